use rayon::prelude::*;

/// Number of rows that one thread handles at a time.
const ROWS: usize = 32;

/// Computes the sum of the singular values of a matrix whose rows have `n` values. There are at least as many rows.
/// Returns `None` if the values are not finite or too large.
///
/// Reflections make the matrix bidiagonal (Golub and Kahan 1965). The singular values are the positive eigenvalues of a
/// tridiagonal matrix with the same elements. Squares of singular values are never formed, so that the error is a small
/// multiple of the rounding of the largest one.
pub(super) fn sum_of_singular_values(matrix: Vec<f64>, n: usize) -> Option<f64> {
    let elements = bidiagonal(matrix, n);
    if !elements.iter().all(|element| element.is_finite()) {
        return None;
    }
    let values = tridiagonal_eigenvalues(vec![0.0; elements.len() + 1], elements)?;
    // For each singular value there is an eigenvalue of either sign.
    Some(values.iter().map(|value| value.abs()).sum::<f64>() / 2.0)
}

/// The reflection `1 - scale v v^T` that maps a vector to `(value, 0, ...)`.
struct Reflection {
    v: Vec<f64>,
    scale: f64,
    value: f64,
}

impl Reflection {
    /// Golub and Van Loan 2013, algorithm 5.1.1, with `v[0]` not scaled to 1.
    fn of(mut x: Vec<f64>) -> Self {
        let norm = dot(&x, &x).sqrt();
        let Some(first) = x.first_mut().filter(|_| norm != 0.0) else {
            return Self { v: x, scale: 0.0, value: 0.0 };
        };
        let value = -norm.copysign(*first);
        // Both terms have the same sign.
        *first -= value;
        let scale = 1.0 / (norm * first.abs());
        Self { v: x, scale, value }
    }
}

/// Makes a matrix bidiagonal. Returns the elements of the diagonal and of the one above it in turn: d, e, d, ..., d.
fn bidiagonal(mut a: Vec<f64>, n: usize) -> Vec<f64> {
    let mut elements = Vec::with_capacity(2 * n);
    let column = a.iter().step_by(n.max(1)).copied().collect();
    let mut left = Reflection::of(column);
    let mut reflected = reflect_columns(&a, n, 0, &left);
    for k in 0..n {
        elements.push(left.value);
        let width = n - k - 1;
        if width == 0 {
            break;
        }
        // Row `k` after the reflection of the columns.
        let above = a[k * n + k + 1..][..width].iter().zip(&reflected);
        let right = Reflection::of(above.map(|(a, r)| a - left.v[0] * r).collect());
        elements.push(right.value);
        let shared = dot(&reflected, &right.v);
        let below = &mut a[(k + 1) * n..];
        // The reflections of columns and rows together subtract `u w^T + z v^T`.
        let z: Vec<f64> = below
            .par_chunks_exact(n)
            .zip(&left.v[1..])
            .with_min_len(ROWS)
            .map(|(row, u)| right.scale * (dot(&row[k + 1..], &right.v) - u * shared))
            .collect();
        let u = &left.v[1..];
        let column = below.chunks_exact(n).zip(u.iter().zip(&z));
        let column = column.map(|(row, (u, z))| row[k + 1] - u * reflected[0] - z * right.v[0]);
        let next = Reflection::of(column.collect());
        // One pass over the matrix subtracts, and begins the reflection of the next column.
        let parts: Vec<Vec<f64>> = below
            .par_chunks_mut(ROWS * n)
            .enumerate()
            .map(|(part, rows)| {
                let mut sum = vec![0.0; width - 1];
                for (row, i) in rows.chunks_exact_mut(n).zip(part * ROWS..) {
                    let (u, z, next) = (u[i], z[i], next.v[i]);
                    let terms = reflected[1..].iter().zip(&right.v[1..]).zip(&mut sum);
                    for (a, ((w, v), sum)) in row[k + 2..].iter_mut().zip(terms) {
                        *a -= u * w + z * v;
                        *sum += next * *a;
                    }
                }
                sum
            })
            .collect();
        reflected = sums(parts, width - 1, next.scale);
        left = next;
    }
    elements
}

/// Computes `scale u^T A` for the rows from `k` and the columns after `k`.
fn reflect_columns(a: &[f64], n: usize, k: usize, left: &Reflection) -> Vec<f64> {
    let width = n.saturating_sub(k + 1);
    let parts = a[k * n..].par_chunks(ROWS * n.max(1)).zip(left.v.par_chunks(ROWS));
    let parts = parts.map(|(rows, u)| {
        let mut sum = vec![0.0; width];
        for (row, u) in rows.chunks_exact(n).zip(u) {
            sum.iter_mut().zip(&row[k + 1..]).for_each(|(sum, a)| *sum += u * a);
        }
        sum
    });
    sums(parts.collect(), width, left.scale)
}

/// Adds vectors in their order, and scales the sum.
fn sums(parts: Vec<Vec<f64>>, len: usize, scale: f64) -> Vec<f64> {
    let mut sum = vec![0.0; len];
    for part in parts {
        sum.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
    }
    sum.iter_mut().for_each(|sum| *sum *= scale);
    sum
}

