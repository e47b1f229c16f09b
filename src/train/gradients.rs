use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use crate::error::Result;

/// Computes the gradients of `loss` (a scalar) with respect to `vars`, by the names of the weights. Weights on which
/// the loss does not depend are omitted.
///
/// # Errors
/// Returns an error if an operation between the weights and the loss has no gradient.
pub fn gradients(loss: &Tensor, vars: &BTreeMap<String, Var>) -> Result<BTreeMap<String, Tensor>> {
    Ok(by_name(loss.backward()?, vars))
}

/// The gradients of `vars` by the names of the weights. Missing gradients are omitted.
pub(crate) fn by_name(
    mut gradients: GradStore,
    vars: &BTreeMap<String, Var>,
) -> BTreeMap<String, Tensor> {
    vars.iter().filter_map(|(name, var)| Some((name.clone(), gradients.remove(var)?))).collect()
}
