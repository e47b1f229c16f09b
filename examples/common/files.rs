//! Writes files atomically: a file is complete or does not exist.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::cli::Result;
use super::tell::out;

/// Writes beside the target and renames.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = partial(path);
    let written = create(&partial)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()).map(|()| file))
        .and_then(|_locked| fs::rename(&partial, path));
    written.map_err(|e| {
        // The error to report is the one above.
        let _ = fs::remove_file(&partial);
        at(path, e)
    })
}

/// Checks before the work that a file with this extension can be written there at the end.
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
    let name = path.file_name().unwrap_or_default();
    clear_leftovers(path.parent().unwrap_or(Path::new("")), |leftover| name == leftover);
    let partial = partial(path);
    File::create(&partial).and_then(|_| fs::remove_file(&partial)).map_err(|e| at(path, e))
}

/// Removes temporary files that killed processes left when they [wrote](write) targets with these names. Failures are
/// ignored, because the files do no harm.
pub fn clear_leftovers(dir: &Path, is_target: impl Fn(&str) -> bool) {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let ours = name.to_str().and_then(target).is_some_and(&is_target);
        if ours && entry.file_type().is_ok_and(|kind| kind.is_file()) {
            let path = entry.path();
            // A process that is still writing the file holds its lock.
            if File::open(&path).is_ok_and(|file| file.try_lock().is_ok()) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

pub fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| at(path, e))
}

/// Renames a file or directory of an earlier run to a name with `-old`, and a number if that name is taken.
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

/// Creates a file that is locked as long as it is open, if the system supports locks.
fn create(partial: &Path) -> io::Result<File> {
    let file = File::create(partial)?;
    let _ = file.try_lock();
    Ok(file)
}

/// The temporary path of a file, beside its target.
fn partial(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}", std::process::id()))
}

/// The name of the target of a file whose name is that of a [`partial`] file.
fn target(partial: &str) -> Option<&str> {
    let (target, process) = partial.strip_prefix('.')?.rsplit_once('.')?;
    process.parse::<u32>().is_ok().then_some(target)
}
