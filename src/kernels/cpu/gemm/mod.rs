//! Products of matrices in any layout. The right-hand side is packed into panels first, unless it has only a few columns
//! (`narrow`). Everything runs on the calling thread, so the order of sums is always the same.

pub(crate) mod micro;
mod narrow;
pub(crate) mod pack;

use std::cell::RefCell;

use self::micro::{Left, PANEL, PanelProduct, panel_product};
pub(crate) use self::narrow::NARROW;
use self::narrow::narrow_product;
use self::pack::{Mat, Panels};
use super::isa::Isa;
use super::memory::sized;

/// The greatest depth of a panel that is prefetched during the product with the panel before it. Two of these panels fill a
/// quarter of a usual second-level cache of 1 MiB.
const MOST_FETCHED: usize = 1024;

thread_local! {
    /// A panel, and a part of a product that does not fill one, reused from call to call. Nothing may
    /// wait for other threads while they are borrowed: this thread could be given work that borrows them
    /// again.
    static PANELS: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// Computes `c = a b`, or `c += a b` if `accumulate`. Rows of `c` begin `c_row` values apart.
pub(crate) fn gemm(isa: Isa, (c, c_row): (&mut [f32], usize), a: Mat, b: Mat, accumulate: bool) {
    PANELS.with_borrow_mut(|(packed, rest)| {
        let packed = sized(packed, b.rows * PANEL);
        for first in (0..b.cols).step_by(PANEL) {
            b.pack_panel(first, packed);
            let place = (first, b.cols, b.rows);
            multiply(isa, (&mut *c, c_row), a.left(b.rows), packed, place, accumulate, rest);
        }
    });
}

/// Computes [`gemm`] with a packed right-hand side.
pub(crate) fn gemm_packed(
    isa: Isa,
    (c, c_row): (&mut [f32], usize),
    a: Mat,
    b: Panels,
    accumulate: bool,
) {
    PANELS.with_borrow_mut(|(_, rest)| {
        for first in (0..b.cols).step_by(PANEL) {
            let place = (first, b.cols, b.rows);
            let (c, a) = ((&mut *c, c_row), a.left(b.rows));
            multiply(isa, c, a, b.panels_from(first), place, accumulate, rest);
        }
    });
}

/// The left-hand side of a convolution, which reads overlapping patches in place. Lines of pixels are `line` values
/// apart, and the patches of a line's pixels `pixel` values. A patch lies in runs of `run` values, `jump` values apart.
#[derive(Clone, Copy)]
pub(crate) struct Patches<'a> {
    pub data: &'a [f32],
    pub line: usize,
    pub pixels: usize,
    pub pixel: usize,
    pub run: usize,
    pub jump: usize,
}

impl<'a> Patches<'a> {
    /// Patches that do not overlap, of lines of `pixels` pixels.
    pub(crate) fn laid_out(patches: Mat<'a>, pixels: usize) -> Self {
        assert_eq!(patches.col_stride, 1);
        let pixel = patches.row_stride;
        let (line, run) = (pixels * pixel, usize::MAX);
        Self { data: patches.data, line, pixels, pixel, run, jump: 0 }
    }

    /// The patches of some lines, as left-hand sides: for each, its first pixel and its number of pixels.
    fn lefts(self, lines: usize) -> impl Iterator<Item = (usize, usize, Left<'a>)> {
        let Self { data, line, pixels, pixel: row, run, jump } = self;
        // Lines without zeros between them are one long line, which fills tiles better.
        let (lines, pixels) =
            if line == pixels * row { (1, lines * pixels) } else { (lines, pixels) };
        (0..lines).map(move |i| {
            (i * pixels, pixels, Left { data: &data[i * line..], row, col: 1, run, jump })
        })
    }
}

/// Adds to `c` the product of the patches of its pixels and a packed right-hand side. Pixels of `c` begin `c_row`
/// values apart.
pub(crate) fn gemm_patches(
    isa: Isa,
    (c, c_row): (&mut [f32], usize),
    lines: usize,
    a: Patches<'_>,
    b: Panels,
) {
    PANELS.with_borrow_mut(|(_, rest)| {
        for first in (0..b.cols).step_by(PANEL) {
            for (pixel, pixels, a) in a.lefts(lines) {
                let c = (&mut c[pixel * c_row..], c_row);
                let place = (first, b.cols, b.rows);
                multiply(isa, c, (pixels, a), b.panels_from(first), place, true, rest);
            }
        }
    });
}

/// Adds to `c` the product of the patches of its pixels and at most [`NARROW`] columns of `depth` values.
pub(crate) fn narrow_patches(
    isa: Isa,
    (c, c_row): (&mut [f32], usize),
    lines: usize,
    a: Patches<'_>,
    (b, depth): (&[f32], usize),
) {
    for (pixel, pixels, a) in a.lefts(lines) {
        narrow_product(isa, &mut c[pixel * c_row..], c_row, pixels, a, b, depth);
    }
}

