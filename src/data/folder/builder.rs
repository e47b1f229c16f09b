use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::cache::{self, Cache};
use super::config::{Channels, FolderConfig, Unreadable};
use super::decode::{self, Reason};
use super::pictures::{Folder, Picture, UnreadableFile};
use super::recipe::Recipe;
use super::scan::{self, Kind};
use crate::data::parallel::{self, lock};
use crate::error::{Error, Result};

/// Maximum number of unreadable files that an error names.
const NAMED: usize = 5;

/// The settings of a [`Folder`] that do not change its images, and the opening of the folder.
///
/// ```
/// use std::ops::ControlFlow;
/// use std::sync::atomic::{AtomicBool, Ordering};
///
/// use ddpm::data::folder::{Folder, FolderConfig};
///
/// # let temp = tempfile::tempdir()?;
/// # let (photos, cache) = (temp.path().join("photos"), temp.path().join("cache"));
/// # std::fs::create_dir(&photos)?;
/// # ddpm::image::RgbImage::new(60, 40).save(photos.join("a.jpg"))?;
/// let interrupted = AtomicBool::new(false); // set by a signal
/// let folder = Folder::builder(photos, FolderConfig::default())
///     .memory_limit(500 << 20)
///     .cache(cache)
///     .on_progress(|progress| {
///         eprint!("\r{progress}");
///         match interrupted.load(Ordering::Relaxed) {
///             true => ControlFlow::Break(()),
///             false => ControlFlow::Continue(()),
///         }
///     })
///     .open()?;
/// # assert_eq!(folder.in_memory(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct FolderBuilder<'a> {
    root: PathBuf,
    config: FolderConfig,
    memory_limit: u64,
    cache: Option<PathBuf>,
    cache_limit: u64,
    on_progress: Report<'a>,
}

type Report<'a> = Box<dyn FnMut(Progress) -> ControlFlow<()> + Send + 'a>;

/// The progress of [`FolderBuilder::open`]. `Display` formats it for a line: `decoding pictures: 120 of 5000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// The present stage.
    pub stage: Stage,
    /// Number of files that this stage has finished.
    pub done: usize,
    /// Number of files of this stage. Equal to `done` while files are being found.
    pub total: usize,
}

/// A stage of [`FolderBuilder::open`]. The stages follow each other in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// Finds the files. Reported once for each folder.
    Finding,
    /// Reads the beginning of each file, to find out whether it is a picture.
    Checking,
    /// Decodes each picture, or reads it from the cache.
    Decoding,
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stage, done, total } = self;
        match stage {
            Stage::Finding => write!(f, "finding files: {done}"),
            Stage::Checking => write!(f, "checking files: {done} of {total}"),
            Stage::Decoding => write!(f, "decoding pictures: {done} of {total}"),
        }
    }
}

impl Folder {
    /// Opens a folder, and decodes every picture once. The limits of memory are the defaults of
    /// [`builder`](Self::builder).
    ///
    /// # Errors
    /// - [`Error::Config`] if the configuration is not [valid](FolderConfig::validate).
    /// - [`Error::Io`] if the folder cannot be read.
    /// - [`Error::Data`] if it has no pictures, with the extensions that pictures have; or if all are unreadable.
    /// - [`Error::Pictures`] if pictures are unreadable and not [skipped](super::Unreadable::Skip), or if a picture has
    ///   no class although [`classes`](FolderConfig::classes) is set.
    pub fn open(root: impl Into<PathBuf>, config: FolderConfig) -> Result<Self> {
        Self::builder(root, config).open()
    }

    /// Returns a builder, which can set the limit of memory, a cache on disk, and a function that receives the
    /// progress.
    pub fn builder<'a>(root: impl Into<PathBuf>, config: FolderConfig) -> FolderBuilder<'a> {
        let on_progress = Box::new(|_| ControlFlow::Continue(()));
        let (memory_limit, cache_limit) = (FolderBuilder::MEMORY_LIMIT, FolderBuilder::CACHE_LIMIT);
        let root = root.into();
        FolderBuilder { root, config, memory_limit, cache: None, cache_limit, on_progress }
    }
}

impl<'a> FolderBuilder<'a> {
    /// The default of [`memory_limit`](Self::memory_limit): 2 GiB.
    pub const MEMORY_LIMIT: u64 = 2 << 30;

    /// The default of [`cache_limit`](Self::cache_limit): 16 GiB.
    pub const CACHE_LIMIT: u64 = 16 << 30;

    /// Sets the number of bytes of scaled pictures that are kept in memory. The default is 2 GiB: 174,000 colour images
    /// of 64 x 64 pixels. Pictures beyond the limit are decoded each time a batch is read.
    pub fn memory_limit(mut self, bytes: u64) -> Self {
        self.memory_limit = bytes;
        self
    }

