//! Between candle's tensors and the kernels' slices.

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor};

/// Calls `f` with the values of contiguous f32 tensors on the CPU.
pub(crate) fn with_values<const N: usize, T>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> Result<T>,
) -> Result<T> {
    let guards = tensors.map(|tensor| tensor.storage_and_layout());
    let mut values = [&[][..]; N];
    for (values, (storage, layout)) in values.iter_mut().zip(&guards) {
        let Storage::Cpu(storage) = &**storage else {
            candle_core::bail!("a CPU kernel was given a tensor of another device")
        };
        *values = contiguous(storage, layout)?;
    }
    f(values)
}

/// The values of a contiguous f32 tensor's storage.
pub(super) fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("a CPU kernel was given a tensor that is not contiguous")
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Whether the CPU kernels take a tensor: the reference compositions take all others.
pub(super) fn on_cpu_in_f32(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == candle_core::DType::F32
}
