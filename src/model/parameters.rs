use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, init::NormalOrUniform};

use super::network::Architecture;
use super::tensor_file::{check_known, read_tensors, weight_of};
use crate::error::{Error, Result, check_float};
use crate::memory::zeros;
use crate::random::{Noise, Purpose, fnv1a};

/// The weights of a network by name, created when the network requests them.
///
/// Initial values depend only on the seed and the name of the weight, not on the order of creation or on other
/// weights.
#[derive(Clone)]
pub struct Parameters {
    store: Arc<Store>,
    dtype: DType,
    device: Device,
}

struct Store {
    source: Source,
    trainable: bool,
    created: Mutex<BTreeMap<String, Var>>,
    /// The first error, stored because a backend of candle can only return candle's errors.
    failure: Mutex<Option<Error>>,
}

enum Source {
    Random(Noise),
    /// Tensors read from this file.
    Given(PathBuf, BTreeMap<String, Tensor>),
}

impl fmt::Debug for Parameters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parameters")
            .field("dtype", &self.dtype)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Parameters {
    /// Creates trainable weights with random initial values, in the distributions that the layers request.
    /// [`Trainer`] uses f32. The crate's own layers support f32 and f64.
    ///
    /// [`Trainer`]: crate::Trainer
    pub fn new(seed: u64, dtype: DType, device: &Device) -> Self {
        Self::from_source(Source::Random(Noise::new(seed)), true, dtype, device)
    }

    /// Reads the weights of a file: a safetensors file, or a file that PyTorch's `torch.save` wrote. They take no
    /// gradients.
    ///
    /// The content of the file decides its format. A file of PyTorch is read without running code: it holds a state
    /// dict, or dictionaries of which [`load_part`](Self::load_part) reads one. Tensors of integers in such a file,
    /// such as counters of batches, are left out.
    ///
    /// ```no_run
    /// use candle_core::{DType, Device};
    /// use ddpm::nn::Parameters;
    /// use ddpm::UNetConfig;
    ///
    /// let weights = Parameters::load("weights.safetensors", DType::F32, &Device::Cpu)?;
    /// let unet = weights.build(&UNetConfig::mnist())?;
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or if it is not a complete file of floating-point tensors. Returns
    /// an error if a value is infinite or NaN, or would be infinite in `dtype`. Returns an error that names the
    /// function if a file of PyTorch needs one to be called that the format of state dicts does not have.
    pub fn load(path: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        Self::load_part(path, "", dtype, device)
    }

    /// Reads those weights of a file whose names begin with `prefix`, as [`load`](Self::load) does. The network
    /// requests them by their names without the prefix. The name of a weight in nested dictionaries consists of all
    /// keys, with dots between them.
    ///
    /// ```no_run
    /// use candle_core::{DType, Device};
    /// use ddpm::nn::Parameters;
    ///
    /// // The averaged weights in a file of the trainer of denoising-diffusion-pytorch.
    /// let prefix = "ema.ema_model.model.";
    /// let weights = Parameters::load_part("model-1.pt", prefix, DType::F32, &Device::Cpu)?;
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns the errors of [`load`](Self::load). Other parts of the file may be damaged, or need any function.
    pub fn load_part(
        path: impl AsRef<Path>,
        prefix: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let path = path.as_ref();
        Ok(Self::frozen(path, read_tensors(path, prefix, dtype, device)?, dtype, device))
    }

    /// Creates trainable weights with the values of `tensors`, which were read from `path`.
    pub(crate) fn trainable(
        path: &Path,
        tensors: BTreeMap<String, Tensor>,
        dtype: DType,
        device: &Device,
    ) -> Self {
        Self::from_source(Source::Given(path.to_owned(), tensors), true, dtype, device)
    }

    /// Creates weights that take no gradients, with the values of `tensors`, which were read from `path`.
    pub(crate) fn frozen(
        path: &Path,
        tensors: BTreeMap<String, Tensor>,
        dtype: DType,
        device: &Device,
    ) -> Self {
        Self::from_source(Source::Given(path.to_owned(), tensors), false, dtype, device)
    }

    fn from_source(source: Source, trainable: bool, dtype: DType, device: &Device) -> Self {
        let (created, failure) = (Mutex::default(), Mutex::default());
        let store = Arc::new(Store { source, trainable, created, failure });
        Self { store, dtype, device: device.clone() }
    }

    /// The builder from which a network takes its weights. A second request for a name returns the same weight, and
    /// is an error if the shape differs.
    pub fn builder(&self) -> VarBuilder<'static> {
        let backend = Box::new(Backend(self.store.clone()));
        VarBuilder::from_backend(backend, self.dtype, self.device.clone())
    }

    /// The weights created so far, in the order of their names.
    ///
    /// Weights that were loaded for inference must not be changed. A network may have copies of them in another layout,
    /// which it makes once.
    pub fn vars(&self) -> BTreeMap<String, Var> {
        lock(&self.store.created).clone()
    }

    /// Builds a network with these weights.
    ///
    /// # Errors
    /// Returns the errors of [`Architecture::build`]. For weights from a file, returns an error if one is missing, has
    /// another shape, or is not a weight of the network.
    pub fn build<N: Architecture>(&self, network: &N) -> Result<N::Model> {
        let model = network.build(self.builder());
        if let Some(failure) = lock(&self.store.failure).take() {
            return Err(failure);
        }
        let model = model?;
        if let Source::Given(path, tensors) = &self.store.source {
            check_known(path, tensors, &lock(&self.store.created))?;
        }
        Ok(model)
    }
}

