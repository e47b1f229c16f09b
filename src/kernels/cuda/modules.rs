//! Modules of kernels. A module is compiled, or loaded from disk, when the first of its kernels is
//! needed.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;

use super::compiler::{Compilation, Target};
use super::element::Element;
use super::kernel::{Kernel, Module};
use crate::kernels::disk_cache::{self, Cache};

/// A device's modules, and the kernels that were used.
pub(super) struct Modules {
    context: Arc<CudaContext>,
    capability: (i32, i32),
    architecture: OnceCell<i32>,
    loaded: RefCell<HashMap<(Element, &'static str), Arc<CudaModule>>>,
    functions: RefCell<HashMap<(Element, &'static str, &'static str), CudaFunction>>,
}

impl Modules {
    pub fn new(context: Arc<CudaContext>, capability: (i32, i32)) -> Self {
        let (architecture, loaded, functions) = Default::default();
        Self { context, capability, architecture, loaded, functions }
    }

    /// Returns the architecture for which modules are compiled: 90 for compute capability 9.0.
    ///
    /// # Errors
    /// Returns an error if NVRTC supports only newer ones.
    pub fn architecture(&self) -> Result<i32> {
        if let Some(&known) = self.architecture.get() {
            return Ok(known);
        }
        let found = Target::of(self.capability)?.architecture();
        Ok(*self.architecture.get_or_init(|| found))
    }

    /// Returns the kernel for maps of this type, to be launched with at most this many bytes of dynamic shared memory.
    /// Loads its module if necessary and if `may_load` is true.
    ///
    /// # Errors
    /// Returns an error if the module is not loaded and `may_load` is false, or if loading fails.
    pub fn function(
        &self,
        kernel: Kernel,
        element: Element,
        shared: u32,
        may_load: bool,
    ) -> Result<CudaFunction> {
        let Kernel { module, name } = kernel;
        if let Some(found) = self.functions.borrow().get(&(element, module.name, name)) {
            return Ok(found.clone());
        }
        if !may_load {
            candle_core::bail!(
                "the kernel {name} is used for the first time within what is captured"
            )
        }
        let function = self.module(module, element)?.load_function(name).w()?;
        // A launch with more must be permitted once.
        if shared > 48 << 10 {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, shared as i32).w()?;
        }
        self.functions.borrow_mut().insert((element, module.name, name), function.clone());
        Ok(function)
    }

    fn module(&self, module: &Module, element: Element) -> Result<Arc<CudaModule>> {
        if let Some(module) = self.loaded.borrow().get(&(element, module.name)) {
            return Ok(module.clone());
        }
        let compilation = Compilation::new(module, element, self.capability)?;
        let loaded = self.load(&compilation)?;
        self.loaded.borrow_mut().insert((element, module.name), loaded.clone());
        Ok(loaded)
    }

    /// Loads a module from this process's memory, or from disk, or compiles it.
    fn load(&self, compilation: &Compilation) -> Result<Arc<CudaModule>> {
        static IMAGES: Mutex<Vec<(String, Vec<u8>)>> = Mutex::new(Vec::new());

        let key = compilation.key();
        // Locked during the compilation, so that another thread that needs the same module waits for
        // it.
        let mut images = IMAGES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, image)) = images.iter().find(|(own, _)| *own == key) {
            return self.load_image(image);
        }
        let cache = cache_of_process();
        if let Some(image) = cache.and_then(|cache| cache.get(&key))
            // If the driver cannot load a cached image, the module is compiled again.
            && let Ok(loaded) = self.load_image(&image)
        {
            images.push((key, image));
            return Ok(loaded);
        }
        let image = compilation.run()?;
        let loaded = self.load_image(&image)?;
        if let Some(cache) = cache {
            cache.put(&key, &image);
        }
        images.push((key, image));
        Ok(loaded)
    }

    fn load_image(&self, image: &[u8]) -> Result<Arc<CudaModule>> {
        self.context.load_module(Ptx::from_binary(image.to_vec())).w()
    }
}

/// The cache on disk, if it is enabled for this process.
fn cache_of_process() -> Option<&'static Cache> {
    static CACHE: OnceLock<Option<Cache>> = OnceLock::new();
    let open = || {
        let directory = disk_cache::directory(|name| std::env::var_os(name))?;
        Cache::open(directory, disk_cache::LIMIT)
    };
    CACHE.get_or_init(open).as_ref()
}