/// A sum in eight interleaved parts, which vectors compute.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut parts = [0.0; 8];
    let (a_whole, a_rest) = a.as_chunks::<8>();
    let (b_whole, b_rest) = b.as_chunks::<8>();
    for (a, b) in a_whole.iter().zip(b_whole) {
        for ((part, a), b) in parts.iter_mut().zip(a).zip(b) {
            *part += a * b;
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    parts.iter().sum::<f64>() + rest
}

/// Computes the eigenvalues of the symmetric tridiagonal matrix with this diagonal and these elements beside it, by
/// implicit QL steps (Golub and Van Loan 2013, section 8.3). Returns `None` if they do not converge, which finite
/// elements do in a few steps each.
fn tridiagonal_eigenvalues(mut d: Vec<f64>, mut e: Vec<f64>) -> Option<Vec<f64>> {
    const STEPS: usize = 100;
    let largest = d.iter().chain(&e).fold(0.0, |largest: f64, value| largest.max(value.abs()));
    let negligible = largest * f64::EPSILON / 64.0;
    e.push(0.0);
    for first in 0..d.len() {
        let mut steps = 0;
        loop {
            // The block from `first` to `last` does not touch the rest. A NaN is never negligible.
            let last = (first..d.len()).find(|&k| e[k].abs() <= negligible)?;
            if last == first {
                break;
            }
            steps += 1;
            if steps > STEPS {
                return None;
            }
            // Wilkinson's shift: the eigenvalue of the first 2 x 2 block that is nearer to its first element.
            let half = (d[first + 1] - d[first]) / (2.0 * e[first]);
            let shift = d[first] - e[first] / (half + half.hypot(1.0).copysign(half));
            // A rotation of the last two axes begins with the shifted matrix; the others restore the form.
            let (mut sin, mut cos, mut moved) = (1.0, 1.0, 0.0);
            let mut bulge = d[last] - shift;
            let mut whole = true;
            for i in (first..last).rev() {
                let (f, b) = (sin * e[i], cos * e[i]);
                let length = f.hypot(bulge);
                e[i + 1] = length;
                if length == 0.0 {
                    // The block has split.
                    d[i + 1] -= moved;
                    e[last] = 0.0;
                    whole = false;
                    break;
                }
                (sin, cos) = (f / length, bulge / length);
                bulge = d[i + 1] - moved;
                let turned = (d[i] - bulge) * sin + 2.0 * cos * b;
                moved = sin * turned;
                d[i + 1] = bulge + moved;
                bulge = cos * turned - b;
            }
            if whole {
                d[first] -= moved;
                e[first] = bulge;
                e[last] = 0.0;
            }
        }
    }
    Some(d)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sums that `numpy.linalg.svd(a, compute_uv=False).sum()` (numpy 2.4) computes in f64 for
    /// `i, j = numpy.indices((m, n)); a = numpy.sin(0.37 * i * i + 1.3 * i * j) + i / m`.
    #[test]
    fn sums_are_those_of_numpy() {
        for (m, n, expected) in [
            (5, 5, 7.202282590753276),
            (9, 4, 9.028684292888704),
            (64, 64, 265.404603342329),
            (200, 90, 606.8781643918661),
            (130, 130, 579.2249538624561),
        ] {
            let value = |i: f64, j: f64| (0.37 * i * i + 1.3 * i * j).sin() + i / m as f64;
            let a = (0..m * n).map(|k| value((k / n) as f64, (k % n) as f64)).collect();
            let found = sum_of_singular_values(a, n).unwrap();
            assert!((found / expected - 1.0).abs() < 1e-13, "{m} x {n}: {found}, not {expected}");
        }
    }

    #[test]
    fn singular_values_far_below_the_largest_are_not_lost() {
        // Two rotations of a diagonal matrix from 1 to 1e-14, whose squares have no digits beside 1.
        let diagonal = [1.0, 1e-7, 3e-10, 1e-14];
        let (sin, cos) = (0.6, 0.8);
        let mut a = vec![0.0; 16];
        a.iter_mut().step_by(5).zip(diagonal).for_each(|(a, d)| *a = d);
        for k in 0..4 {
            for (i, j) in [(0, 1), (1, 2), (2, 3)] {
                let (x, y) = (a[i * 4 + k], a[j * 4 + k]);
                (a[i * 4 + k], a[j * 4 + k]) = (cos * x - sin * y, sin * x + cos * y);
            }
        }
        let found = sum_of_singular_values(a, 4).unwrap() - 1.0;
        let expected: f64 = diagonal[1..].iter().sum();
        assert!((found - expected).abs() < 1e-15, "{found}, not {expected}");
    }

    #[test]
    fn zeros_and_single_columns_are_exact_and_infinities_are_none() {
        assert_eq!(sum_of_singular_values(vec![0.0; 12], 3), Some(0.0));
        for (column, expected) in [(vec![-3.0], 3.0), (vec![3.0, 4.0], 5.0)] {
            let found = sum_of_singular_values(column, 1).unwrap();
            assert!((found / expected - 1.0).abs() < 1e-15, "{found}, not {expected}");
        }
        assert_eq!(sum_of_singular_values(vec![1.0, f64::NAN, 0.0, 1.0], 2), None);
        assert_eq!(sum_of_singular_values(vec![1e200, 1.0, 0.0, 1e200], 2), None);
    }
}
