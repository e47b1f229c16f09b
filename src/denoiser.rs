use std::sync::Arc;

use candle_core::Tensor;
use candle_core::backprop::GradStore;

use crate::{Dropout, Result};

/// A network that predicts what was added to an image, or what the process's
/// [`Prediction`](crate::Prediction) says: all that training and sampling know of it.
///
/// Only [`forward`](Self::forward) is needed. The other methods are for networks that have dropout, or a faster
/// way to compute gradients than candle's.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ddpm::{Denoiser, Diffusion, NoiseSchedule, Prediction, Result, Sampler, Solver};
///
/// /// Predicts the same even grey, whatever it is shown.
/// struct Grey(f64);
///
/// impl Denoiser for Grey {
///     fn forward(&self, x_t: &Tensor, _t: &Tensor) -> Result<Tensor> {
///         Ok((x_t.zeros_like()? + self.0)?)
///     }
/// }
///
/// // What it predicts is the image, and not the noise.
/// let diffusion = Diffusion::new(NoiseSchedule::cosine(1000)?, Prediction::Sample);
/// let sampler = Sampler::new(&diffusion, Solver::ddim(), 10)?;
/// let image = sampler.sample(&Grey(0.25), (1, 1, 2, 2), 0, &Device::Cpu)?;
/// for pixel in image.flatten_all()?.to_vec1::<f32>()? {
///     assert!((pixel - 0.25).abs() < 1e-5);
/// }
/// # Ok::<(), ddpm::Error>(())
/// ```
///
/// A closure is a `Denoiser`, too: `|x_t: &Tensor, t: &Tensor| ...`, through [`from_fn`]; and so is a
/// reference, a `Box` or an `Arc` of one, such as `Box<dyn Denoiser>`.
pub trait Denoiser {
    /// The prediction for a batch: `x_t` (batch, channels, height, width), `t` (batch) of an
    /// integer dtype, counted in the full schedule's steps; the answer has the shape of `x_t`.
    ///
    /// A network that shares its work among rayon's threads, as [`UNet`](crate::UNet) does, may run other
    /// jobs of theirs on the calling one meanwhile, where that is one of them: hold no lock over the call
    /// that such a job wants.
    ///
    /// # Errors
    /// Whatever the network fails with; those of other libraries are wrapped by
    /// [`Error::external`](crate::Error::external).
    fn forward(&self, x_t: &Tensor, t: &Tensor) -> Result<Tensor>;

    /// The prediction while training, when it differs: networks with dropout draw their masks from
    /// `dropout`. Shapes and errors are those of [`forward`](Self::forward), and so is the answer
    /// unless this is implemented.
    fn forward_train(&self, x_t: &Tensor, t: &Tensor, dropout: &Dropout) -> Result<Tensor> {
        let _ = dropout;
        self.forward(x_t, t)
    }

    /// The gradients of all weights in one training pass: calls `d_output` once with the output of
    /// [`forward_train`](Self::forward_train), detached, for the gradient of the loss with respect
    /// to it, of the same shape. It may be called on another thread, one of those that share the work:
    /// it must not wait for other threads, nor hold a lock over operations of tensors.
    ///
    /// Unless this is implemented, candle's own gradients are taken. A network implements it that
    /// has a faster way, as [`UNet`](crate::UNet) does on the CPU and on CUDA devices.
    ///
    /// # Errors
    /// Those of the network and of `d_output`.
    fn forward_backward(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        dropout: &Dropout,
        d_output: &mut (dyn FnMut(&Tensor) -> Result<Tensor> + Send),
    ) -> Result<GradStore> {
        backward_by_autograd(self, x_t, t, dropout, d_output)
    }

    /// Whether [`forward_backward`](Self::forward_backward) launches the same work on a CUDA device for
    /// every batch of the shape of `x_t`, by kernels that read what changes from the device, uploads
    /// nothing and reads nothing back: then a training loop may capture it as a CUDA graph. It does not,
    /// unless this is implemented.
    fn is_repeatable(&self, x_t: &Tensor) -> bool {
        let _ = x_t;
        false
    }

    /// Whether the weight of this name may be without a gradient: one that is meant to stay as it is, or that not
    /// every batch uses. [`Trainer`](crate::Trainer) refuses any other weight that has no gradient in its first
    /// update, since some of candle's operations have none, without an error: `candle_nn::LayerNorm` is one.
    /// No weight may, unless this is implemented.
    fn may_lack_gradient(&self, name: &str) -> bool {
        let _ = name;
        false
    }

    /// Takes back gradients that [`forward_backward`](Self::forward_backward) gave and nobody needs
    /// any longer: the next ones may take their memory, and change these and whatever shares their
    /// values. A training loop calls it after its update to save the system the work of clearing fresh
    /// memory. Does nothing unless this is implemented.
    fn recycle(&self, gradients: Vec<Tensor>) {
        let _ = gradients;
    }
}

/// What [`Denoiser::forward_backward`] does unless a network has another way.
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

/// A [`Denoiser`] of a closure: for guidance around another network, or a known solution in a test.
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
