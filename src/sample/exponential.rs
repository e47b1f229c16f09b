//! Steps of exponential integrators. Lu et al. 2022 (DPM-Solver++), equation 8; Zhao et al. 2023 (UniPC), section 3.
//!
//! With `h = lambda' - lambda`, the probability-flow ODE has the exact solution
//!
//! ```text
//! x' = sqrt((1 - abar') / (1 - abar)) x + sqrt(abar') integral over d from 0 to h of e^(d - h) x_0(lambda + d)
//! ```
//!
//! The integral needs an approximation of `x_0` along the path, which follows from predictions at several levels.

use super::plan::Level;

/// The step from one level to another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    /// The factor of the sample.
    pub x: f64,
    /// `-h`, or `-2 h` for the solvers of the SDE.
    pub z: f64,
    /// The factor of the predictions: `sqrt(abar')`.
    pub scale: f64,
    from: Level,
    h: f64,
}

impl Step {
    pub fn new(from: Level, to: Level) -> Self {
        let h = to.lambda() - from.lambda();
        Self { x: to.noise() / from.noise(), z: -h, scale: to.signal(), from, h }
    }

    /// The position of a level, as a multiple of `h`: 0 at the beginning of the step, 1 at its end, and negative for
    /// the levels of earlier steps.
    fn position(&self, level: Level) -> f64 {
        (level.lambda() - self.from.lambda()) / self.h
    }

    /// The positions of the levels before `levels[i]` for a step of this order from `levels[i]`. A first level without
    /// signal is infinitely far away and has none, which lowers the order.
    pub fn positions(&self, levels: &[Level], i: usize, order: usize) -> Vec<f64> {
        let before = (1..order).map(|back| levels[i - back]);
        before.filter(|level| level.alpha_bar > 0.0).map(|level| self.position(level)).collect()
    }

    /// The factor of `x_0` at the beginning of the step, if `x_0` is constant.
    pub fn constant(&self) -> f64 {
        -self.scale * libm::expm1(self.z)
    }

    /// The factors of predictions at the beginning of the step and at other positions. Those of a single other position
    /// follow from `single`, the factor of the divided difference `(x_0(position) - x_0(0)) / position`. Those of more
    /// positions are exact for polynomials.
    pub fn factors(&self, positions: &[f64], single: f64) -> Vec<f64> {
        let differences = if positions.len() == 1 { vec![single] } else { self.exact(positions) };
        let others: Vec<f64> = positions.iter().zip(differences).map(|(r, c)| c / r).collect();
        let first = self.constant() - others.iter().sum::<f64>();
        [first].into_iter().chain(others).collect()
    }

    /// The factors of the divided differences that integrate every polynomial through `positions` and 0 exactly. The
    /// factors solve `sum over j of c_j r_j^(i - 1) = -scale i! psi_i(z)` for `i` from 1 to the number of positions.
    fn exact(&self, positions: &[f64]) -> Vec<f64> {
        let n = positions.len();
        let (mut powers, mut factorial) = (vec![1.0; n], 1.0);
        // Rows of the equations, with the right-hand side last.
        let mut rows = Vec::new();
        for i in 1..=n {
            factorial *= i as f64;
            let mut row = powers.clone();
            row.push(-self.scale * factorial * psi(i as u32, self.z));
            rows.push(row);
            powers.iter_mut().zip(positions).for_each(|(power, r)| *power *= r);
        }
        // Elimination. Different positions leave no pivot at 0, because they make every leading minor a Vandermonde
        // determinant.
        for k in 0..n {
            let pivot = rows[k].clone();
            for (_, row) in rows.iter_mut().enumerate().filter(|(i, _)| *i != k) {
                let share = row[k] / pivot[k];
                row.iter_mut().zip(&pivot).for_each(|(a, b)| *a -= share * b);
            }
        }
        rows.iter().enumerate().map(|(k, row)| row[n] / row[k]).collect()
    }
}

/// Computes `psi_k(z)`, the sum over `j >= 1` of `z^j / (j + k)!`. `psi_0(z)` is `e^z - 1`.
///
/// The recursion `psi_k(z) = psi_(k-1)(z) / z - 1 / k!` would lose all digits for small `z`.
fn psi(k: u32, z: f64) -> f64 {
    let factorial = (1..=k).map(f64::from).product::<f64>();
    if z.abs() > 1.0 {
        return if k == 0 { libm::expm1(z) } else { psi(k - 1, z) / z - 1.0 / factorial };
    }
    let (mut term, mut sum) = (1.0 / factorial, 0.0);
    for j in 1..20 {
        term *= z / f64::from(j + k);
        sum += term;
    }
    sum
}
