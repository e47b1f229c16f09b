//! The microkernel: the product of a left-hand side and one packed panel of a right-hand side.
//!
//! A tile of the result, up to 14 rows by two vectors, stays in registers during the loop over the
//! depth.

use crate::kernels::cpu::simd::{Simd, simd_fn};

/// Columns of a panel of a packed right-hand side. A multiple of two vectors of every instruction set.
pub(crate) const PANEL: usize = 32;

/// A left-hand side. The values of a row lie in runs of equal length: element (i, k) is at `i * row + k % run * col +
/// k / run * jump`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub col: usize,
    /// Values of a run: a divisor of the depth of the product, or a greater number than the depth.
    pub run: usize,
    /// The distance from one run to the next.
    pub jump: usize,
}

impl<'a> Left<'a> {
    /// The left-hand side whose element (i, k) is at `i * row + k * col`.
    pub(crate) fn new(data: &'a [f32], row: usize, col: usize) -> Self {
        Self { data, row, col, run: usize::MAX, jump: 0 }
    }
}

/// A product with one panel of columns: `c = a b`, or `c += a b` if `accumulate`.
pub(crate) struct PanelProduct<'a> {
    /// Row i of the result begins at `i * c_row`.
    pub c: &'a mut [f32],
    pub c_row: usize,
    pub rows: usize,
    /// The left-hand side, `rows` by `depth`.
    pub a: Left<'a>,
    /// The right-hand side, `depth` by [`PANEL`], row by row.
    pub b: &'a [f32],
    pub depth: usize,
    pub accumulate: bool,
    /// The right-hand side of the next product, or empty. Its rows are prefetched during this product, because packed
    /// weights may lie in main memory.
    pub next: &'a [f32],
}

simd_fn! {
    /// Computes a product with one panel. Each sum adds its terms in the order of the depth, for any
    /// number of rows.
    pub(crate) fn panel_product<S>(product: PanelProduct<'_>) {
        let PanelProduct { c, c_row, rows, a, b, depth, accumulate, next } = product;
        if rows == 0 {
            return;
        }
        assert!((rows - 1) * c_row + PANEL <= c.len());
        if let Some(last) = depth.checked_sub(1) {
            let (run, k) = (last / a.run, last.min(a.run - 1));
            assert!((rows - 1) * a.row + k * a.col + run * a.jump < a.data.len());
        }
        assert!(depth * PANEL <= b.len());
        // Tiles have nearly equal heights: a last tile of one or two rows would waste most of its loads.
        let tiles = rows.div_ceil(S::ROWS);
        for j in (0..PANEL).step_by(2 * S::WIDTH) {
            for tile in 0..tiles {
                let fetched = if (j, tile) == (0, 0) { next } else { &[] };
                let (first, last) = (tile * rows / tiles, (tile + 1) * rows / tiles);
                // SAFETY: by the assertions above, every element that the tile touches is within its
                // slice: rows are less than `rows`, columns less than `PANEL`.
                unsafe {
                    tile_product::<S>(
                        last - first,
                        Tile {
                            c: c.as_mut_ptr().add(first * c_row + j),
                            c_row,
                            a: a.data.as_ptr().add(first * a.row),
                            a_row: a.row,
                            a_col: a.col,
                            run: a.run,
                            jump: a.jump,
                            b: b.as_ptr().add(j),
                            depth,
                            accumulate,
                            // Rows that are in a cache already cost almost nothing.
                            next: if fetched.is_empty() { b } else { fetched }.as_ptr(),
                        },
                    );
                }
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Tile {
    c: *mut f32,
    c_row: usize,
    a: *const f32,
    a_row: usize,
    a_col: usize,
    run: usize,
    jump: usize,
    b: *const f32,
    depth: usize,
    accumulate: bool,
    /// Rows that are fetched to the second-level cache.
    next: *const f32,
}

/// # Safety
/// Each element of the tile must be within memory that may be read, or written for `c`.
#[inline(always)]
unsafe fn tile_product<S: Simd>(rows: usize, tile: Tile) {
    macro_rules! of_height {
        ($($height:literal)*) => {
            match rows {
                $($height if $height <= S::ROWS => {
                    // SAFETY: the caller guarantees the requirements.
                    unsafe { fixed_tile::<S, $height>(tile) }
                })*
                _ => assert!(rows == 0, "a tile of {rows} rows"),
            }
        };
    }
    of_height!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
}

/// Computes `M` rows by two vectors of columns, all in registers.
///
/// # Safety
/// The requirements of [`tile_product`] apply.
#[inline(always)]
unsafe fn fixed_tile<S: Simd, const M: usize>(tile: Tile) {
    let Tile {
        c,
        c_row,
        a: mut begin,
        a_row,
        a_col,
        run,
        jump,
        mut b,
        depth,
        accumulate,
        mut next,
    } = tile;
    // SAFETY: the caller guarantees each of these elements.
    unsafe {
        let mut sums = [[S::splat(0.0); 2]; M];
        if accumulate {
            for (i, sums) in sums.iter_mut().enumerate() {
                *sums = [S::load(c.add(i * c_row)), S::load(c.add(i * c_row + S::WIDTH))];
            }
        }
        let mut left = depth;
        while left > 0 {
            let len = left.min(run);
            let mut a = begin;
            for _ in 0..len {
                let columns = [S::load(b), S::load(b.add(S::WIDTH))];
                fetch_row(next);
                next = next.wrapping_add(PANEL);
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = S::splat(*a.add(i * a_row));
                    sums[0] = x.mul_add(columns[0], sums[0]);
                    sums[1] = x.mul_add(columns[1], sums[1]);
                }
                a = a.wrapping_add(a_col);
                b = b.wrapping_add(PANEL);
            }
            begin = begin.wrapping_add(jump);
            left -= len;
        }
        for (i, sums) in sums.iter().enumerate() {
            sums[0].store(c.add(i * c_row));
            sums[1].store(c.add(i * c_row + S::WIDTH));
        }
    }
}

/// Fetches a row of [`PANEL`] values, two cache lines, to the second-level cache.
#[inline(always)]
fn fetch_row(row: *const f32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch has no effect other than on caches, whatever the address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(row.cast());
            _mm_prefetch::<_MM_HINT_T1>(row.wrapping_add(PANEL / 2).cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}
