/// An object of a C library, which is destroyed when this value is dropped.
pub(super) struct Owned<T: Copy, E> {
    pub value: T,
    destroy: unsafe fn(T) -> Result<(), E>,
}

impl<T: Copy, E> Owned<T, E> {
    /// Takes ownership of a newly created object, with the function that destroys it.
    pub fn new(value: T, destroy: unsafe fn(T) -> Result<(), E>) -> Self {
        Self { value, destroy }
    }
}

impl<T: Copy, E> Drop for Owned<T, E> {
    fn drop(&mut self) {
        // SAFETY: `destroy` fits the object and is called once. Nothing depends on its success.
        let _ = unsafe { (self.destroy)(self.value) };
    }
}
