//! NVRTC, which compiles the sources of the kernels.

use std::ffi::{CStr, CString};

use candle_core::cuda_backend::cudarc::nvrtc::result::{self, NvrtcError};
use candle_core::cuda_backend::cudarc::nvrtc::sys;
use candle_core::{Error, Result};

use super::element::Element;
use super::kernel::Module;
use super::owned::Owned;

/// The target of a compilation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// Machine code of one architecture: 90 for compute capability 9.0. The driver loads it without
    /// compiling, even if the driver is older than the compiler.
    Machine(i32),
    /// PTX of an older architecture, which the driver compiles for the device.
    Ptx(i32),
}

/// A source, and the settings of its compilation.
pub(super) struct Compilation {
    source: &'static str,
    target: Target,
    options: Vec<String>,
}

impl Target {
    /// Selects the target for a device of this compute capability.
    ///
    /// # Errors
    /// Returns an error if NVRTC supports only newer capabilities.
    pub fn of(capability: (i32, i32)) -> Result<Self> {
        let mut count = 0;
        // SAFETY: the function writes one number.
        let counted = unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) };
        let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: the function writes as many numbers as it reported.
        let listed = unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) };
        if [counted, listed] != [sys::nvrtcResult::NVRTC_SUCCESS; 2] {
            known.clear();
        }
        Self::among(&known, capability)
    }

    fn among(known: &[i32], (major, minor): (i32, i32)) -> Result<Self> {
        let own = 10 * major + minor;
        if known.is_empty() || known.contains(&own) {
            return Ok(Self::Machine(own));
        }
        match known.iter().copied().filter(|&known| known < own).max() {
            Some(older) => Ok(Self::Ptx(older)),
            None => candle_core::bail!(
                "this version of NVRTC is for other devices than one of compute capability {major}.{minor}"
            ),
        }
    }

    /// Returns the architecture: 90 for compute capability 9.0.
    pub fn architecture(self) -> i32 {
        match self {
            Self::Machine(own) => own,
            Self::Ptx(older) => older,
        }
    }

    fn option(self) -> String {
        match self {
            Self::Machine(own) => format!("--gpu-architecture=sm_{own}"),
            Self::Ptx(older) => format!("--gpu-architecture=compute_{older}"),
        }
    }
}

impl Compilation {
    /// Creates the compilation of a module, for maps of this type on devices of this compute capability.
    ///
    /// # Errors
    /// Returns an error if NVRTC does not support the device.
    pub fn new(module: &Module, element: Element, capability: (i32, i32)) -> Result<Self> {
        let target = Target::of(capability)?;
        let options =
            vec![target.option(), "--std=c++17".to_owned(), element.definition().to_owned()];
        Ok(Self { source: module.source, target, options })
    }

    /// Returns a text that identifies everything on which the result depends.
    pub fn key(&self) -> String {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the function writes two numbers. Zeros stand for an unknown version.
        let _ = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
        let (version, options) = (env!("CARGO_PKG_VERSION"), self.options.join(" "));
        format!("ddpm {version}\nNVRTC {major}.{minor}\n{options}\n{}", self.source)
    }

    /// Compiles the module to the form that the driver loads.
    ///
    /// # Errors
    /// Returns NVRTC's first error if the source does not compile.
    pub fn run(&self) -> Result<Vec<u8>> {
        let source = CString::new(self.source).map_err(Error::wrap)?;
        let program = result::create_program(&source, None).map_err(Error::wrap)?;
        let program = Owned::new(program, result::destroy_program as _);
        // SAFETY: the program was created above.
        if let Err(error) = unsafe { result::compile_program(program.value, &self.options) } {
            return Err(failure(&program, error));
        }
        let image = match self.target {
            Target::Machine(_) => machine_code(&program),
            // SAFETY: the program was compiled above.
            Target::Ptx(_) => unsafe { result::get_ptx(program.value) }
                .map(|text| text.into_iter().map(|c| c as u8).collect()),
        };
        let mut image = image.map_err(Error::wrap)?;
        // The driver reads PTX up to a terminating zero.
        if image.last() != Some(&0) {
            image.push(0);
        }
        Ok(image)
    }
}

type Program = Owned<sys::nvrtcProgram, NvrtcError>;

fn machine_code(program: &Program) -> std::result::Result<Vec<u8>, NvrtcError> {
    let mut len = 0;
    // SAFETY: the program was compiled, and the function writes one number.
    unsafe { sys::nvrtcGetCUBINSize(program.value, &mut len) }.result()?;
    let mut image = vec![0u8; len];
    // SAFETY: the buffer has as many bytes as the function above reported.
    unsafe { sys::nvrtcGetCUBIN(program.value, image.as_mut_ptr().cast()) }.result()?;
    Ok(image)
}

fn failure(program: &Program, error: NvrtcError) -> Error {
    // SAFETY: the program was created and has not been destroyed.
    let Ok(log) = (unsafe { result::get_program_log(program.value) }) else {
        return Error::wrap(error);
    };
    let log: Vec<u8> = log.into_iter().map(|c| c as u8).collect();
    let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy();
    match log.lines().find(|line| line.contains("error")).or(log.lines().next()) {
        Some(line) => {
            Error::Msg(format!("NVRTC does not compile the kernels' source ({error}): {line}"))
        }
        None => Error::wrap(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_is_for_the_device_itself() {
        let known = [75, 80, 86, 90, 100];
        let of = |capability| Target::among(&known, capability);
        assert_eq!(of((9, 0)).unwrap(), Target::Machine(90));
        assert_eq!(of((7, 5)).unwrap(), Target::Machine(75));
        // A device that is newer than the compiler, and one that the compiler does not list.
        assert_eq!(of((12, 0)).unwrap(), Target::Ptx(100));
        assert_eq!(of((8, 9)).unwrap(), Target::Ptx(86));
        let message = of((7, 0)).unwrap_err().to_string();
        assert!(message.contains("compute capability 7.0"), "{message}");
        assert_eq!(Target::among(&[], (8, 0)).unwrap(), Target::Machine(80));
        assert_eq!(Target::Machine(90).option(), "--gpu-architecture=sm_90");
        assert_eq!(Target::Ptx(90).option(), "--gpu-architecture=compute_90");
    }

    #[test]
    fn keys_are_those_of_their_compilations() {
        let module = |source| Module { name: "a module", source };
        let key = |source, element, capability| {
            Compilation::new(&module(source), element, capability).unwrap().key()
        };
        let own = key("a", Element::F32, (8, 0));
        assert_eq!(key("a", Element::F32, (8, 0)), own);
        for other in [
            key("b", Element::F32, (8, 0)),
            key("a", Element::F16, (8, 0)),
            key("a", Element::F32, (9, 0)),
        ] {
            assert_ne!(other, own);
        }
        assert!(own.contains(env!("CARGO_PKG_VERSION")), "{own}");
    }

    #[test]
    fn errors_are_the_compilers() {
        let module = Module { name: "broken", source: "__global__ void broken(" };
        let compilation = Compilation::new(&module, Element::F32, (8, 0)).unwrap();
        let message = compilation.run().unwrap_err().to_string();
        assert!(
            message.contains("NVRTC does not compile") && message.contains("error"),
            "{message}"
        );
    }
}