    /// Keeps scaled pictures in the files of a directory, which is created if necessary. The default is no cache.
    ///
    /// The name of a file is a hash of the content of the picture and of the settings, with
    /// [`max_pixels`](FolderConfig::max_pixels). A changed picture, or another setting, therefore makes another file.
    /// Damaged files are detected and made again. The directory may be removed at any time. It should belong to the
    /// user alone: files with the right checksum are trusted.
    pub fn cache(mut self, directory: impl Into<PathBuf>) -> Self {
        self.cache = Some(directory.into());
        self
    }

    /// Sets the largest number of bytes of the files in the [cache](Self::cache). The default is 16 GiB: 1.4 million
    /// colour images of 64 x 64 pixels. Beyond the limit, the least recently used files are removed.
    pub fn cache_limit(mut self, bytes: u64) -> Self {
        self.cache_limit = bytes;
        self
    }

    /// Sets a function that is called after each file, from the thread that has read it, and never from two threads at
    /// once. If it returns `Break`, opening the folder ends with [`Error::Stopped`].
    pub fn on_progress(mut self, f: impl FnMut(Progress) -> ControlFlow<()> + Send + 'a) -> Self {
        self.on_progress = Box::new(f);
        self
    }

    /// Opens the folder, and decodes every picture once, on as many threads as rayon's pool has.
    ///
    /// # Errors
    /// Returns the errors of [`Folder::open`]. Also returns [`Error::Stopped`] if the function of
    /// [`on_progress`](Self::on_progress) returned `Break`, and [`Error::Io`] if the cache cannot be written.
    pub fn open(self) -> Result<Folder> {
        self.config.validate()?;
        let Self { root, config, memory_limit, cache, cache_limit, on_progress } = self;
        let cache = cache.map(|directory| Cache::open(directory, cache_limit)).transpose()?;
        let work = Work {
            root: &root,
            config: &config,
            threads: rayon::current_num_threads(),
            stop: AtomicBool::new(false),
            report: Mutex::new(on_progress),
        };
        let Found { paths, channels, mut unreadable, ignored } = work.find()?;
        let class_names = if config.classes { work.classes(&paths)? } else { vec![] };
        let class = |path: &Path| {
            let name = class_name(path)?;
            class_names.binary_search(&name.as_encoded_bytes()).ok().map(|class| class as u32)
        };

        let recipe = Recipe { config: config.clone(), channels };
        let room = AtomicU64::new(memory_limit);
        let prepared = work.for_each(Stage::Decoding, &paths, |path| {
            let scaled = prepare(&root.join(path), &recipe, cache.as_ref())?;
            Ok(scaled.map(|(key, scaled)| {
                let bytes = scaled.pixels.len() as u64;
                let less = |room: u64| room.checked_sub(bytes);
                let fits = room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok();
                (key, fits.then_some(scaled))
            }))
        })?;
        let mut pictures = Vec::new();
        for (path, prepared) in paths.iter().zip(prepared) {
            match prepared {
                Ok((key, scaled)) => {
                    pictures.push(Picture { path: path.clone(), class: class(path), key, scaled });
                }
                Err(reason) => unreadable.push(UnreadableFile { path: path.clone(), reason }),
            }
        }
        unreadable.sort_by_cached_key(|file| scan::bytes(&file.path));
        work.check(&unreadable, pictures.len())?;
        let all_in_memory = pictures.iter().all(|picture| picture.scaled.is_some());
        let threads = if all_in_memory { 1 } else { work.threads };
        let class_names =
            class_names.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
        drop(work);
        Ok(Folder { root, recipe, pictures, class_names, unreadable, ignored, cache, threads })
    }
}

/// Reads and scales a picture.
///
/// # Errors
/// Returns an error if the cache cannot be written. The reason why a picture is unreadable is not an error.
fn prepare(
    path: &Path,
    recipe: &Recipe,
    cache: Option<&Cache>,
) -> Result<std::result::Result<(cache::Key, super::recipe::Scaled), Reason>> {
    let content = match decode::content(path, recipe.config.max_pixels) {
        Ok(content) => content,
        Err(reason) => return Ok(Err(reason)),
    };
    let key = cache::key(recipe, &content);
    if let Some(scaled) = cache.and_then(|cache| cache.get(&key, recipe)) {
        return Ok(Ok((key, scaled)));
    }
    match recipe.scaled(&content) {
        Ok(scaled) => {
            cache.map_or(Ok(()), |cache| cache.put(&key, recipe, &scaled))?;
            Ok(Ok((key, scaled)))
        }
        Err(reason) => Ok(Err(reason)),
    }
}

/// The pictures of a folder before they are decoded.
struct Found {
    paths: Vec<PathBuf>,
    channels: u8,
    unreadable: Vec<UnreadableFile>,
    ignored: usize,
}

/// The opening of a folder.
struct Work<'a, 'b> {
    root: &'b Path,
    config: &'b FolderConfig,
    threads: usize,
    stop: AtomicBool,
    report: Mutex<Report<'a>>,
}

