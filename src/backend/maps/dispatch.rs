use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::cpu::Cpu;
#[cfg(feature = "cuda")]
use super::cuda::Cuda;
use super::ops::Maps;
use super::place::Place;
use super::pool::Pool;
use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Gpu};

/// A computation that is generic over the backend.
pub(crate) trait Pass {
    type Output;

    /// Computes with the kernels of a device.
    fn run<B: Maps>(self, backend: B) -> Result<Self::Output>;
}

/// Runs a pass with the kernels of its device, and with memory from `pool`.
pub(crate) fn dispatch<P>(place: &Place<'_>, pool: &Arc<Pool>, pass: P) -> Result<P::Output>
where
    P: Pass + Send,
    P::Output: Send,
{
    let &Place { device, .. } = place;
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return pass.run(Cuda::new(Gpu::of(device)?, pool, place)?);
    }
    let _ = device;
    Pool::among_threads(|| pass.run(Cpu::new(pool, place)))
}

/// Computes a forward pass, `pass(inputs)`. A device may record the pass and repeat it for other inputs of the same
/// shapes, if the weights never change.
///
/// # Errors
/// Returns the errors of `pass`.
pub(crate) fn repeated(
    place: &Place<'_>,
    pool: &Arc<Pool>,
    inputs: &[Tensor],
    pass: &mut dyn FnMut(&[Tensor]) -> Result<Tensor>,
) -> Result<Tensor> {
    let weights_are_kept = place.fixed && !place.repack;
    #[cfg(feature = "cuda")]
    if place.device.is_cuda() && weights_are_kept {
        let gpu = Gpu::of(place.device)?;
        return cuda::repeated(&gpu, &pool.network, place.precision, inputs, pass);
    }
    let _ = (weights_are_kept, pool);
    pass(inputs)
}

/// Returns whether there are kernels for networks whose weights have this dtype on this device.
pub(crate) fn has_kernels(dtype: DType, device: &Device) -> bool {
    dtype == DType::F32 && (device.is_cpu() || cfg!(feature = "cuda") && device.is_cuda())
}

/// Returns whether passes on this device may be captured and repeated.
pub(crate) fn can_capture(device: &Device) -> bool {
    device.is_cuda()
}
