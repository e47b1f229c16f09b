//! The instruction sets of the machine.

use std::env;
use std::sync::OnceLock;

use crate::error::{Error, Result};

const LIMIT: &str = "DDPM_MAX_CPU_ISA";

/// The largest instruction set that the kernels may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Limit {
    Baseline,
    Avx2,
    Avx512,
    /// AVX-512, and the tiles of AMX.
    Amx,
}

impl Limit {
    fn named(name: &str) -> Option<Self> {
        match name {
            "" | "amx" => Some(Self::Amx),
            "avx512" => Some(Self::Avx512),
            "avx2" => Some(Self::Avx2),
            "baseline" => Some(Self::Baseline),
            _ => None,
        }
    }

    /// Returns the value of the environment variable `DDPM_MAX_CPU_ISA`, which is read once per
    /// process. There is no limit if the variable is not set or [not valid](check_limit).
    pub(crate) fn of_process() -> Self {
        static LIMITED: OnceLock<Limit> = OnceLock::new();
        *LIMITED.get_or_init(|| Self::named(&asked()).unwrap_or(Self::Amx))
    }
}

fn asked() -> String {
    env::var_os(LIMIT).unwrap_or_default().to_string_lossy().to_lowercase()
}

/// Returns an error if `DDPM_MAX_CPU_ISA` is set to a name that is not one of the limits.
pub(crate) fn check_limit() -> Result<()> {
    let asked = asked();
    match Limit::named(&asked) {
        Some(_) => Ok(()),
        None => Err(Error::config(LIMIT, asked, "amx, avx512, avx2 or baseline")),
    }
}

/// An instruction set that this machine has. A value is created only after the machine's support was
/// checked, so it is safe to run a kernel that is compiled for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Isa(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// The instructions that every machine of the architecture has: SSE2, NEON.
    Baseline,
}

impl Isa {
    /// Returns the best instruction set of this machine within the [`Limit`] of the process.
    pub(crate) fn detect() -> Self {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let mut all = Self::available();
            let allowed = |isa: &Isa| Limit::named(isa.name()) <= Some(Limit::of_process());
            let best = all.iter().position(allowed).unwrap_or(all.len() - 1);
            all.remove(best)
        })
    }

    /// Returns all instruction sets of this machine, the best first. The result is never empty.
    pub(crate) fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                found.push(Self(Kind::Avx512));
            }
            if avx2 {
                found.push(Self(Kind::Avx2));
            }
        }
        found.push(Self(Kind::Baseline));
        found
    }

    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            Kind::Baseline => "baseline",
        }
    }

    pub(crate) fn kind(self) -> Kind {
        self.0
    }
}
