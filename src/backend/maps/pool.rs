//! Memory that passes of a network reuse. New memory costs the system more time than most operations take.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Tensor, TensorId};

use crate::error::{Error, Result};
use crate::kernels::cpu::conv::algorithm::Workspace;
use crate::kernels::cpu::memory::{before_line, first_line};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::Network;
use crate::memory::filled;

/// Maximum number of issued gradients that are tracked: several times the number of weights of a network.
const MAX_ISSUED: usize = 1 << 13;

/// Memory that is currently not in use.
#[derive(Default)]
pub(crate) struct Pool {
    free: Mutex<Free>,
    /// The network whose passes use the memory.
    #[cfg(feature = "cuda")]
    pub network: Arc<Network>,
}

/// Whether a pass of any network is running [in the thread pool](Pool::among_threads), which all networks share.
static BUSY: AtomicBool = AtomicBool::new(false);

#[derive(Default)]
struct Free {
    by_size: BTreeMap<usize, Vec<Vec<f32>>>,
    /// The last use of the memory: the batch size, and whether a backward pass followed.
    last: (usize, bool),
    /// The weight of each issued gradient. `gradients` holds the returned ones, by the ids of their weights.
    issued: HashMap<TensorId, TensorId>,
    gradients: HashMap<TensorId, Tensor>,
    workspace: Workspace,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").finish_non_exhaustive()
    }
}

impl Pool {
    /// Prepares for a pass. If its kind differs from that of the last pass, frees the memory: otherwise the needs of
    /// all kinds of passes would add up.
    pub fn begin(&self, batch: usize, recording: bool) {
        let mut free = self.lock();
        if free.last != (batch, recording) {
            free.by_size.clear();
            free.last = (batch, recording);
        }
    }

    /// Takes back gradients that are no longer needed. Ignores tensors that were not issued by this pool.
    pub fn recycle(&self, gradients: Vec<Tensor>) {
        let mut free = self.lock();
        for gradient in gradients {
            if let Some(weight) = free.issued.remove(&gradient.id()) {
                free.gradients.insert(weight, gradient);
            }
        }
    }

    /// Returns a tensor for the gradient of a weight, with arbitrary content.
    pub fn gradient(&self, weight: &Tensor) -> Result<Tensor> {
        let mut free = self.lock();
        let gradient = match free.gradients.remove(&weight.id()) {
            Some(gradient) => gradient,
            None => Tensor::zeros(weight.shape(), DType::F32, weight.device())?,
        };
        // If the caller never recycles gradients, this map would grow without bound, so it is cleared.
        if free.issued.len() >= MAX_ISSUED {
            free.issued.clear();
        }
        free.issued.insert(gradient.id(), weight.id());
        Ok(gradient)
    }

    /// Takes the workspace of convolutions; [`give_back`](Self::give_back) returns it.
    pub fn workspace(&self) -> Workspace {
        std::mem::take(&mut self.lock().workspace)
    }

