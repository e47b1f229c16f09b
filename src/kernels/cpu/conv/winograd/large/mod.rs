//! The transforms of F(4x4, 3x3), with tiles of 6x6 pixels that overlap by 2.

mod kernels;
mod lines;
mod maps;

pub(super) use self::kernels::{kernel_gradient, transform_kernels};
pub(super) use self::maps::{transform_gradient, transform_input, transform_output};
