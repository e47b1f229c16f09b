//! Ctrl-C, and the wish of the system to stop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::cli::Result;

/// What a shell expects of a program that was interrupted.
pub const EXIT_CODE: u8 = 130;

/// A terminal that is closed may send SIGHUP itself and have it sent by its shell: within this time
/// it is the same wish.
const SAME: Duration = Duration::from_secs(1);

static STOPPED: AtomicBool = AtomicBool::new(false);

/// What work that was stopped ends with.
#[derive(Debug, thiserror::Error)]
#[error("stopped")]
pub struct Interrupted;

/// From now on the first Ctrl-C only [asks to stop](stopped), which `say` tells, and the second one
/// stops.
pub fn watch(say: impl Fn() + Send + 'static) -> Result<()> {
    let mut first = None;
    ctrlc::set_handler(move || match first {
        None => {
            first = Some(Instant::now());
            STOPPED.store(true, Ordering::SeqCst);
            say();
        }
        Some(first) if first.elapsed() < SAME => {}
        Some(_) => std::process::exit(EXIT_CODE.into()),
    })?;
    Ok(())
}

pub fn stopped() -> bool {
    STOPPED.load(Ordering::SeqCst)
}

/// Ends work that has nothing to save.
pub fn check() -> Result<()> {
    if stopped() { Err(Interrupted.into()) } else { Ok(()) }
}
