use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, init::NormalOrUniform};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::{Serialize, de::DeserializeOwned};

use crate::error::in_short;
use crate::random::{Noise, Purpose, zeros};
use crate::{Denoiser, Error, Precision, Result};

/// The configuration of a network. A checkpoint stores it, and builds the network from it.
///
/// [`UNetConfig`](crate::UNetConfig) implements this trait, and so does the configuration of your own network:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Conv2d, Conv2dConfig, Linear, Module, VarBuilder, conv2d, linear};
/// use ddpm::{Denoiser, Network, Parameters, Result, TimeEmbedding};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// struct SmallConfig {
///     channels: usize,
/// }
///
/// struct Small {
///     embedding: TimeEmbedding,
///     time: Linear,
///     convolution: Conv2d,
/// }
///
/// impl Network for SmallConfig {
///     const KIND: &'static str = "small";
///     type Model = Small;
///
///     fn build(&self, vb: VarBuilder) -> Result<Small> {
///         let channels = self.channels;
///         let same_size = Conv2dConfig { padding: 1, ..Default::default() };
///         Ok(Small {
///             embedding: TimeEmbedding::new(16, vb.pp("embedding"))?,
///             time: linear(16, channels, vb.pp("time"))?,
///             convolution: conv2d(channels, channels, 3, same_size, vb.pp("convolution"))?,
///         })
///     }
/// }
///
/// impl Denoiser for Small {
///     fn forward(&self, x_t: &Tensor, t: &Tensor) -> Result<Tensor> {
///         let time = self.time.forward(&self.embedding.forward(t)?)?; // (batch, channels)
///         let x_t = x_t.broadcast_add(&time.unsqueeze(2)?.unsqueeze(3)?)?;
///         Ok(self.convolution.forward(&x_t)?)
///     }
/// }
///
/// # fn main() -> Result<()> {
/// let weights = Parameters::new(0, DType::F32, &Device::Cpu);
/// let small = weights.build(&SmallConfig { channels: 3 })?;
/// let x_t = Tensor::zeros((2, 3, 8, 8), DType::F32, &Device::Cpu)?;
/// let output = small.forward(&x_t, &Tensor::new(&[0u32, 999], &Device::Cpu)?)?;
/// assert_eq!(output.dims(), x_t.dims());
/// assert!(weights.vars().contains_key("convolution.weight"));
/// # Ok(())
/// # }
/// ```
pub trait Network: Serialize + DeserializeOwned {
    /// The name of this kind of network in a checkpoint. A checkpoint with another name is refused.
    const KIND: &'static str;

    /// The type of the network.
    type Model: Denoiser;

    /// Builds the network. It takes each weight from `vb`, under its own name.
    ///
    /// This is called once for training, and again for other weights in the same network, such as the averaged
    /// weights. The same configuration must therefore always request the same names and shapes.
    ///
    /// # Errors
    /// Returns an error if the configuration is not valid, or if `vb` cannot supply a weight.
    fn build(&self, vb: VarBuilder) -> Result<Self::Model>;

