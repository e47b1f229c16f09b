use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::Seek;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::files;
use crate::model::tensor_file::{check_known, open_regular, read_tensors_of, weight_of};

/// Reads the weights of an extractor, in f32, from a safetensors file or a file of PyTorch. Returns them and the
/// SHA-256 of the file. Both are of the same bytes, even if another program replaces the file.
pub(super) fn load(path: &Path, device: &Device) -> Result<(BTreeMap<String, Tensor>, String)> {
    let (mut file, _) = open_regular(path)?;
    let sha256 = files::sha256(&file).map_err(Error::io(path))?;
    file.rewind().map_err(Error::io(path))?;
    Ok((read_tensors_of(path, file, "", DType::F32, device)?, sha256))
}

/// The `eps` of the batch normalisations of TensorFlow's image networks.
const EPS: f64 = 1e-3;

/// The weights of a file, by name, for a network that takes all of them.
pub(super) struct Weights<'a> {
    path: &'a Path,
    tensors: &'a BTreeMap<String, Tensor>,
    /// The names that belong to the network.
    known: RefCell<BTreeMap<String, ()>>,
}

impl<'a> Weights<'a> {
    pub(super) fn new(path: &'a Path, tensors: &'a BTreeMap<String, Tensor>) -> Self {
        Self { path, tensors, known: RefCell::default() }
    }

    /// The values of a weight of this shape.
    ///
    /// # Errors
    /// Returns an error if the weight is missing or has another shape.
    pub(super) fn values(&self, name: impl Into<String>, shape: &[usize]) -> Result<Vec<f32>> {
        let name = name.into();
        let tensor = weight_of(self.path, self.tensors, &name, shape)?;
        self.known.borrow_mut().insert(name, ());
        Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    /// The weight of the convolution `layer`, (out, in, height, width), and the bias (out), both with the batch
    /// normalisation `norm` that follows it. With its fixed statistics, the normalisation is a factor and a shift of
    /// each channel.
    ///
    /// # Errors
    /// Returns an error if a weight is missing or has another shape, if a variance plus [`EPS`] is not positive, or if
    /// a weight or bias is then not finite.
    pub(super) fn normalized(
        &self,
        layer: &str,
        norm: &str,
        dims: [usize; 4],
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let mut weight = self.values(format!("{layer}.weight"), &dims)?;
        let of = |part: &str| self.values(format!("{norm}.{part}"), &dims[..1]);
        let [factor, bias, mean, variance] =
            [of("weight")?, of("bias")?, of("running_mean")?, of("running_var")?];
        self.allow(format!("{norm}.num_batches_tracked"));
        if let Some(variance) = variance.iter().find(|v| f64::from(**v) + EPS <= 0.0) {
            let reason = format!("{norm}.running_var has {variance}; it must be above -{EPS}");
            return Err(Error::data(self.path, reason));
        }
        let mut shift = vec![0f32; dims[0]];
        for (o, weight) in weight.chunks_exact_mut(dims[1..].iter().product()).enumerate() {
            let factor = f64::from(factor[o]) / (f64::from(variance[o]) + EPS).sqrt();
            weight.iter_mut().for_each(|weight| *weight = (f64::from(*weight) * factor) as f32);
            shift[o] = (f64::from(bias[o]) - f64::from(mean[o]) * factor) as f32;
        }
        self.check_finite(&format!("{layer}.weight, times the factor of {norm}"), &weight)?;
        self.check_finite(&format!("{norm}.bias, minus the scaled {norm}.running_mean"), &shift)?;
        Ok((weight, shift))
    }

    /// Allows a weight that the network does not need.
    pub(super) fn allow(&self, name: impl Into<String>) {
        self.known.borrow_mut().insert(name.into(), ());
    }

    fn check_finite(&self, what: &str, values: &[f32]) -> Result<()> {
        match values.iter().find(|value| !value.is_finite()) {
            Some(value) => {
                Err(Error::data(self.path, format!("{what} has {value}; it must be finite")))
            }
            None => Ok(()),
        }
    }

    /// # Errors
    /// Returns an error if the file has a tensor that is not one of the network.
    pub(super) fn check_known(&self) -> Result<()> {
        check_known(self.path, self.tensors, &self.known.borrow())
    }
}
