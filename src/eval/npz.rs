//! Archives of NumPy (`.npz`): arrays of floating-point numbers by name. An archive is a ZIP file whose entries are
//! `.npy` files.

use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};
use crate::files;
use crate::zip::{Archive, archive};

/// An array in C order.
pub(super) struct Array {
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
    /// Whether the file has fewer bits than f64.
    pub is_f32: bool,
}

/// Reads the array `name` of an archive, if there is one.
///
/// # Errors
/// Returns an error if the entry is damaged, or if its numbers are neither float64 nor float32.
pub(super) fn array(archive: &Archive, name: &str) -> Result<Option<Array>> {
    let Some(content) = archive.read(&format!("{name}.npy"))? else { return Ok(None) };
    let array = npy(&content).map_err(|reason| archive.damaged(format!("{name}: {reason}")))?;
    Ok(Some(array))
}

/// Reads the content of a `.npy` file.
fn npy(mut content: &[u8]) -> std::result::Result<Array, String> {
    let size = content.len() as u64;
    let mut start = [0; 8];
    let mut exactly = |bytes: &mut [u8]| content.read_exact(bytes).map_err(|e| e.to_string());
    exactly(&mut start)?;
    if !start.starts_with(b"\x93NUMPY") {
        return Err("not a .npy file".into());
    }
    // Version 1 has a length of 2 bytes, later ones of 4.
    let mut length = [0; 4];
    let digits = if start[6] == 1 { 2 } else { 4 };
    exactly(&mut length[..digits])?;
    let length = u32::from_le_bytes(length);
    // Also the header of an array of many dimensions is short.
    if length > 4096 {
        return Err(format!("a header of {length} bytes; at most 4,096 are read"));
    }
    let mut header = vec![0; length as usize];
    exactly(&mut header)?;
    let header = String::from_utf8_lossy(&header);
    let field = |name: &str| {
        let at = header.find(&format!("'{name}':"))?;
        Some(header[at + name.len() + 3..].trim_start())
    };
    let width = match field("descr").unwrap_or_default() {
        descr if descr.starts_with("'<f8'") => 8,
        descr if descr.starts_with("'<f4'") => 4,
        _ => return Err("the numbers are not little-endian float64 or float32".into()),
    };
    let shape = field("shape").and_then(|shape| shape.strip_prefix('(')?.split_once(')'));
    let shape = shape.map(|(shape, _)| shape.split(',').map(str::trim).filter(|n| !n.is_empty()));
    let shape =
        shape.and_then(|shape| shape.map(|n| n.parse().ok()).collect::<Option<Vec<usize>>>());
    let Some(shape) = shape else { return Err("the header has no shape".into()) };
    if shape.len() > 1 && !field("fortran_order").is_some_and(|order| order.starts_with("False")) {
        return Err("the array is not in C order".into());
    }
    let count = shape.iter().try_fold(1u64, |count, &n| count.checked_mul(n as u64));
    let expected = count.and_then(|count| count.checked_mul(width));
    if expected != Some(size.saturating_sub(8 + digits as u64 + u64::from(length))) {
        return Err(format!("shape {shape:?} does not fit the size of the entry"));
    }
    let values = if width == 8 {
        content.as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect()
    } else {
        content.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes).into()).collect()
    };
    Ok(Array { shape, values, is_f32: width == 4 })
}

/// Writes an archive of arrays, stored without compression.
pub(super) fn write(path: &Path, arrays: &[(&str, &[usize], &[f64])]) -> Result<()> {
    let entry = |&(name, shape, values): &(&str, &[usize], &[f64])| {
        // As NumPy writes it: `(3,)` and `(3, 3)`.
        let comma = if shape.len() == 1 { "," } else { "" };
        let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ") + comma;
        let header = format!("{{'descr': '<f8', 'fortran_order': False, 'shape': ({shape}), }}");
        // With the 10 bytes before it, the header ends at a multiple of 64 bytes.
        let length = (header.len() + 11).next_multiple_of(64) - 10;
        let mut content = b"\x93NUMPY\x01\x00".to_vec();
        content.extend((length as u16).to_le_bytes());
        content.extend(format!("{header:<0$}\n", length - 1).into_bytes());
        content.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        (format!("{name}.npy"), content)
    };
    let entries: Vec<_> = arrays.iter().map(entry).collect();
    let content = archive(&entries).map_err(|size| {
        Error::config("statistics", format!("of {size}"), "less than 4 GB in a file")
    })?;
    files::write(path, &content)
}
