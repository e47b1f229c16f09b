//! Files that are there whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::cli::Result;
use super::tell::out;

/// Writes beside the target and renames.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = partial(path);
    let written = File::create(&partial)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&partial, path));
    written.map_err(|e| {
        // The error that matters is the one above.
        let _ = fs::remove_file(&partial);
        at(path, e)
    })
}

/// Makes sure, before the work, that a file of this extension can be written there at its end.
pub fn check(option: &str, path: &Path, extension: &str) -> Result<()> {
    if !path.extension().is_some_and(|e| e.eq_ignore_ascii_case(extension)) {
        let path = path.display();
        return Err(format!("{option} is {path}; it must end in .{extension}").into());
    }
    if path.is_dir() {
        return Err(
            format!("{option} is {}, a directory; it must be a file", path.display()).into()
        );
    }
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        create_dir(parent)?;
    }
    let partial = partial(path);
    File::create(&partial).and_then(|_| fs::remove_file(&partial)).map_err(|e| at(path, e))
}

pub fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| at(path, e))
}

/// Moves an earlier run's file or directory to a name with `-old`, and a number where that is taken.
pub fn put_aside(path: &Path) -> Result<()> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map(|e| format!(".{}", e.to_string_lossy()));
    let extension = extension.unwrap_or_default();
    let mut aside = path.with_file_name(format!("{stem}-old{extension}"));
    for n in 2.. {
        if !aside.exists() {
            break;
        }
        aside.set_file_name(format!("{stem}-old-{n}{extension}"));
    }
    fs::rename(path, &aside).map_err(|e| at(path, e))?;
    out!("kept     {}, of an earlier run", aside.display());
    Ok(())
}

/// An error that names its file.
pub fn at(path: &Path, error: io::Error) -> Box<dyn std::error::Error + Send + Sync> {
    format!("{}: {error}", path.display()).into()
}

fn partial(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}", std::process::id()))
}
