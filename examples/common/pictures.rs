//! Grids of images, as a PNG or as the frames of a GIF.

pub use ddpm::pictures::{bytes, grid_of as grid, png};

use super::cli::Result;

/// At most this many frames show the denoising.
const FRAMES: usize = 48;

/// Returns an error if images with this number of channels cannot be drawn. Called before long work.
pub fn check_channels(channels: usize) -> Result<()> {
    if !matches!(channels, 1 | 3) {
        let expected = "1 (grey) or 3 (colour) can be shown";
        return Err(format!("the network's images have {channels} channels; {expected}").into());
    }
    Ok(())
}

/// Whether step `index` of `total` has a frame: all, or as many as are enough, evenly; the last
/// one always.
pub fn has_frame(index: usize, total: usize) -> bool {
    total <= FRAMES || (index + 1) * FRAMES / total > index * FRAMES / total
}
