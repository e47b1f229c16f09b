//! Self-attention: each head is `softmax(q k^T / sqrt(head's channels)) v`. Vaswani et al. 2017.

/// The sizes of an attention over all positions of an image.
///
/// The input is (batch, positions, 3 channels): q, k and v of a position side by side. The output is
/// (batch, positions, channels). Each of q, k, v and the output is divided into heads of equal size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AttentionShape {
    pub positions: usize,
    pub channels: usize,
    /// Number of heads. It divides the number of channels.
    pub heads: usize,
}

impl AttentionShape {
    /// The sizes for a feature map of q, k and v with these dimensions (batch, height, width,
    /// 3 channels).
    pub(crate) fn of_map([_, height, width, channels]: [usize; 4], heads: usize) -> Self {
        Self { positions: height * width, channels: channels / 3, heads }
    }

    /// Number of channels of a head.
    pub(crate) fn head(&self) -> usize {
        self.channels / self.heads
    }

    /// The factor of the scores, `1 / sqrt(head)`.
    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.head() as f32).sqrt()
    }
}
