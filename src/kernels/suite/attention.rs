//! Attention.

use candle_core::{DType, Result, Tensor};
use proptest::prelude::*;

use super::{Expected, Subject, compare, rounded, subjects};
use crate::kernels::reference;
use crate::kernels::tests::{Normals, value_and_gradients};
use crate::random_inputs::inputs;

/// Attention.
pub(crate) struct AttentionCase {
    /// (batch, positions, 3 channels)
    pub qkv: Tensor,
    pub heads: usize,
    pub dy: Tensor,
}

impl AttentionCase {
    fn expected(&self, subject: &dyn Subject) -> Result<Expected> {
        let [qkv, dy] = [&self.qkv, &self.dy].map(|t| rounded(t, subject.maps()));
        let exact = value_and_gradients(
            DType::F64,
            std::slice::from_ref(&qkv),
            |_| dy.clone(),
            |v| reference::attention::attention(&v[0], self.heads),
        )?;
        let bounds = subject.products().attention_bounds(&qkv, &dy, self.heads)?;
        Ok(["y", "dx"].into_iter().zip(exact).zip(bounds).map(|((n, e), b)| (n, e, b)).collect())
    }

    fn check(&self) {
        let case = format!("attention of {:?} in {} heads", self.qkv.dims(), self.heads);
        for subject in subjects() {
            let expected = self.expected(&*subject).unwrap();
            compare(&*subject, &case, subject.attention(self).unwrap(), &expected);
        }
    }
}

proptest! {
    #![proptest_config(inputs(96))]

    #[test]
    fn attention_agrees(
        (batch, positions) in (1usize..4, prop_oneof![Just(1usize), 1usize..40]),
        (head, heads) in prop_oneof![(1usize..70, Just(1usize)), (1usize..20, 1usize..5)],
        seed: u64,
    ) {
        let (normals, channels) = (Normals(seed), head * heads);
        let qkv = normals.tensor(0, &[batch, positions, 3 * channels]);
        let dy = normals.gradient(&[batch, positions, channels]);
        AttentionCase { qkv, heads, dy }.check();
    }
}
