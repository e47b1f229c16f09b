use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

use crate::engine::{Autograd, Engine, Pass};
use crate::error::{Error, Result};
use crate::kernels::op::activation::VectorActivation;
use crate::layers::{Linear, Sinusoids, weights_dtype};
use crate::process::check_timesteps;

/// An embedding of the timestep: sines and cosines at geometrically decreasing frequencies (Vaswani et al. 2017),
/// then Linear, GELU, Linear.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use ddpm::nn::Parameters;
/// use ddpm::TimeEmbedding;
///
/// let parameters = Parameters::new(0, DType::F32, &Device::Cpu);
/// let embedding = TimeEmbedding::new(128, parameters.builder())?;
/// let t = Tensor::new(&[0u32, 500, 999], &Device::Cpu)?;
/// assert_eq!(embedding.forward(&t)?.dims(), [3, 128]);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct TimeEmbedding {
    sinusoids: Sinusoids,
    hidden: Linear,
    activation: VectorActivation,
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
        let vb = vb.pp("mlp");
        Ok(Self {
            sinusoids: Sinusoids::new(dim / 2),
            hidden: Linear::new(dim, 4 * dim, vb.pp("0"))?,
            activation: VectorActivation::Gelu,
            output: Linear::new(4 * dim, dim, vb.pp("2"))?,
            dtype,
        })
    }

    /// Creates an embedding of `output` values, with as many hidden values and with SiLU in place of GELU, from these
    /// sinusoids. The layers are named `linear_1` and `linear_2`.
    ///
    /// # Errors
    /// Returns an error if `output` is not from 1 to 262,144, if the dtype of `vb` is neither f32 nor f64, or if `vb`
    /// cannot supply a weight.
    pub(crate) fn with_silu(sinusoids: Sinusoids, output: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            dtype: weights_dtype(&vb)?,
            hidden: Linear::new(sinusoids.dim(), output, vb.pp("linear_1"))?,
            activation: VectorActivation::Silu,
            output: Linear::new(output, output, vb.pp("linear_2"))?,
            sinusoids,
        })
    }

    /// Computes the embedding (batch, dim) of `t` (batch), which has an integer dtype, f32 or f64. Times between two
    /// timesteps are embedded by the same formula.
    ///
    /// # Errors
    /// Returns an error if `t` is not one-dimensional or of another dtype. On the CPU, returns an error if a timestep
    /// is negative or not finite.
    pub fn forward(&self, t: &Tensor) -> Result<Tensor> {
        let &[batch] = t.dims() else {
            return Err(Error::shape("t", t.dims(), "(batch)"));
        };
        check_timesteps(t, batch, None)?;
        let engine = Autograd::new(Pass { t: Some(t), ..Pass::default() }, self.dtype);
        Ok(self.run(&engine)?.flatten_from(1)?)
    }

    /// Computes the embedding of the timesteps of the engine's pass, a batch of vectors.
    ///
    /// # Errors
    /// Returns the errors of the engine.
    pub fn run<'n, E: Engine<'n>>(&'n self, engine: &E) -> Result<E::Map> {
        let sinusoids = engine.sinusoids(&self.sinusoids)?;
        let hidden = engine.linear(VectorActivation::None, &self.hidden, &sinusoids)?;
        engine.linear(self.activation, &self.output, &hidden)
    }
}

pub(crate) fn check_dim(dim: usize) -> Result<()> {
    if !(4..=1 << 16).contains(&dim) || !dim.is_multiple_of(2) {
        return Err(Error::config("time_dim", dim, "even, and at least 4, at most 65536"));
    }
    Ok(())
}
