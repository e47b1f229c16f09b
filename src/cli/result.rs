use std::error::Error;

/// The result of a program, with any error.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The error of work that the user stopped. [`main`](super::main) then returns the exit code for a stop by a signal.
#[derive(Debug, thiserror::Error)]
#[error("stopped")]
pub struct Interrupted;
