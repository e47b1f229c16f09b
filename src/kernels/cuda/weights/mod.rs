//! The weights of a network in the layout and type that products take, packed by one launch, and their gradients,
//! unpacked by another.
//!
//! A copy of a weight cannot be stale: each pass packs the weights as they are when it begins. Only a network whose
//! weights never change keeps the copies for later passes.

mod table;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{Result, Tensor, TensorId};

use self::table::{MODULE, Own, Table, chunk_of};
use super::conv::Convolution;
use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::kernel;
use super::launch::{THREADS, blocks_of};
use super::maps::Channels;
use super::memory::Memory;

kernel! { MODULE, "pack_weights", PackWeights { weights: Pointer, parts: Pointer, packed: Pointer } }
kernel! { MODULE, "unpack_weights", UnpackWeights { weights: Pointer, parts: Pointer, packed: Pointer } }

/// The alignment of a weight among the packed ones, in bytes. cuDNN and cuBLASLt select their kernels by it.
const ALIGNMENT: usize = 256;

/// The identity of a network whose passes share its packed weights and its graphs. Dropping it frees what this thread
/// keeps for the network. Other threads free their share when they next begin a pass.
#[derive(Debug)]
pub(crate) struct Network(u64);

impl Default for Network {
    fn default() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        Self(COUNT.fetch_add(1, Ordering::Relaxed))
    }
}

impl Network {
    pub(super) fn id(&self) -> u64 {
        self.0
    }
}

/// Frees what this thread keeps of the weights of a network.
pub(super) fn forget(network: u64) {
    // Dropped after the borrow has ended.
    let _removed = SETS.try_with(|sets| {
        sets.try_borrow_mut().map(|mut sets| take(&mut sets, |key| key.0 == network))
    });
}

/// The network, the device, and the type of the packed weights.
type Key = (u64, DeviceId, Element);

type Sets = HashMap<Key, (Weak<Network>, Rc<Set>)>;

thread_local! {
    static SETS: RefCell<Sets> = RefCell::default();
}

fn take(sets: &mut Sets, is_of: impl Fn(&Key) -> bool) -> Vec<(Weak<Network>, Rc<Set>)> {
    let keys: Vec<Key> = sets.keys().filter(|key| is_of(key)).copied().collect();
    keys.iter().filter_map(|key| sets.remove(key)).collect()
}

/// A weight that a pass has used.
struct Entry {
    weight: Tensor,
    layout: Channels,
    /// The type in which the packed gradient was last computed, if it has to be unpacked.
    gradient: Cell<Option<Element>>,
}

/// The weights of a network, in the order of their first use, and the data that are kept from one pass to the next.
#[derive(Default)]
struct Set {
    entries: RefCell<Vec<Entry>>,
    by_id: RefCell<HashMap<TensorId, usize>>,
    packing: RefCell<Option<Rc<Table>>>,
    unpacking: RefCell<Option<Rc<Table>>>,
    kept: RefCell<Option<Rc<Packed>>>,
}

/// Packed weights: the first ones of a set.
struct Packed {
    first: Pointer,
    offsets: Vec<usize>,
    /// Memory that returns to the pool after the pass, or memory that is kept.
    _memory: (Option<Memory>, Option<CudaSlice<u8>>),
}

/// The weights of a network during a pass.
pub(crate) struct PassWeights {
    gpu: Rc<Gpu>,
    set: Rc<Set>,
    element: Element,
    packed: Option<Rc<Packed>>,
    /// The weights that were not known when the pass began.
    others: RefCell<HashMap<TensorId, Memory>>,
    gradients: RefCell<Gradients>,
}

/// The gradients of a pass that are unpacked at its end.
#[derive(Default)]
struct Gradients {
    memory: Option<Memory>,
    /// The places of the gradients, by the index of the weight.
    slots: HashMap<usize, (usize, Element)>,
    /// The gradients that were written, with the tensors to which they go.
    written: Vec<(usize, Tensor)>,
}

impl PassWeights {
    /// Packs all weights that earlier passes of the network have used. With `keeps`, the weights never change, and are
    /// packed once.
    pub fn begin(
        gpu: Rc<Gpu>,
        network: &Arc<Network>,
        element: Element,
        keeps: bool,
    ) -> Result<Self> {
        let key = (network.id(), gpu.device.id(), element);
        let (set, _removed) = SETS.with_borrow_mut(|sets| {
            let dead: Vec<Key> = sets
                .iter()
                .filter(|(_, (network, _))| network.strong_count() == 0)
                .map(|(key, _)| *key)
                .collect();
            let removed = take(sets, |key| dead.contains(key));
            let own = sets.entry(key).or_insert_with(|| (Arc::downgrade(network), Rc::default()));
            (own.1.clone(), removed)
        });
        let packed = set.packed(&gpu, element, keeps)?;
        let (others, gradients) = Default::default();
        Ok(Self { gpu, set, element, packed, others, gradients })
    }

    /// Returns the packed weights of a convolution: (out, k, k, in) in the maps' type.
    pub fn of_convolution(&self, convolution: &Convolution, weight: &Tensor) -> Result<Pointer> {
        let layout = convolution.weights();
        if self.element == Element::F32 && layout.pixels == 1 {
            return self.gpu.pointer(weight);
        }
        let index = self.set.by_id.borrow().get(&weight.id()).copied();
        if let (Some(index), Some(packed)) = (index, &self.packed)
            && let Some(&offset) = packed.offsets.get(index)
        {
            return Ok(packed.first.offset(offset));
        }
        if let Some(packed) = self.others.borrow().get(&weight.id()) {
            return Ok(packed.pointer);
        }
        let packed = self.gpu.take_for(layout.count, self.element)?;
        let (pointer, own) = (packed.pointer, self.gpu.pointer(weight)?);
        layout.last(&self.gpu, own, pointer, self.element)?;
        self.others.borrow_mut().insert(weight.id(), packed);
        if index.is_none() && chunk_of(layout).is_some() {
            self.set.add(weight, layout);
        }
        Ok(pointer)
    }

