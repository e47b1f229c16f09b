use std::rc::Rc;

use candle_core::{Result, Tensor};

use super::gemm::{As, How, Matrix};
use super::{Added, Element, Gpu, Memory, Pointer, THREADS, blocks_of, each, each_of};
use crate::Precision;
use crate::kernels::op::activation::Activation;
use crate::random::Address;

/// Each group's mean and reciprocal deviation.
pub(crate) struct NormStatistics(Memory);

/// A normalisation of maps of these dimensions.
pub(crate) struct Norm<'a> {
    pub dims: [usize; 4],
    pub groups: usize,
    pub weight: &'a Tensor,
    pub bias: &'a Tensor,
    pub activation: Activation,
}

impl Norm<'_> {
    fn count(&self) -> usize {
        self.dims.iter().product()
    }

    fn activation(&self) -> i32 {
        match self.activation {
            Activation::None => 0,
            Activation::Silu => 1,
        }
    }

    /// Channels, and pixels of an image.
    fn sizes(&self) -> (u32, u32) {
        (self.dims[3] as u32, (self.dims[1] * self.dims[2]) as u32)
    }

    /// What a thread takes at once of these maps.
    fn width(&self, gpu: &Gpu, element: Element, maps: &[Pointer]) -> Result<u32> {
        let mut addresses = vec![gpu.pointer(self.weight)?, gpu.pointer(self.bias)?];
        addresses.extend(maps);
        Ok(element.width(&[self.dims[3] / self.groups], &addresses))
    }
}

/// What can be computed of a map's values one by one.
impl Gpu {
    pub fn images_to_map(self: &Rc<Self>, x: &Tensor, element: Element) -> Result<Memory> {
        let (x, (_, channels, h, w)) = (x.contiguous()?, x.dims4()?);
        let count = x.elem_count();
        let y = self.take(count * element.bytes())?;
        self.launch(
            element,
            "images_to_map",
            each(count)?,
            (self.pointer(&x)?, y.pointer, channels as u32, (h * w) as u32, count as u32),
        )?;
        Ok(y)
    }

    pub fn map_to_images(&self, x: &Memory, dims: [usize; 4], element: Element) -> Result<Tensor> {
        let [batch, h, w, channels] = dims;
        let (images, pointer) = self.tensor(&[batch, channels, h, w])?;
        let count = images.elem_count();
        self.launch(
            element,
            "map_to_images",
            each(count)?,
            (x.pointer, pointer, channels as u32, (h * w) as u32, count as u32),
        )?;
        Ok(images)
    }

    /// Sines and cosines of timesteps (batch) of u32: (batch, 2 half).
    pub fn sinusoids(
        self: &Rc<Self>,
        t: &Tensor,
        half: usize,
        decay: f64,
        element: Element,
    ) -> Result<Memory> {
        let count = t.elem_count() * 2 * half;
        let y = self.take(count * element.bytes())?;
        self.launch(
            element,
            "sinusoids",
            each(count)?,
            (self.pointer(t)?, y.pointer, half as u32, decay, count as u32),
        )?;
        Ok(y)
    }

    pub fn add(&self, sum: &Memory, more: &Memory, count: usize, element: Element) -> Result<()> {
        self.add_at(sum.pointer, more.pointer, count, element)
    }

    pub(super) fn add_at(
        &self,
        sum: Pointer,
        more: Pointer,
        count: usize,
        element: Element,
    ) -> Result<()> {
        let width = element.width(&[count], &[sum, more]);
        self.launch(element, "add", each_of(count, width)?, (sum, more, width, count as u32))
    }

