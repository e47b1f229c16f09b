//! The product of a left-hand side and a few columns, which would not fill a panel.

use super::micro::Left;
use crate::kernels::cpu::simd::{Simd, lanes, simd_fn};

/// The greatest number of columns.
pub(crate) const NARROW: usize = 4;

/// Rows that are computed at once: the values of a column are loaded once for all of them.
const ROWS: usize = 4;

simd_fn! {
    /// Adds to `c` the product of `rows` rows of `a` and of a right-hand side of at most [`NARROW`] columns. The runs of
    /// `a` are contiguous. Column j of the right-hand side is `b[j * depth..][..depth]`. Row i of `c` begins at
    /// `i * c_row`. The order of each sum does not depend on the number of rows.
    pub(crate) fn narrow_product<S>(
        c: &mut [f32],
        c_row: usize,
        rows: usize,
        a: Left<'_>,
        b: &[f32],
        depth: usize,
    ) {
        assert!(depth > 0 && a.col == 1);
        let columns = b.len() / depth;
        assert_eq!(b.len(), columns * depth);
        assert!(rows == 0 || (rows - 1) * c_row + columns <= c.len());
        let (run, k) = ((depth - 1) / a.run, (depth - 1).min(a.run - 1));
        assert!(rows == 0 || (rows - 1) * a.row + k + run * a.jump < a.data.len());
        macro_rules! of_width {
            ($($width:literal)*) => {
                match columns {
                    // SAFETY: by the assertions, the rows of `a` are within its slice.
                    $($width => unsafe { rows_of_width::<S, $width>(c, c_row, rows, a, b, depth) },)*
                    _ => assert!(columns == 0, "{columns} columns"),
                }
            };
        }
        of_width!(1 2 3 4);
    }
}

/// # Safety
/// `rows` rows of `a`, each of `depth` values, must be readable. `b` must have `N` columns of `depth` values.
#[inline(always)]
unsafe fn rows_of_width<S: Simd, const N: usize>(
    c: &mut [f32],
    c_row: usize,
    rows: usize,
    a: Left<'_>,
    b: &[f32],
    depth: usize,
) {
    let mut first = 0;
    while first < rows {
        // The last rows are computed together with some of those before them.
        let begin = if rows < ROWS { first } else { first.min(rows - ROWS) };
        let at = a.data[begin * a.row..].as_ptr();
        // SAFETY: the caller guarantees the requirements.
        unsafe {
            if rows < ROWS {
                let [sums] = sums::<S, N, 1>(at, &a, b, depth);
                add(&mut c[begin * c_row..], &sums);
                first += 1;
            } else {
                let sums = sums::<S, N, ROWS>(at, &a, b, depth);
                for (i, sums) in sums.iter().enumerate().skip(first - begin) {
                    add(&mut c[(begin + i) * c_row..], sums);
                }
                first = begin + ROWS;
            }
        }
    }
}

fn add<const N: usize>(c: &mut [f32], sums: &[f32; N]) {
    c[..N].iter_mut().zip(sums).for_each(|(c, sum)| *c += sum);
}

/// The products of `M` rows, of which the first is at `a`.
///
/// # Safety
/// The requirements of [`rows_of_width`] apply to these rows.
#[inline(always)]
unsafe fn sums<S: Simd, const N: usize, const M: usize>(
    a: *const f32,
    left: &Left<'_>,
    b: &[f32],
    depth: usize,
) -> [[f32; N]; M] {
    let mut vectors = [[S::splat(0.0); N]; M];
    // The values of a run that do not fill a vector, and at the end all values.
    let mut rest = [[0f32; N]; M];
    let (mut begin, mut from) = (a, 0);
    while from < depth {
        let run = left.run.min(depth - from);
        let whole = run / S::WIDTH * S::WIDTH;
        // SAFETY: the caller guarantees the rows, and `b` has `N` columns of `depth` values.
        unsafe {
            for k in (0..whole).step_by(S::WIDTH) {
                let mut columns = [S::splat(0.0); N];
                for (j, column) in columns.iter_mut().enumerate() {
                    *column = S::load(b.as_ptr().add(j * depth + from + k));
                }
                for (i, sums) in vectors.iter_mut().enumerate() {
                    let x = S::load(begin.add(i * left.row + k));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = x.mul_add(column, *sum);
                    }
                }
            }
            for k in whole..run {
                for (i, sums) in rest.iter_mut().enumerate() {
                    let x = *begin.add(i * left.row + k);
                    for (j, sum) in sums.iter_mut().enumerate() {
                        *sum += x * b[j * depth + from + k];
                    }
                }
            }
        }
        begin = begin.wrapping_add(left.jump);
        from += run;
    }
    for (sums, vectors) in rest.iter_mut().zip(vectors) {
        for (sum, vector) in sums.iter_mut().zip(vectors) {
            for lane in lanes(vector) {
                *sum += lane;
            }
        }
    }
    rest
}
