//! The files of a folder.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use image::ImageFormat;

use crate::error::{Error, Result};

/// The formats of pictures with their extensions.
pub(super) const FORMATS: [(ImageFormat, &[&str]); 6] = [
    (ImageFormat::Png, &["png", "apng"]),
    (ImageFormat::Jpeg, &["jpg", "jpeg", "jpe", "jfif"]),
    (ImageFormat::WebP, &["webp"]),
    (ImageFormat::Gif, &["gif"]),
    (ImageFormat::Bmp, &["bmp", "dib"]),
    (ImageFormat::Tiff, &["tif", "tiff"]),
];

/// The extensions of pictures, for messages.
pub(super) fn extensions() -> String {
    let all: Vec<_> = FORMATS.iter().flat_map(|(_, extensions)| *extensions).copied().collect();
    format!(".{}", all.join(", ."))
}

/// Returns whether a file's name ends in one of the extensions.
pub(super) fn is_named_like_picture(path: &Path) -> bool {
    let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default();
    let is_one = |known: &&str| known.eq_ignore_ascii_case(extension);
    FORMATS.iter().flat_map(|(_, extensions)| *extensions).any(is_one)
}

/// Returns the format of a content, if it is one of [`FORMATS`].
pub(super) fn format_of(content: &[u8]) -> Option<ImageFormat> {
    let format = image::guess_format(content).ok()?;
    FORMATS.iter().any(|(known, _)| *known == format).then_some(format)
}

/// The kind of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Picture,
    Broken(String),
    Other,
}

/// Reads the beginning of a file.
pub(super) fn kind(path: &Path) -> Kind {
    let named = is_named_like_picture(path);
    let broken = |reason: String| if named { Kind::Broken(reason) } else { Kind::Other };
    let start = match start(path) {
        Ok(start) => start,
        Err(reason) => return broken(reason),
    };
    match format_of(&start) {
        // "BM" is also the beginning of texts.
        Some(ImageFormat::Bmp) if !named => Kind::Other,
        Some(_) => Kind::Picture,
        None if start.is_empty() => broken("an empty file".into()),
        None => broken("its content is none of PNG, JPEG, WebP, GIF, BMP, TIFF".into()),
    }
}

fn start(path: &Path) -> std::result::Result<Vec<u8>, String> {
    // Checked before opening, because opening a pipe would wait for its writer.
    if !path.metadata().map_err(|e| e.to_string())?.is_file() {
        return Err("not a regular file".into());
    }
    let mut start = Vec::new();
    let file = File::open(path).map_err(|e| e.to_string())?;
    file.take(32).read_to_end(&mut start).map_err(|e| e.to_string())?;
    Ok(start)
}

/// The result of [`files`]. All paths are relative to the folder.
#[derive(Debug, Default)]
pub(super) struct Files {
    /// In the order of [`bytes`].
    pub paths: Vec<PathBuf>,
    /// Folders and links that cannot be read, with the reasons.
    pub failed: Vec<(PathBuf, String)>,
}

/// Finds all files of a folder. Calls `found` with their number from time to time; returns `None` if it returns false.
///
/// # Errors
/// Returns an error if the folder itself cannot be read.
pub(super) fn files(root: &Path, mut found: impl FnMut(usize) -> bool) -> Result<Option<Files>> {
    fs::read_dir(root).map_err(Error::io(root))?;
    let mut files = Files::default();
    // Folders of links wait until all others were visited. A picture thus has the path without links, if there is one.
    let (mut folders, mut links) = (vec![PathBuf::new()], Vec::new());
    let mut visited = HashSet::new();
    while let Some(folder) = folders.pop().or_else(|| take_first(&mut links)) {
        let entries = fs::canonicalize(root.join(&folder)).and_then(|canonical| {
            let is_new = visited.insert(canonical);
            if is_new { fs::read_dir(root.join(&folder)).map(Some) } else { Ok(None) }
        });
        let entries = match entries {
            Ok(Some(entries)) => entries,
            Ok(None) => continue,
            Err(error) => {
                files.failed.push((folder, error.to_string()));
                continue;
            }
        };
        for entry in entries {
            let Ok(entry) =
                entry.inspect_err(|e| files.failed.push((folder.clone(), e.to_string())))
            else {
                continue;
            };
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let path = folder.join(entry.file_name());
            let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
            match fs::metadata(root.join(&path)) {
                Ok(data) if data.is_dir() && is_link => links.push(path),
                Ok(data) if data.is_dir() => folders.push(path),
                Ok(_) => files.paths.push(path),
                Err(error) if is_named_like_picture(&path) => {
                    files.failed.push((path, error.to_string()));
                }
                // A link that leads nowhere, or in a circle.
                Err(_) => {}
            }
        }
        if !found(files.paths.len()) {
            return Ok(None);
        }
    }
    files.paths.sort_by_cached_key(|path| bytes(path));
    Ok(Some(files))
}

/// Removes the first path in the order of [`bytes`], which no file system changes.
fn take_first(paths: &mut Vec<PathBuf>) -> Option<PathBuf> {
    let first = (0..paths.len()).min_by_key(|&k| bytes(&paths[k]))?;
    Some(paths.swap_remove(first))
}

/// The bytes of a relative path, joined by `/` on every system.
pub(super) fn bytes(path: &Path) -> Vec<u8> {
    let parts: Vec<_> = path.iter().map(OsStr::as_encoded_bytes).collect();
    parts.join(&b'/')
}
