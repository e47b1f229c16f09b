use std::fmt;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};

use super::autograd::Autograd;
use super::graph::Graph;
use super::map::Map;
use super::pass::Pass;
use super::survey::Weights;
use super::tape::Tape;
use crate::backend::maps::{
    self, Maps, Place, Pool, can_capture, check_precision, dispatch, has_kernels, repeated,
};
use crate::denoiser::{
    Condition, Denoiser, Output, OutputGradient, Trainable, gradients_by_autograd,
};
use crate::error::{Error, Result, check_dims, check_float};
use crate::kernels;
use crate::layers::Classes;
use crate::precision::Precision;
use crate::process::check_timesteps;
use crate::random::Dropout;

/// A [`Graph`] with its runtime. This [`Denoiser`] computes the graph with the crate's kernels if they support it, and
/// with candle tensors otherwise.
///
/// The kernels support f32 weights on the CPU or on a CUDA device. They are used for passes without gradients, and by
/// [`gradients`](Trainable::gradients). Clones share weights and memory.
pub struct Model<G> {
    graph: Arc<G>,
    weights: Weights,
    precision: Precision,
    /// True if the backward pass computes the maps of recomputable parts again, and if other passes do not keep packed
    /// weights.
    recompute: bool,
    /// Memory for maps and gradients, reused from one pass to the next.
    pool: Arc<Pool>,
}

impl<G> Clone for Model<G> {
    fn clone(&self) -> Self {
        let &Self { ref graph, ref weights, precision, recompute, ref pool } = self;
        let (graph, weights, pool) = (graph.clone(), weights.clone(), pool.clone());
        Self { graph, weights, precision, recompute, pool }
    }
}

impl<G: fmt::Debug> fmt::Debug for Model<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model")
            .field("graph", &self.graph)
            .field("precision", &self.precision)
            .finish_non_exhaustive()
    }
}

impl<G: Graph> Model<G> {
    /// Creates a model with the weights that the graph holds. Weights that take gradients are shared with their
    /// trainer.
    ///
    /// # Errors
    /// Returns the errors of the graph, and an error if `DDPM_MAX_CPU_ISA` is set to an unknown value.
    pub fn new(graph: G) -> Result<Self> {
        kernels::check_limit()?;
        let weights = Weights::of(&graph)?;
        let (graph, pool) = (Arc::new(graph), Arc::default());
        Ok(Self { graph, weights, precision: Precision::Highest, recompute: false, pool })
    }

    /// Sets the precision of products in the crate's kernels. The default is [`Precision::Highest`].
    ///
    /// # Errors
    /// Returns an error if this build, or the device or dtype of the network, does not support the precision.
    pub fn with_precision(mut self, precision: Precision) -> Result<Self> {
        self.set_precision(precision)?;
        Ok(self)
    }

    /// The network.
    pub fn graph(&self) -> &G {
        &self.graph
    }

    #[cfg(test)]
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// # Errors
    /// Returns an error if the shapes or dtypes of `x_t` and `t` do not fit the network.
    fn check(&self, x_t: &Tensor, t: &Tensor) -> Result<()> {
        let &[batch, channels, height, width] = x_t.dims() else {
            return Err(Error::shape("x_t", x_t.dims(), "(batch, channels, height, width)"));
        };
        self.graph.check_images(channels, height, width).map_err(|error| match error {
            Error::Shape { expected, .. } => Error::shape("x_t", x_t.dims(), expected),
            error => error,
        })?;
        if x_t.elem_count() == 0 {
            return Err(Error::shape("x_t", x_t.dims(), "a batch of at least one image"));
        }
        check_float("dtype of x_t", x_t.dtype())?;
        check_timesteps(t, batch, None)
    }