    /// Of each of `batch` images its channels, times their factors.
    pub fn scale_maps(
        self: &Rc<Self>,
        x: &Memory,
        mask: &Memory,
        dims: [usize; 4],
        element: Element,
    ) -> Result<Memory> {
        let [_, h, w, channels] = dims;
        let count = dims.iter().product::<usize>();
        let y = self.take(count * element.bytes())?;
        let maps = [x.pointer, mask.pointer, y.pointer];
        let width = element.width(&[channels], &maps);
        self.launch(
            element,
            "scale_maps",
            each_of(count, width)?,
            (
                x.pointer,
                mask.pointer,
                y.pointer,
                channels as u32,
                (h * w) as u32,
                width,
                count as u32,
            ),
        )?;
        Ok(y)
    }

    /// The mask (batch, channels) of a dropout at this address, from the sample `first` on.
    pub fn dropout_mask(
        self: &Rc<Self>,
        address: Address,
        first: usize,
        (batch, channels): (usize, usize),
        p: f64,
        element: Element,
    ) -> Result<Memory> {
        let count = batch * channels;
        let mask = self.take(count * element.bytes())?;
        let keep = (1.0 / (1.0 - p)) as f32;
        self.launch(
            element,
            "dropout_mask",
            each(count)?,
            (
                mask.pointer,
                address.seed,
                address.place,
                self.step(address.step)?,
                first as u32,
                p,
                keep,
                channels as u32,
                count as u32,
            ),
        )?;
        Ok(mask)
    }

    pub fn concatenate(
        self: &Rc<Self>,
        [a, b]: [&Memory; 2],
        channels: [usize; 2],
        pixels: usize,
        element: Element,
    ) -> Result<Memory> {
        let [first, second] = channels.map(|channels| channels as u32);
        let count = pixels * (channels[0] + channels[1]);
        let y = self.take(count * element.bytes())?;
        let width = element.width(&channels, &[a.pointer, b.pointer, y.pointer]);
        self.launch(
            element,
            "concatenate",
            each_of(count, width)?,
            (a.pointer, b.pointer, y.pointer, first, second, width, count as u32),
        )?;
        Ok(y)
    }

    pub fn split(
        self: &Rc<Self>,
        y: &Memory,
        channels: [usize; 2],
        pixels: usize,
        element: Element,
    ) -> Result<[Memory; 2]> {
        let [first, second] = channels.map(|channels| channels as u32);
        let a = self.take(pixels * channels[0] * element.bytes())?;
        let b = self.take(pixels * channels[1] * element.bytes())?;
        let count = pixels * (channels[0] + channels[1]);
        let width = element.width(&channels, &[y.pointer, a.pointer, b.pointer]);
        self.launch(
            element,
            "split",
            each_of(count, width)?,
            (y.pointer, a.pointer, b.pointer, first, second, width, count as u32),
        )?;
        Ok([a, b])
    }

    /// Adds to the map `y` (.., channels), images of so many pixels, a bias and what else there is.
    pub(super) fn add_to_map(
        &self,
        y: &Memory,
        [batch, pixels, channels]: [usize; 3],
        added: &Added<'_>,
        element: Element,
    ) -> Result<()> {
        let pointer =
            |memory: Option<&Memory>| memory.map_or(Pointer::NONE, |memory| memory.pointer);
        let (per_image, residual) = (pointer(added.per_image), pointer(added.residual));
        let (bias, count) = (self.pointer(added.bias)?, batch * pixels * channels);
        let width = element.width(&[channels], &[y.pointer, bias, per_image, residual]);
        self.launch(
            element,
            "add_to_map",
            each_of(count, width)?,
            (
                y.pointer,
                bias,
                per_image,
                residual,
                channels as u32,
                pixels as u32,
                width,
                count as u32,
            ),
        )
    }

    /// Writes the sums over the pixels of each image, (batch, channels) of f32, and the same as maps are
    /// kept where that is asked for.
    pub(super) fn sums_by_image(
        &self,
        x: &Memory,
        [batch, pixels, channels]: [usize; 3],
        sums: Pointer,
        also: Option<&Memory>,
        element: Element,
    ) -> Result<()> {
        let width = element.width(&[channels], &[x.pointer]);
        let grid = (batch as u32, (channels as u32).div_ceil(32 * width));
        let also = also.map_or(Pointer::NONE, |also| also.pointer);
        self.launch(
            element,
            "sums_by_image",
            blocks_of(grid, (THREADS, 1)),
            (x.pointer, sums, also, channels as u32, pixels as u32, width),
        )
    }