/// Locks the map. A panic in another thread that held the lock leaves the map valid.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Backend(Arc<Store>);

impl Backend {
    fn create(
        &self,
        shape: &Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Var> {
        check_float("dtype of the weights", dtype)?;
        let tensor = match &self.0.source {
            Source::Random(noise) => initial(*noise, name, shape, init)?,
            Source::Given(path, tensors) => weight_of(path, tensors, name, shape.dims())?.clone(),
        };
        // `from_tensor` copies, so that no network shares weights that another one trains.
        Ok(Var::from_tensor(&tensor.to_dtype(dtype)?.to_device(device)?)?)
    }
}

impl SimpleBackend for Backend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let mut created = lock(&self.0.created);
        let var = match created.get(name) {
            Some(var) => var.clone(),
            None => match self.create(&shape, name, init, dtype, device) {
                Ok(var) => {
                    created.insert(name.to_string(), var.clone());
                    var
                }
                Err(error) => {
                    let message = error.to_string();
                    lock(&self.0.failure).get_or_insert(error);
                    candle_core::bail!("{message}")
                }
            },
        };
        if var.shape() != &shape {
            candle_core::bail!("weight {name} is asked for as {:?} and {shape:?}", var.shape())
        }
        Ok(if self.0.trainable { var.as_tensor().clone() } else { var.as_detached_tensor() })
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        match lock(&self.0.created).get(name) {
            Some(var) => Ok(var.as_tensor().clone()),
            None => candle_core::bail!("weight {name} has no shape yet: ask for it with one"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        match &self.0.source {
            Source::Random(_) => lock(&self.0.created).contains_key(name),
            Source::Given(_, tensors) => tensors.contains_key(name),
        }
    }
}

/// Computes the initial value of a weight, on the CPU.
///
/// # Errors
/// Returns an error if there is not enough memory for a weight of this shape.
fn initial(noise: Noise, name: &str, shape: &Shape, init: Init) -> Result<Tensor> {
    let hash = fnv1a(name.as_bytes());
    let mut stream = noise.stream(Purpose::Weights, hash, (hash >> 40) as u32);
    let mut values = zeros("weight", shape.dims()).map_err(|_| {
        let value = format!("{name} of shape {:?}", shape.dims());
        Error::config("weight", value, "small enough for the available memory")
    })?;
    let mut uniform = |values: &mut [f32], lo: f64, up: f64| {
        values.iter_mut().for_each(|v| *v = (lo + (up - lo) * stream.uniform()) as f32);
    };
    match init {
        Init::Const(c) => values.fill(c as f32),
        Init::Uniform { lo, up } => uniform(&mut values, lo, up),
        Init::Randn { mean, stdev } => {
            stream.fill_normal(&mut values);
            values.iter_mut().for_each(|v| *v = (mean + stdev * f64::from(*v)) as f32);
        }
        Init::Kaiming { dist, fan, non_linearity } => {
            let std = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
            match dist {
                NormalOrUniform::Uniform => {
                    let bound = 3f64.sqrt() * std;
                    uniform(&mut values, -bound, bound);
                }
                NormalOrUniform::Normal => {
                    stream.fill_normal(&mut values);
                    values.iter_mut().for_each(|v| *v = (std * f64::from(*v)) as f32);
                }
            }
        }
    }
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}
