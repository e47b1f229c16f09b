//! The units that multiply bf16 values: AMX tiles, the pairwise dot products of AVX-512, or f32
//! arithmetic on the same values. All of them sum in f32.

use super::emulated;
use super::operands::SliceProduct;
#[cfg(target_arch = "x86_64")]
use super::{amx, pairs};
use crate::kernels::cpu::isa::Isa;
#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::isa::{self, Limit};

/// A unit of this machine that multiplies bf16 values. A value is created only after the machine's
/// support was checked, so it is safe to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unit(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Amx,
    #[cfg(target_arch = "x86_64")]
    Pairs,
    Emulated(Isa),
}

impl Unit {
    /// Returns the fastest unit of this machine within this instruction set.
    pub(crate) fn detect(isa: Isa) -> Self {
        Self::of(isa).next().unwrap_or(Self(Kind::Emulated(isa)))
    }

    /// Returns the units of this machine within this instruction set, the fastest first. The iterator is
    /// never empty.
    fn of(isa: Isa) -> impl Iterator<Item = Self> {
        let native: [Option<Kind>; 2];
        #[cfg(target_arch = "x86_64")]
        {
            let wide = isa.kind() == isa::Kind::Avx512;
            let amx = wide && Limit::of_process() == Limit::Amx && amx::available();
            let pairs = wide
                && is_x86_feature_detected!("avx512bf16")
                && is_x86_feature_detected!("avx512bw");
            native = [amx.then_some(Kind::Amx), pairs.then_some(Kind::Pairs)];
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            native = [None, None];
        }
        native.into_iter().flatten().chain([Kind::Emulated(isa)]).map(Self)
    }

    /// Returns whether the unit has instructions for products of bf16 values.
    pub(crate) fn is_native(self) -> bool {
        !matches!(self.0, Kind::Emulated(_))
    }

    /// Returns whether the unit multiplies with tiles.
    pub(crate) fn has_tiles(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self.0 == Kind::Amx {
            return true;
        }
        false
    }

    /// The instruction set that emulates the unit, if it is emulated.
    #[cfg(test)]
    pub(crate) fn isa(self) -> Option<Isa> {
        if let Kind::Emulated(isa) = self.0 { Some(isa) } else { None }
    }

    /// Returns all units of this machine, and AMX even if it must be emulated.
    #[cfg(test)]
    pub(crate) fn available() -> Vec<Self> {
        let mut found: Vec<_> = Isa::available().into_iter().flat_map(Self::of).collect();
        #[cfg(target_arch = "x86_64")]
        if !found.contains(&Self(Kind::Amx)) && amx::testable() {
            found.push(Self(Kind::Amx));
        }
        found
    }

    /// Computes a product.
    ///
    /// # Panics
    /// Panics if a row of a step, up to the next multiple of [`ROWS`](super::operands::ROWS), is not
    /// within its slice.
    pub(crate) fn multiply(self, product: SliceProduct<'_>) {
        if product.rows == 0 {
            return;
        }
        product.check();
        match self.0 {
            Kind::Emulated(isa) => emulated::product(isa, product),
            // SAFETY: a `Unit` of this kind exists only if the machine has it. All rows of all steps are
            // within their slices, which was checked.
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => unsafe { amx::product(product.into_raw()) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Kind::Pairs => unsafe { pairs::product(product.into_raw()) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::operands::{DEPTH, Product, ROWS, Step, round};
    use super::*;
    use crate::kernels::cpu::gemm::micro::PANEL;
    use crate::kernels::tests::{F32, Normals, roundings};
    use crate::random_inputs::inputs;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(inputs(64))]

        #[test]
        fn every_unit_multiplies(
            (rows, count) in (1usize..70, 0usize..5),
            (more_a, more_b, more_c) in (0usize..9, 0usize..9, 0usize..40),
            accumulate: bool,
            seed: u64,
        ) {
            let (a_row, b_row) = (DEPTH + more_a, 2 * (PANEL + more_b));
            let c_row = PANEL + more_c;
            // Overlapping steps, out of order, at any distance.
            let step = |i: usize| Step { a: (5 * i + 3) % 7, b: 2 * ((3 * i + 1) % 4) };
            let steps: Vec<Step> = (0..count).map(step).collect();
            let room = rows.next_multiple_of(ROWS);
            let normal = |k, len| Normals(seed).values(k, len);
            let bits = |values: &[f32]| values.iter().map(|&x| round(x)).collect::<Vec<u16>>();
            let (a, b) = (bits(&normal(0, room * a_row + 7)), bits(&normal(1, 16 * b_row + 8)));
            let before = normal(2, room * c_row);
            let value = |bits: u16| f64::from(f32::from_bits(u32::from(bits) << 16));
            for unit in Unit::available() {
                let mut c = before.clone();
                unit.multiply(Product {
                    c: &mut c[..], c_row, rows, a: &a[..], a_row, b: &b[..], b_row, steps: &steps, accumulate,
                });
                for i in 0..rows {
                    for j in 0..c_row {
                        let at = i * c_row + j;
                        if j >= PANEL {
                            prop_assert_eq!(c[at], before[at], "beyond the panel");
                            continue;
                        }
                        let mut sum = if accumulate { f64::from(before[at]) } else { 0.0 };
                        let mut magnitude = sum.abs();
                        for step in &steps {
                            for k in 0..DEPTH {
                                let b = b[step.b + k / 2 * b_row + 2 * j + k % 2];
                                let term = value(a[step.a + i * a_row + k]) * value(b);
                                (sum, magnitude) = (sum + term, magnitude + term.abs());
                            }
                        }
                        let terms = DEPTH * count + usize::from(accumulate);
                        let bound = roundings(terms as f64) * F32 * magnitude;
                        let off = (f64::from(c[at]) - sum).abs();
                        prop_assert!(
                            off <= bound,
                            "{unit:?}: {}, not {sum}: off by {off:e}, more than {bound:e}", c[at]
                        );
                    }
                }
            }
        }
    }
}
