use candle_core::{D, Result, Tensor};

/// Computes `softmax(q k^T / sqrt(head)) v` over all positions, for each of `heads` heads of `head` channels. q, k and
/// v lie side by side in `qkv` (batch, positions, 3 channels). The result is (batch, positions, channels).
pub(crate) fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let channels = qkv.dim(D::Minus1)? / 3;
    let head = channels / heads;
    let outputs: Vec<Tensor> = (0..heads)
        .map(|i| {
            let part = |k| qkv.narrow(2, k * channels + i * head, head)?.contiguous();
            one_head(&part(0)?, &part(1)?, &part(2)?)
        })
        .collect::<Result<_>>()?;
    match &outputs[..] {
        [output] => Ok(output.clone()),
        outputs => Tensor::cat(outputs, 2),
    }
}

/// Computes `softmax(q k^T / sqrt(channels)) v`. Each is (batch, positions, channels).
fn one_head(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    // The scores grow with the number of channels: scaling q first keeps them small.
    let scores = (q * scale)?.matmul(&k.transpose(1, 2)?.contiguous()?)?;
    // Not `softmax_last_dim`, which has no gradient.
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(v)
}
