//! The bits per dimension of images: by the variational bound, and by the probability-flow ODE.

mod bound;
mod flow;
mod request;
#[cfg(test)]
mod tests;
mod trace;

pub use bound::{Bound, Term, VariationalBound};
pub use flow::{Integrator, Likelihood, ProbabilityFlow};
pub use request::Evaluated;
pub use trace::Trace;
