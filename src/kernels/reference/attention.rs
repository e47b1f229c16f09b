use candle_core::{D, Result, Tensor};

/// Computes `softmax(q k^T / sqrt(channels)) v` over all positions. Each is (batch, positions,
/// channels).
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    // The scores grow with the number of channels: scaling q first keeps them small.
    let scores = (q * scale)?.matmul(&k.transpose(1, 2)?.contiguous()?)?;
    // Not `softmax_last_dim`, which has no gradient.
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(v)
}
