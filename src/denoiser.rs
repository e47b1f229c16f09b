use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result, check_dims};
use crate::precision::Precision;
use crate::random::Dropout;

/// A network that predicts the noise added to an image, or another [`Prediction`](crate::process::Prediction) of the
/// process. This trait is the interface of a network to sampling; [`Trainable`] is its interface to training.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ddpm::nn::{Condition, Output};
/// use ddpm::process::Prediction;
/// use ddpm::{Denoiser, Diffusion, NoiseSchedule, Result, Sampler, Solver};
///
/// /// Always predicts the same even grey.
/// struct Grey(f64);
///
/// impl Denoiser for Grey {
///     fn denoise(&self, x_t: &Tensor, _t: &Tensor, _: &Condition) -> Result<Output> {
///         Ok(Output::new((x_t.zeros_like()? + self.0)?))
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
    /// Computes the output for a batch `x_t` (batch, channels, height, width). `t` (batch) holds times of the full
    /// schedule: timesteps in an integer dtype, or times that may lie between two timesteps in f32. A network without
    /// conditions ignores `condition`.
    ///
    /// Training asks for timesteps only. A [`Sampler`](crate::Sampler) asks for a time between two timesteps if its
    /// spacing or its solver has such times; see [`Spacing`](crate::sample::Spacing). All other requests are u32.
    ///
    /// Networks such as [`UNet`](crate::UNet) use rayon. If you call this from a rayon thread, that thread may run
    /// unrelated jobs while it waits. Do not hold a lock across the call that such a job might take.
    ///
    /// # Errors
    /// Returns the errors of the network. [`Error::external`](crate::Error::external) wraps errors of other libraries.
    fn denoise(&self, x_t: &Tensor, t: &Tensor, condition: &Condition) -> Result<Output>;

    /// The number of classes, if the network can be conditioned on them. The default is `None`: a network without
    /// classes.
    fn classes(&self) -> Option<u32> {
        None
    }

    /// The number that stands for no class in [`Condition::Classes`]. `None` if every image must have a class, or if
    /// there are no classes. The default is the number of [classes](Self::classes).
    fn no_class(&self) -> Option<u32> {
        self.classes()
    }

    /// Computes two outputs: that of [`denoise`](Self::denoise), and the baseline from which
    /// [`Guidance`](crate::sample::Guidance) moves away.
    ///
    /// In the default, the baseline is the output without a class. Both are computed in one pass over twice as many
    /// images.
    ///
    /// # Errors
    /// Returns the errors of [`denoise`](Self::denoise). The default also returns an error if there is no condition, or
    /// if the network has no [number for no class](Self::no_class).
    fn denoise_with_baseline(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        condition: &Condition,
    ) -> Result<[Output; 2]> {
        let Some(none) = self.no_class() else {
            let lack = lack_of_guidance(self);
            let expected = format!("unused, because the network has no {lack}");
            return Err(Error::config("guidance", "used", expected));
        };
        let Condition::Classes(classes) = condition else {
            return Err(Error::config("condition", "none", "a class per image, as guidance needs"));
        };
        let batch = x_t.dim(0)?;
        let without = Tensor::full(none, batch, &Device::Cpu)?.to_device(classes.device())?;
        let twice = |x: &Tensor| Tensor::cat(&[x, x], 0);
        let condition = Condition::Classes(Tensor::cat(&[classes, &without], 0)?);
        let Output { prediction, variance } = self.denoise(&twice(x_t)?, &twice(t)?, &condition)?;
        let half = |first| -> Result<Output> {
            let part = |x: &Tensor| x.narrow(0, first, batch);
            let variance = variance.as_ref().map(part).transpose()?;
            Ok(Output { prediction: part(&prediction)?.contiguous()?, variance })
        };
        Ok([half(0)?, half(batch)?])
    }

    /// Computes the [prediction](Output::prediction) of [`denoise`](Self::denoise) without a condition.
    ///
    /// # Errors
    /// Returns the errors of [`denoise`](Self::denoise).
    fn forward(&self, x_t: &Tensor, t: &Tensor) -> Result<Tensor> {
        Ok(self.denoise(x_t, t, &Condition::None)?.prediction)
    }
}

/// Names the part that a network without a [number for no class](Denoiser::no_class) lacks, for errors.
pub(crate) fn lack_of_guidance(network: &(impl Denoiser + ?Sized)) -> &'static str {
    match network.classes() {
        Some(_) => "vector for images without a class",
        None => "classes",
    }
}

