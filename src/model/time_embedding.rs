use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

use super::weights_dtype;
use crate::engine::Linear;
use crate::engine::{Autograd, Engine, VectorActivation};
use crate::process::check_timesteps;
use crate::{Error, Result};

/// An embedding of the timestep: sines and cosines at geometrically decreasing frequencies (Vaswani et al. 2017),
/// then Linear, GELU, Linear.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use ddpm::{Parameters, TimeEmbedding};
///
/// let parameters = Parameters::new(0, DType::F32, &Device::Cpu);
/// let embedding = TimeEmbedding::new(128, parameters.builder())?;
/// let t = Tensor::new(&[0u32, 500, 999], &Device::Cpu)?;
/// assert_eq!(embedding.forward(&t)?.dims(), [3, 128]);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct TimeEmbedding {
    frequencies: Vec<f64>,
    hidden: Linear,
    output: Linear,
    dtype: DType,
}

impl TimeEmbedding {
    /// Creates an embedding of `dim` values, with `4 dim` hidden values.
    ///
    /// # Errors
    /// Returns an error if `dim` is odd or less than 4, if the dtype of `vb` is neither f32 nor f64, or if `vb` cannot
    /// supply a weight.
    pub fn new(dim: usize, vb: VarBuilder) -> Result<Self> {
        check_dim(dim)?;
        let dtype = weights_dtype(&vb)?;
        let half = dim / 2;
        let decay = decay(half);
        let vb = vb.pp("mlp");
        Ok(Self {
            frequencies: (0..half).map(|i| libm::exp(-decay * i as f64)).collect(),
            hidden: Linear::new(dim, 4 * dim, vb.pp("0"))?,
            output: Linear::new(4 * dim, dim, vb.pp("2"))?,
            dtype,
        })
    }

    /// Computes the embedding (batch, dim) of `t` (batch), which has an integer dtype.
    ///
    /// # Errors
    /// Returns an error if `t` is not one-dimensional or not of an integer dtype. On the CPU, returns an error if a
    /// timestep is negative.
    pub fn forward(&self, t: &Tensor) -> Result<Tensor> {
        let &[batch] = t.dims() else {
            let expected = "(batch)".to_string();
            return Err(Error::Shape { what: "t", found: t.dims().to_vec(), expected });
        };
        check_timesteps(t, batch, None)?;
        let embedding = self.sinusoids(t)?.unsqueeze(1)?.unsqueeze(1)?;
        Ok(self.run(&Autograd, &embedding)?.flatten_from(1)?)
    }

    pub(crate) fn dim(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// The k-th frequency is `exp(-decay * k)`.
    #[cfg(feature = "cuda")]
    pub(crate) fn decay(&self) -> f64 {
        decay(self.frequencies.len())
    }

    /// Computes [`forward`](Self::forward) from the [`sinusoids`](Self::sinusoids).
    pub(crate) fn run<'n, E: Engine<'n>>(
        &'n self,
        engine: &E,
        embedding: &E::Map,
    ) -> Result<E::Map> {
        let hidden = engine.linear(VectorActivation::None, &self.hidden, embedding)?;
        engine.linear(VectorActivation::Gelu, &self.output, &hidden)
    }

    /// Computes `[sin | cos]` of `t` times each frequency: (batch, dim), in the dtype of the weights. `t` must have
    /// been [checked](check_timesteps).
    pub(crate) fn sinusoids(&self, t: &Tensor) -> Result<Tensor> {
        // In half precision the phase would be wrong by 0.1 rad. Metal has no f64, not even to cast from.
        let dtype = if t.device().is_metal() { DType::F32 } else { DType::F64 };
        let frequencies = Tensor::new(self.frequencies.as_slice(), &Device::Cpu)?
            .to_dtype(dtype)?
            .to_device(t.device())?;
        let angles = t.to_dtype(dtype)?.unsqueeze(1)?.broadcast_mul(&frequencies.unsqueeze(0)?)?;
        Ok(Tensor::cat(&[angles.sin()?, angles.cos()?], 1)?.to_dtype(self.dtype)?)
    }
}

/// The decay for `half` frequencies. With Ho's divisor, the last frequency is exactly 1 / 10000.
fn decay(half: usize) -> f64 {
    libm::log(10000.0) / (half - 1) as f64
}

pub(crate) fn check_dim(dim: usize) -> Result<()> {
    if !(4..=1 << 16).contains(&dim) || !dim.is_multiple_of(2) {
        return Err(Error::config("time_dim", dim, "even, and at least 4, at most 65536"));
    }
    Ok(())
}
