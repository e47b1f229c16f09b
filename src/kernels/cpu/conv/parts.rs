//! The division of a batch into parts, whose sums are added in order.

/// Maximum memory for the sums of parts. One part alone may need more.
const SUMS_BYTES: usize = 9 << 20;

/// Minimum number of output pixels in a part. With fewer, a part would cost more time than it saves.
const MIN_PART_PIXELS: usize = 1024;

/// Maximum number of parts.
const MAX_PARTS: usize = 16;

/// Returns the number of parts of a batch with this many output pixels. Each part has `sums` values in f32. The number
/// of parts does not depend on the number of threads, so the results do not either. It is a power of two, so that the
/// threads of usual machines have equally many parts.
pub(super) fn parts(pixels: usize, sums: usize) -> usize {
    let most = SUMS_BYTES / (sums * size_of::<f32>()).max(1);
    1 << most.min(pixels / MIN_PART_PIXELS).clamp(1, MAX_PARTS).ilog2()
}
