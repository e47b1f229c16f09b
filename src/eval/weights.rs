use std::path::Path;

use candle_core::{DType, Device};

use crate::error::{Error, Result};
use crate::files;
use crate::model::Parameters;
use crate::model::tensor_file::{read_regular, tensors_of};

/// Reads the weights of an extractor from a safetensors file, in f32. Returns them and the SHA-256 of the file.
pub(super) fn load(path: &Path, device: &Device) -> Result<(Parameters, String)> {
    let bytes = read_regular(path)?;
    let sha256 = files::sha256(&bytes[..]).map_err(Error::io(path))?;
    let tensors = tensors_of(path, &bytes, DType::F32, device)?;
    Ok((Parameters::frozen(path, tensors, DType::F32, device), sha256))
}
