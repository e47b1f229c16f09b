//! The engine of the crate's kernels. Each operation runs a kernel on plain memory and records its backward pass. The
//! memory of maps that are no longer needed is reused.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};

use super::graph::{Engine, Normed, Sealed};
use super::map::{Gradient, Kept, Map, Parts};
use super::pass::Pass;
use super::shapes;
use crate::backend::maps::{ConvGradients, Maps, Norm};
use crate::error::{Result, check_fraction};
use crate::kernels::op::activation::VectorActivation;
use crate::kernels::op::attention::AttentionShape;
use crate::kernels::op::conv::{Add, Addends};
use crate::layers::{Conv2d, Embedding, GroupNorm, Linear, Sinusoids};
use crate::random::Dropout;

/// Returns the gradients of the values that are added to a convolution's output.
fn gradients<B: Maps>(add: &Add<'_, Map<B>>) -> Addends<Gradient<B>> {
    add.map(|map| map.map_or(Gradient::UNWANTED, |map| map.gradient.clone()))
}

/// The backward pass of an operation, as a function of its output's gradient.
type Backward<'n, 'p, B> =
    Box<dyn FnOnce(&Tape<'n, 'p, B>, <B as Maps>::Buffer) -> Result<()> + 'n>;

/// The gradient of an operation's output, and the operation's backward pass.
type Node<'n, 'p, B> = (Gradient<B>, Backward<'n, 'p, B>);

/// The operations that a tape records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Recording {
    /// None, because no backward pass follows, or because it computes them again.
    Nothing,
    /// All operations outside of [recomputed](Engine::recomputed) parts. Such a part is recorded as one operation.
    Parts,
    /// All operations of a part that is computed again.
    Operations,
}

/// Runs the operations of a network with the kernels of a backend, and records their backward passes.
pub(crate) struct Tape<'n, 'p, B: Maps> {
    backend: B,
    pass: Pass<'p>,
    /// Whether [recomputable](Engine::recomputable) parts are computed again.
    recompute: bool,
    recording: Cell<Recording>,
    /// The recorded operations.
    nodes: RefCell<Vec<Node<'n, 'p, B>>>,
    /// The gradients of weights that the backward pass has computed so far.
    weights: RefCell<Vec<(&'n Tensor, Tensor)>>,
}

impl<'n, 'p, B: Maps + 'n> Tape<'n, 'p, B> {
    /// Creates a tape for a pass that will be followed by [`backward`](Self::backward). With `recompute`, recomputable
    /// parts are computed again there.
    pub fn recording(backend: B, pass: Pass<'p>, recompute: bool) -> Self {
        let recording = Cell::new(Recording::Parts);
        Self { recompute, recording, ..Self::forgetful(backend, pass) }
    }

    /// Creates a tape for a forward pass only.
    pub fn forgetful(backend: B, pass: Pass<'p>) -> Self {
        let recording = Cell::new(Recording::Nothing);
        let (nodes, weights) = Default::default();
        Self { backend, pass, recompute: false, recording, nodes, weights }
    }

    /// Copies images (batch, channels, height, width) to a map that needs no gradient.
    pub fn images(&self, x: &Tensor) -> Result<Map<B>> {
        let (batch, channels, height, width) = x.dims4()?;
        let (dims, values) = ([batch, height, width, channels], self.backend.images(x)?);
        Ok(Map::new(dims, values, Gradient::UNWANTED))
    }

    /// Copies a map to images (batch, channels, height, width).
    pub fn to_images(&self, map: &Map<B>) -> Result<Tensor> {
        self.backend.to_images(map.dims, &map.values)
    }

