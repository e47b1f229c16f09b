//! The computation of networks: the graph of operations, the engines that run it, and its runtime.
//!
//! Feature maps are channels-last, as in [`kernels`](crate::kernels).

mod autograd;
mod graph;
mod map;
mod model;
mod pass;
mod shapes;
mod survey;
mod tape;

pub(crate) use autograd::Autograd;
pub use graph::{Engine, Graph, Normed};
pub use model::Model;
pub(crate) use pass::Pass;
