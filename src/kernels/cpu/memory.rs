//! Memory that kernels reuse from call to call. New memory would cost a page fault per 4 KiB.

/// Bytes of a cache line.
const LINE: usize = 64;

/// Maximum number of values before the first cache line of an allocation.
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

/// Returns the index of the first value that begins at a cache line.
pub(crate) fn first_line<T>(memory: &[T]) -> usize {
    memory.as_ptr().align_offset(LINE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begins_at_a_line<T: Copy + Default>() {
        for before in [0, 1, 100] {
            let mut memory = vec![T::default(); before];
            for len in [0, 1, 15, 16, 1000, 40, 100_000] {
                let found = sized(&mut memory, len);
                assert_eq!((found.len(), found.as_ptr() as usize % LINE), (len, 0));
                let begin = found.as_ptr();
                assert_eq!(from_line(&memory).as_ptr(), begin);
                assert!(from_line(&memory).len() >= len);
            }
        }
        assert!(from_line::<T>(&[]).is_empty());
    }

    #[test]
    fn memory_begins_at_a_cache_line() {
        begins_at_a_line::<f32>();
        begins_at_a_line::<u16>();
    }
}
