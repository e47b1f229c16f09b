//! Tensors in the files of PyTorch (`torch.save`), read without running code.
//!
//! Today such a file is a ZIP archive: the pickle `data.pkl` describes the objects, and each storage of numbers has an
//! entry of its own. A file of a version before 1.6 is a sequence of pickles, followed by the storages.

mod pickle;
mod tensors;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

use safetensors::tensor::TensorView;

use self::pickle::{Pickled, Value};
use self::tensors::{Storage, View, named};
use crate::error::{Error, Result, in_short};
use crate::zip::Archive;

/// The first pickle of a file of the earlier format: a number of 10 bytes.
const MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
/// The version of the earlier format.
const PROTOCOL: i64 = 1001;
/// The greatest size of all tensors, as a multiple of the size of the file. Tensors can share numbers.
const MOST_SHARED: u64 = 8;

/// Returns whether a file that begins with these bytes is a ZIP archive.
pub(super) fn is_archive(start: &[u8]) -> bool {
    start.starts_with(b"PK\x03\x04")
}

/// Returns whether a file that begins with these bytes has the earlier format. The first two bytes alone could be the
/// length of the header of a safetensors file.
pub(super) fn is_legacy(start: &[u8]) -> bool {
    start.starts_with(MAGIC)
}

/// Reads the tensors of an archive whose names begin with `prefix`. Calls `visit` for each, with its name without the
/// prefix. Tensors of integers, such as counters of batches, are left out.
///
/// # Errors
/// Returns an error if the file is damaged, or if a value of such a name needs code to be run.
pub(super) fn visit_archive(
    archive: &Archive,
    prefix: &str,
    visit: impl FnMut(&str, &TensorView<'_>) -> Result<()>,
) -> Result<()> {
    let names = archive.names().filter_map(|name| str::from_utf8(name).ok());
    let mut roots = names.filter_map(|name| name.strip_suffix("/data.pkl"));
    let Some(root) = roots.find(|root| !root.contains('/')) else {
        return Err(archive.damaged("the archive has no data.pkl, so it is not of PyTorch".into()));
    };
    // PyTorch compresses nothing, so no content is larger than the file.
    let read = |name: &str| match archive.size(&format!("{root}/{name}")) {
        Some(size) if size > archive.len() => {
            Err(archive.damaged(format!("{name} has more bytes than the file")))
        }
        _ => archive.read(&format!("{root}/{name}")),
    };
    if let Some(order) = read("byteorder")? {
        check_order(archive.path(), order == b"little")?;
    }
    let pickle = read("data.pkl")?.unwrap_or_default();
    let (pickled, _) = Pickled::read(&pickle).map_err(|reason| archive.damaged(reason))?;
    let (read, left) = (BTreeMap::new(), archive.len());
    let storages = Storages::Archive { archive, root, read, left };
    visit_all((archive.path(), archive.len()), &pickled, storages, prefix, visit)
}

/// Reads the content of a file of the earlier format, as [`visit_archive`] does.
///
/// # Errors
/// Returns an error if the file is damaged, or if a value of such a name needs code to be run.
pub(super) fn visit_legacy(
    path: &Path,
    bytes: &[u8],
    prefix: &str,
    visit: impl FnMut(&str, &TensorView<'_>) -> Result<()>,
) -> Result<()> {
    let damaged = |reason: String| Error::damaged(path, reason);
    let (_, rest) = Pickled::read(bytes).map_err(damaged)?;
    let (protocol, rest) = Pickled::read(rest).map_err(damaged)?;
    if protocol.value != Value::Int(PROTOCOL) {
        return Err(damaged(format!("the version of the format is not {PROTOCOL}")));
    }
    let (system, rest) = Pickled::read(rest).map_err(damaged)?;
    let little = (Value::Text("little_endian"), Value::Bool(true));
    check_order(path, system.dict(system.value).is_some_and(|facts| facts.contains(&little)))?;
    let (pickled, rest) = Pickled::read(rest).map_err(damaged)?;
    let (keys, mut rest) = Pickled::read(rest).map_err(damaged)?;
    let known = Storage::all(&pickled).collect::<std::result::Result<Vec<_>, _>>();
    let known: BTreeMap<&str, Storage<'_>> =
        known.map_err(damaged)?.into_iter().map(|storage| (storage.key, storage)).collect();
    let mut storages = BTreeMap::new();
    for key in keys.sequence(keys.value).unwrap_or_default() {
        let Some(storage) = (match key {
            Value::Text(key) => known.get(key),
            _ => None,
        }) else {
            return Err(damaged("the file has a storage to which nothing refers".into()));
        };
        let content = rest.split_first_chunk().and_then(|(len, rest)| {
            let fits = u64::from_le_bytes(*len) == storage.len as u64;
            rest.split_at_checked(storage.len.checked_mul(storage.width)?).filter(|_| fits)
        });
        let Some((content, after)) = content else {
            return Err(damaged(format!("storage {} is incomplete", in_short(storage.key))));
        };
        storages.insert(storage.key, content);
        rest = after;
    }
    let storages = Storages::Legacy(storages);
    visit_all((path, bytes.len() as u64), &pickled, storages, prefix, visit)
}

fn visit_all(
    (path, len): (&Path, u64),
    pickled: &Pickled<'_>,
    mut storages: Storages<'_>,
    prefix: &str,
    mut visit: impl FnMut(&str, &TensorView<'_>) -> Result<()>,
) -> Result<()> {
    let named = named(pickled, prefix).map_err(|reason| Error::data(path, reason))?;
    let mut left = len.saturating_mul(MOST_SHARED);
    for (name, arguments) in named {
        let what = in_short(&name);
        let damaged = |reason: String| Error::damaged(path, format!("{what}: {reason}"));
        let view = View::parse(pickled, arguments).map_err(damaged)?;
        let Some(dtype) = view.storage.dtype else { continue };
        let size = view.size().map_err(damaged)? as u64;
        left = left.checked_sub(size).ok_or_else(|| {
            damaged(format!("the tensors have more than {MOST_SHARED} times the size of the file"))
        })?;
        let storage = storages.get(path, &view.storage)?;
        let values = view.values(storage);
        let view = TensorView::new(dtype, view.shape, &values);
        visit(&name, &view.map_err(|error| damaged(error.to_string()))?)?;
    }
    Ok(())
}

/// The storages of a file.
enum Storages<'a> {
    Archive {
        archive: &'a Archive,
        /// The directory of the entries.
        root: &'a str,
        /// The storages so far, by their keys.
        read: BTreeMap<String, Vec<u8>>,
        /// The greatest size of all others. The entries of a damaged archive can overlap.
        left: u64,
    },
    Legacy(BTreeMap<&'a str, &'a [u8]>),
}

impl Storages<'_> {
    /// The bytes of a storage: as many as its length states.
    fn get(&mut self, path: &Path, storage: &Storage<'_>) -> Result<&[u8]> {
        let expected = storage.len.checked_mul(storage.width);
        let bytes = match self {
            Self::Archive { archive, root, read, left } => {
                match read.entry(storage.key.to_owned()) {
                    Entry::Occupied(read) => Some(&**read.into_mut()),
                    Entry::Vacant(vacant) => {
                        let name = format!("{root}/data/{}", storage.key);
                        let fits = |size: &u64| expected.is_some_and(|all| all as u64 == *size);
                        let size = archive.size(&name).filter(fits);
                        match size.and_then(|size| left.checked_sub(size)) {
                            Some(rest) => {
                                *left = rest;
                                archive.read(&name)?.map(|content| &**vacant.insert(content))
                            }
                            None => None,
                        }
                    }
                }
            }
            Self::Legacy(storages) => storages.get(storage.key).copied(),
        };
        bytes.filter(|bytes| Some(bytes.len()) == expected).ok_or_else(|| {
            let key = in_short(storage.key);
            Error::damaged(path, format!("storage {key} is missing, or has another size"))
        })
    }
}

/// # Errors
/// Returns an error if the numbers are not little-endian.
fn check_order(path: &Path, is_little: bool) -> Result<()> {
    match is_little {
        true => Ok(()),
        false => Err(Error::data(path, "the numbers are not little-endian, which is not read")),
    }
}
