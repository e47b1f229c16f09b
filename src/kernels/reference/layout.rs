use candle_core::{Result, Tensor};

/// Converts (batch, channels, height, width) to (batch, height, width, channels).
pub(crate) fn to_channels_last(images: &Tensor) -> Result<Tensor> {
    images.permute((0, 2, 3, 1))?.contiguous()
}

/// Converts (batch, height, width, channels) to (batch, channels, height, width).
pub(crate) fn to_channels_first(maps: &Tensor) -> Result<Tensor> {
    maps.permute((0, 3, 1, 2))?.contiguous()
}
