use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::files;
use crate::model::tensor_file::{open_regular, read_tensors};

/// Reads the weights of an extractor, in f32, from a safetensors file or a file of PyTorch. Returns them and the SHA-256
/// of the file.
pub(super) fn load(path: &Path, device: &Device) -> Result<(BTreeMap<String, Tensor>, String)> {
    let sha256 = files::sha256(open_regular(path)?.0).map_err(Error::io(path))?;
    Ok((read_tensors(path, "", DType::F32, device)?, sha256))
}
