//! Convolutions of channels-last maps. The map is continued by zeros.

use crate::error::{Error, Result};

/// The effect of a convolution on the size of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Scale {
    /// The distance in input pixels from one output pixel to the next. 1 keeps the size.
    Stride(usize),
    /// As [`Stride`](Self::Stride), but the first position of the kernel begins at the first pixel of the map, and not
    /// half a kernel before it.
    StrideFromEdge(usize),
    /// As [`Stride`](Self::Stride), but every position of the kernel lies within the map, so that no zeros are read.
    StrideWithin(usize),
    /// Each pixel is doubled in both directions before the convolution, whose stride is 1.
    Upsample,
}

impl Scale {
    /// The height or width of the output, if the input and the kernel have the height or width `size` and `kernel`.
    pub(crate) fn output(self, size: usize, kernel: usize) -> usize {
        match self {
            Self::Stride(stride) | Self::StrideFromEdge(stride) => size.div_ceil(stride),
            Self::StrideWithin(stride) => (size + 1).saturating_sub(kernel).div_ceil(stride),
            Self::Upsample => 2 * size,
        }
    }

    /// The stride of the kernel.
    pub(crate) fn stride(self) -> usize {
        match self {
            Self::Stride(stride) | Self::StrideFromEdge(stride) | Self::StrideWithin(stride) => {
                stride
            }
            Self::Upsample => 1,
        }
    }
}

/// The sizes of a convolution.
///
/// The input is (batch, h, w, c_in), the weight (c_out, c_in, kernel height, kernel width), the output (batch, h_out,
/// w_out, c_out).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ConvShape {
    pub batch: usize,
    /// Height of the input, before it is upsampled.
    pub h: usize,
    /// Width of the input, before it is upsampled.
    pub w: usize,
    pub c_in: usize,
    pub h_out: usize,
    pub w_out: usize,
    pub c_out: usize,
    /// Height and width of the kernel. Both are odd.
    pub kernel: [usize; 2],
    pub scale: Scale,
}

impl ConvShape {
    /// The convolution of `x` (batch, height, width, in) with `weight` (out, in, kernel height, kernel width), or
    /// (out, in) for a kernel of one value.
    ///
    /// The output is (batch, ceil(height / stride), ceil(width / stride), out). It has twice the height and width if
    /// `x` is upsampled, and one pixel per position of the kernel if each position lies within the map.
    ///
    /// # Errors
    /// Returns an error if the weight is neither (out, in) nor (out, in, kernel height, kernel width) with odd sizes,
    /// or if `x` has another number of channels. Returns an error if the stride is 0, or if no position of the kernel
    /// lies within the map although it has to.
    pub(crate) fn new(x: [usize; 4], weight: &[usize], scale: Scale) -> Result<Self> {
        let [batch, h, w, channels] = x;
        let (c_out, c_in, kernel) = match *weight {
            [c_out, c_in, height, width] => (c_out, c_in, [height, width]),
            [c_out, c_in] => (c_out, c_in, [1, 1]),
            _ => return Err(wrong_weight(weight)),
        };
        if kernel.iter().any(|size| size.is_multiple_of(2)) {
            return Err(wrong_weight(weight));
        }
        if c_in != channels {
            let expected = format!("(batch, height, width, {c_in}) for a weight of {weight:?}");
            return Err(Error::shape("the input of a convolution", x, expected));
        }
        if scale.stride() == 0 {
            return Err(Error::config("the stride of a convolution", 0, "at least 1"));
        }
        let [h_out, w_out] = [scale.output(h, kernel[0]), scale.output(w, kernel[1])];
        if matches!(scale, Scale::StrideWithin(_)) && (h_out == 0 || w_out == 0) {
            let expected = format!("at least as high and wide as the kernel of {weight:?}");
            return Err(Error::shape("the input of a convolution", x, expected));
        }
        Ok(Self { batch, h, w, c_in, h_out, w_out, c_out, kernel, scale })
    }

    /// The stride of the kernel.
    pub(crate) fn stride(&self) -> usize {
        self.scale.stride()
    }

    /// Returns whether each pixel of the input is first doubled in both directions.
    pub(crate) fn upsamples(&self) -> bool {
        self.scale == Scale::Upsample
    }

    /// Height and width of the map over which the kernel moves: the input after upsampling.
    pub(crate) fn map(&self) -> [usize; 2] {
        if self.upsamples() { [2 * self.h, 2 * self.w] } else { [self.h, self.w] }
    }

    /// Rows and columns of zeros before the map. As many as the kernel reads follow it.
    pub(crate) fn padding(&self) -> [usize; 2] {
        if self.begins_at_edge() { [0, 0] } else { self.kernel.map(|size| size / 2) }
    }

    /// Returns whether the first position of the kernel begins at the first pixel.
    pub(crate) fn begins_at_edge(&self) -> bool {
        matches!(self.scale, Scale::StrideFromEdge(_) | Scale::StrideWithin(_))
    }

    /// Returns whether every position of the kernel lies within the map.
    pub(crate) fn stays_within(&self) -> bool {
        matches!(self.scale, Scale::StrideWithin(_))
    }

