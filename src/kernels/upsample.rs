use candle_core::{Result, Tensor};

/// Each pixel doubled in both directions: (batch, h, w, channels) to (batch, 2 h, 2 w, channels).
pub(crate) fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    // Not candle's `upsample_nearest2d`, whose backward overwrites gradients already there.
    x.reshape((b, h, 1, w, 1, c))?.broadcast_as((b, h, 2, w, 2, c))?.reshape((b, 2 * h, 2 * w, c))
}
