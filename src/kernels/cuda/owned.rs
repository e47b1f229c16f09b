/// A library's object, which is destroyed with this.
pub(super) struct Owned<T: Copy, E> {
    pub value: T,
    destroy: unsafe fn(T) -> Result<(), E>,
}

impl<T: Copy, E> Owned<T, E> {
    /// An object that was just made, and the function that destroys it.
    pub fn new(value: T, destroy: unsafe fn(T) -> Result<(), E>) -> Self {
        Self { value, destroy }
    }
}

impl<T: Copy, E> Drop for Owned<T, E> {
    fn drop(&mut self) {
        // SAFETY: it was made for this, and is destroyed once. If that fails, nothing depends on it.
        let _ = unsafe { (self.destroy)(self.value) };
    }
}
