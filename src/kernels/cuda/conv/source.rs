//! The source of the kernels.

use super::super::kernel::Module;

pub(super) const MODULE: &Module = &Module {
    name: "conv",
    source: concat!(
        include_str!("../common.cuh"),
        include_str!("../activation.cuh"),
        include_str!("../product.cuh"),
        include_str!("conv.cu"),
        include_str!("few.cu"),
    ),
};
