use candle_core::{Result, Tensor};

/// Converts (batch, channels, height, width) to (batch, height, width, channels).
pub(crate) fn to_channels_last(images: &Tensor) -> Result<Tensor> {
    images.permute((0, 2, 3, 1))?.contiguous()
}

/// Converts (batch, height, width, channels) to (batch, channels, height, width).
pub(crate) fn to_channels_first(maps: &Tensor) -> Result<Tensor> {
    maps.permute((0, 3, 1, 2))?.contiguous()
}

/// Returns `count` rows, or columns, of a map: every `stride`-th from `offset` on. `dim` is the dimension.
pub(super) fn every(
    x: &Tensor,
    dim: usize,
    offset: usize,
    stride: usize,
    count: usize,
) -> Result<Tensor> {
    if stride == 1 {
        return x.narrow(dim, offset, count);
    }
    let places: Vec<u32> = (0..count).map(|i| (i * stride + offset) as u32).collect();
    x.index_select(&Tensor::new(places, x.device())?, dim)
}
