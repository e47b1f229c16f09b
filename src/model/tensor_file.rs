//! Reading the tensors of files: safetensors, and the files of PyTorch.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek};
use std::path::Path;

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};

use super::pytorch;
use crate::error::{Error, Result, in_short};
use crate::zip::Archive;

/// Reads the tensors of a file whose names begin with `prefix`, by their names without the prefix. The content decides
/// the format: safetensors, or a file of PyTorch (`torch.save`), of which no code is run. The names of a file of
/// PyTorch are the keys of its dictionaries, with dots between them; its tensors of integers are left out.
///
/// All tensors must be floating-point tensors with values that are finite, also in `dtype`. They keep the dtypes of the
/// file.
///
/// # Errors
/// Returns an error if the file cannot be read, if it is damaged, or if a value of such a name is not such a tensor.
/// Returns an error that names the function if a file of PyTorch calls one to make such a value.
pub(crate) fn read_tensors(
    path: &Path,
    prefix: &str,
    dtype: DType,
    device: &Device,
) -> Result<BTreeMap<String, Tensor>> {
    read_tensors_of(path, open_regular(path)?.0, prefix, dtype, device)
}

/// Reads the tensors of an open file, as [`read_tensors`] does. The file is at its beginning, and `path` is its path.
pub(crate) fn read_tensors_of(
    path: &Path,
    mut file: File,
    prefix: &str,
    dtype: DType,
    device: &Device,
) -> Result<BTreeMap<String, Tensor>> {
    let mut content = Vec::new();
    (&file).take(4).read_to_end(&mut content).map_err(Error::io(path))?;
    let mut tensors = BTreeMap::new();
    let insert = |name: &str, view: &TensorView<'_>| {
        tensors.insert(name.to_owned(), checked(path, name, view, dtype, device)?);
        Ok(())
    };
    if pytorch::is_archive(&content) {
        file.rewind().map_err(Error::io(path))?;
        pytorch::visit_archive(&Archive::new(path, file)?, prefix, insert)?;
        return Ok(tensors);
    }
    file.read_to_end(&mut content).map_err(Error::io(path))?;
    if pytorch::is_legacy(&content) {
        pytorch::visit_legacy(path, &content, prefix, insert)?;
        return Ok(tensors);
    }
    visit_safetensors(path, &content, prefix, insert)?;
    Ok(tensors)
}

/// Reads a file.
pub(crate) fn read_regular(path: &Path) -> Result<Vec<u8>> {
    let (mut file, _) = open_regular(path)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(Error::io(path))?;
    Ok(bytes)
}

/// Opens a regular file. Returns it and its length.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    // Checked before opening, because a pipe would wait for its writer, and a device may have no end.
    let metadata = path.metadata().map_err(Error::io(path))?;
    if !metadata.is_file() {
        let reason = std::io::Error::new(ErrorKind::InvalidInput, "not a regular file");
        return Err(Error::io(path)(reason));
    }
    Ok((File::open(path).map_err(Error::io(path))?, metadata.len()))
}

/// Reads all tensors from the content of a safetensors file, as [`read_tensors`] does.
pub(crate) fn tensors_of(
    path: &Path,
    bytes: &[u8],
    dtype: DType,
    device: &Device,
) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    visit_safetensors(path, bytes, "", |name, view| {
        tensors.insert(name.to_owned(), checked(path, name, view, dtype, device)?);
        Ok(())
    })?;
    Ok(tensors)
}

/// Calls `visit` for each tensor of a safetensors file whose name begins with `prefix`, with its name without the
/// prefix.
fn visit_safetensors(
    path: &Path,
    bytes: &[u8],
    prefix: &str,
    mut visit: impl FnMut(&str, &TensorView<'_>) -> Result<()>,
) -> Result<()> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| not_safetensors(path, bytes, e))?;
    for (name, view) in file.iter() {
        let Some(name) = name.strip_prefix(prefix) else { continue };
        // PyTorch's batch normalisations count training batches in an integer, which no network here needs.
        if !name.ends_with(".num_batches_tracked") {
            visit(name, &view)?;
        }
    }
    Ok(())
}

/// Creates a tensor of a file.
///
/// # Errors
/// Returns an error if it is not a floating-point tensor, or if a value is not finite, also in `dtype`.
fn checked(
    path: &Path,
    name: &str,
    view: &TensorView<'_>,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let damaged = |reason: String| Error::damaged(path, format!("{} {reason}", in_short(name)));
    if !matches!(view.dtype(), Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64) {
        let expected = "it must be F16, BF16, F32 or F64";
        return Err(damaged(format!("is of dtype {}; {expected}", view.dtype())));
    }
    if let Some(reason) = not_finite(view, dtype) {
        return Err(damaged(reason));
    }
    let loaded = view.load(device);
    loaded.map_err(|e| damaged(format!("cannot be loaded: {}", Error::from(e))))
}

/// Returns the text of `key` in the metadata of a safetensors file, from its content.
///
/// # Errors
/// Returns an error if this is not the complete content of a safetensors file.
pub(crate) fn metadata_of(path: &Path, bytes: &[u8], key: &str) -> Result<Option<String>> {
    let header = SafeTensors::read_metadata(bytes).map_err(|e| not_safetensors(path, bytes, e))?;
    Ok(header.1.metadata().as_ref().and_then(|metadata| metadata.get(key).cloned()))
}

