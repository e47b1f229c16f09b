//! The source of the kernels.

use super::super::kernel::Module;

pub(super) const MODULE: &Module = &Module {
    name: "maps",
    source: concat!(include_str!("../common.cuh"), include_str!("maps.cu")),
};