/// Computes the columns of one panel, from `first` on, of a product with `cols` columns and sums of
/// `depth` terms. `b` begins with the panel.
fn multiply(
    isa: Isa,
    (c, c_row): (&mut [f32], usize),
    (rows, a): (usize, Left<'_>),
    b: &[f32],
    (first, cols, depth): (usize, usize, usize),
    accumulate: bool,
    rest: &mut Vec<f32>,
) {
    if rows == 0 {
        return;
    }
    // A larger panel would displace this one from the second-level cache.
    let next = if depth <= MOST_FETCHED { b.get(depth * PANEL..).unwrap_or_default() } else { &[] };
    let count = PANEL.min(cols - first);
    if count == PANEL {
        let c = &mut c[first..];
        return panel_product(isa, PanelProduct { c, c_row, rows, a, b, depth, accumulate, next });
    }
    let rest = sized(rest, rows * PANEL);
    let whole = PanelProduct { c: rest, c_row: PANEL, rows, a, b, depth, accumulate: false, next };
    panel_product(isa, whole);
    for (i, rest) in rest.chunks_exact(PANEL).enumerate() {
        let c = &mut c[i * c_row + first..][..count];
        if accumulate {
            c.iter_mut().zip(rest).for_each(|(c, rest)| *c += rest);
        } else {
            c.copy_from_slice(&rest[..count]);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::tests::{F32, Normals, roundings};
    use crate::random_inputs::inputs;

    fn is_that_of_the_definition(
        (m, n, k): (usize, usize, usize),
        (more_a, more_b, more_c): (usize, usize, usize),
        (transpose_a, transpose_b, accumulate): (bool, bool, bool),
        normals: Normals,
    ) {
        let size = |transpose, rows, cols| if transpose { (cols, rows) } else { (rows, cols) };
        let mat = |values, transpose, (rows, cols), stride| {
            let mat = Mat::with_stride(values, rows, cols, stride);
            if transpose { mat.transposed() } else { mat }
        };
        let (a_size, b_size) = (size(transpose_a, m, k), size(transpose_b, k, n));
        let (a_row, b_row, c_row) = (a_size.1 + more_a, b_size.1 + more_b, n + more_c);
        let (a, b_values) =
            (normals.values(0, a_size.0 * a_row), normals.values(1, b_size.0 * b_row));
        let before = normals.values(2, m * c_row);
        let at = |values: &[f32], transpose, row, i: usize, j: usize| {
            f64::from(values[if transpose { j * row + i } else { i * row + j }])
        };
        for isa in Isa::available() {
            let (a_mat, b_mat) =
                (mat(&a, transpose_a, a_size, a_row), mat(&b_values, transpose_b, b_size, b_row));
            let mut found = [before.clone(), before.clone()];
            gemm(isa, (&mut found[0], c_row), a_mat, b_mat, accumulate);
            let mut packed = vec![f32::NAN; 9];
            let b = b_mat.packed(&mut packed);
            gemm_packed(isa, (&mut found[1], c_row), a_mat, b, accumulate);
            assert_eq!(&found[0], &found[1]);
            let b = &b_values;
            for (place, found) in found[0].iter().enumerate() {
                let (i, j) = (place / c_row, place % c_row);
                let there = f64::from(before[place]);
                if j >= n {
                    assert_eq!(f64::from(*found), there, "beyond the row");
                    continue;
                }
                let mut sum = if accumulate { there } else { 0.0 };
                let mut magnitude = sum.abs();
                for l in 0..k {
                    let term = at(&a, transpose_a, a_row, i, l) * at(b, transpose_b, b_row, l, j);
                    (sum, magnitude) = (sum + term, magnitude + term.abs());
                }
                let (off, bound) = (
                    (f64::from(*found) - sum).abs(),
                    roundings((k + usize::from(accumulate)) as f64) * F32 * magnitude,
                );
                assert!(off <= bound, "{isa:?}: {found}, not {sum}: off by {off:e} > {bound:e}");
            }
        }
    }

    #[test]
    fn a_product_of_nothing_is_that_of_the_definition() {
        is_that_of_the_definition((0, 64, 0), (0, 0, 0), (false, false, false), Normals(4));
    }

    proptest! {
        #![proptest_config(inputs(96))]

        #[test]
        fn products_are_those_of_the_definition(
            sizes in (0usize..40, 0usize..70, 0usize..40),
            more in (0usize..5, 0usize..5, 0usize..5),
            how in any::<(bool, bool, bool)>(),
            seed: u64,
        ) {
            is_that_of_the_definition(sizes, more, how, Normals(seed));
        }
    }
}
