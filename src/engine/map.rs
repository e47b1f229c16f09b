//! The feature maps of a [tape](super::tape), and their gradients.

use std::cell::RefCell;
use std::rc::Rc;

use crate::backend::maps::Maps;
use crate::error::Result;

/// A feature map (batch, height, width, channels), and its gradient in the backward pass.
pub(crate) struct Map<B: Maps> {
    pub dims: [usize; 4],
    pub values: Rc<B::Buffer>,
    /// The maps of which this map is the concatenation, if it is one.
    pub parts: Option<Rc<Parts<B>>>,
    pub gradient: Gradient<B>,
}

impl<B: Maps> Clone for Map<B> {
    fn clone(&self) -> Self {
        let Self { dims, values, parts, gradient } = self;
        let (values, parts, gradient) = (values.clone(), parts.clone(), gradient.clone());
        Self { dims: *dims, values, parts, gradient }
    }
}

impl<B: Maps> Map<B> {
    pub fn new(dims: [usize; 4], values: B::Buffer, gradient: Gradient<B>) -> Self {
        Self { dims, values: Rc::new(values), parts: None, gradient }
    }

    pub fn batch(&self) -> usize {
        self.dims[0]
    }

    pub fn channels(&self) -> usize {
        self.dims[3]
    }

    /// Returns what the backward pass keeps of this map.
    pub fn kept(&self) -> Kept<B> {
        let source = match &self.parts {
            Some(parts) => Source::Parts(parts.clone()),
            None => Source::Values(self.values.clone()),
        };
        Kept { dims: self.dims, source, gradient: self.gradient.clone() }
    }
}

/// The two maps of a concatenation.
pub(crate) struct Parts<B: Maps> {
    pub channels: [usize; 2],
    pub maps: [Rc<B::Buffer>; 2],
}

impl<B: Maps> Parts<B> {
    /// Concatenates the parts to a map of dimensions `dims`.
    pub fn concatenate(&self, backend: &B, dims: [usize; 4]) -> Result<B::Buffer> {
        let [a, b] = &self.maps;
        backend.concatenate(dims[..3].iter().product(), self.channels, [a, b])
    }
}

/// A map that is kept for the backward pass. Concatenations are computed again: one of their parts is usually kept
/// anyway, and copying takes little time.
pub(crate) struct Kept<B: Maps> {
    pub dims: [usize; 4],
    source: Source<B>,
    pub gradient: Gradient<B>,
}

enum Source<B: Maps> {
    Values(Rc<B::Buffer>),
    Parts(Rc<Parts<B>>),
}

impl<B: Maps> Kept<B> {
    pub fn values(&self, backend: &B) -> Result<Rc<B::Buffer>> {
        match &self.source {
            Source::Values(values) => Ok(values.clone()),
            Source::Parts(parts) => Ok(Rc::new(parts.concatenate(backend, self.dims)?)),
        }
    }

    pub fn map(&self, backend: &B) -> Result<Map<B>> {
        let parts = match &self.source {
            Source::Values(_) => None,
            Source::Parts(parts) => Some(parts.clone()),
        };
        let (values, gradient) = (self.values(backend)?, self.gradient.clone());
        Ok(Map { dims: self.dims, values, parts, gradient })
    }
}

/// The gradient of a map, accumulated during the backward pass. Operations that need only the gradient of a map hold
/// this value instead of the map, whose memory can then be reused.
pub(crate) struct Gradient<B: Maps> {
    /// The accumulated gradient. `None` if no gradient is needed.
    sum: Option<Rc<RefCell<Option<B::Buffer>>>>,
    len: usize,
}

impl<B: Maps> Clone for Gradient<B> {
    fn clone(&self) -> Self {
        Self { sum: self.sum.clone(), len: self.len }
    }
}

impl<B: Maps> Gradient<B> {
    pub const UNWANTED: Self = Self { sum: None, len: 0 };

    /// The gradient of a map of `len` values, initially empty.
    pub fn wanted(len: usize) -> Self {
        Self { sum: Some(Rc::default()), len }
    }

    pub fn is_wanted(&self) -> bool {
        self.sum.is_some()
    }

    /// Takes the accumulated gradient, and leaves nothing in its place.
    pub fn take(&self) -> Option<B::Buffer> {
        self.sum.as_ref()?.borrow_mut().take()
    }

    /// Adds to the gradient, if it is needed.
    pub fn add(&self, backend: &B, d: B::Buffer) -> Result<()> {
        let Some(sum) = &self.sum else { return Ok(()) };
        let mut sum = sum.borrow_mut();
        match &mut *sum {
            Some(sum) => backend.add(sum, &d, self.len)?,
            None => *sum = Some(d),
        }
        Ok(())
    }

    /// Calls `f` to write the gradient, or to add to it if the second argument of `f` is true.
    pub fn write(
        &self,
        backend: &B,
        f: impl FnOnce(&mut B::Buffer, bool) -> Result<()>,
    ) -> Result<()> {
        let Some(sum) = &self.sum else { return Ok(()) };
        let there = sum.borrow_mut().take();
        let accumulate = there.is_some();
        let mut d = there.map_or_else(|| backend.take(self.len), Ok)?;
        f(&mut d, accumulate)?;
        *sum.borrow_mut() = Some(d);
        Ok(())
    }
}