impl Work<'_, '_> {
    /// Reports the progress. Returns whether to go on.
    fn report(&self, stage: Stage, done: usize, total: usize) -> bool {
        if lock(&self.report)(Progress { stage, done, total }).is_break() {
            self.stop.store(true, Ordering::Relaxed);
        }
        !self.stop.load(Ordering::Relaxed)
    }

    fn stopped(&self) -> Error {
        Error::Stopped { path: self.root.into() }
    }

    /// Calls `f` with each path, on all threads.
    fn for_each<R: Send>(
        &self,
        stage: Stage,
        paths: &[PathBuf],
        f: impl Fn(&Path) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        let done = AtomicUsize::new(0);
        let results = parallel::map(self.threads, paths.iter(), &self.stop, |path| {
            let result = f(path);
            self.report(stage, done.fetch_add(1, Ordering::Relaxed) + 1, paths.len());
            result
        })?;
        // The last call may have asked to stop, too.
        match self.stop.load(Ordering::Relaxed) {
            false => results.ok_or_else(|| self.stopped()),
            true => Err(self.stopped()),
        }
    }

    /// Finds the pictures and their channels.
    fn find(&self) -> Result<Found> {
        let files = scan::files(self.root, |found| self.report(Stage::Finding, found, found))?;
        let files = files.ok_or_else(|| self.stopped())?;
        let is_auto = self.config.channels == Channels::Auto;
        let kinds = self.for_each(Stage::Checking, &files.paths, |path| {
            let path = self.root.join(path);
            let kind = scan::kind(&path);
            // Broken pictures do not determine the channels.
            let has_colour = is_auto && kind == Kind::Picture && {
                let max_pixels = self.config.max_pixels;
                let content = decode::content(&path, max_pixels);
                content.and_then(|c| decode::is_grey(&c, max_pixels)).is_ok_and(|is_grey| !is_grey)
            };
            Ok((kind, has_colour))
        })?;
        let file = |(path, reason)| UnreadableFile { path, reason };
        let mut found = Found {
            paths: Vec::new(),
            channels: match self.config.channels {
                Channels::Auto | Channels::Grey => 1,
                Channels::Rgb => 3,
                Channels::Rgba => 4,
            },
            unreadable: files.failed.into_iter().map(file).collect(),
            ignored: 0,
        };
        for (path, (kind, has_colour)) in files.paths.into_iter().zip(kinds) {
            if has_colour {
                found.channels = 3;
            }
            match kind {
                Kind::Picture => found.paths.push(path),
                Kind::Broken(reason) => found.unreadable.push(file((path, reason))),
                Kind::Other => found.ignored += 1,
            }
        }
        Ok(found)
    }

    /// The bytes of the names of the classes, in their order.
    fn classes<'p>(&self, paths: &'p [PathBuf]) -> Result<Vec<&'p [u8]>> {
        let mut names = BTreeSet::new();
        for path in paths {
            let name = class_name(path).ok_or_else(|| Error::Pictures {
                path: self.root.join(path),
                reason: "in no sub-folder, so it has no class".into(),
                field: "classes",
                remedy: "move it into one, or set `classes` to false",
            })?;
            names.insert(name.as_encoded_bytes());
        }
        Ok(names.into_iter().collect())
    }

    /// # Errors
    /// Returns an error if there is no picture, or if there are unreadable ones, which are not to be skipped.
    fn check(&self, unreadable: &[UnreadableFile], readable: usize) -> Result<()> {
        let first: Vec<_> = unreadable
            .iter()
            .take(NAMED)
            .map(|file| format!("{} ({})", file.path.display(), file.reason))
            .collect();
        let more = match unreadable.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let named = format!("{}{more}", first.join(", "));
        if self.config.unreadable == Unreadable::Refuse && !unreadable.is_empty() {
            let (count, all) = (unreadable.len(), unreadable.len() + readable);
            return Err(Error::Pictures {
                path: self.root.into(),
                reason: format!("{count} of {all} pictures cannot be read: {named}"),
                field: "unreadable",
                remedy: "Unreadable::Skip leaves them out",
            });
        }
        let reason = match (readable, unreadable.is_empty()) {
            (0, true) => format!("no pictures here; their names end in {}", scan::extensions()),
            (0, false) => format!("no picture here can be read: {named}"),
            _ => return Ok(()),
        };
        Err(Error::data(self.root, reason))
    }
}

/// The first folder of a path, if it has one.
fn class_name(path: &Path) -> Option<&OsStr> {
    let mut parts = path.iter();
    let name = parts.next()?;
    parts.next().map(|_| name)
}

impl fmt::Debug for FolderBuilder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FolderBuilder")
            .field("root", &self.root)
            .field("config", &self.config)
            .field("memory_limit", &self.memory_limit)
            .field("cache", &self.cache)
            .field("cache_limit", &self.cache_limit)
            .finish_non_exhaustive()
    }
}