    /// Sets the precision of the model's products. The default ignores `Highest` and `High`, and refuses half
    /// precision.
    ///
    /// # Errors
    /// Returns an error if the model does not support the precision.
    fn with_precision(model: Self::Model, precision: Precision) -> Result<Self::Model> {
        match precision {
            Precision::Highest | Precision::High => Ok(model),
            Precision::BF16 | Precision::F16 => {
                let expected = format!("highest or high with a network of kind {}", Self::KIND);
                Err(Error::config("precision", precision, expected))
            }
        }
    }
}

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

    /// Reads the weights of a safetensors file, from a checkpoint or from PyTorch. They take no gradients.
    ///
    /// ```no_run
    /// use candle_core::{DType, Device};
    /// use ddpm::{Parameters, UNet, UNetConfig};
    ///
    /// let weights = Parameters::load("weights.safetensors", DType::F32, &Device::Cpu)?;
    /// let unet: UNet = weights.build(&UNetConfig::mnist())?;
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or if it is not a complete safetensors file of floating-point
    /// tensors. Returns an error if a value is infinite or NaN, or would be infinite in `dtype`.
    pub fn load(path: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        Ok(Self::frozen(path, read_tensors(path, dtype, device)?, dtype, device))
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
    pub fn vars(&self) -> BTreeMap<String, Var> {
        lock(&self.store.created).clone()
    }

    /// Builds a network with these weights.
    ///
    /// # Errors
    /// Returns the errors of [`Network::build`]. For weights from a file, returns an error if one is missing, has
    /// another shape, or is not a weight of the network.
    pub fn build<N: Network>(&self, network: &N) -> Result<N::Model> {
        let model = network.build(self.builder());
        if let Some(failure) = lock(&self.store.failure).take() {
            return Err(failure);
        }
        let model = model?;
        if let Source::Given(path, tensors) = &self.store.source {
            let created = lock(&self.store.created);
            if let Some(name) = tensors.keys().find(|name| !created.contains_key(*name)) {
                return Err(Error::UnknownWeight { path: path.clone(), name: name.clone() });
            }
        }
        Ok(model)
    }
}

/// Reads a safetensors file: see [`tensors_of`].
fn read_tensors(path: &Path, dtype: DType, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    tensors_of(path, &read_regular(path)?, dtype, device)
}

/// Reads a file.
pub(crate) fn read_regular(path: &Path) -> Result<Vec<u8>> {
    let (mut file, _) = open_regular(path)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(Error::io(path))?;
    Ok(bytes)
}

/// Opens a regular file. Returns it and its length.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    // Checked before opening, because a pipe would wait for its writer, and a device may have no end.
    let metadata = path.metadata().map_err(Error::io(path))?;
    if !metadata.is_file() {
        let reason = std::io::Error::new(ErrorKind::InvalidInput, "not a regular file");
        return Err(Error::io(path)(reason));
    }
    Ok((File::open(path).map_err(Error::io(path))?, metadata.len()))
}

/// Reads the tensors from the content of a safetensors file. The content must be complete, and all tensors must be
/// floating-point tensors with values that are finite, also in `dtype`. The tensors keep the dtypes of the file.
pub(crate) fn tensors_of(
    path: &Path,
    bytes: &[u8],
    dtype: DType,
    device: &Device,
) -> Result<BTreeMap<String, Tensor>> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| not_safetensors(path, bytes, e))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let damaged = |reason: String| Error::damaged(path, format!("{} {reason}", in_short(name)));
        if !matches!(view.dtype(), Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64) {
            let expected = "it must be F16, BF16, F32 or F64";
            return Err(damaged(format!("is of dtype {}; {expected}", view.dtype())));
        }
        if let Some(reason) = not_finite(&view, dtype) {
            return Err(damaged(reason));
        }
        let tensor = view
            .load(device)
            .map_err(|e| damaged(format!("cannot be loaded: {}", Error::from(e))))?;
        tensors.insert(name.to_string(), tensor);
    }
    Ok(tensors)
}

/// The error for a weight that is missing from `tensors`, which were read from `path`. It names a weight among them
/// whose name differs only by a prefix, such as wrappers of a network put before all names.
pub(crate) fn missing(path: &Path, name: &str, tensors: &BTreeMap<String, Tensor>) -> Error {
    let prefixed = |long: &str, short: &str| {
        long.strip_suffix(short).is_some_and(|prefix| prefix.ends_with('.'))
    };
    let similar = tensors.keys().find(|found| prefixed(found, name) || prefixed(name, found));
    Error::MissingWeight { path: path.to_owned(), name: name.into(), similar: similar.cloned() }
}

