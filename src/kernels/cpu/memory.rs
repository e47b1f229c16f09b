//! Memory that kernels reuse from call to call. New memory would cost a page fault per 4 KiB.

/// Bytes of a cache line.
const LINE: usize = 64;

/// Returns the first `len` values of a vector, which grows if necessary. Their content is arbitrary.
pub(crate) fn sized<T: Copy + Default>(memory: &mut Vec<T>, len: usize) -> &mut [T] {
    if memory.len() < len {
        memory.resize(len, T::default());
    }
    &mut memory[..len]
}

/// Returns values like [`sized`], aligned to a cache line. Large allocations begin 16 bytes after a
/// cache line, so that a vector of the size of a cache line would lie in two of them.
pub(crate) fn sized_by_lines<T: Copy + Default>(memory: &mut Vec<T>, len: usize) -> &mut [T] {
    let values = sized(memory, len + LINE / size_of::<T>());
    let first = values.as_ptr().align_offset(LINE);
    &mut values[first..first + len]
}

/// Returns the values that [`sized_by_lines`] returned, to the end of the memory.
pub(crate) fn from_line<T>(memory: &[T]) -> &[T] {
    memory.get(memory.as_ptr().align_offset(LINE)..).unwrap_or(&[])
}
