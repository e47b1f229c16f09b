use std::collections::BTreeMap;
use std::io::Seek;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::files;
use crate::model::tensor_file::{open_regular, read_tensors_of};

/// Reads the weights of an extractor, in f32, from a safetensors file or a file of PyTorch. Returns them and the SHA-256
/// of the file. Both are of the same bytes, even if another program replaces the file.
pub(super) fn load(path: &Path, device: &Device) -> Result<(BTreeMap<String, Tensor>, String)> {
    let (mut file, _) = open_regular(path)?;
    let sha256 = files::sha256(&file).map_err(Error::io(path))?;
    file.rewind().map_err(Error::io(path))?;
    Ok((read_tensors_of(path, file, "", DType::F32, device)?, sha256))
}
