use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, DeviceRepr, LaunchArgs, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc::{
    CompileError, CompileOptions, Ptx, compile_ptx_with_opts, sys,
};

use super::{Element, Gpu, Pointer};

const SOURCE: &str = concat!(
    include_str!("source/types.cu"),
    include_str!("source/maps.cu"),
    include_str!("source/norm.cu"),
    include_str!("source/patches.cu"),
    include_str!("source/process.cu"),
    include_str!("source/adam.cu"),
);

/// Threads of a block that sums up: `THREADS` in `types.cu`.
pub(super) const THREADS: u32 = 256;

/// What a kernel takes by value: plain numbers.
pub(crate) trait Argument: DeviceRepr {
    /// What the source calls it.
    const TYPE: &'static str;
}

impl Argument for u32 {
    const TYPE: &'static str = "u32";
}

impl Argument for u64 {
    const TYPE: &'static str = "u64";
}

// SAFETY: a `u64` within.
unsafe impl DeviceRepr for Pointer {}

impl Argument for Pointer {
    const TYPE: &'static str = "*";
}

impl Argument for i32 {
    const TYPE: &'static str = "int";
}

impl Argument for f32 {
    const TYPE: &'static str = "float";
}

impl Argument for f64 {
    const TYPE: &'static str = "double";
}

/// All that a kernel takes, in its order.
pub(super) trait Arguments {
    const TYPES: &'static [&'static str];

    fn push<'a>(&'a self, launch: &mut LaunchArgs<'a>);
}

/// For tuples of these types, and of all but the first, and so on.
macro_rules! tuples {
    ($first:ident) => {};
    ($first:ident $($other:ident)+) => {
        impl<$first: Argument, $($other: Argument),+> Arguments for ($first, $($other),+) {
            const TYPES: &'static [&'static str] = &[$first::TYPE, $($other::TYPE),+];

            #[allow(non_snake_case)]
            fn push<'a>(&'a self, launch: &mut LaunchArgs<'a>) {
                let ($first, $($other),+) = self;
                launch.arg($first);
                $(launch.arg($other);)+
            }
        }
        tuples!($($other)+);
    };
}
tuples!(A B C D E F G H I J K L);

/// A kernel, and the types of its parameters.
pub(super) struct Kernel {
    function: CudaFunction,
    parameters: Vec<&'static str>,
}

impl Gpu {
    /// Launches the kernel of this name.
    ///
    /// Pointers among the arguments must be of as much memory as it reads and writes: the functions of
    /// this module that launch see to that.
    ///
    /// # Errors
    /// If there is no such kernel, or it takes other arguments, or CUDA does not launch it.
    pub(super) fn launch<A: Arguments>(
        &self,
        element: Element,
        name: &'static str,
        config: LaunchConfig,
        arguments: A,
    ) -> Result<()> {
        let mut kernels = self.kernels.borrow_mut();
        let Kernel { function, parameters } = match kernels.entry((element, name)) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(place) => {
                let function = self.module(element)?.load_function(name).w()?;
                place.insert(Kernel { function, parameters: parameters(name) })
            }
        };
        if A::TYPES != parameters {
            candle_core::bail!(
                "the kernel {name} takes {parameters:?}, and was given {:?}",
                A::TYPES
            )
        }
        let mut launch = self.stream.launch_builder(function);
        arguments.push(&mut launch);
        // SAFETY: the arguments are of the types in the source, and live as long as this lasts; the memory
        // is seen to as said above.
        unsafe { launch.launch(config) }.w().map(drop)
    }

    fn module(&self, element: Element) -> Result<Arc<CudaModule>> {
        if let Some(module) = self.modules.borrow().get(&element) {
            return Ok(module.clone());
        }
        let module = self.stream.context().load_module(compiled(element, self.capability)?).w()?;
        self.modules.borrow_mut().insert(element, module.clone());
        Ok(module)
    }
}

/// The types of a kernel's parameters in the source, `*` for any pointer.
fn parameters(name: &str) -> Vec<&'static str> {
    let (_, from) = SOURCE.split_once(&format!("__global__ void {name}(")).unwrap_or_default();
    let (list, _) = from.split_once(')').unwrap_or_default();
    let of = |parameter: &'static str| match parameter.contains('*') {
        true => "*",
        false => parameter.split_whitespace().next().unwrap_or_default(),
    };
    list.split(',').map(of).collect()
}

