//! The fast way to compute a network on the CPU, in f32: each operation runs a kernel on plain
//! memory and notes how to go back through it. Memory of maps that are done with is used again.

use std::cell::RefCell;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::engine::{Add, Engine, VectorActivation};
use super::layers::{Conv2d, GROUPS, GroupNorm, Linear};
use super::pool::{Buffer, Pool};
use crate::kernels::{
    AttentionSizes, Convolution, Epilogue, Isa, Normalization, Workspace, add_values,
    linear_forward, linear_input_gradient, linear_weight_gradient, sum_over_batch, sums_by_image,
    with_values, with_values_mut,
};
use crate::{Dropout, Precision, Result};

/// A feature map (batch, height, width, channels), and its gradient on the way back.
#[derive(Clone)]
pub(super) struct Map {
    dims: [usize; 4],
    values: Rc<Buffer>,
    gradient: Gradient,
}

/// The gradient of a map, as far as it has been summed up. Operations that need no more of a map than
/// this keep no more of it.
#[derive(Clone, Default)]
struct Gradient {
    /// None where no gradient is wanted.
    sum: Option<Rc<RefCell<Option<Buffer>>>>,
}

impl Gradient {
    fn wanted() -> Self {
        Self { sum: Some(Rc::default()) }
    }

    /// What there is, which is then no longer there.
    fn take(&self) -> Option<Buffer> {
        self.sum.as_ref()?.borrow_mut().take()
    }

    fn add(&self, d: Buffer) {
        let Some(sum) = &self.sum else { return };
        let mut sum = sum.borrow_mut();
        match &mut *sum {
            Some(sum) => add_values(sum, &d),
            None => *sum = Some(d),
        }
    }

    /// Lets `f` write the gradient of `len` values, or add to it where it is told so.
    fn write(&self, pool: &Arc<Pool>, len: usize, f: impl FnOnce(&mut [f32], bool)) {
        let Some(sum) = &self.sum else { return };
        let there = sum.borrow_mut().take();
        let accumulate = there.is_some();
        let mut d = there.unwrap_or_else(|| pool.take(len));
        f(&mut d, accumulate);
        *sum.borrow_mut() = Some(d);
    }
}

impl Map {
    fn batch(&self) -> usize {
        self.dims[0]
    }

    fn channels(&self) -> usize {
        self.dims[3]
    }

    pub fn to_tensor(&self) -> Result<Tensor> {
        Ok(Tensor::from_slice(&self.values, &self.dims, &Device::Cpu)?)
    }
}

/// The gradients of what was added to a convolution's output.
#[derive(Default)]
struct Added {
    per_image: Gradient,
    residual: Gradient,
}

impl Added {
    fn new(add: &Add<'_, Map>) -> Self {
        let gradient =
            |map: Option<&Map>| map.map_or_else(Gradient::default, |m| m.gradient.clone());
        Self { per_image: gradient(add.per_image), residual: gradient(add.residual) }
    }
}

impl Drop for Tape<'_> {
    fn drop(&mut self) {
        self.pool.give_back(self.workspace.take());
    }
}

/// How to go back through an operation, from its output's gradient.
type Backward<'n> = Box<dyn FnOnce(&Tape<'n>, Buffer) -> Result<()> + 'n>;

