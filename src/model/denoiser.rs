use std::sync::Arc;

use candle_core::Tensor;
use candle_core::backprop::GradStore;

use crate::{Dropout, Result};

/// A network that predicts the noise added to an image, or another [`Prediction`](crate::Prediction) of the process.
/// This trait is the interface of a network to training and sampling.
///
/// Only [`forward`](Self::forward) is required. The other methods are for networks that have dropout, or a faster
/// method than candle's to compute gradients.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ddpm::{Denoiser, Diffusion, NoiseSchedule, Prediction, Result, Sampler, Solver};
///
/// /// Always predicts the same even grey.
/// struct Grey(f64);
///
/// impl Denoiser for Grey {
///     fn forward(&self, x_t: &Tensor, _t: &Tensor) -> Result<Tensor> {
///         Ok((x_t.zeros_like()? + self.0)?)
///     }
/// }
///
/// // It predicts the image instead of the noise.
/// let diffusion = Diffusion::new(NoiseSchedule::cosine(1000)?, Prediction::Sample);
/// let sampler = Sampler::new(&diffusion, Solver::ddim(), 10)?;
/// let image = sampler.sample(&Grey(0.25), (1, 1, 2, 2), 0, &Device::Cpu)?;
/// for pixel in image.flatten_all()?.to_vec1::<f32>()? {
///     assert!((pixel - 0.25).abs() < 1e-5);
/// }
/// # Ok::<(), ddpm::Error>(())
/// ```
///
/// [`from_fn`] makes a `Denoiser` of a closure `|x_t: &Tensor, t: &Tensor| ...`. References, `Box`es and `Arc`s of a
/// `Denoiser` also implement the trait, for example `Box<dyn Denoiser>`.
pub trait Denoiser {
    /// Computes the prediction for a batch `x_t` (batch, channels, height, width), in the shape of `x_t`. `t` (batch)
    /// has an integer dtype and holds timesteps of the full schedule.
    ///
    /// Networks such as [`UNet`](crate::UNet) use rayon. If you call this from a rayon thread, that thread may run
    /// unrelated jobs while it waits. Do not hold a lock across the call that such a job might take.
    ///
    /// # Errors
    /// Returns the errors of the network. [`Error::external`](crate::Error::external) wraps errors of other
    /// libraries.
    fn forward(&self, x_t: &Tensor, t: &Tensor) -> Result<Tensor>;

    /// Computes the prediction during training. Networks with dropout draw their masks from `dropout`. Shapes and
    /// errors are those of [`forward`](Self::forward). The default calls `forward`.
    fn forward_train(&self, x_t: &Tensor, t: &Tensor, dropout: &Dropout) -> Result<Tensor> {
        let _ = dropout;
        self.forward(x_t, t)
    }

    /// Computes the gradients of all weights in one training pass.
    ///
    /// Calls `d_output` once with the detached output of [`forward_train`](Self::forward_train). `d_output` returns
    /// the gradient of the loss with respect to this output, in the same shape. It may run on another of the threads
    /// that share the work, so it must not wait for other threads, or hold a lock across tensor operations.
    ///
    /// The default uses candle's gradients. A network with a faster method implements this, as
    /// [`UNet`](crate::UNet) does for the CPU and for CUDA devices.
    ///
    /// # Errors
    /// Returns the errors of the network and of `d_output`.
    fn forward_backward(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        dropout: &Dropout,
        d_output: &mut (dyn FnMut(&Tensor) -> Result<Tensor> + Send),
    ) -> Result<GradStore> {
        backward_by_autograd(self, x_t, t, dropout, d_output)
    }

    /// Returns whether a training loop may capture [`forward_backward`](Self::forward_backward) as a CUDA graph.
    ///
    /// This is allowed if the method launches the same work for every batch of the shape of `x_t`. Its kernels must
    /// read values that change from the device, and the method must not copy data to or from the device. The default
    /// is `false`.
    fn is_repeatable(&self, x_t: &Tensor) -> bool {
        let _ = x_t;
        false
    }