/// The kernels for maps of this type on devices of this compute capability, compiled once by a program.
fn compiled(element: Element, capability: (i32, i32)) -> Result<Ptx> {
    type Compiled = ((Element, (i32, i32)), Ptx);
    static COMPILED: Mutex<Vec<Compiled>> = Mutex::new(Vec::new());

    // Held while it compiles: who wants the same waits.
    let mut all = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, found)) = all.iter().find(|(own, _)| *own == (element, capability)) {
        return Ok(found.clone());
    }
    let options = vec![
        format!("--gpu-architecture=compute_{}", architecture(capability)?),
        "--std=c++17".to_owned(),
        element.definition().to_owned(),
    ];
    let options = CompileOptions { options, ..Default::default() };
    let ptx = compile_ptx_with_opts(SOURCE, options).map_err(|error| match error {
        CompileError::CompileError { log, .. } => {
            let log = log.to_string_lossy();
            let line = log.lines().find(|line| line.contains("error")).unwrap_or(&log);
            candle_core::Error::Msg(format!("NVRTC does not take the kernels' source: {line}"))
        }
        other => candle_core::Error::wrap(other),
    })?;
    all.push(((element, capability), ptx.clone()));
    Ok(ptx)
}

/// The newest architecture that NVRTC knows and the device has: 75 for compute capability 7.5.
fn architecture((major, minor): (i32, i32)) -> Result<i32> {
    let own = 10 * major + minor;
    let mut count = 0;
    // SAFETY: it writes one number.
    let counted = unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) };
    let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: it writes as many numbers as it said.
    let listed = unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) };
    if [counted, listed] != [sys::nvrtcResult::NVRTC_SUCCESS; 2] {
        return Ok(own);
    }
    known.iter().copied().filter(|&known| known <= own).max().ok_or_else(|| {
        let message = format!(
            "this version of NVRTC is for other devices than one of compute capability {major}.{minor}"
        );
        candle_core::Error::Msg(message)
    })
}

impl Element {
    /// How many values of a map a thread takes at once, `width` in the source: 16 or 8 bytes of them, if
    /// each of these numbers of channels divides into so many and the memory begins at a multiple of 16.
    pub(super) fn width(self, channels: &[usize], pointers: &[Pointer]) -> u32 {
        let aligned = pointers.iter().all(|pointer| pointer.0.is_multiple_of(16));
        let fits = |width: &usize| aligned && channels.iter().all(|n| n.is_multiple_of(*width));
        let widths = [16 / self.bytes(), 8 / self.bytes()];
        widths.into_iter().find(fits).unwrap_or(1) as u32
    }
}

/// A thread for each of `count` values.
///
/// # Errors
/// If they are too many for the kernels' indices.
pub(super) fn each(count: usize) -> Result<LaunchConfig> {
    each_of(count, 1)
}

/// A thread for each `width` of `count` values.
///
/// # Errors
/// If they are too many for the kernels' indices.
pub(super) fn each_of(count: usize, width: u32) -> Result<LaunchConfig> {
    // The last block's threads have indices beyond it, which must not begin again.
    const MOST: usize = u32::MAX as usize - (THREADS * 8) as usize;
    if count > MOST {
        candle_core::bail!("{count} values in a map: the CUDA kernels take {MOST} at most")
    }
    let blocks = count.div_ceil((width * THREADS) as usize) as u32;
    Ok(blocks_of((blocks, 1), (THREADS, 1)))
}

pub(super) fn blocks_of(grid: (u32, u32), block: (u32, u32)) -> LaunchConfig {
    let (grid_dim, block_dim) = ((grid.0.max(1), grid.1, 1), (block.0, block.1, 1));
    LaunchConfig { grid_dim, block_dim, shared_mem_bytes: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_the_sources() {
        assert_eq!(parameters("cast"), ["*", "*", "u32"]);
        let expected = ["*", "u64", "u64", "*", "u32", "double", "float", "u32", "u32"];
        assert_eq!(parameters("dropout_mask"), expected);
        assert_eq!(parameters("gather_patches")[2], "Sizes");
    }

    #[test]
    fn widths_divide() {
        let width = |element: Element, channels: usize, at| {
            element.width(&[64, channels], &[Pointer(256), Pointer(at)])
        };
        assert_eq!(width(Element::F32, 8, 16), 4);
        assert_eq!(width(Element::F32, 6, 16), 2);
        assert_eq!(width(Element::F32, 3, 16), 1);
        assert_eq!(width(Element::F32, 8, 8), 1);
        assert_eq!(width(Element::F16, 8, 0), 8);
        assert_eq!(width(Element::Bf16, 12, 32), 4);
        assert_eq!(width(Element::Bf16, 2, 32), 1);
    }
}