    /// Writes the sums over `rows` rows of f32 to a vector.
    pub(super) fn sum_columns(&self, x: &Memory, sums: &Tensor, rows: usize) -> Result<()> {
        let columns = sums.elem_count();
        let grid = (columns.div_ceil(32) as u32, 1);
        self.launch(
            Element::F32,
            "column_sums",
            blocks_of(grid, (32, 8)),
            (x.pointer, self.pointer(sums)?, columns as u32, rows as u32),
        )
    }
}

/// Normalisation.
impl Gpu {
    pub fn normalize(
        self: &Rc<Self>,
        norm: &Norm<'_>,
        x: &Memory,
        element: Element,
    ) -> Result<(Memory, NormStatistics)> {
        let (batch, (channels, pixels)) = (norm.dims[0], norm.sizes());
        let y = self.take(norm.count() * element.bytes())?;
        let statistics = self.take(batch * norm.groups * 2 * Element::F32.bytes())?;
        let width = norm.width(self, element, &[x.pointer, y.pointer])?;
        let grid = (batch as u32, norm.groups as u32);
        self.launch(
            element,
            "normalize",
            blocks_of(grid, (THREADS, 1)),
            (
                x.pointer,
                y.pointer,
                self.pointer(norm.weight)?,
                self.pointer(norm.bias)?,
                statistics.pointer,
                norm.activation(),
                channels,
                pixels,
                width,
            ),
        )?;
        Ok((y, NormStatistics(statistics)))
    }

    pub fn normalize_again(
        self: &Rc<Self>,
        norm: &Norm<'_>,
        x: &Memory,
        NormStatistics(statistics): &NormStatistics,
        element: Element,
    ) -> Result<Memory> {
        let (channels, pixels) = norm.sizes();
        let y = self.take(norm.count() * element.bytes())?;
        let width = norm.width(self, element, &[x.pointer, y.pointer])?;
        self.launch(
            element,
            "normalize_again",
            each_of(norm.count(), width)?,
            (
                x.pointer,
                y.pointer,
                self.pointer(norm.weight)?,
                self.pointer(norm.bias)?,
                statistics.pointer,
                norm.activation(),
                channels,
                pixels,
                norm.groups as u32,
                width,
                norm.count() as u32,
            ),
        )?;
        Ok(y)
    }

    /// Makes `d` the gradient of the input, and writes those of weight and bias.
    #[allow(clippy::too_many_arguments)]
    pub fn normalize_backward(
        self: &Rc<Self>,
        norm: &Norm<'_>,
        x: &Memory,
        NormStatistics(statistics): &NormStatistics,
        d: &Memory,
        more: Option<&Memory>,
        [d_weight, d_bias]: [&Tensor; 2],
        element: Element,
    ) -> Result<()> {
        let (batch, (channels, pixels)) = (norm.dims[0], norm.sizes());
        let [for_weight, for_bias] = [
            self.take(batch * norm.dims[3] * Element::F32.bytes())?,
            self.take(batch * norm.dims[3] * Element::F32.bytes())?,
        ];
        let more = more.map_or(Pointer::NONE, |more| more.pointer);
        let width = norm.width(self, element, &[x.pointer, d.pointer, more])?;
        let grid = (batch as u32, norm.groups as u32);
        self.launch(
            element,
            "normalize_backward",
            blocks_of(grid, (THREADS, 1)),
            (
                x.pointer,
                d.pointer,
                more,
                self.pointer(norm.weight)?,
                self.pointer(norm.bias)?,
                statistics.pointer,
                for_weight.pointer,
                for_bias.pointer,
                norm.activation(),
                channels,
                pixels,
                width,
            ),
        )?;
        self.sum_columns(&for_weight, d_weight, batch)?;
        self.sum_columns(&for_bias, d_bias, batch)
    }
}