    /// Number of weights for each pair of an input and an output channel.
    pub(crate) fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// Number of values from which an output pixel is computed.
    pub(crate) fn patch(&self) -> usize {
        self.taps() * self.c_in
    }

    /// Returns whether each output pixel depends on one input pixel only.
    pub(crate) fn is_pointwise(&self) -> bool {
        self.taps() == 1 && matches!(self.scale, Scale::Stride(1) | Scale::StrideWithin(1))
    }

    /// Number of values of an input image.
    pub(crate) fn input_len(&self) -> usize {
        self.h * self.w * self.c_in
    }

    /// Number of values of an output image.
    pub(crate) fn output_len(&self) -> usize {
        self.h_out * self.w_out * self.c_out
    }

    /// The dimensions of the output.
    pub(crate) fn output(&self) -> [usize; 4] {
        [self.batch, self.h_out, self.w_out, self.c_out]
    }

    /// Returns the convolution that computes the gradient of the map from the gradient of the output, if the
    /// stride is 1 and the kernel does not begin at the edge. Its kernel is rotated by 180 degrees, and its
    /// channels are exchanged.
    pub(crate) fn transposed(&self) -> Self {
        let [h, w] = self.map();
        let Self { batch, c_in, c_out, kernel, .. } = *self;
        let scale = Scale::Stride(1);
        Self { batch, h, w, c_in: c_out, h_out: h, w_out: w, c_out: c_in, kernel, scale }
    }
}

fn wrong_weight(weight: &[usize]) -> Error {
    let expected = "(out, in) or (out, in, height, width) with an odd height and width";
    Error::shape("the weight of a convolution", weight, expected)
}

/// A value for each of the two addends of a convolution's output: the addends themselves, see [`Add`], or their
/// gradients.
#[derive(Debug, Clone, Copy, Default)]
pub struct Addends<T> {
    /// Vectors (batch, 1, 1, channels), each added to every pixel of its image.
    pub per_image: T,
    /// A map of the shape of the output.
    pub residual: T,
}

/// The values that are added to the output of a convolution, in addition to its bias.
pub type Add<'a, M> = Addends<Option<&'a M>>;

impl<T> Addends<Option<T>> {
    /// Adds nothing.
    pub const NOTHING: Self = Self { per_image: None, residual: None };

    /// Adds a vector to every pixel of its image.
    pub fn per_image(vectors: T) -> Self {
        Self { per_image: Some(vectors), residual: None }
    }

    /// Adds a map.
    pub fn residual(map: T) -> Self {
        Self { per_image: None, residual: Some(map) }
    }
}

impl<T> Addends<T> {
    /// Applies `f` to both addends.
    pub(crate) fn map<U>(self, mut f: impl FnMut(T) -> U) -> Addends<U> {
        Addends { per_image: f(self.per_image), residual: f(self.residual) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_has_the_size_of_the_map_over_the_stride() {
        let output = |scale| ConvShape::new([2, 5, 8, 3], &[7, 3, 3, 3], scale).unwrap().output();
        assert_eq!(output(Scale::Stride(1)), [2, 5, 8, 7]);
        assert_eq!(output(Scale::Stride(2)), [2, 3, 4, 7]);
        assert_eq!(output(Scale::Stride(3)), [2, 2, 3, 7]);
        assert_eq!(output(Scale::StrideFromEdge(2)), [2, 3, 4, 7]);
        assert_eq!(output(Scale::StrideWithin(1)), [2, 3, 6, 7]);
        assert_eq!(output(Scale::StrideWithin(2)), [2, 2, 3, 7]);
        assert_eq!(output(Scale::Upsample), [2, 10, 16, 7]);
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let error = |weight: &[usize], stride| {
            let shape = ConvShape::new([2, 5, 8, 3], weight, Scale::Stride(stride));
            shape.unwrap_err().to_string()
        };
        let weight = |found| {
            format!(
                "the weight of a convolution has shape {found}; it must be (out, in) or (out, in, height, width) \
                 with an odd height and width"
            )
        };
        assert_eq!(error(&[7, 3, 2, 2], 1), weight("[7, 3, 2, 2]"));
        assert_eq!(error(&[7, 3, 3, 4], 1), weight("[7, 3, 3, 4]"));
        assert_eq!(error(&[7], 1), weight("[7]"));
        assert_eq!(
            error(&[7, 4, 3, 3], 1),
            "the input of a convolution has shape [2, 5, 8, 3]; it must be (batch, height, width, 4) for a \
             weight of [7, 4, 3, 3]"
        );
        assert_eq!(
            error(&[7, 3, 3, 3], 0),
            "the stride of a convolution is 0; it must be at least 1"
        );
        let narrow = ConvShape::new([2, 7, 2, 3], &[7, 3, 1, 3], Scale::StrideWithin(1));
        assert_eq!(
            narrow.unwrap_err().to_string(),
            "the input of a convolution has shape [2, 7, 2, 3]; it must be at least as high and wide as the \
             kernel of [7, 3, 1, 3]"
        );
    }
}