    pub fn give_back(&self, workspace: Workspace) {
        self.lock().workspace = workspace;
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a pass on a thread of the pool that shares its work. From outside the pool, submitting each operation and
    /// waiting for it would take longer than some operations do. Only one pass is moved into the pool at a time: a
    /// thread that waits within one pass could otherwise start others, each on top of the stack of the last one.
    pub fn among_threads<R: Send>(pass: impl FnOnce() -> R + Send) -> R {
        struct Leave;

        impl Drop for Leave {
            fn drop(&mut self) {
                BUSY.store(false, Ordering::Release);
            }
        }

        if BUSY.swap(true, Ordering::Acquire) {
            return pass();
        }
        let _leave = Leave;
        rayon::scope(|_| pass())
    }

    /// Takes memory of this length, with arbitrary content.
    ///
    /// # Errors
    /// Returns [`Error::OutOfMemory`] if the system does not have enough memory. The amount depends on the batch size,
    /// which the caller chose.
    pub fn take(self: &Arc<Self>, len: usize) -> Result<Buffer> {
        let mut free = self.lock();
        // The smallest block that is large enough, unless most of it would be wasted.
        let least = len.saturating_add(before_line::<f32>());
        let found =
            free.by_size.range(least..=least.saturating_mul(2)).find(|(_, free)| !free.is_empty());
        let values = match found.map(|(&size, _)| size) {
            Some(size) => free.by_size.get_mut(&size).and_then(Vec::pop),
            None => None,
        };
        drop(free);
        let values = values.or_else(|| filled(&[least], 0.0));
        let bytes = len.saturating_mul(size_of::<f32>());
        let values = values.ok_or(Error::OutOfMemory { bytes })?;
        let first = first_line(&values);
        Ok(Buffer { values, span: first..first + len, pool: self.clone() })
    }
}

/// Values borrowed from a pool.
pub(crate) struct Buffer {
    values: Vec<f32>,
    /// The borrowed values, which begin at a cache line.
    span: Range<usize>,
    pool: Arc<Pool>,
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[self.span.clone()]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[self.span.clone()]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        self.pool.lock().by_size.entry(values.len()).or_default().push(values);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::denoiser::{Condition, Denoiser, Trainable};
    use crate::engine::Model;
    use crate::kernels::with_values_mut;
    use crate::model::{DownBlockType, Parameters, UNet, UNet2DConfig, UNetConfig, UpBlockType};
    use crate::random::Dropout;
    use crate::sample::Sampler;

    #[test]
    fn an_allocation_that_fails_is_an_error_with_its_size() -> Result<()> {
        let pool = Arc::new(Pool::default());
        // Leaves free memory, so that the next call searches it. The search must not overflow.
        drop(pool.take(7)?);
        // More than any address space holds, and more than a `usize` can count in bytes.
        let absurd = usize::MAX >> 4;
        for (len, bytes) in [(absurd, 4 * absurd), (usize::MAX, usize::MAX)] {
            let Err(error) = pool.take(len) else { panic!("there is memory for {len} values") };
            assert!(matches!(error, Error::OutOfMemory { bytes: found } if found == bytes));
            let text = error.to_string();
            assert!(text.contains(&format!("a feature map of {bytes} bytes")), "{text}");
        }
        // Memory that was returned before the error is still available.
        assert_eq!(pool.take(7)?.len(), 7);
        Ok(())
    }

    #[test]
    fn maps_begin_at_a_cache_line() -> Result<()> {
        let pool = Arc::new(Pool::default());
        for len in [1, 7, 16, 100, 10_000, 1 << 20, 99] {
            let map = pool.take(len)?;
            assert_eq!((map.len(), map.as_ptr() as usize % 64), (len, 0));
        }
        Ok(())
    }

    #[test]
    fn memory_is_that_of_the_last_kind_of_pass() -> Result<()> {
        let config = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
        let held = |unet: &Model<UNet>| -> usize {
            let free = unet.pool().lock();
            free.by_size.iter().map(|(size, free)| size * free.len()).sum()
        };
        let forward = |unet: &Model<UNet>, batch: usize| -> Result<usize> {
            let x = Tensor::zeros((batch, 1, 28, 28), DType::F32, &Device::Cpu)?;
            unet.forward(&x, &Tensor::zeros(batch, DType::U32, &Device::Cpu)?)?;
            Ok(held(unet))
        };
        let path = std::path::Path::new("weights");
        let parameters = Parameters::new(0, DType::F32, &Device::Cpu);
        parameters.build(&config)?;
        let weights: BTreeMap<_, _> =
            parameters.vars().into_iter().map(|(k, v)| (k, v.as_detached_tensor())).collect();
        let build =
            || Parameters::frozen(path, weights.clone(), DType::F32, &Device::Cpu).build(&config);
        let (one, many): (Model<UNet>, Model<UNet>) = (build()?, build()?);
        // After a few passes, the memory of each size fits closely.
        let settled = |unet: &Model<UNet>| -> Result<usize> {
            (0..3).try_for_each(|_| forward(unet, 6).map(drop))?;
            forward(unet, 6)
        };
        let once = settled(&one)?;
        assert_eq!(forward(&one, 6)?, once);
        for batch in 1..6 {
            forward(&many, batch)?;
        }
        assert_eq!(settled(&many)?, once);
        Ok(())
    }