/// A linear layer of activated vectors (batch, in).
pub(crate) struct LinearLayer<'a> {
    pub precision: Precision,
    pub batch: usize,
    /// (out, in)
    pub weight: &'a Tensor,
    pub bias: &'a Tensor,
    /// 0 for none, 1 for SiLU, 2 for GELU.
    pub activation: i32,
}

impl LinearLayer<'_> {
    fn element(&self) -> Element {
        Element::of(self.precision)
    }

    fn sizes(&self) -> Result<(usize, usize)> {
        self.weight.dims2()
    }

    /// The weights as maps are kept.
    fn weights(&self, gpu: &Rc<Gpu>) -> Result<(Memory, Matrix)> {
        let (element, (output, input)) = (self.element(), self.sizes()?);
        let count = output * input;
        let weights = gpu.take(count * element.bytes())?;
        gpu.launch(
            element,
            "cast",
            each(count)?,
            (gpu.pointer(self.weight)?, weights.pointer, count as u32),
        )?;
        let matrix = Matrix::new(weights.pointer, output, input, element);
        Ok((weights, matrix))
    }

    fn activated(&self, gpu: &Rc<Gpu>, x: &Memory) -> Result<(Memory, Matrix)> {
        let (element, (_, input)) = (self.element(), self.sizes()?);
        let count = self.batch * input;
        let y = gpu.take(count * element.bytes())?;
        gpu.launch(
            element,
            "activate",
            each(count)?,
            (x.pointer, y.pointer, self.activation, count as u32),
        )?;
        let matrix = Matrix::new(y.pointer, self.batch, input, element);
        Ok((y, matrix))
    }

    pub fn forward(&self, gpu: &Rc<Gpu>, x: &Memory) -> Result<Memory> {
        let (element, (output, _)) = (self.element(), self.sizes()?);
        let count = self.batch * output;
        let y = gpu.take(count * element.bytes())?;
        let (_x, x) = self.activated(gpu, x)?;
        let (_weights, weights) = self.weights(gpu)?;
        let d = Matrix::new(y.pointer, self.batch, output, element);
        let (x, weights) = ((x, As::Stored), (weights, As::Transposed));
        gpu.multiply(self.precision, x, weights, d, How::PLAIN)?;
        let bias = Added { bias: self.bias, per_image: None, residual: None };
        gpu.add_to_map(&y, [1, self.batch, output], &bias, element)?;
        Ok(y)
    }

    /// The gradient of the input; writes those of weight and bias.
    pub fn backward(
        &self,
        gpu: &Rc<Gpu>,
        x: &Memory,
        dy: &Memory,
        [d_weight, d_bias]: [&Tensor; 2],
    ) -> Result<Memory> {
        let (element, (output, input)) = (self.element(), self.sizes()?);
        let d = Matrix::new(dy.pointer, self.batch, output, element);
        let (_activated, activated) = self.activated(gpu, x)?;
        let gradient = Matrix::new(gpu.pointer(d_weight)?, output, input, Element::F32);
        let (transposed, activated) = ((d, As::Transposed), (activated, As::Stored));
        gpu.multiply(self.precision, transposed, activated, gradient, How::PLAIN)?;

        // The batch as pixels of one image.
        gpu.sums_by_image(dy, [1, self.batch, output], gpu.pointer(d_bias)?, None, element)?;

        let count = self.batch * input;
        let dx = gpu.take(count * element.bytes())?;
        let (_weights, weights) = self.weights(gpu)?;
        let to = Matrix::new(dx.pointer, self.batch, input, element);
        gpu.multiply(self.precision, (d, As::Stored), (weights, As::Stored), to, How::PLAIN)?;
        gpu.launch(
            element,
            "activate_backward",
            each(count)?,
            (x.pointer, dx.pointer, self.activation, count as u32),
        )?;
        Ok(dx)
    }
}