    /// Computes the gradient of a convolution's weights from its input and the gradient of its output.
    /// [`finish`](Self::finish) completes it.
    pub fn gradient(
        &self,
        convolution: &Convolution,
        maps: [&Memory; 2],
        (weight, gradient): (&Tensor, &Tensor),
    ) -> Result<()> {
        let gpu = &self.gpu;
        if convolution.is_pointwise() {
            let ([x, dy], to) = (maps, gpu.pointer(gradient)?);
            return convolution.weight_gradient_by_patches(gpu, x, dy, to);
        }
        let index = self.set.by_id.borrow().get(&weight.id()).copied();
        let slot = index.map(|index| self.slot(index)).transpose()?.flatten();
        let (element, temporary) = convolution.weight_gradient(gpu, maps, slot)?;
        if let Some(index) = index {
            self.set.entries.borrow()[index].gradient.set(Some(element));
        }
        match (temporary, index) {
            (None, Some(index)) => {
                self.gradients.borrow_mut().written.push((index, gradient.clone()));
            }
            (None, None) => {}
            (Some(packed), _) => {
                let (from, to) = (packed.pointer, gpu.pointer(gradient)?);
                convolution.weights().first(gpu, from, to, element)?;
            }
        }
        Ok(())
    }

    /// Returns the place of the gradient of a weight, and its type, if it is known and not in use.
    fn slot(&self, index: usize) -> Result<Option<(Pointer, Element)>> {
        let mut gradients = self.gradients.borrow_mut();
        // A weight that two layers share has two gradients.
        if gradients.written.iter().any(|(other, _)| *other == index) {
            return Ok(None);
        }
        if gradients.memory.is_none() {
            let (mut end, mut slots) = (0, HashMap::new());
            for (i, entry) in self.set.entries.borrow().iter().enumerate() {
                let Some(element) = entry.gradient.get() else { continue };
                slots.insert(i, (end, element));
                end += (entry.layout.count * element.bytes()).next_multiple_of(ALIGNMENT);
            }
            gradients.memory = Some(self.gpu.take(end)?);
            gradients.slots = slots;
        }
        let Gradients { memory, slots, .. } = &*gradients;
        Ok(memory
            .as_ref()
            .zip(slots.get(&index))
            .map(|(memory, &(offset, element))| (memory.pointer.offset(offset), element)))
    }

    /// Completes the gradients of the weights, after the last of them was computed.
    pub fn finish(&self) -> Result<()> {
        let Gradients { memory, slots, written } = self.gradients.take();
        let Some(memory) = memory.filter(|_| !written.is_empty()) else { return Ok(()) };
        let mut own = Vec::with_capacity(written.len());
        for (index, gradient) in &written {
            let (offset, element) = slots[index];
            let layout = self.set.entries.borrow()[*index].layout;
            let wide = element != self.element;
            own.push(Own { values: self.gpu.pointer(gradient)?, layout, offset, wide });
        }
        let table = Table::current(&self.gpu, &self.set.unpacking, &own)?;
        let (weights, parts, blocks) = table.arguments(&self.gpu);
        let unpack = UnpackWeights { weights, parts, packed: memory.pointer };
        self.gpu.launch(self.element, blocks_of((blocks, 1), (THREADS, 1)), unpack)
    }
}

impl Set {
    fn add(&self, weight: &Tensor, layout: Channels) {
        let mut entries = self.entries.borrow_mut();
        self.by_id.borrow_mut().insert(weight.id(), entries.len());
        entries.push(Entry { weight: weight.clone(), layout, gradient: Cell::new(None) });
    }

    /// Packs the known weights, or returns those that are kept.
    fn packed(&self, gpu: &Rc<Gpu>, element: Element, keeps: bool) -> Result<Option<Rc<Packed>>> {
        let entries = self.entries.borrow();
        if entries.is_empty() {
            return Ok(None);
        }
        let kept = self.kept.borrow().clone().filter(|_| keeps);
        if let Some(kept) = kept.filter(|kept| kept.offsets.len() == entries.len()) {
            gpu.capture.hold(kept.clone());
            return Ok(Some(kept));
        }
        let (mut own, mut end) = (Vec::with_capacity(entries.len()), 0);
        for entry in &*entries {
            let (values, layout) = (gpu.pointer(&entry.weight)?, entry.layout);
            own.push(Own { values, layout, offset: end, wide: false });
            end += (layout.count * element.bytes()).next_multiple_of(ALIGNMENT);
        }
        let table = Table::current(gpu, &self.packing, &own)?;
        let (first, memory) = if keeps {
            if gpu.capture.is_active() {
                candle_core::bail!("weights to be kept within what is captured")
            }
            let memory = gpu.pool.allocate::<u8>(end)?;
            (Pointer::to(&memory, &gpu.stream), (None, Some(memory)))
        } else {
            let memory = gpu.take(end)?;
            (memory.pointer, (Some(memory), None))
        };
        let (weights, parts, blocks) = table.arguments(gpu);
        let pack = PackWeights { weights, parts, packed: first };
        gpu.launch(element, blocks_of((blocks, 1), (THREADS, 1)), pack)?;
        let offsets = own.iter().map(|own| own.offset).collect();
        let packed = Rc::new(Packed { first, offsets, _memory: memory });
        if keeps {
            *self.kept.borrow_mut() = Some(packed.clone());
        }
        Ok(Some(packed))
    }
}
