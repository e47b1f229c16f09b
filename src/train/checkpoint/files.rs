use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use flate2::Crc;
use safetensors::SafeTensorError;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::kernels::with_values;
use crate::model::tensor_file::{open_regular, read_regular, tensors_of};

/// The length and CRC-32 of a file when it was written. They detect every single flipped bit. They miss one in
/// about four billion cases of other damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Checksum {
    bytes: u64,
    #[serde(with = "hexadecimal")]
    crc32: u32,
}

/// Serialises a CRC-32 as other programs print it: `"cbf43926"`.
mod hexadecimal {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(value: &u32, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{value:08x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
        let text = String::deserialize(deserializer)?;
        let number = u32::from_str_radix(&text, 16).ok().filter(|_| text.len() == 8);
        number.ok_or_else(|| D::Error::custom("crc32 must have eight hexadecimal digits"))
    }
}

impl Checksum {
    fn of(bytes: &[u8]) -> Self {
        let mut crc = Crc::new();
        crc.update(bytes);
        Self { bytes: bytes.len() as u64, crc32: crc.sum() }
    }

    /// Compares a file with this checksum.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or if its content has changed since it was written.
    pub fn verify(&self, path: &Path) -> Result<()> {
        self.compare(path, Self::of_file(path)?)
    }

    /// # Errors
    /// Returns an error if the file cannot be read.
    fn of_file(path: &Path) -> Result<Self> {
        let (mut file, bytes) = open_regular(path)?;
        let (mut crc, mut part) = (Crc::new(), vec![0; 1 << 20]);
        loop {
            match file.read(&mut part).map_err(Error::io(path))? {
                0 => return Ok(Self { bytes, crc32: crc.sum() }),
                n => crc.update(&part[..n]),
            }
        }
    }

    fn compare(&self, path: &Path, found: Self) -> Result<()> {
        if found.bytes != self.bytes {
            let reason = format!("{} bytes long; {} were written", found.bytes, self.bytes);
            return Err(Error::damaged(path, reason));
        }
        if found.crc32 != self.crc32 {
            let reason =
                format!("its CRC-32 is {:08x}; {:08x} was written", found.crc32, self.crc32);
            return Err(Error::damaged(path, reason));
        }
        Ok(())
    }
}

/// Reads the tensors of a file. Compares the file with the checksum `written`, if there is one.
pub(super) fn read_tensors(
    path: &Path,
    written: Option<&Checksum>,
    device: &Device,
) -> Result<BTreeMap<String, Tensor>> {
    let bytes = read_regular(path)?;
    if let Some(written) = written {
        written.compare(path, Checksum::of(&bytes))?;
    }
    tensors_of(path, &bytes, DType::F32, device)
}

/// Writes tensors of finite f32 with optional metadata (a key and its text), and flushes them to disk.
///
/// There is at most one key, because `safetensors` writes several keys in a random order.
///
/// # Errors
/// Returns an error that names the tensor if a value is not finite, or an error if the file cannot be written.
pub(super) fn write_tensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: Option<(&str, &str)>,
    step: u64,
) -> Result<Checksum> {
    let mut on_cpu = BTreeMap::new();
    for (name, tensor) in tensors {
        let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
        let found = with_values([&tensor], |[values]| {
            values.iter().copied().find(|value| !value.is_finite())
        })?;
        if let Some(value) = found {
            return Err(Error::NonFinite { what: format!("weight {name}"), value, step });
        }
        on_cpu.insert(name, tensor);
    }
    let metadata = metadata.map(|(key, text)| HashMap::from([(key.into(), text.into())]));
    safetensors::serialize_to_file(on_cpu, metadata, path).map_err(|error| match error {
        SafeTensorError::IoError(error) => Error::io(path)(error),
        error => Error::external(error),
    })?;
    let sync = || File::options().write(true).open(path)?.sync_all();
    sync().map_err(Error::io(path))?;
    Checksum::of_file(path)
}

pub(super) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(Error::io(path))
}

/// Flushes renames within `dir` to disk, so that they survive a power failure. Only Unix supports and needs this.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        return match File::open(dir).and_then(|dir| dir.sync_all()) {
            // Some file systems cannot flush a directory: their renames last, or nothing can make them last.
            Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
                Ok(())
            }
            flushed => flushed.map_err(Error::io(dir)),
        };
    }
    Ok(())
}
