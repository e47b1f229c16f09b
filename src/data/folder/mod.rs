//! A folder of pictures as a data set. Needs the feature `image`.
//!
//! [`Folder::open`] finds the pictures of a folder and of all folders in it: PNG, JPEG, WebP, GIF (the first frame),
//! BMP and TIFF, with 8 or 16 bits. Every picture is turned as its EXIF data says, cropped, and scaled to one size.
//!
//! ```
//! use ddpm::data::folder::{Crop, Folder, FolderConfig};
//! use ddpm::data::{Dataset, ImageShape};
//!
//! # let temp = tempfile::tempdir()?;
//! # let photos = temp.path();
//! # ddpm::image::RgbImage::new(60, 40).save(photos.join("a.jpg"))?;
//! let config = FolderConfig { height: 32, width: 32, ..FolderConfig::default() };
//! let folder = Folder::open(photos, config)?;
//! assert_eq!(folder.shape(), ImageShape { channels: 3, height: 32, width: 32 });
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The pictures of a folder
//!
//! - The format is detected from the content. A file with the extension of a picture is
//!   [unreadable](FolderConfig::unreadable) if its content is not one of the six formats. A file with another
//!   extension, or without one, is a picture if its content begins like one (except for BMP, which begins with only two
//!   letters). All other files are ignored.
//! - Files and folders whose names begin with a dot are ignored.
//! - Symbolic links are followed. A folder is read only once, even if several links lead to it, so loops of links end.
//! - The order of the pictures is that of the bytes of their paths, relative to the folder and joined by `/`. It does
//!   not depend on the file system.
//! - All pictures are decoded once when the folder is opened. Unreadable ones are known before training begins.
//!
//! # Pixels
//!
//! These steps follow each other:
//!
//! 1. The picture is decoded. A sample `v` of 16 bits becomes `v / 257`, rounded. Colour profiles are ignored.
//! 2. The picture is turned or mirrored as its EXIF orientation says.
//! 3. Transparent pixels are laid over [`background`](FolderConfig::background), unless alpha is
//!    [kept](Channels::Rgba).
//! 4. Colours become grey if `channels` is [`Channels::Grey`]: `0.299 R + 0.587 G + 0.114 B`, as in ITU-R BT.601.
//! 5. The picture is [cropped](Crop) and scaled by an antialiasing [`Filter`]. Pictures smaller than the images are
//!    enlarged.
//!
//! Scaling agrees with Pillow's `resize` within 1 of 255, first along the columns and then along the rows. Overshoots
//! at edges are clipped after each of the two passes, so values at saturated edges depend on the order of the passes.
//! In one call, Pillow chooses the order by the sizes. JPEG decoders differ by more if a file stores colour at half the
//! resolution.
//!
//! # Memory and speed
//!
//! Scaled pictures are kept in memory, up to a [limit](FolderBuilder::memory_limit). The others are decoded when a
//! batch is read, on as many threads as rayon's pool has, while the network is trained with the previous batch. A
//! [cache](FolderBuilder::cache) on disk replaces decoding by reading a small file.

mod builder;
mod cache;
mod config;
mod decode;
mod pictures;
mod recipe;
mod scan;
mod single;

pub use builder::{FolderBuilder, Progress, Stage};
pub use config::{Channels, Crop, Filter, FolderConfig, Unreadable};
pub use pictures::{Folder, UnreadableFile};
pub use single::{read_mask, read_picture};
