//! Sums of gradients: over the pixels of an image, and over the images of a batch.

use std::cell::RefCell;
use std::rc::Rc;

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{Result, Tensor};

use super::super::device::Gpu;
use super::super::element::{Element, Pointer};
use super::super::kernel::{Argument, argument, holds, kernel};
use super::super::launch::{THREADS, blocks_of};
use super::super::memory::Memory;
use super::source::MODULE;

kernel! { MODULE, "sums_by_image", SumsByImage {
    x: Pointer, mask: Pointer, sums: Pointer, also: Pointer, channels: u32, pixels: u32, width: u32,
} }
kernel! { MODULE, "column_sums", SumColumns { all: AllColumns, matrices: u32 } }

argument! { MODULE, struct Columns {
    x: u64, sums: u64, rows: u32, columns: u32, first: u32, unused: u32,
} }

/// The number of matrices that one launch sums.
const MATRICES: usize = 64;

#[derive(Clone, Copy)]
#[repr(C)]
struct AllColumns([Columns; MATRICES]);

const _: () = assert!(holds(MODULE.source, "struct AllColumns {\n    Columns at[64];\n};"));

// SAFETY: the struct consists of plain numbers, with the layout of the source.
unsafe impl DeviceRepr for AllColumns {}

impl Argument for AllColumns {
    const TYPE: &'static str = "AllColumns";
}

/// The sums of a map over the pixels of each image: vectors (batch, channels).
pub(crate) struct ImageSums {
    /// The sums in f32.
    pub sums: Rc<Memory>,
    /// The sums in the maps' type: the same memory if that is f32.
    pub of_maps: Rc<Memory>,
}

impl ImageSums {
    /// Takes memory for `count` sums, with arbitrary content.
    pub(in super::super) fn take(gpu: &Gpu, count: usize, element: Element) -> Result<Self> {
        let sums = Rc::new(gpu.take_for(count, Element::F32)?);
        let of_maps = match element {
            Element::F32 => sums.clone(),
            _ => Rc::new(gpu.take_for(count, element)?),
        };
        Ok(Self { sums, of_maps })
    }

    pub(in super::super) fn pointer(&self) -> Pointer {
        self.sums.pointer
    }

    /// The address of the sums in the maps' type, or null if that is f32.
    pub(in super::super) fn also_pointer(&self) -> Pointer {
        if Rc::ptr_eq(&self.sums, &self.of_maps) { Pointer::NONE } else { self.of_maps.pointer }
    }

    /// Computes the sums of a map (batch, pixels, channels). With `mask`, first multiplies the map by these factors
    /// (batch, channels) in place.
    pub fn of(
        gpu: &Gpu,
        x: &Memory,
        mask: Option<&Memory>,
        [batch, pixels, channels]: [usize; 3],
        element: Element,
    ) -> Result<Self> {
        let own = Self::take(gpu, batch * channels, element)?;
        let (x, mask) = (x.pointer, Memory::pointer_or_none(mask));
        let width = element.width(&[channels], &[x, mask]);
        let (channels, pixels) = (channels as u32, pixels as u32);
        let blocks = blocks_of((batch as u32, channels.div_ceil(32 * width)), (THREADS, 1));
        let (sums, also) = (own.pointer(), own.also_pointer());
        gpu.launch(element, blocks, SumsByImage { x, mask, sums, also, channels, pixels, width })?;
        Ok(own)
    }
}

/// Sums over the rows of matrices, which are computed together: each alone takes as long as a launch.
#[derive(Default)]
pub(crate) struct ColumnSums(RefCell<Vec<(Rc<Memory>, usize, Tensor)>>);

impl ColumnSums {
    /// Requests the sums over `rows` rows of f32, which [`compute`](Self::compute) writes to `sums` at the latest. The
    /// matrix must not change until then.
    pub fn add(&self, gpu: &Gpu, x: Rc<Memory>, rows: usize, sums: &Tensor) -> Result<()> {
        self.0.borrow_mut().push((x, rows, sums.clone()));
        if self.0.borrow().len() == MATRICES { self.compute(gpu) } else { Ok(()) }
    }

    /// Computes all sums that have been requested.
    pub fn compute(&self, gpu: &Gpu) -> Result<()> {
        let requests = self.0.take();
        let unused = Columns { x: 0, sums: 0, rows: 0, columns: 0, first: 0, unused: 0 };
        let (mut all, mut blocks) = (AllColumns([unused; MATRICES]), 0);
        for (to, (x, rows, sums)) in all.0.iter_mut().zip(&requests) {
            let (columns, first) = (sums.elem_count() as u32, blocks);
            let (x, sums, rows) = (x.pointer.0, gpu.pointer(sums)?.0, *rows as u32);
            *to = Columns { x, sums, rows, columns, first, unused: 0 };
            blocks += columns.div_ceil(32);
        }
        if blocks == 0 {
            return Ok(());
        }
        let sum = SumColumns { all, matrices: requests.len() as u32 };
        gpu.launch(Element::F32, blocks_of((blocks, 1), (32, 8)), sum)
    }
}