    /// The bits of the gradients are compared in `tests/gradients.rs`.
    #[test]
    fn recomputed_maps_are_not_kept() -> Result<()> {
        let config = UNet2DConfig {
            sample_size: 16.into(),
            block_out_channels: vec![16, 16],
            norm_num_groups: 4,
            down_block_types: vec![DownBlockType::Plain, DownBlockType::Attention],
            up_block_types: vec![UpBlockType::Attention, UpBlockType::Plain],
            ..UNet2DConfig::cifar10()
        };
        let x = Sampler::prior((2, 3, 16, 16), 0, &Device::Cpu)?;
        let t = Tensor::new(&[3u32, 700], &Device::Cpu)?;
        let values = |recompute| -> Result<usize> {
            let mut unet = Parameters::new(0, DType::F32, &Device::Cpu).build(&config)?;
            unet.set_recompute(recompute)?;
            let dropout = Dropout::new(0, 0);
            for _ in 0..3 {
                unet.gradients(&x, &t, &Condition::None, &dropout, &mut |y| Ok(y.clone()))?;
            }
            let free = unet.pool().lock();
            Ok(free.by_size.iter().map(|(size, free)| size * free.len()).sum())
        };
        let (kept, recomputed) = (values(false)?, values(true)?);
        assert!(10 * recomputed < 9 * kept, "{recomputed} values, instead of {kept}");
        Ok(())
    }

    /// Only recycled gradients are overwritten, and all of their values are.
    #[test]
    fn gradients_take_the_memory_of_those_that_came_back() -> Result<()> {
        let config = UNetConfig {
            hidden_dims: vec![8, 16],
            attention_levels: vec![0],
            ..UNetConfig::mnist()
        };
        let parameters = Parameters::new(0, DType::F32, &Device::Cpu);
        let unet = parameters.build(&config)?;
        let x = Sampler::prior((2, 1, 28, 28), 0, &Device::Cpu)?;
        let t = Tensor::new(&[3u32, 700], &Device::Cpu)?;
        let pass = || -> Result<Vec<Tensor>> {
            let dropout = Dropout::new(0, 0);
            let mut found =
                unet.gradients(&x, &t, &Condition::None, &dropout, &mut |y| Ok(y.clone()))?;
            let vars = parameters.vars();
            Ok(vars.values().map(|var| found.remove(var).expect("a gradient")).collect())
        };
        let values = |gradients: &[Tensor]| -> Result<Vec<Vec<f32>>> {
            gradients.iter().map(|g| Ok(g.flatten_all()?.to_vec1()?)).collect()
        };
        let kept = pass()?;
        let expected = values(&kept)?;
        assert!(expected.iter().flatten().any(|&d| d != 0.0));

        let returned = pass()?;
        let ids: Vec<_> = returned.iter().map(Tensor::id).collect();
        assert!(kept.iter().all(|kept| !ids.contains(&kept.id())));
        for gradient in &returned {
            with_values_mut(gradient, |values| values.fill(f32::NAN))?;
        }
        unet.recycle(returned);
        // A tensor that the network did not issue, and must not overwrite.
        let other = x.copy()?;
        unet.recycle(vec![other.clone()]);

        let again = pass()?;
        assert_eq!(again.iter().map(Tensor::id).collect::<Vec<_>>(), ids);
        assert_eq!(values(&again)?, expected);
        assert_eq!(values(&kept)?, expected);
        assert_eq!(values(&[other])?, values(std::slice::from_ref(&x))?);
        Ok(())
    }
}
