use serde::{Deserialize, Serialize};

/// The size of images.
///
/// A number is a square. In JSON, a square is also a number, and any other size is an object with `height` and `width`.
///
/// ```
/// use ddpm::nn::ImageSize;
///
/// assert_eq!(ImageSize::from(32), ImageSize { height: 32, width: 32 });
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Stored", into = "Stored")]
pub struct ImageSize {
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
}

impl From<usize> for ImageSize {
    fn from(size: usize) -> Self {
        Self { height: size, width: size }
    }
}

/// The form of a size in JSON.
#[derive(Serialize, Deserialize)]
#[serde(
    untagged,
    deny_unknown_fields,
    expecting = "a number of pixels, or an object with height and width"
)]
enum Stored {
    Square(usize),
    Rectangle { height: usize, width: usize },
}

impl From<Stored> for ImageSize {
    fn from(stored: Stored) -> Self {
        match stored {
            Stored::Square(size) => size.into(),
            Stored::Rectangle { height, width } => Self { height, width },
        }
    }
}

impl From<ImageSize> for Stored {
    fn from(ImageSize { height, width }: ImageSize) -> Self {
        if height == width { Self::Square(height) } else { Self::Rectangle { height, width } }
    }
}
