//! Both networks agree with PyTorch: they have the outputs and gradients of tests/data/pytorch for its weights.

use std::collections::HashMap;
use std::path::Path;

use burn::module::{ModuleVisitor, Param};
use burn::nn::loss::{MseLoss, Reduction};
use burn::optim::GradientsParams;
use burn::store::{ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore};
use burn::tensor::{Device, TensorData};
use candle_core::{DType, Tensor, Var};
use candle_nn::{VarBuilder, loss};
use safetensors::SafeTensors;

use crate::{Config, burn::UNet as BurnUNet, candle::UNet as CandleUNet};

/// The allowed difference: of outputs, and of gradients relative to the largest of their tensor.
const TOLERANCE: f32 = 1e-4;
/// The allowed absolute difference of gradients whose exact value is 0.
const ROUNDING: f32 = 1e-6;

#[test]
fn candle_agrees() {
    for fixture in Fixture::all() {
        let variables: HashMap<_, _> = fixture
            .part("weights.")
            .map(|(name, w)| (name, Var::from_tensor(w).unwrap()))
            .collect();
        let weights =
            variables.iter().map(|(name, v)| (name.clone(), v.as_tensor().clone())).collect();
        let weights = VarBuilder::from_tensors(weights, DType::F32, &candle_core::Device::Cpu);
        let unet = CandleUNet::new(&fixture.config, weights).unwrap();
        let out = unet.forward(&fixture.tensors["x"], &fixture.timesteps()).unwrap();
        close(
            &format!("{}: out", fixture.name),
            &values(&out),
            &values(&fixture.tensors["out"]),
            1.0,
        );
        let mut gradients = loss::mse(&out, &fixture.tensors["eps"]).unwrap().backward().unwrap();
        for (name, expected) in fixture.part("grad.") {
            let gradient = gradients
                .remove(&variables[&name])
                .unwrap_or_else(|| panic!("{name}: no gradient"));
            close_gradient(
                &format!("{}: {name}", fixture.name),
                &values(&gradient),
                &values(expected),
            );
        }
    }
}

#[test]
fn burn_agrees() {
    let device = Device::flex().autodiff();
    for fixture in Fixture::all() {
        let tensor = |name: &str| {
            let tensor = &fixture.tensors[name];
            burn::tensor::Tensor::<4>::from_data(
                TensorData::new(values(tensor), tensor.dims()),
                &device,
            )
        };
        let mut unet = BurnUNet::new(&fixture.config, &device);
        fixture.load_burn(&mut unet, "weights.");
        let out = unet.forward(tensor("x"), &fixture.timesteps());
        let computed = out.to_data().try_to_vec().unwrap();
        close(&format!("{}: out", fixture.name), &computed, &values(&fixture.tensors["out"]), 1.0);
        let loss = MseLoss::new().forward(out, tensor("eps"), Reduction::Mean);
        let gradients = GradientsParams::from_grads(loss.backward(), &unet);
        // A network whose weights are the expected gradients has them by the same keys.
        let mut expected = unet;
        fixture.load_burn(&mut expected, "grad.");
        burn::module::Module::visit(
            &expected,
            &mut Gradients { fixture: &fixture.name, gradients },
        );
    }
}

/// Compares the gradients of a network with the expected gradients, which are the weights of the visited network.
struct Gradients<'a> {
    fixture: &'a str,
    gradients: GradientsParams,
}

impl ModuleVisitor for Gradients<'_> {
    fn visit_float<const D: usize>(&mut self, expected: &Param<burn::tensor::Tensor<D>>) {
        let gradient = self.gradients.remove::<D>(expected.id).expect("a gradient of every weight");
        let name = format!("{}: a gradient of shape {:?}", self.fixture, gradient.dims());
        let [computed, expected] =
            [gradient, expected.val()].map(|t| t.into_data().try_to_vec().unwrap());
        close_gradient(&name, &computed, &expected);
    }
}

/// The outputs and gradients that PyTorch computed with a network.
struct Fixture {
    name: String,
    config: Config,
    tensors: HashMap<String, Tensor>,
}

impl Fixture {
    fn all() -> Vec<Self> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/data/pytorch");
        let fixtures: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| Self::read(&entry.unwrap().path()))
            .collect();
        assert!(!fixtures.is_empty());
        fixtures
    }

    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        Self {
            name: path.file_name().unwrap().to_string_lossy().into_owned(),
            config: serde_json::from_str(&metadata.metadata().as_ref().unwrap()["config"]).unwrap(),
            tensors: candle_core::safetensors::load_buffer(&bytes, &candle_core::Device::Cpu)
                .unwrap(),
        }
    }

    fn timesteps(&self) -> Vec<u32> {
        self.tensors["t"].to_dtype(DType::U32).unwrap().to_vec1().unwrap()
    }

    /// Returns the tensors whose names begin with `prefix`, with the rest of their names.
    fn part(&self, prefix: &str) -> impl Iterator<Item = (String, &Tensor)> {
        self.tensors
            .iter()
            .filter_map(move |(name, t)| Some((name.strip_prefix(prefix)?.to_owned(), t)))
    }

    /// Replaces the weights of burn's network by these tensors.
    fn load_burn(&self, unet: &mut BurnUNet, prefix: &str) {
        let bytes = safetensors::serialize(self.part(prefix), None).unwrap();
        let mut store =
            SafetensorsStore::from_bytes(Some(bytes)).with_from_adapter(PyTorchToBurnAdapter);
        // PyTorch numbers the modules of a sequence, also those without weights.
        for (pattern, name) in [
            (r"(block\d)\.0\.", "$1.norm."),
            (r"(block\d)\.2\.", "$1.conv."),
            (r"time_emb\.1\.", "time_emb."),
            (r"time_mlp\.mlp\.0\.", "time_mlp.0."),
            (r"time_mlp\.mlp\.2\.", "time_mlp.1."),
            (r"out_(norm|conv)\.", "out.$1."),
        ] {
            store = store.with_key_remapping(pattern, name);
        }
        let result = unet.load_from(&mut store).unwrap();
        assert!(result.is_success() && result.unused.is_empty(), "{result}");
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn close_gradient(name: &str, computed: &[f32], expected: &[f32]) {
    let largest = expected.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    close(name, computed, expected, largest.max(ROUNDING / TOLERANCE));
}

fn close(name: &str, computed: &[f32], expected: &[f32], scale: f32) {
    assert_eq!(computed.len(), expected.len(), "{name}");
    let error = computed.iter().zip(expected).fold(0f32, |error, (a, b)| error.max((a - b).abs()));
    assert!(error <= TOLERANCE * scale, "{name}: {error} of {scale}");
}