pub(super) struct Tape<'n> {
    isa: Isa,
    precision: Precision,
    pool: &'n Arc<Pool>,
    /// None where nothing is noted, since there will be no way back.
    nodes: Option<RefCell<Vec<(Gradient, Backward<'n>)>>>,
    /// The gradients of weights, as far as the way back has led.
    weights: RefCell<Vec<(&'n Tensor, Tensor)>>,
    workspace: RefCell<Workspace>,
}

impl<'n> Tape<'n> {
    /// For a pass of this batch that is to be followed by [`backward`](Self::backward).
    pub fn recording(pool: &'n Arc<Pool>, precision: Precision, batch: usize) -> Self {
        pool.begin(batch, true);
        let mut tape = Self::new(pool, precision);
        tape.nodes = Some(RefCell::default());
        tape
    }

    /// For a pass forward only.
    pub fn forgetful(pool: &'n Arc<Pool>, precision: Precision, batch: usize) -> Self {
        pool.begin(batch, false);
        Self::new(pool, precision)
    }

    fn new(pool: &'n Arc<Pool>, precision: Precision) -> Self {
        let (weights, workspace) = (RefCell::default(), pool.workspace());
        let workspace = RefCell::new(workspace);
        Self { isa: Isa::detect(), precision, pool, nodes: None, weights, workspace }
    }

    /// A map of a tensor's values, which needs no gradient.
    pub fn input(&self, x: &Tensor) -> Result<Map> {
        let mut values = self.pool.take(x.elem_count());
        with_values([&x.contiguous()?], |[x]| {
            values.copy_from_slice(x);
            Ok(())
        })?;
        Ok(Map { dims: x.dims4()?.into(), values: Rc::new(values), gradient: Gradient::default() })
    }

    /// Goes back from the output `y`, with its gradient: the gradients of all weights.
    pub fn backward(&self, y: Map, dy: &Tensor) -> Result<GradStore> {
        let mut d = self.pool.take(y.values.len());
        with_values([dy], |[dy]| {
            d.copy_from_slice(dy);
            Ok(())
        })?;
        y.gradient.add(d);
        drop(y);
        if let Some(nodes) = &self.nodes {
            // A node is dropped when it is done with, and with it the maps that only it needed.
            while let Some((gradient, backward)) = { nodes.borrow_mut().pop() } {
                if let Some(dy) = gradient.take() {
                    backward(self, dy)?;
                }
            }
        }
        // The one way to an empty `GradStore`.
        let mut gradients = Tensor::zeros((), DType::F32, &Device::Cpu)?.backward()?;
        for (weight, mut gradient) in self.weights.take() {
            if let Some(other) = gradients.remove(weight) {
                gradient = (gradient + other)?;
            }
            gradients.insert(weight, gradient);
        }
        Ok(gradients)
    }

    /// An operation's output; `backward` is kept if there is a way back.
    fn output(
        &self,
        dims: [usize; 4],
        values: Buffer,
        backward: impl FnOnce(&Tape<'n>, Buffer) -> Result<()> + 'n,
    ) -> Map {
        let mut gradient = Gradient::default();
        if let Some(nodes) = &self.nodes {
            gradient = Gradient::wanted();
            nodes.borrow_mut().push((gradient.clone(), Box::new(backward)));
        }
        Map { dims, values: Rc::new(values), gradient }
    }

    /// Lets `write` write the gradient of a weight.
    fn weight_gradient(&self, weight: &'n Tensor, write: impl FnOnce(&mut [f32])) -> Result<()> {
        let gradient = self.pool.gradient(weight)?;
        with_values_mut(&gradient, |values| {
            write(values);
            Ok(())
        })?;
        self.weights.borrow_mut().push((weight, gradient));
        Ok(())
    }

    fn convolution(&self, conv: &Conv2d, x: [usize; 4]) -> Result<Convolution> {
        let sizes = Convolution::new(self.isa, x, conv.weight.shape(), conv.scale)?;
        Ok(sizes.with_precision(self.precision))
    }

    /// The convolution's output for `x` (of these dimensions).
    fn convolve(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        x: &[f32],
        add: &Add<'_, Map>,
    ) -> Result<([usize; 4], Buffer)> {
        let sizes = self.convolution(conv, dims)?;
        let mut y = self.pool.take(sizes.output().iter().product());
        with_values([&conv.weight, &conv.bias], |[weight, bias]| {
            let epilogue = Epilogue {
                bias: Some(bias),
                per_image: add.per_image.map(|map| &**map.values),
                residual: add.residual.map(|map| &**map.values),
                accumulate: false,
            };
            if conv.weight.track_op() {
                let mut workspace = self.workspace.borrow_mut();
                let weights = sizes.pack_for_now(weight, &mut workspace);
                sizes.forward(x, &weights, epilogue, &mut y);
                workspace.unpack(weights);
                return Ok(());
            }
            // Not packed by `get_or_init`: threads of the pool that wait for the first one would
            // keep it from ending. At worst it is done twice.
            let packed = &conv.packed[self.precision as usize];
            let weights = match packed.get() {
                Some(weights) => weights,
                None => {
                    let weights = sizes.pack(weight);
                    packed.get_or_init(|| weights)
                }
            };
            sizes.forward(x, weights, epilogue, &mut y);
            Ok(())
        })?;
        Ok((sizes.output(), y))
    }

    /// From a convolution's `dy` to the gradients of its weights and of what was added, and, by `dx`,
    /// to that of its input `x`, whose memory `dx` is given.
    fn convolve_backward<X: Deref<Target = [f32]>>(
        &self,
        conv: &'n Conv2d,
        dims: [usize; 4],
        x: X,
        dy: Buffer,
        added: Added,
        dx: impl FnOnce(&Convolution, &[f32], &[f32], X) -> Result<()>,
    ) -> Result<()> {
        let sizes = self.convolution(conv, dims)?;
        let [batch, _, _, channels] = sizes.output();
        let sums = sums_by_image(&dy, batch, channels);
        self.weight_gradient(&conv.bias, |d| sum_over_batch(&sums, d))?;
        added.per_image.write(self.pool, sums.len(), |d, accumulate| {
            for (d, sum) in d.iter_mut().zip(&sums) {
                *d = *sum as f32 + if accumulate { *d } else { 0.0 };
            }
        });
        self.weight_gradient(&conv.weight, |d| {
            sizes.weight_gradient(&x, &dy, d, &mut self.workspace.borrow_mut());
        })?;
        with_values([&conv.weight], |[weight]| Ok(dx(&sizes, &dy, weight, x)))??;
        added.residual.add(dy);
        Ok(())
    }

    /// Calls `f` with the normalisation.
    fn normalization<R>(
        &self,
        norm: &GroupNorm,
        f: impl FnOnce(Normalization<'_>) -> R,
    ) -> Result<R> {
        let GroupNorm { weight, bias, activation } = norm;
        Ok(with_values([weight, bias], |[weight, bias]| {
            let activation = *activation;
            Ok(f(Normalization { isa: self.isa, groups: GROUPS, activation, weight, bias }))
        })?)
    }
}

impl<'n> Engine<'n> for Tape<'n> {
    type Map = Map;

    fn conv(&self, conv: &'n Conv2d, x: &Map, add: Add<'_, Map>) -> Result<Map> {
        let (dims, y) = self.convolve(conv, x.dims, &x.values, &add)?;
        let (x, added) = (x.clone(), Added::new(&add));
        Ok(self.output(dims, y, move |tape, dy| {
            tape.convolve_backward(
                conv,
                x.dims,
                &**x.values,
                dy,
                added,
                |sizes, dy, weight, values| {
                    x.gradient.write(tape.pool, values.len(), |dx, accumulate| {
                        let workspace = &mut *tape.workspace.borrow_mut();
                        sizes.input_gradient(dy, weight, dx, accumulate, workspace);
                    });
                    Ok(())
                },
            )
        }))
    }

    fn norm_conv(
        &self,
        norm: &'n GroupNorm,
        conv: &'n Conv2d,
        x: &Map,
        add: Add<'_, Map>,
    ) -> Result<Map> {
        let mut n = self.pool.take(x.values.len());
        let stats = self.normalization(norm, |norm| norm.forward(x.batch(), &x.values, &mut n))?;
        let (dims, y) = self.convolve(conv, x.dims, &n, &add)?;
        let (x, added) = (x.clone(), Added::new(&add));
        Ok(self.output(dims, y, move |tape, dy| {
            // Not kept, but computed again: it is as large as the map, and soon there.
            let mut n = tape.pool.take(x.values.len());
            tape.normalization(norm, |norm| norm.forward_again(&x.values, &stats, &mut n))?;
            tape.convolve_backward(conv, x.dims, n, dy, added, |sizes, dy, weight, n| {
                // Nor is it needed any longer when its gradient takes its place.
                let mut dn = n;
                let workspace = &mut *tape.workspace.borrow_mut();
                sizes.input_gradient(dy, weight, &mut dn, false, workspace);
                let there = x.gradient.take();
                let (dweight, dbias) = tape.normalization(norm, |norm| {
                    norm.backward(&x.values, &stats, &mut dn, there.as_deref())
                })?;
                x.gradient.add(dn);
                tape.weight_gradient(&norm.weight, |d| d.copy_from_slice(&dweight))?;
                tape.weight_gradient(&norm.bias, |d| d.copy_from_slice(&dbias))?;
                Ok(())
            })
        }))
    }

    fn linear(&self, f: VectorActivation, linear: &'n Linear, x: &Map) -> Result<Map> {
        let output = linear.bias.elem_count();
        let activated =
            move |x: &Map| -> Vec<f32> { x.values.iter().map(|&x| f.value(x)).collect() };
        let mut y = self.pool.take(x.batch() * output);
        with_values([&linear.weight, &linear.bias], |[weight, bias]| {
            linear_forward(self.isa, &activated(x), weight, bias, &mut y);
            Ok(())
        })?;
        let x = x.clone();
        Ok(self.output([x.batch(), 1, 1, output], y, move |tape, dy| {
            let mut dx = tape.pool.take(x.values.len());
            with_values([&linear.weight], |[weight]| {
                linear_input_gradient(tape.isa, weight, output, &dy, &mut dx);
                Ok(())
            })?;
            tape.weight_gradient(&linear.weight, |d| {
                linear_weight_gradient(tape.isa, &activated(&x), output, &dy, d);
            })?;
            tape.weight_gradient(&linear.bias, |d| sum_over_batch(&dy, d))?;
            dx.iter_mut().zip(&**x.values).for_each(|(dx, &x)| *dx *= f.derivative(x));
            x.gradient.add(dx);
            Ok(())
        }))
    }

    fn drop_maps(&self, x: &Map, dropout: &Dropout, layer: u16, p: f64) -> Result<Map> {
        let c = x.channels();
        let mask = dropout.mask(layer, x.batch(), c, p, DType::F32, &Device::Cpu)?;
        let mask = mask.flatten_all()?.to_vec1::<f32>()?;
        let image = x.values.len() / x.batch();
        let scale = move |to: &mut [f32], from: &[f32]| {
            let images = to.par_chunks_mut(image).zip(from.par_chunks(image));
            images.zip(mask.par_chunks(c)).for_each(|((to, from), mask)| {
                for (to, from) in to.chunks_mut(c).zip(from.chunks(c)) {
                    to.iter_mut().zip(from).zip(mask).for_each(|((to, from), m)| *to = from * m);
                }
            });
        };
        let mut y = self.pool.take(x.values.len());
        scale(&mut y, &x.values);
        // Of `x` no more than its gradient is needed.
        let (dims, gradient) = (x.dims, x.gradient.clone());
        Ok(self.output(dims, y, move |tape, dy| {
            let mut dx = tape.pool.take(dy.len());
            scale(&mut dx, &dy);
            gradient.add(dx);
            Ok(())
        }))
    }

    fn concatenate(&self, a: &Map, b: &Map) -> Result<Map> {
        let [batch, h, w, _] = a.dims;
        let (first, second) = (a.channels(), b.channels());
        let mut y = self.pool.take(a.values.len() + b.values.len());
        let rows = a.values.par_chunks(w * first).zip(b.values.par_chunks(w * second));
        y.par_chunks_mut(w * (first + second)).zip(rows).for_each(|(y, (a, b))| {
            let pixels = a.chunks_exact(first).zip(b.chunks_exact(second));
            for (y, (a, b)) in y.chunks_exact_mut(first + second).zip(pixels) {
                y[..first].copy_from_slice(a);
                y[first..].copy_from_slice(b);
            }
        });
        let gradients = (a.gradient.clone(), b.gradient.clone());
        Ok(self.output([batch, h, w, first + second], y, move |tape, dy| {
            let pixels = batch * h * w;
            let mut da = tape.pool.take(pixels * first);
            let mut db = tape.pool.take(pixels * second);
            let rows = da.par_chunks_mut(w * first).zip(db.par_chunks_mut(w * second));
            dy.par_chunks(w * (first + second)).zip(rows).for_each(|(dy, (a, b))| {
                let pixels = a.chunks_exact_mut(first).zip(b.chunks_exact_mut(second));
                for (dy, (a, b)) in dy.chunks_exact(first + second).zip(pixels) {
                    a.copy_from_slice(&dy[..first]);
                    b.copy_from_slice(&dy[first..]);
                }
            });
            gradients.0.add(da);
            gradients.1.add(db);
            Ok(())
        }))
    }

    fn attention(&self, qkv: &Map) -> Result<Map> {
        let [batch, h, w, c] = qkv.dims;
        let sizes = AttentionSizes { isa: self.isa, positions: h * w, channels: c / 3 };
        let mut y = self.pool.take(qkv.values.len() / 3);
        sizes.forward(&qkv.values, &mut y);
        let qkv = qkv.clone();
        Ok(self.output([batch, h, w, c / 3], y, move |tape, dy| {
            let mut dqkv = tape.pool.take(qkv.values.len());
            sizes.backward(&qkv.values, &dy, &mut dqkv);
            qkv.gradient.add(dqkv);
            Ok(())
        }))
    }
}
