//! Access to the values of candle tensors as slices, on which the CPU kernels compute.

use std::cell::Cell;

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor};

use crate::memory::filled;

/// Calls `f` with the values of contiguous f32 tensors on the CPU.
pub(crate) fn with_values<const N: usize, T>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> T,
) -> Result<T> {
    let guards = tensors.map(|tensor| tensor.storage_and_layout());
    let mut values = [&[][..]; N];
    for (values, (storage, layout)) in values.iter_mut().zip(&guards) {
        let Storage::Cpu(storage) = &**storage else {
            candle_core::bail!("a CPU kernel was given a tensor of another device")
        };
        *values = contiguous(storage, layout)?;
    }
    Ok(f(values))
}

/// Allocates the result of an operation. Its size depends on the batch, which the user chose.
///
/// # Errors
/// Returns an error if there is not enough memory.
pub(super) fn zeros(len: usize) -> Result<Vec<f32>> {
    match filled(&[len], 0.0) {
        Some(values) => Ok(values),
        None => candle_core::bail!("not enough memory for {len} values"),
    }
}

/// Returns the values of a contiguous f32 tensor's storage.
pub(super) fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("a CPU kernel was given a tensor that is not contiguous")
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Returns whether the CPU kernels support the dtype and the device of `x`. The reference
/// compositions support all others.
pub(crate) fn on_cpu_in_f32(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// Calls `f` with the values of a contiguous f32 tensor on the CPU, to change them in place. The
/// change affects every tensor that shares the values.
pub(crate) fn with_values_mut<T>(tensor: &Tensor, f: impl FnOnce(&mut [f32]) -> T) -> Result<T> {
    struct Change<F, T>(Cell<Option<F>>, Cell<Option<T>>);

    impl<F: FnOnce(&mut [f32]) -> T, T> InplaceOp1 for Change<F, T> {
        fn name(&self) -> &'static str {
            "change"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let (CpuStorage::F32(values), Some((start, end))) =
                (storage, layout.contiguous_offsets())
            else {
                candle_core::bail!("a CPU kernel was given a tensor that is not contiguous f32")
            };
            if let Some(f) = self.0.take() {
                self.1.set(Some(f(&mut values[start..end])));
            }
            Ok(())
        }
    }

    let change = Change(Cell::new(Some(f)), Cell::new(None));
    tensor.inplace_op1(&change)?;
    match change.1.take() {
        Some(result) => Ok(result),
        None => candle_core::bail!("a CPU kernel was given a tensor of another device"),
    }
}

/// Returns whether two tensors are views of the same memory.
pub(crate) fn same_storage(a: &Tensor, b: &Tensor) -> bool {
    std::ptr::eq(&*a.storage_and_layout().0, &*b.storage_and_layout().0)
}
