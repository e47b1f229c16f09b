//! The gradient of the weights: the sum over the output's pixels of `dy p^T`, where `p` is the patch of the pixel.
//!
//! A panel holds some values of the patches of a block of pixels. The values are copied from the map, and multiplied by
//! the gradients of these pixels. A task sums some panels over a part of the batch. The order of the sums depends only
//! on the shapes.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::super::parts::parts;
use crate::kernels::cpu::gemm::micro::{Left, PANEL, PanelProduct, panel_product};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::memory::sized;
use crate::kernels::cpu::transpose::transpose;
use crate::kernels::op::conv::ConvShape;

/// Pixels of a block: the depth of a product.
const BLOCK: usize = 192;

/// Maximum number of panels in a task. Their sums stay in the second-level cache for a usual number of channels.
const MAX_PANELS: usize = 16;

thread_local! {
    /// A panel, reused from call to call. Nothing may wait for other threads while it is borrowed: this thread could be
    /// given work that borrows it again.
    static COPIED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Writes the gradient of the weights, (out, in, height, width), from `x` (batch, h, w, in) and
/// `dy` (batch, h, w, out).
pub(super) fn weight_gradient(
    isa: Isa,
    shape: &ConvShape,
    x: &[f32],
    dy: &[f32],
    dweight: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let (c_out, patch) = (shape.c_out, shape.patch());
    let pixels = shape.batch * shape.h_out * shape.w_out;
    assert!(dy.len() == pixels * c_out && dweight.len() == c_out * patch);
    let panels = patch.div_ceil(PANEL);
    let panel_len = c_out * PANEL;
    let part_len = panels * panel_len;
    let part = pixels.div_ceil(parts(pixels, part_len));
    let parts = pixels.div_ceil(part);
    // Work for every thread.
    let groups = (2 * rayon::current_num_threads()).div_ceil(parts);
    let group = panels.div_ceil(groups).clamp(1, MAX_PANELS);
    let sums = sized(scratch, parts * part_len);

    sums.par_chunks_mut(part_len).enumerate().for_each(|(i, sums)| {
        let part = i * part..((i + 1) * part).min(pixels);
        sums.par_chunks_mut(group * panel_len).enumerate().for_each(|(i, sums)| {
            COPIED.with_borrow_mut(|copied| {
                let copied = sized(copied, BLOCK * PANEL);
                for first in part.clone().step_by(BLOCK) {
                    let block = first..(first + BLOCK).min(part.end);
                    for (j, sums) in sums.chunks_mut(panel_len).enumerate() {
                        let values = (i * group + j) * PANEL;
                        copy_values(shape, x, block.clone(), values..values + PANEL, copied);
                        let product = PanelProduct {
                            c: sums,
                            c_row: PANEL,
                            rows: c_out,
                            a: Left::new(&dy[first * c_out..], 1, c_out),
                            b: copied,
                            depth: block.len(),
                            accumulate: first > part.start,
                            next: &[],
                        };
                        panel_product(isa, product);
                    }
                }
            });
        });
    });
    let sums = &*sums;
    // Each output channel, from (height, width, in) to (in, height, width).
    let taps = shape.taps();
    dweight.par_chunks_mut(patch).enumerate().for_each(|(o, dweight)| {
        COPIED.with_borrow_mut(|copied| {
            let copied = sized(copied, panels * PANEL);
            for (panel, sum) in copied.chunks_exact_mut(PANEL).enumerate() {
                let at =
                    |part: usize| &sums[part * part_len + panel * panel_len + o * PANEL..][..PANEL];
                sum.copy_from_slice(at(0));
                for part in 1..parts {
                    sum.iter_mut().zip(at(part)).for_each(|(sum, value)| *sum += value);
                }
            }
            transpose(isa, copied, shape.c_in, dweight, taps, (taps, shape.c_in));
        });
    });
}

/// Values of a patch that lie side by side in the map.
struct Run {
    /// Row and column of the kernel.
    ky: usize,
    kx: usize,
    /// The position among the values of pixel `kx`, or of the pixels after it.
    skipped: usize,
    /// The place in a row of the panel.
    place: Range<usize>,
}

/// Divides some values of a patch into runs.
fn runs(shape: &ConvShape, values: Range<usize>) -> Vec<Run> {
    let [height, width] = shape.kernel;
    // Neighbours in the patch are neighbours in the map, unless it is upsampled.
    let taps = if shape.upsamples() { 1 } else { width };
    let len = taps * shape.c_in;
    let of_run = |i: usize| {
        let (first, last) = (values.start.max(i * len), values.end.min((i + 1) * len));
        (first < last).then(|| Run {
            ky: i * taps / width,
            kx: i * taps % width,
            skipped: first - i * len,
            place: first - values.start..last - values.start,
        })
    };
    (0..height * width / taps).filter_map(of_run).collect()
}

/// Copies some values of the patches of a block of the batch's pixels to `to`, one row of [`PANEL`] values per pixel.
/// Values outside of the map, and after the last one of a patch, are 0.
fn copy_values(
    shape: &ConvShape,
    x: &[f32],
    pixels: Range<usize>,
    values: Range<usize>,
    to: &mut [f32],
) {
    let &ConvShape { h, w, c_in, h_out, w_out, .. } = shape;
    let ([map_h, _], [above, _]) = (shape.map(), shape.padding());
    let scale = if shape.upsamples() { 2 } else { 1 };
    if values.end > shape.patch() {
        to.fill(0.0);
    }
    let runs = runs(shape, values);
    let mut first = pixels.start;
    while first < pixels.end {
        // The pixels of one line of the output.
        let (line, ox) = (first / w_out, first % w_out);
        let count = (w_out - ox).min(pixels.end - first);
        let (image, oy) = (line / h_out, line % h_out);
        let to = &mut to[(first - pixels.start) * PANEL..][..count * PANEL];
        for run in &runs {
            let y = (oy * shape.stride() + run.ky).checked_sub(above).filter(|&y| y < map_h);
            match y {
                Some(y) => {
                    let from = &x[(image * h + y / scale) * w * c_in..][..w * c_in];
                    copy_run(shape, from, ox, run, to);
                }
                None => to.chunks_exact_mut(PANEL).for_each(|to| to[run.place.clone()].fill(0.0)),
            }
        }
        first += count;
    }
}

/// Copies a run from a line of the map, for pixels `ox` and following of a line of the output.
fn copy_run(shape: &ConvShape, from: &[f32], ox: usize, run: &Run, to: &mut [f32]) {
    let (len, c_in) = (run.place.len(), shape.c_in as isize);
    let [_, map_w] = shape.map();
    for (i, to) in to.chunks_exact_mut(PANEL).enumerate() {
        let x = ((ox + i) * shape.stride() + run.kx) as isize - shape.padding()[1] as isize;
        let first = if shape.upsamples() {
            let inside = (0..map_w as isize).contains(&x);
            // The first value after the line, if the pixel is outside.
            if inside { x / 2 * c_in + run.skipped as isize } else { from.len() as isize }
        } else {
            x * c_in + run.skipped as isize
        };
        let inside = usize::try_from(first).ok().and_then(|first| from.get(first..first + len));
        match inside {
            // A constant length needs no call.
            Some(inside) if len == PANEL => to.copy_from_slice(&inside[..PANEL]),
            Some(inside) => to[run.place.clone()].copy_from_slice(inside),
            None => {
                let to = &mut to[run.place.clone()];
                to.fill(0.0);
                let before = first.min(0).unsigned_abs().min(len);
                let from = from.get(first.max(0) as usize..).unwrap_or_default();
                to[before..].iter_mut().zip(from).for_each(|(to, value)| *to = *value);
            }
        }
    }
}