/// The output of a [`Denoiser`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Output {
    /// The prediction, of the shape of `x_t`.
    pub prediction: Tensor,
    /// The variance of the reverse process, of the shape of `x_t`, if the network learns the variance. It is a position
    /// between the logarithms of two variances, from -1 for `Variance::Posterior` to 1 for `Variance::Beta`. It may lie
    /// outside. It is `2 v - 1` for the `v` of Nichol and Dhariwal 2021, equation 15, as in their code.
    pub variance: Option<Tensor>,
}

impl Output {
    /// Creates the output of a network that does not learn the variance.
    pub fn new(prediction: Tensor) -> Self {
        Self { prediction, variance: None }
    }

    /// Divides the channels of `y`, which are those of the prediction, then those of the variance.
    ///
    /// # Errors
    /// Returns an error if `y` is not a batch of images, or if an operation fails.
    pub(crate) fn divided(y: &Tensor) -> Result<Self> {
        let channels = y.dim(1)? / 2;
        let half = |first| y.narrow(1, first, channels)?.contiguous();
        Ok(Self::new(half(0)?).with_variance(half(channels)?))
    }

    /// Adds a learned variance.
    #[must_use]
    pub fn with_variance(self, variance: Tensor) -> Self {
        Self { variance: Some(variance), ..self }
    }
}

/// The condition on which a [`Denoiser`] predicts.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum Condition {
    /// No condition.
    #[default]
    None,
    /// The class of each image: (batch), u32, on any device. A network may have a number that stands for [no
    /// class](Denoiser::no_class).
    Classes(Tensor),
}

impl From<Option<Tensor>> for Condition {
    /// The classes of the images of a batch, if they have any.
    fn from(classes: Option<Tensor>) -> Self {
        classes.map_or(Self::None, Self::Classes)
    }
}

impl Condition {
    /// Creates the condition of one class for each image.
    ///
    /// # Errors
    /// Returns an error if an operation fails.
    pub fn classes(classes: Vec<u32>) -> Result<Self> {
        let batch = classes.len();
        Ok(Self::Classes(Tensor::from_vec(classes, batch, &Device::Cpu)?))
    }

    /// Creates the condition of `count` images for a network with this number of classes: one class after the other,
    /// then the first again.
    ///
    /// # Errors
    /// Returns an error if `classes` is 0, or if an operation fails.
    pub fn each_class(classes: u32, count: usize) -> Result<Self> {
        if classes == 0 {
            return Err(Error::config("classes", classes, "at least 1"));
        }
        Self::classes((0..classes).cycle().take(count).collect())
    }

    /// # Errors
    /// Returns an error if there is not one class of dtype u32 for each image of the batch.
    pub(crate) fn check(&self, batch: usize) -> Result<()> {
        let Self::Classes(classes) = self else { return Ok(()) };
        check_dims("the list of classes", classes.dims(), &[batch], "one per image")?;
        if classes.dtype() != DType::U32 {
            return Err(Error::config("dtype of the classes", classes.dtype().as_str(), "u32"));
        }
        Ok(())
    }

    /// Returns the condition of `len` images of the batch, beginning with image `first`.
    ///
    /// # Errors
    /// Returns an error if the batch has no such images.
    pub fn narrow(&self, first: usize, len: usize) -> Result<Self> {
        match self {
            Self::None => Ok(Self::None),
            Self::Classes(classes) => Ok(Self::Classes(classes.narrow(0, first, len)?)),
        }
    }
}

/// A [`Denoiser`] that a [`Trainer`](crate::Trainer) can train.
///
/// Every method has a default. The defaults suit networks on candle tensors without dropout. Such a network needs only
/// `impl Trainable for MyNetwork {}`.
pub trait Trainable: Denoiser {
    /// Computes the output during training. Networks with dropout draw their masks from `dropout`. Shapes and errors
    /// are those of [`denoise`](Denoiser::denoise), which the default calls.
    ///
    /// If the images of the data set have classes, the `condition` has classes, too, even for a network without
    /// classes. [`Model::denoise_train`](crate::nn::Model) then ignores them, but [`Model::denoise`](crate::nn::Model)
    /// returns an error. A network that wraps another one therefore calls the `denoise_train` of that network here.
    /// This method also applies the dropout.
    ///
    /// # Errors
    /// Returns the errors of the network.
    fn denoise_train(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        condition: &Condition,
        dropout: &Dropout,
    ) -> Result<Output> {
        let _ = dropout;
        self.denoise(x_t, t, condition)
    }

    /// Computes the gradients of all weights in one training pass.
    ///
    /// Calls `d_output` once with the detached output of [`denoise_train`](Self::denoise_train). `d_output` returns
    /// the gradient of the loss with respect to each part of this output, in the same shapes. It may run on another of
    /// the threads that share the work, so it must not wait for other threads, or hold a lock across tensor
    /// operations.
    ///
    /// The default uses candle's gradients. [`Model`](crate::nn::Model) has a faster method on the CPU and on CUDA
    /// devices.
    ///
    /// # Errors
    /// Returns the errors of the network and of `d_output`.
    fn gradients(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        condition: &Condition,
        dropout: &Dropout,
        d_output: &mut OutputGradient<'_>,
    ) -> Result<GradStore> {
        gradients_by_autograd(self, x_t, t, condition, dropout, d_output)
    }