    /// Returns whether the weight of this name may lack a gradient, because it stays constant or because not every
    /// batch uses it.
    ///
    /// If any other weight has no gradient in the first update, [`Trainer`](crate::Trainer) returns an error. The
    /// reason is that some operations of candle, such as `candle_nn::LayerNorm`, have no gradient and report no
    /// error. The default is `false`.
    fn may_lack_gradient(&self, name: &str) -> bool {
        let _ = name;
        false
    }

    /// Takes back gradients of [`forward_backward`](Self::forward_backward) that are no longer needed.
    ///
    /// The next gradients may reuse their memory, which changes these tensors and all that share their values. A
    /// training loop calls this after its update, so that the system need not clear new memory. The default does
    /// nothing.
    fn recycle(&self, gradients: Vec<Tensor>) {
        let _ = gradients;
    }
}

/// The default of [`Denoiser::forward_backward`].
pub(crate) fn backward_by_autograd(
    denoiser: &(impl Denoiser + ?Sized),
    x_t: &Tensor,
    t: &Tensor,
    dropout: &Dropout,
    d_output: &mut (dyn FnMut(&Tensor) -> Result<Tensor> + Send),
) -> Result<GradStore> {
    let output = denoiser.forward_train(x_t, t, dropout)?;
    let d_output = d_output(&output.detach())?;
    // The sum of output * d has d for its gradient with respect to the output.
    Ok((output * d_output.detach())?.sum_all()?.backward()?)
}

macro_rules! denoiser_behind {
    ($($pointer:ty),*) => {$(
        impl<D: Denoiser + ?Sized> Denoiser for $pointer {
            fn forward(&self, x_t: &Tensor, t: &Tensor) -> Result<Tensor> {
                (**self).forward(x_t, t)
            }

            fn forward_train(&self, x_t: &Tensor, t: &Tensor, dropout: &Dropout) -> Result<Tensor> {
                (**self).forward_train(x_t, t, dropout)
            }

            fn forward_backward(
                &self,
                x_t: &Tensor,
                t: &Tensor,
                dropout: &Dropout,
                d_output: &mut (dyn FnMut(&Tensor) -> Result<Tensor> + Send),
            ) -> Result<GradStore> {
                (**self).forward_backward(x_t, t, dropout, d_output)
            }

            fn is_repeatable(&self, x_t: &Tensor) -> bool {
                (**self).is_repeatable(x_t)
            }

            fn may_lack_gradient(&self, name: &str) -> bool {
                (**self).may_lack_gradient(name)
            }

            fn recycle(&self, gradients: Vec<Tensor>) {
                (**self).recycle(gradients);
            }
        }
    )*};
}

denoiser_behind!(&D, Box<D>, Arc<D>);

/// Makes a [`Denoiser`] of a closure, for example for guidance around another network, or for a known solution in a
/// test.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ddpm::{Diffusion, Sampler, Solver, from_fn};
///
/// // Predicting the whole of x_t as noise leaves an image of zeros.
/// let denoiser = from_fn(|x_t: &Tensor, _t: &Tensor| Ok(x_t.clone()));
/// let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddim(), 10)?;
/// let images = sampler.sample(&denoiser, (2, 1, 8, 8), 0, &Device::Cpu)?;
/// assert_eq!(images.dims(), [2, 1, 8, 8]);
/// # Ok::<(), ddpm::Error>(())
/// ```
pub fn from_fn<F>(f: F) -> impl Denoiser
where
    F: Fn(&Tensor, &Tensor) -> Result<Tensor>,
{
    struct FromFn<F>(F);

    impl<F: Fn(&Tensor, &Tensor) -> Result<Tensor>> Denoiser for FromFn<F> {
        fn forward(&self, x_t: &Tensor, t: &Tensor) -> Result<Tensor> {
            (self.0)(x_t, t)
        }
    }

    FromFn(f)
}
