//! Values in a device's memory: their types and addresses.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use crate::precision::Precision;

/// An address in the device's memory, or null.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub(crate) struct Pointer(pub(super) u64);

impl Pointer {
    pub const NONE: Self = Self(0);

    pub fn to<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> Self {
        Self(slice.device_ptr(stream).0)
    }

    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }

    pub fn as_ptr(self) -> *mut c_void {
        self.0 as *mut c_void
    }
}

/// The type of a map's values in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Element {
    F32,
    Bf16,
    F16,
}

impl Element {
    pub fn of(precision: Precision) -> Self {
        match precision {
            Precision::Highest | Precision::High => Self::F32,
            Precision::BF16 => Self::Bf16,
            Precision::F16 => Self::F16,
        }
    }

    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// Returns the compiler option that selects the type `T` of the source.
    pub(super) fn definition(self) -> &'static str {
        match self {
            Self::F32 => "-DDDPM_F32",
            Self::Bf16 => "-DDDPM_BF16",
            Self::F16 => "-DDDPM_F16",
        }
    }

    /// Returns the number of values that a thread handles at once, `width` in the source. It fills 16 or 8
    /// bytes if it divides each of these numbers of channels and the addresses are multiples of 16.
    /// Otherwise it is 1.
    pub(super) fn width(self, channels: &[usize], pointers: &[Pointer]) -> u32 {
        let aligned = pointers.iter().all(|pointer| pointer.0.is_multiple_of(16));
        let fits = |width: &usize| aligned && channels.iter().all(|n| n.is_multiple_of(*width));
        let widths = [16 / self.bytes(), 8 / self.bytes()];
        widths.into_iter().find(fits).unwrap_or(1) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_divide() {
        let width = |element: Element, channels: usize, at| {
            element.width(&[64, channels], &[Pointer(256), Pointer(at)])
        };
        assert_eq!(width(Element::F32, 8, 16), 4);
        assert_eq!(width(Element::F32, 6, 16), 2);
        assert_eq!(width(Element::F32, 3, 16), 1);
        assert_eq!(width(Element::F32, 8, 8), 1);
        assert_eq!(width(Element::F16, 8, 0), 8);
        assert_eq!(width(Element::Bf16, 12, 32), 4);
        assert_eq!(width(Element::Bf16, 2, 32), 1);
    }
}
