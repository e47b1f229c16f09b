use candle_core::{Result, Tensor};

/// Doubles each pixel in both directions: (batch, h, w, channels) to (batch, 2 h, 2 w, channels).
pub(crate) fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    // This replaces candle's `upsample_nearest2d`, whose backward pass overwrites existing gradients.
    x.reshape((b, h, 1, w, 1, c))?.broadcast_as((b, h, 2, w, 2, c))?.reshape((b, 2 * h, 2 * w, c))
}

/// Computes the means of two by two pixels: (batch, h, w, channels) to (batch, h / 2, w / 2, channels). `h` and `w` are
/// even.
pub(crate) fn average_pixels(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    x.reshape((b, h / 2, 2, w / 2, 2 * c))?
        .sum(2)?
        .reshape((b, h / 2, w / 2, 2, c))?
        .sum(3)?
        .affine(0.25, 0.0)
}