    /// Computes the gradients of all weights from the gradient of the output `y`, given as images.
    pub fn backward(&self, y: Map<B>, dy: &Tensor) -> Result<GradStore> {
        y.gradient.add(&self.backend, self.backend.images(dy)?)?;
        drop(y);
        // A node is dropped after its backward pass, together with the maps that only this node needed. A backward pass
        // may record operations, which are then the next ones.
        while let Some((gradient, backward)) = { self.nodes.borrow_mut().pop() } {
            if let Some(dy) = gradient.take() {
                backward(self, dy)?;
            }
        }
        self.backend.finish()?;
        // Candle offers no other way to create an empty `GradStore`.
        let mut gradients = Tensor::zeros((), DType::F32, &Device::Cpu)?.backward()?;
        for (weight, mut gradient) in self.weights.take() {
            if let Some(other) = gradients.remove(weight) {
                gradient = (gradient + other)?;
            }
            gradients.insert(weight, gradient);
        }
        Ok(gradients)
    }

    /// Creates the output map of an operation, and records `backward`.
    fn output(
        &self,
        dims: [usize; 4],
        values: B::Buffer,
        backward: impl FnOnce(&Self, B::Buffer) -> Result<()> + 'n,
    ) -> Map<B> {
        Map::new(dims, values, self.node(dims, backward))
    }

    /// Records `backward` if operations are recorded. Returns the gradient that it will receive, of a map of dimensions
    /// `dims`.
    fn node(
        &self,
        dims: [usize; 4],
        backward: impl FnOnce(&Self, B::Buffer) -> Result<()> + 'n,
    ) -> Gradient<B> {
        if self.recording.get() == Recording::Nothing {
            return Gradient::UNWANTED;
        }
        let gradient = Gradient::wanted(dims.iter().product());
        self.nodes.borrow_mut().push((gradient.clone(), Box::new(backward)));
        gradient
    }

    /// Calls `f` while these operations are recorded.
    fn while_recording<R>(&self, recording: Recording, f: impl FnOnce() -> R) -> R {
        let before = self.recording.replace(recording);
        let result = f();
        self.recording.set(before);
        result
    }

    fn record<const N: usize>(&self, weights: [&'n Tensor; N], gradients: [Tensor; N]) {
        self.weights.borrow_mut().extend(weights.into_iter().zip(gradients));
    }

    /// Records the gradients of a normalisation's weights, and adds those of its input `x` and of its scales and
    /// shifts, from that of its output.
    fn normalize_backward(
        &self,
        (norm, by): (&'n GroupNorm, Option<&Map<B>>),
        (x, values): (&Kept<B>, &B::Buffer),
        statistics: &B::Statistics,
        mut d: B::Buffer,
    ) -> Result<()> {
        let (backend, there) = (&self.backend, x.gradient.take());
        let (gradients, d_by) = backend.normalize_backward(
            Norm { layer: norm, by: by.map(|by| &*by.values) },
            x.dims,
            values,
            statistics,
            &mut d,
            there.as_ref(),
        )?;
        self.record([&norm.weight, &norm.bias], gradients);
        if let (Some(by), Some(d_by)) = (by, d_by) {
            by.gradient.add(backend, d_by)?;
        }
        x.gradient.add(backend, d)
    }

    /// Multiplies `x`, seen as a map of dimensions `dims`, by a dropout mask of one factor per image and channel.
    fn dropped(
        &self,
        x: &Map<B>,
        dims: [usize; 4],
        dropout: &Dropout,
        layer: u16,
        p: f64,
    ) -> Result<Map<B>> {
        let mask = self.backend.mask(dropout, layer, dims, p)?;
        let y = self.backend.scale_maps(dims, &x.values, &mask)?;
        // The backward pass needs only the gradient of `x`, so the map is not kept.
        let gradient = x.gradient.clone();
        Ok(self.output(x.dims, y, move |tape, dy| {
            gradient.add(&tape.backend, tape.backend.scale_maps(dims, &dy, &mask)?)
        }))
    }

    /// Multiplies the values of a map, or of its gradient, by the factors of a dropout with this probability and
    /// number.
    fn drop_in_place(
        &self,
        dims: [usize; 4],
        x: &mut B::Buffer,
        dropout: Option<(f64, u16)>,
    ) -> Result<()> {
        match (dropout, self.pass.dropout) {
            (Some((p, layer)), Some(masks)) => self.backend.drop_values(dims, x, masks, layer, p),
            _ => Ok(()),
        }
    }

    /// Records the gradients of a convolution's weights, and adds the gradient of the addend per image.
    fn record_convolution(
        &self,
        conv: &'n Conv2d,
        (gradients, of_images): ConvGradients<B::Buffer>,
        per_image: &Gradient<B>,
    ) -> Result<()> {
        self.record([&conv.weight, &conv.bias], gradients);
        of_images.map_or(Ok(()), |d| per_image.add(&self.backend, d))
    }
}

/// Checks the operands of a convolution.
fn check<B: Maps>(conv: &Conv2d, x: &Map<B>, add: &Add<'_, Map<B>>) -> Result<()> {
    let dims = |map: Option<&Map<B>>| map.map(|map| map.dims.into());
    shapes::conv(conv, x.dims.into(), dims(add.per_image), dims(add.residual))
}

/// Returns the values that are added to a convolution, in the type of the backend.
fn plain<'a, B: Maps>(add: &Add<'a, Map<B>>) -> Add<'a, B::Buffer> {
    add.map(|map| map.map(|map| &*map.values))
}

