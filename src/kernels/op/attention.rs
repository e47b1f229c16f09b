//! Self-attention with one head: `softmax(q k^T / sqrt(channels)) v`. Vaswani et al. 2017.

/// The sizes of an attention over all positions of an image.
///
/// The input is (batch, positions, 3 channels): q, k and v of a position side by side. The output is
/// (batch, positions, channels).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AttentionShape {
    pub positions: usize,
    pub channels: usize,
}

impl AttentionShape {
    /// The sizes for a feature map of q, k and v with these dimensions (batch, height, width,
    /// 3 channels).
    pub(crate) fn of_map([_, height, width, channels]: [usize; 4]) -> Self {
        Self { positions: height * width, channels: channels / 3 }
    }

    /// The factor of the scores, `1 / sqrt(channels)`.
    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.channels as f32).sqrt()
    }
}
