//! The shapes of launches: grids of blocks of threads.

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;

use super::kernel::holds;

/// Threads of a block that computes a sum.
pub(super) const THREADS: u32 = 256;

const _: () = assert!(holds(include_str!("common.cuh"), "#define THREADS 256\n"));

/// Launches one thread for each of `count` values.
///
/// # Errors
/// Returns an error if there are too many values for the kernels' indices.
pub(super) fn each(count: usize) -> Result<LaunchConfig> {
    each_of(count, 1)
}

/// Launches one thread for every `width` of `count` values.
///
/// # Errors
/// Returns an error if there are too many values for the kernels' indices.
pub(super) fn each_of(count: usize, width: u32) -> Result<LaunchConfig> {
    // Threads of the last block have indices beyond the values. These must not wrap around.
    const MOST: usize = u32::MAX as usize - (THREADS * 8) as usize;
    if count > MOST {
        candle_core::bail!("{count} values in a map: the CUDA kernels take {MOST} at most")
    }
    let blocks = count.div_ceil((width * THREADS) as usize) as u32;
    Ok(blocks_of((blocks, 1), (THREADS, 1)))
}

/// Launches a grid of blocks. Both sizes are (x, y).
pub(super) fn blocks_of(grid: (u32, u32), block: (u32, u32)) -> LaunchConfig {
    let (grid_dim, block_dim) = ((grid.0.max(1), grid.1, 1), (block.0, block.1, 1));
    LaunchConfig { grid_dim, block_dim, shared_mem_bytes: 0 }
}