    /// Returns the class of each image of the batch, on the device of `t`, if the network has classes.
    ///
    /// # Errors
    /// Returns an error if the condition does not have one class per image, or if there is no condition although the
    /// network needs one. Returns an error if the network does not have a class, and the classes are on the CPU. On
    /// another device such a class gives NaN, because reading it would wait for the device.
    fn classes_of(&self, condition: &Condition, t: &Tensor) -> Result<Option<Tensor>> {
        let Some(Classes { count, has_none }) = self.weights.classes else { return Ok(None) };
        let batch = t.dim(0)?;
        condition.check(batch)?;
        let Condition::Classes(classes) = condition else {
            if !has_none {
                let expected = "a class per image, because the network has no vector for images \
                                without a class";
                return Err(Error::config("condition", "none", expected));
            }
            let none = Tensor::full(count as u32, batch, &Device::Cpu)?;
            return Ok(Some(none.to_device(t.device())?));
        };
        if classes.device().is_cpu() {
            let outside = |class: &u32| *class as usize >= count + usize::from(has_none);
            if let Some(class) = classes.to_vec1::<u32>()?.into_iter().find(outside) {
                let none = if has_none { format!(", or {count} for no class") } else { "".into() };
                let expected = format!("from 0 to {}{none}", count - 1);
                return Err(Error::config("class", class, expected));
            }
        }
        Ok(Some(classes.to_device(t.device())?))
    }

    fn denoise_by_autograd(&self, x_t: &Tensor, pass: Pass<'_>) -> Result<Tensor> {
        let dtype = self.weights.home.as_ref().map_or(x_t.dtype(), |(dtype, _)| *dtype);
        let x = kernels::to_channels_last(&x_t.to_dtype(dtype)?)?;
        let y = self.graph.run(&Autograd::new(pass, dtype), &x)?;
        Ok(kernels::to_channels_first(&y)?.to_dtype(x_t.dtype())?)
    }

    fn denoise_by_kernels(
        &self,
        place: &Place<'_>,
        x_t: &Tensor,
        pass: Pass<'_>,
    ) -> Result<Tensor> {
        let inputs: Vec<Tensor> =
            [Some(x_t), pass.t, pass.classes].into_iter().flatten().cloned().collect();
        repeated(place, &self.pool, &inputs, &mut |inputs| {
            let mut rest = inputs.iter().skip(1);
            let t = pass.t.and_then(|_| rest.next());
            let pass = Pass { t, classes: pass.classes.and_then(|_| rest.next()), ..pass };
            let x_t = inputs.first().unwrap_or(x_t);
            dispatch(place, &self.pool, Forward { graph: &*self.graph, x_t, pass })
        })
    }

    /// Returns the device, size and kind of a pass, if the crate's kernels can compute it.
    fn place(&self, x_t: &Tensor, recording: bool) -> Result<Option<Place<'_>>> {
        let suits = |(dtype, device): &&(DType, Device)| {
            has_kernels(*dtype, device) && x_t.device().same_device(device)
        };
        let Some((_, device)) = self.weights.home.as_ref().filter(suits) else { return Ok(None) };
        if x_t.track_op() {
            return Ok(None);
        }
        let &Self { precision, recompute: repack, .. } = self;
        let batch = x_t.dim(0)?;
        let fixed = !self.weights.trainable;
        Ok(Some(Place { device, precision, batch, recording, fixed, repack }))
    }
}

/// Divides the images that a network outputs for `x_t` into prediction and variance, if it learns the variance.
///
/// # Errors
/// Returns an error if the network learns the variance, but does not output two channels for each channel of `x_t`.
fn output(graph: &impl Graph, x_t: &Tensor, y: Tensor) -> Result<Output> {
    if !graph.learns_variance() {
        return Ok(Output::new(y));
    }
    let (batch, channels, height, width) = x_t.dims4()?;
    let expected = [batch, 2 * channels, height, width];
    check_dims("the network's output", y.dims(), &expected, "prediction and variance")?;
    Output::divided(&y)
}

/// The forward pass of a graph.
struct Forward<'a, G> {
    graph: &'a G,
    x_t: &'a Tensor,
    pass: Pass<'a>,
}

impl<'a, G: Graph> Forward<'a, G> {
    /// Returns the output as a map and as images.
    fn on<'n, B: Maps + 'n>(&self, tape: &Tape<'n, '_, B>) -> Result<(Map<B>, Tensor)>
    where
        'a: 'n,
    {
        let y = self.graph.run(tape, &tape.images(self.x_t)?)?;
        let output = tape.to_images(&y)?.to_dtype(self.x_t.dtype())?;
        Ok((y, output))
    }
}

impl<G: Graph> maps::Pass for Forward<'_, G> {
    type Output = Tensor;

    fn run<B: Maps>(self, backend: B) -> Result<Tensor> {
        Ok(self.on(&Tape::forgetful(backend, self.pass))?.1)
    }
}

