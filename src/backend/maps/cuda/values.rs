use std::cell::RefCell;
use std::rc::Rc;

use candle_core::Tensor;

use crate::error::Result;
use crate::kernels::cuda::{Added, Element, Gpu, ImageSums, InputGradient, Memory};

/// A map in the memory of a device, or what its values will be computed from by the first operation that needs them.
/// Most operations compute them on their own; some need no pass of their own for it.
pub(crate) struct DeviceMap {
    state: RefCell<State>,
    /// The sums over the pixels of each image, if an operation computed them together with the values.
    sums: RefCell<Option<Rc<ImageSums>>>,
}

#[derive(Clone)]
enum State {
    Values(Rc<Memory>),
    /// Values to which others must be added.
    Adding(Rc<Memory>, Addends),
    /// The gradient of the input of linear layers.
    Linear(InputGradient),
}

/// Values to be added to a map, and factors of the sum.
#[derive(Clone, Default)]
pub(crate) struct Addends {
    /// The batch, the number of pixels and that of channels.
    pub dims: [usize; 3],
    pub bias: Option<Tensor>,
    pub per_image: Option<Rc<Memory>>,
    pub residual: Option<Rc<Memory>>,
    pub mask: Option<Rc<Memory>>,
}

impl Addends {
    pub fn added(&self) -> Added<'_> {
        Added {
            bias: self.bias.as_ref(),
            per_image: self.per_image.as_deref(),
            residual: self.residual.as_deref(),
            mask: self.mask.as_deref(),
        }
    }

    /// Returns the mask if there are no addends.
    fn only_mask(&self) -> Option<&Rc<Memory>> {
        let addends = self.bias.is_some() || self.per_image.is_some() || self.residual.is_some();
        self.mask.as_ref().filter(|_| !addends)
    }
}

/// A device, and the type of the values of maps on it.
#[derive(Clone, Copy)]
pub(crate) struct On<'a> {
    pub gpu: &'a Gpu,
    pub element: Element,
}

impl On<'_> {
    pub fn take(self, len: usize) -> Result<Rc<Memory>> {
        Ok(Rc::new(self.gpu.take_for(len, self.element)?))
    }

    /// Returns the memory itself if nothing else refers to it, and new memory for `len` values otherwise.
    fn alone(self, memory: &Rc<Memory>, len: usize) -> Result<Rc<Memory>> {
        if Rc::strong_count(memory) == 1 { Ok(memory.clone()) } else { self.take(len) }
    }
}

impl DeviceMap {
    fn new(state: State) -> Self {
        Self { state: RefCell::new(state), sums: RefCell::default() }
    }

    pub fn adding(values: Memory, addends: Addends) -> Self {
        Self::new(State::Adding(Rc::new(values), addends))
    }

    pub fn linear(gradient: InputGradient) -> Self {
        Self::new(State::Linear(gradient))
    }

    /// States that `sums` are the sums of the values.
    pub fn set_sums(&mut self, sums: Rc<ImageSums>) {
        self.sums = RefCell::new(Some(sums));
    }

    /// Returns the values.
    pub fn ready(&self, on: On<'_>) -> Result<Rc<Memory>> {
        let mut state = self.state.borrow_mut();
        let memory = match &*state {
            State::Values(memory) => return Ok(memory.clone()),
            State::Adding(from, addends) => {
                let to = on.alone(from, addends.dims.iter().product())?;
                addends.added().add_to(on.gpu, [from, &to], addends.dims, on.element)?;
                to
            }
            State::Linear(gradient) => Rc::new(gradient.compute(on.gpu, on.element)?),
        };
        *state = State::Values(memory.clone());
        Ok(memory)
    }

    /// Returns the values, `len` of them, to be changed. They belong to no other map.
    pub fn writable(&mut self, on: On<'_>, len: usize) -> Result<Rc<Memory>> {
        self.sums = RefCell::default();
        drop(self.ready(on)?);
        let state = self.state.get_mut();
        if let State::Values(memory) = state
            && Rc::strong_count(memory) > 1
        {
            let copy = on.take(len)?;
            Added::default().add_to(on.gpu, [memory, &copy], [1, 1, len], on.element)?;
            *state = State::Values(copy);
        }
        self.ready(on)
    }

    /// Calls `f` with values of dimensions `dims`, and with what it must add to them, if anything, and the memory for
    /// the sum.
    pub fn with_addends<R>(
        &self,
        on: On<'_>,
        dims: [usize; 3],
        f: impl FnOnce(&Memory, Option<(&Added<'_>, &Memory)>) -> Result<R>,
    ) -> Result<R> {
        let mut state = self.state.borrow_mut();
        let (result, sum) = match &*state {
            State::Adding(from, addends) if addends.dims == dims => {
                let to = on.alone(from, dims.iter().product())?;
                (f(from, Some((&addends.added(), &to)))?, to)
            }
            _ => {
                drop(state);
                return f(&*self.ready(on)?, None);
            }
        };
        *state = State::Values(sum);
        Ok(result)
    }

    /// Returns the map times `mask` (batch, channels).
    pub fn masked(&self, on: On<'_>, dims: [usize; 3], mask: Rc<Memory>) -> Result<Self> {
        if let State::Adding(from, addends) = &*self.state.borrow()
            && addends.dims == dims
            && addends.mask.is_none()
        {
            let addends = Addends { mask: Some(mask), ..addends.clone() };
            return Ok(Self::new(State::Adding(from.clone(), addends)));
        }
        let addends = Addends { dims, mask: Some(mask), ..Addends::default() };
        Ok(Self::new(State::Adding(self.ready(on)?, addends)))
    }

    /// Returns the sums over the pixels of each image.
    pub fn image_sums(&self, on: On<'_>, dims: [usize; 3]) -> Result<Rc<ImageSums>> {
        if let Some(sums) = &*self.sums.borrow() {
            return Ok(sums.clone());
        }
        let masking = {
            let state = self.state.borrow();
            match &*state {
                State::Adding(memory, addends)
                    if addends.dims == dims && Rc::strong_count(memory) == 1 =>
                {
                    addends.only_mask().map(|mask| (memory.clone(), mask.clone()))
                }
                _ => None,
            }
        };
        let sums = match masking {
            Some((memory, mask)) => {
                let sums = ImageSums::of(on.gpu, &memory, Some(&mask), dims, on.element)?;
                *self.state.borrow_mut() = State::Values(memory);
                sums
            }
            None => ImageSums::of(on.gpu, &*self.ready(on)?, None, dims, on.element)?,
        };
        let sums = Rc::new(sums);
        *self.sums.borrow_mut() = Some(sums.clone());
        Ok(sums)
    }

    /// Adds another map that is not computed yet to this one, if one operation computes both. Returns whether it does.
    pub fn join(&mut self, more: &Self) -> bool {
        match (self.state.get_mut(), &*more.state.borrow()) {
            (State::Linear(sum), State::Linear(more)) => sum.join(more),
            _ => false,
        }
    }
}

impl From<Memory> for DeviceMap {
    fn from(memory: Memory) -> Self {
        Self::from(Rc::new(memory))
    }
}

impl From<Rc<Memory>> for DeviceMap {
    fn from(memory: Rc<Memory>) -> Self {
        Self::new(State::Values(memory))
    }
}
