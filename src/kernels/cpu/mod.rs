//! The kernels for CPUs. They compute on slices, independently of candle's tensors.

pub(crate) mod adam;
pub(crate) mod attention;
pub(crate) mod bf16;
pub(crate) mod conv;
pub(crate) mod depthwise;
pub(crate) mod dropout;
pub(crate) mod gemm;
pub(crate) mod isa;
pub(crate) mod linear;
pub(crate) mod maps;
pub(crate) mod math;
pub(crate) mod memory;
pub(crate) mod muon;
pub(crate) mod norm;
pub(crate) mod pixels;
pub(crate) mod pool;
pub(crate) mod reduce;
pub(crate) mod simd;
#[cfg(test)]
pub(crate) mod tests;
pub(crate) mod transpose;