/// The reason given for a file that is not a safetensors file.
fn not_safetensors(path: &Path, bytes: &[u8], error: SafeTensorError) -> Error {
    // A zip archive, or a pickle of protocol 2 to 5.
    if bytes.starts_with(b"PK\x03\x04") || matches!(bytes, [0x80, 2..=5, ..]) {
        let reason = "a file of PyTorch's own format (a pickle), not of safetensors; convert it in Python: \
                      `safetensors.torch.save_file(model.state_dict(), \"weights.safetensors\")`";
        return Error::data(path, reason);
    }
    let reason = format!("{error}; is it truncated? It has {} bytes", bytes.len());
    Error::damaged(path, reason)
}

/// Describes the values of a tensor that are not finite, or would not be finite in `dtype`.
///
/// Without the sign bit, the bits of floating-point numbers are in the order of their magnitudes: infinity follows
/// all finite numbers, and NaN follows infinity.
fn not_finite(view: &TensorView<'_>, dtype: DType) -> Option<String> {
    // The smallest magnitude that is infinite in `dtype`: half a unit beyond its largest number.
    let least = match dtype {
        DType::F16 => 65520.0,
        DType::BF16 => f64::from(f32::from_bits(0x7f7f_8000)),
        DType::F32 => f64::from_bits(0x47ef_ffff_f000_0000),
        _ => f64::INFINITY,
    };
    // The smallest bits of each type with such a magnitude. In f16 only infinity is as large.
    let single = (least as f32).to_bits();
    let found = match view.dtype() {
        Dtype::F16 => find(view, |v| u16::from_le_bytes(v) & 0x7fff, 0x7c00, 0x7c00),
        Dtype::BF16 => {
            let least = single.div_ceil(1 << 16) as u16;
            find(view, |v| u16::from_le_bytes(v) & 0x7fff, least, 0x7f80)
        }
        Dtype::F32 => find(view, |v| u32::from_le_bytes(v) & !(1 << 31), single, 0x7f80_0000),
        _ => {
            let infinity = f64::INFINITY.to_bits();
            find(view, |v| u64::from_le_bytes(v) & !(1 << 63), least.to_bits(), infinity)
        }
    };
    let (count, index, order) = found?;
    let kind = match order {
        Ordering::Less => format!("too large for {}", dtype.as_str()),
        Ordering::Equal => "infinite".into(),
        Ordering::Greater => "NaN".into(),
    };
    let total = view.shape().iter().product::<usize>();
    Some(format!(
        "is not finite: {count} of {total} values, the first at index {index}, which is {kind}"
    ))
}

/// Returns the number of magnitudes in a tensor that are `least` or more, the index of the first, and its comparison
/// with infinity.
fn find<const BYTES: usize, B: Ord + Copy>(
    view: &TensorView<'_>,
    magnitude: impl Fn([u8; BYTES]) -> B,
    least: B,
    infinity: B,
) -> Option<(usize, usize, Ordering)> {
    let (values, _) = view.data().as_chunks();
    // Counted first, without a branch per value, because the number is nearly always 0.
    let count = values.iter().filter(|&&value| magnitude(value) >= least).count();
    let first = values.iter().position(|&value| count > 0 && magnitude(value) >= least)?;
    Some((count, first, magnitude(values[first]).cmp(&infinity)))
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
        if !dtype.is_float() {
            return Err(Error::config(
                "dtype of the weights",
                dtype.as_str(),
                "a floating-point dtype",
            ));
        }
        let tensor = match &self.0.source {
            Source::Random(noise) => initial(*noise, name, shape, init)?,
            Source::Given(path, tensors) => {
                let Some(tensor) = tensors.get(name) else {
                    return Err(missing(path, name, tensors));
                };
                if tensor.shape() != shape {
                    return Err(Error::WeightShape {
                        path: path.clone(),
                        name: name.into(),
                        found: tensor.dims().to_vec(),
                        expected: shape.dims().to_vec(),
                    });
                }
                tensor.clone()
            }
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
    let hash = fnv1a(name);
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

/// A hash that is the same in every version and on every machine, unlike that of the standard library.
fn fnv1a(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}