/// Attention of all positions to all, of each of a batch; q, k and v lie side by side.
pub(crate) struct Attention {
    pub precision: Precision,
    pub batch: usize,
    pub positions: usize,
    pub channels: usize,
}

impl Attention {
    fn element(&self) -> Element {
        Element::of(self.precision)
    }

    /// q, k or v (0, 1 or 2) in memory that holds all three.
    fn part(&self, qkv: &Memory, i: usize) -> Matrix {
        let pointer = qkv.pointer.offset(i * self.channels * self.element().bytes());
        let stride = 3 * self.channels;
        Matrix::new(pointer, self.positions, self.channels, self.element())
            .batched(stride, self.positions * stride)
    }

    fn output(&self, y: &Memory) -> Matrix {
        Matrix::new(y.pointer, self.positions, self.channels, self.element())
            .batched(self.channels, self.positions * self.channels)
    }

    fn scores(&self, memory: &Memory) -> Matrix {
        Matrix::new(memory.pointer, self.positions, self.positions, self.element())
            .batched(self.positions, self.positions * self.positions)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.channels as f32).sqrt()
    }

    fn product(
        &self,
        gpu: &Gpu,
        a: (Matrix, As),
        b: (Matrix, As),
        d: Matrix,
        alpha: f32,
    ) -> Result<()> {
        gpu.multiply(self.precision, a, b, d, How { batch: self.batch, alpha, accumulate: false })
    }

    /// How much each position attends to each.
    fn probabilities(&self, gpu: &Rc<Gpu>, qkv: &Memory) -> Result<Memory> {
        let rows = self.batch * self.positions;
        let scores = gpu.take(rows * self.positions * self.element().bytes())?;
        let (q, k) = ((self.part(qkv, 0), As::Stored), (self.part(qkv, 1), As::Transposed));
        self.product(gpu, q, k, self.scores(&scores), self.scale())?;
        gpu.launch(
            self.element(),
            "softmax",
            blocks_of((rows as u32, 1), (THREADS, 1)),
            (scores.pointer, self.positions as u32),
        )?;
        Ok(scores)
    }

    pub fn forward(&self, gpu: &Rc<Gpu>, qkv: &Memory) -> Result<Memory> {
        let p = self.probabilities(gpu, qkv)?;
        let count = self.batch * self.positions * self.channels;
        let y = gpu.take(count * self.element().bytes())?;
        let (p, v) = ((self.scores(&p), As::Stored), (self.part(qkv, 2), As::Stored));
        self.product(gpu, p, v, self.output(&y), 1.0)?;
        Ok(y)
    }

    pub fn backward(&self, gpu: &Rc<Gpu>, qkv: &Memory, dy: &Memory) -> Result<Memory> {
        let rows = self.batch * self.positions;
        let p = self.probabilities(gpu, qkv)?;
        let d = gpu.take(rows * self.positions * self.element().bytes())?;
        let dqkv = gpu.take(rows * 3 * self.channels * self.element().bytes())?;
        let [q, k, v] = [0, 1, 2].map(|i| self.part(qkv, i));
        let [dq, dk, dv] = [0, 1, 2].map(|i| self.part(&dqkv, i));
        let (dy, scores, ds) = (self.output(dy), self.scores(&p), self.scores(&d));

        self.product(gpu, (scores, As::Transposed), (dy, As::Stored), dv, 1.0)?;
        self.product(gpu, (dy, As::Stored), (v, As::Transposed), ds, 1.0)?;
        gpu.launch(
            self.element(),
            "softmax_backward",
            blocks_of((rows as u32, 1), (THREADS, 1)),
            (p.pointer, d.pointer, self.positions as u32),
        )?;
        self.product(gpu, (ds, As::Stored), (k, As::Stored), dq, self.scale())?;
        self.product(gpu, (ds, As::Transposed), (q, As::Stored), dk, self.scale())?;
        Ok(dqkv)
    }
}