/// The forward and the backward pass of a graph.
struct ForwardBackward<'a, 'd, G> {
    forward: Forward<'a, G>,
    recompute: bool,
    d_output: &'a mut OutputGradient<'d>,
}

impl<G: Graph> maps::Pass for ForwardBackward<'_, '_, G> {
    type Output = GradStore;

    fn run<B: Maps>(self, backend: B) -> Result<GradStore> {
        let tape = Tape::recording(backend, self.forward.pass, self.recompute);
        let (y, images) = self.forward.on(&tape)?;
        let output = output(self.forward.graph, self.forward.x_t, images)?;
        let d = (self.d_output)(&output)?;
        let part = |d: &Tensor, of: &Tensor| {
            check_dims("the output's gradient", d.dims(), of.dims(), "that of the output")
        };
        part(&d.prediction, &output.prediction)?;
        let Some(variance) = &output.variance else {
            return tape.backward(y, &d.prediction);
        };
        let d_variance = d.variance.map_or_else(|| variance.zeros_like(), Ok)?;
        part(&d_variance, variance)?;
        tape.backward(y, &Tensor::cat(&[&d.prediction, &d_variance], 1)?)
    }
}

impl<G: Graph> Denoiser for Model<G> {
    fn denoise(&self, x_t: &Tensor, t: &Tensor, condition: &Condition) -> Result<Output> {
        self.check(x_t, t)?;
        if let (Condition::Classes(_), None) = (condition, self.weights.classes) {
            let expected = "no condition, because the network has no classes";
            return Err(Error::config("condition", "classes", expected));
        }
        let classes = self.classes_of(condition, t)?;
        let pass = Pass { t: Some(t), classes: classes.as_ref(), dropout: None };
        let place = self.place(x_t, false)?.filter(|_| !self.weights.trainable);
        let y = match place {
            Some(place) => self.denoise_by_kernels(&place, x_t, pass)?,
            None => self.denoise_by_autograd(x_t, pass)?,
        };
        output(&*self.graph, x_t, y)
    }

    fn classes(&self) -> Option<u32> {
        self.weights.classes.map(|classes| classes.count as u32)
    }

    fn no_class(&self) -> Option<u32> {
        let none = self.weights.classes.filter(|classes| classes.has_none);
        none.map(|classes| classes.count as u32)
    }
}

impl<G: Graph> Trainable for Model<G> {
    fn denoise_train(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        condition: &Condition,
        dropout: &Dropout,
    ) -> Result<Output> {
        self.check(x_t, t)?;
        let classes = self.classes_of(condition, t)?;
        let pass = Pass { t: Some(t), classes: classes.as_ref(), dropout: Some(dropout) };
        output(&*self.graph, x_t, self.denoise_by_autograd(x_t, pass)?)
    }

    fn gradients(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        condition: &Condition,
        dropout: &Dropout,
        d_output: &mut OutputGradient<'_>,
    ) -> Result<GradStore> {
        self.check(x_t, t)?;
        // Candle continues the backward pass to the weights from which others are computed.
        let Some(place) = self.place(x_t, true)?.filter(|_| !self.weights.derived) else {
            return gradients_by_autograd(self, x_t, t, condition, dropout, d_output);
        };
        let classes = self.classes_of(condition, t)?;
        let pass = Pass { t: Some(t), classes: classes.as_ref(), dropout: Some(dropout) };
        let forward = Forward { graph: &*self.graph, x_t, pass };
        let recompute = self.recompute;
        dispatch(&place, &self.pool, ForwardBackward { forward, recompute, d_output })
    }

    fn set_precision(&mut self, precision: Precision) -> Result<()> {
        let (dtype, device) = self.weights.home.clone().unwrap_or((DType::F32, Device::Cpu));
        check_precision(precision, dtype, &device)?;
        self.precision = precision;
        Ok(())
    }

    fn set_recompute(&mut self, recompute: bool) -> Result<()> {
        self.recompute = recompute;
        Ok(())
    }

    fn is_repeatable(&self, x_t: &Tensor) -> bool {
        let place = self.place(x_t, true).ok().flatten().filter(|_| !self.weights.derived);
        place.is_some_and(|place| can_capture(place.device))
    }

    fn recycle(&self, gradients: Vec<Tensor>) {
        self.pool.recycle(gradients);
    }
}