    /// Sets the precision of the products of the network. The default ignores `Highest` and `High`, and returns an
    /// error for half precision.
    ///
    /// # Errors
    /// Returns an error if the network does not support the precision.
    fn set_precision(&mut self, precision: Precision) -> Result<()> {
        match precision {
            Precision::Highest | Precision::High => Ok(()),
            Precision::BF16 | Precision::F16 => {
                let expected = "highest or high with this network";
                Err(Error::config("precision", precision, expected))
            }
        }
    }

    /// Sets whether values are computed again instead of being kept, which takes less memory and more time. The results
    /// are the same in each bit.
    ///
    /// With `true`, [`gradients`](Self::gradients) computes the maps of the network's
    /// [parts](crate::nn::Engine::recomputable) again in the backward pass. Networks that candle differentiates keep all
    /// maps. On the CPU, [`denoise`](Denoiser::denoise) packs the weights for the kernels in each pass. With `false`,
    /// and when candle differentiates `denoise`, the packed weights are kept. They take about 1.8 times the memory of the
    /// weights, or 4 times with [`Precision::High`] without AMX. With channels that are no multiples of 32 they take more.
    ///
    /// The default returns an error for `true`.
    ///
    /// # Errors
    /// Returns an error if the network cannot do so.
    fn set_recompute(&mut self, recompute: bool) -> Result<()> {
        if recompute {
            return Err(Error::config("recompute", recompute, "false with this network"));
        }
        Ok(())
    }

    /// Returns whether a training loop may capture [`gradients`](Self::gradients) as a CUDA graph.
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

    /// Takes back gradients of [`gradients`](Self::gradients) that are no longer needed.
    ///
    /// The next gradients may reuse their memory, which changes these tensors and all that share their values. A
    /// training loop calls this after its update, which saves the time to allocate new memory. The default does
    /// nothing.
    fn recycle(&self, gradients: Vec<Tensor>) {
        let _ = gradients;
    }
}

/// A function from the output of a network to the gradient of the loss with respect to it.
pub type OutputGradient<'a> = dyn FnMut(&Output) -> Result<Output> + Send + 'a;

/// Computes [`Trainable::gradients`] with candle's gradients.
pub(crate) fn gradients_by_autograd(
    network: &(impl Trainable + ?Sized),
    x_t: &Tensor,
    t: &Tensor,
    condition: &Condition,
    dropout: &Dropout,
    d_output: &mut OutputGradient<'_>,
) -> Result<GradStore> {
    let Output { prediction, variance } = network.denoise_train(x_t, t, condition, dropout)?;
    let detached =
        Output { prediction: prediction.detach(), variance: variance.as_ref().map(Tensor::detach) };
    let d = d_output(&detached)?;
    // The gradient of `sum(output * d)` with respect to the output is `d`.
    let mut sum = (prediction * d.prediction.detach())?.sum_all()?;
    if let (Some(variance), Some(d)) = (variance, d.variance) {
        sum = (sum + (variance * d.detach())?.sum_all()?)?;
    }
    Ok(sum.backward()?)
}

macro_rules! behind {
    ($($pointer:ty),*) => {$(
        impl<D: Denoiser + ?Sized> Denoiser for $pointer {
            fn denoise(&self, x_t: &Tensor, t: &Tensor, condition: &Condition) -> Result<Output> {
                (**self).denoise(x_t, t, condition)
            }

            fn classes(&self) -> Option<u32> {
                (**self).classes()
            }

            fn no_class(&self) -> Option<u32> {
                (**self).no_class()
            }

            fn denoise_with_baseline(
                &self,
                x_t: &Tensor,
                t: &Tensor,
                condition: &Condition,
            ) -> Result<[Output; 2]> {
                (**self).denoise_with_baseline(x_t, t, condition)
            }
        }
    )*};
}

behind!(&D, Box<D>, Arc<D>);

/// Creates a [`Denoiser`] without conditions from a closure, for example for guidance around another network, or for a
/// known solution in a test.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ddpm::nn::from_fn;
/// use ddpm::{Diffusion, Sampler, Solver};
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
        fn denoise(&self, x_t: &Tensor, t: &Tensor, _: &Condition) -> Result<Output> {
            (self.0)(x_t, t).map(Output::new)
        }
    }

    FromFn(f)
}