impl<B: Maps> Sealed for Tape<'_, '_, B> {}

impl<'n, B: Maps + 'n> Engine<'n> for Tape<'n, '_, B> {
    type Map = Map<B>;

    fn conv_add(&self, conv: &'n Conv2d, x: &Map<B>, add: Add<'_, Map<B>>) -> Result<Map<B>> {
        check(conv, x, &add)?;
        let (dims, y) = self.backend.convolve(conv, x.dims, &x.values, plain(&add))?;
        let (x, added) = (x.kept(), gradients(&add));
        Ok(self.output(dims, y, move |tape, dy| {
            let backend = &tape.backend;
            let values = x.values(backend)?;
            let of_image = added.per_image.is_wanted();
            let weights =
                backend.convolve_weight_gradients(conv, x.dims, &values, &dy, of_image)?;
            tape.record_convolution(conv, weights, &added.per_image)?;
            drop(values);
            x.gradient.write(backend, |dx, accumulate| {
                backend.convolve_input_gradient(conv, x.dims, &dy, dx, accumulate)
            })?;
            added.residual.add(backend, dy)
        }))
    }

    fn normed_conv_add(
        &self,
        Normed { norm, by, dropout }: Normed<'_, 'n, Map<B>>,
        conv: &'n Conv2d,
        x: &Map<B>,
        add: Add<'_, Map<B>>,
    ) -> Result<Map<B>> {
        shapes::modulated_norm(norm, x.dims.into(), by.map(|by| by.dims.into()))?;
        check(conv, x, &add)?;
        dropout.map_or(Ok(()), |(p, _)| check_fraction("dropout", p))?;
        let own = || Norm { layer: norm, by: by.map(|by| &*by.values) };
        let dropped = dropout.filter(|_| self.pass.dropout.is_some());
        let fused = match dropped {
            None => self.backend.convolve_normed(own(), conv, x.dims, &x.values, plain(&add))?,
            Some(_) => None,
        };
        let (dims, y, statistics) = match fused {
            Some(result) => result,
            None => {
                let (mut n, statistics) = self.backend.normalize(own(), x.dims, &x.values)?;
                self.drop_in_place(x.dims, &mut n, dropped)?;
                let (dims, y) = self.backend.convolve(conv, x.dims, &n, plain(&add))?;
                (dims, y, statistics)
            }
        };
        let (x, by, added) = (x.kept(), by.cloned(), gradients(&add));
        Ok(self.output(dims, y, move |tape, dy| {
            let backend = &tape.backend;
            let values = x.values(backend)?;
            let own = || Norm { layer: norm, by: by.as_ref().map(|by| &*by.values) };
            let of_image = added.per_image.is_wanted();
            let fused = match dropped {
                None => {
                    let own = (own(), &statistics);
                    backend.normed_weight_gradients(own, conv, x.dims, &values, &dy, of_image)?
                }
                Some(_) => None,
            };
            let (weights, mut dn) = match fused {
                Some(weights) => (weights, backend.take(x.dims.iter().product())?),
                None => {
                    // The normalised map is not kept: it would be as large as `x`. Normalising again takes little time.
                    let mut n = backend.normalize_again(own(), x.dims, &values, &statistics)?;
                    tape.drop_in_place(x.dims, &mut n, dropped)?;
                    let weights =
                        backend.convolve_weight_gradients(conv, x.dims, &n, &dy, of_image)?;
                    // The normalised map is no longer needed, so its gradient overwrites it.
                    (weights, n)
                }
            };
            tape.record_convolution(conv, weights, &added.per_image)?;
            backend.convolve_input_gradient(conv, x.dims, &dy, &mut dn, false)?;
            tape.drop_in_place(x.dims, &mut dn, dropped)?;
            added.residual.add(backend, dy)?;
            tape.normalize_backward((norm, by.as_ref()), (&x, &values), &statistics, dn)
        }))
    }

    fn modulated_norm(
        &self,
        norm: &'n GroupNorm,
        x: &Map<B>,
        by: Option<&Map<B>>,
    ) -> Result<Map<B>> {
        shapes::modulated_norm(norm, x.dims.into(), by.map(|by| by.dims.into()))?;
        let own = Norm { layer: norm, by: by.map(|by| &*by.values) };
        let (n, statistics) = self.backend.normalize(own, x.dims, &x.values)?;
        let (x, by) = (x.kept(), by.cloned());
        Ok(self.output(x.dims, n, move |tape, dn| {
            let values = x.values(&tape.backend)?;
            tape.normalize_backward((norm, by.as_ref()), (&x, &values), &statistics, dn)
        }))
    }

    fn linear(&self, f: VectorActivation, linear: &'n Linear, x: &Map<B>) -> Result<Map<B>> {
        shapes::linear(linear, x.dims.into())?;
        let y = self.backend.linear(f, linear, x.batch(), &x.values)?;
        let x = x.clone();
        Ok(self.output([x.batch(), 1, 1, linear.bias.elem_count()], y, move |tape, dy| {
            let (dx, gradients) =
                tape.backend.linear_backward(f, linear, x.batch(), &x.values, &dy)?;
            tape.record([&linear.weight, &linear.bias], gradients);
            x.gradient.add(&tape.backend, dx)
        }))
    }

    fn add_class(&self, embedding: &'n Embedding, x: &Map<B>) -> Result<Map<B>> {
        shapes::embedding(embedding, x.dims.into())?;
        let classes = self.pass.classes()?.clone();
        let y = self.backend.add_class(embedding, &classes, &x.values)?;
        let gradient = x.gradient.clone();
        Ok(self.output(x.dims, y, move |tape, dy| {
            let table = tape.backend.add_class_backward(embedding, &classes, &dy)?;
            tape.record([&embedding.weight], [table]);
            gradient.add(&tape.backend, dy)
        }))
    }

    fn drop_maps(&self, x: &Map<B>, layer: u16, p: f64) -> Result<Map<B>> {
        check_fraction("dropout", p)?;
        let Some(dropout) = self.pass.dropout else { return Ok(x.clone()) };
        self.dropped(x, x.dims, dropout, layer, p)
    }

    fn drop_values(&self, x: &Map<B>, layer: u16, p: f64) -> Result<Map<B>> {
        check_fraction("dropout", p)?;
        let Some(dropout) = self.pass.dropout else { return Ok(x.clone()) };
        let [batch, h, w, channels] = x.dims;
        // Each value is a map of one pixel.
        self.dropped(x, [batch, 1, 1, h * w * channels], dropout, layer, p)
    }

    fn pool(&self, x: &Map<B>) -> Result<Map<B>> {
        shapes::pooling(x.dims.into())?;
        let [batch, h, w, channels] = x.dims;
        let y = self.backend.sum_pixels(x.dims, &x.values, 0.25)?;
        let (dims, gradient) = ([batch, h / 2, w / 2, channels], x.gradient.clone());
        Ok(self.output(dims, y, move |tape, dy| {
            gradient.add(&tape.backend, tape.backend.repeat_pixels(dims, &dy, 0.25)?)
        }))
    }

    fn upsample(&self, x: &Map<B>) -> Result<Map<B>> {
        let [batch, h, w, channels] = x.dims;
        let y = self.backend.repeat_pixels(x.dims, &x.values, 1.0)?;
        let (dims, gradient) = ([batch, 2 * h, 2 * w, channels], x.gradient.clone());
        Ok(self.output(dims, y, move |tape, dy| {
            gradient.add(&tape.backend, tape.backend.sum_pixels(dims, &dy, 1.0)?)
        }))
    }

    fn concatenate(&self, a: &Map<B>, b: &Map<B>) -> Result<Map<B>> {
        shapes::concatenation(a.dims.into(), b.dims.into())?;
        let [batch, h, w, _] = a.dims;
        let (pixels, channels) = (batch * h * w, [a.channels(), b.channels()]);
        let dims = [batch, h, w, channels[0] + channels[1]];
        let parts = Parts { channels, maps: [a.values.clone(), b.values.clone()] };
        let y = parts.concatenate(&self.backend, dims)?;
        let gradients = [a.gradient.clone(), b.gradient.clone()];
        let y = self.output(dims, y, move |tape, dy| {
            let parts = tape.backend.split(pixels, channels, &dy)?;
            gradients.iter().zip(parts).try_for_each(|(sum, d)| sum.add(&tape.backend, d))
        });
        Ok(Map { parts: Some(Rc::new(parts)), ..y })
    }

    fn attention(&self, qkv: &Map<B>, heads: usize) -> Result<Map<B>> {
        shapes::attention(qkv.dims.into(), heads)?;
        let [batch, h, w, c] = qkv.dims;
        let shape = AttentionShape::of_map(qkv.dims, heads);
        let (y, results) = self.backend.attention(batch, shape, &qkv.values)?;
        let qkv = qkv.kept();
        Ok(self.output([batch, h, w, c / 3], y, move |tape, dy| {
            let values = qkv.values(&tape.backend)?;
            let d = tape.backend.attention_backward(batch, shape, &values, &results, &dy)?;
            qkv.gradient.add(&tape.backend, d)
        }))
    }

    fn recomputable<const N: usize>(
        &self,
        inputs: [&Map<B>; N],
        part: impl Fn(&Self, [&Map<B>; N]) -> Result<Map<B>> + 'n,
    ) -> Result<Map<B>> {
        if self.recompute { self.recomputed(inputs, part) } else { part(self, inputs) }
    }

    fn recomputed<const N: usize>(
        &self,
        inputs: [&Map<B>; N],
        part: impl Fn(&Self, [&Map<B>; N]) -> Result<Map<B>> + 'n,
    ) -> Result<Map<B>> {
        if self.recording.get() != Recording::Parts {
            return part(self, inputs);
        }
        let y = self.while_recording(Recording::Nothing, || part(self, inputs))?;
        let inputs = inputs.map(Map::kept);
        let gradient = self.node(y.dims, move |tape, dy| {
            let inputs: Vec<Map<B>> =
                inputs.into_iter().map(|kept| kept.map(&tape.backend)).collect::<Result<_>>()?;
            // The recorded operations are those that the backward pass computes next.
            let again = || part(tape, std::array::from_fn(|i| &inputs[i]));
            tape.while_recording(Recording::Operations, again)?.gradient.add(&tape.backend, dy)
        });
        Ok(Map { gradient, ..y })
    }

    fn sinusoids(&self, sinusoids: &Sinusoids) -> Result<Map<B>> {
        let t = self.pass.timesteps()?;
        let dims = [t.dim(0)?, 1, 1, sinusoids.dim()];
        let values = self.backend.sinusoids(sinusoids, t)?;
        Ok(Map::new(dims, values, Gradient::UNWANTED))
    }
}
