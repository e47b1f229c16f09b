//! The transforms of tiles of six columns: F(2x4, 3x3), with 4 rows, and F(4x4, 3x3), with 6 rows.

mod columns;
mod kernels;
mod lines;
mod maps;

pub(super) use self::kernels::{kernel_gradient, transform_kernels};
pub(super) use self::maps::{transform_gradient, transform_input, transform_output};