/// Returns the tensor of this name and shape among those of a file.
///
/// # Errors
/// Returns an error if the file has no tensor of this name, or one of another shape.
pub(crate) fn weight_of<'a>(
    path: &Path,
    tensors: &'a BTreeMap<String, Tensor>,
    name: &str,
    shape: &[usize],
) -> Result<&'a Tensor> {
    let tensor = tensors.get(name).ok_or_else(|| missing(path, name, tensors))?;
    if tensor.dims() == shape {
        return Ok(tensor);
    }
    let (path, found, expected) = (path.to_owned(), tensor.dims().to_vec(), shape.to_vec());
    Err(Error::WeightShape { path, name: name.into(), found, expected })
}

/// # Errors
/// Returns an error if a tensor of a file has a name that is not one of `known`.
pub(crate) fn check_known<T>(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    known: &BTreeMap<String, T>,
) -> Result<()> {
    match tensors.keys().find(|name| !known.contains_key(*name)) {
        Some(name) => Err(Error::UnknownWeight { path: path.to_owned(), name: name.clone() }),
        None => Ok(()),
    }
}

/// The error for a weight that is missing from `tensors`, which were read from `path`. It names a weight among them
/// whose name differs only by a prefix, such as wrappers of a network put before all names.
fn missing(path: &Path, name: &str, tensors: &BTreeMap<String, Tensor>) -> Error {
    let prefixed = |long: &str, short: &str| {
        long.strip_suffix(short).is_some_and(|prefix| prefix.ends_with('.'))
    };
    let similar = tensors.keys().find(|found| prefixed(found, name) || prefixed(name, found));
    Error::MissingWeight { path: path.to_owned(), name: name.into(), similar: similar.cloned() }
}

/// The reason given for a file that is not a safetensors file.
fn not_safetensors(path: &Path, bytes: &[u8], error: SafeTensorError) -> Error {
    if pytorch::is_archive(bytes) || pytorch::is_legacy(bytes) {
        let reason = "a file of PyTorch, which does not describe its network; Parameters::load reads its weights";
        return Error::data(path, reason);
    }
    if matches!(bytes, [0x80, 2..=5, ..]) {
        return Error::data(path, "a pickle that torch.save did not write");
    }
    let reason = format!("{error}; is it truncated? It has {} bytes", bytes.len());
    Error::damaged(path, reason)
}

/// Describes the values of a tensor that are not finite, or would not be finite in `dtype`.
///
/// Without the sign bit, the bits of floating-point numbers are in the order of their magnitudes: infinity follows
/// all finite numbers, and NaN follows infinity.
fn not_finite(view: &TensorView<'_>, dtype: DType) -> Option<String> {
    // The smallest magnitude that is infinite in `dtype`: half a unit beyond its largest number.
    let least = match dtype {
        DType::F16 => 65520.0,
        DType::BF16 => f64::from(f32::from_bits(0x7f7f_8000)),
        DType::F32 => f64::from_bits(0x47ef_ffff_f000_0000),
        _ => f64::INFINITY,
    };
    // The smallest bits of each type with such a magnitude. In f16 only infinity is as large.
    let single = (least as f32).to_bits();
    let found = match view.dtype() {
        Dtype::F16 => find(view, |v| u16::from_le_bytes(v) & 0x7fff, 0x7c00, 0x7c00),
        Dtype::BF16 => {
            let least = single.div_ceil(1 << 16) as u16;
            find(view, |v| u16::from_le_bytes(v) & 0x7fff, least, 0x7f80)
        }
        Dtype::F32 => find(view, |v| u32::from_le_bytes(v) & !(1 << 31), single, 0x7f80_0000),
        _ => {
            let infinity = f64::INFINITY.to_bits();
            find(view, |v| u64::from_le_bytes(v) & !(1 << 63), least.to_bits(), infinity)
        }
    };
    let (count, index, order) = found?;
    let kind = match order {
        Ordering::Less => format!("too large for {}", dtype.as_str()),
        Ordering::Equal => "infinite".into(),
        Ordering::Greater => "NaN".into(),
    };
    let total = view.shape().iter().product::<usize>();
    Some(format!(
        "is not finite: {count} of {total} values, the first at index {index}, which is {kind}"
    ))
}

/// Returns the number of magnitudes in a tensor that are `least` or more, the index of the first, and its comparison
/// with infinity.
fn find<const BYTES: usize, B: Ord + Copy>(
    view: &TensorView<'_>,
    magnitude: impl Fn([u8; BYTES]) -> B,
    least: B,
    infinity: B,
) -> Option<(usize, usize, Ordering)> {
    let (values, _) = view.data().as_chunks();
    // Counted first, without a branch per value, because the number is nearly always 0.
    let count = values.iter().filter(|&&value| magnitude(value) >= least).count();
    let first = values.iter().position(|&value| count > 0 && magnitude(value) >= least)?;
    Some((count, first, magnitude(values[first]).cmp(&infinity)))
}
