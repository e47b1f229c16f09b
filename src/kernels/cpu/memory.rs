//! Memory that kernels reuse from call to call. New memory would cost a page fault per 4 KiB.

/// Bytes of a cache line.
const LINE: usize = 64;

/// Values that may lie before the first cache line of an allocation.
pub(crate) const fn before_line<T>() -> usize {
    LINE / size_of::<T>()
}

/// Returns `len` values of a vector, which grows if necessary. They begin at a cache line, and their content is
/// arbitrary. Large allocations begin 16 bytes after a cache line, so that a vector of the size of a cache line would
/// lie in two of them.
pub(crate) fn sized<T: Copy + Default>(memory: &mut Vec<T>, len: usize) -> &mut [T] {
    if memory.len() < len + before_line::<T>() {
        memory.resize(len + before_line::<T>(), T::default());
    }
    let first = first_line(memory);
    &mut memory[first..first + len]
}

/// Returns the values that [`sized`] returned, to the end of the memory.
pub(crate) fn from_line<T>(memory: &[T]) -> &[T] {
    memory.get(first_line(memory)..).unwrap_or(&[])
}

/// The first value that begins at a cache line.
pub(crate) fn first_line<T>(memory: &[T]) -> usize {
    memory.as_ptr().align_offset(LINE)
}
