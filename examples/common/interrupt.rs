//! Ctrl-C, and the wish of the system to stop.

use std::sync::atomic::{AtomicBool, Ordering};

use super::cli::Result;

/// What a shell expects of a program that was interrupted.
pub const EXIT_CODE: u8 = 130;

static STOPPED: AtomicBool = AtomicBool::new(false);

/// From now on the first Ctrl-C only [asks to stop](stopped), and the second one stops.
pub fn watch(say: impl Fn(&str) + Send + 'static) -> Result<()> {
    ctrlc::set_handler(move || {
        if STOPPED.swap(true, Ordering::SeqCst) {
            std::process::exit(EXIT_CODE.into());
        }
        say("stopping after this step; once more leaves without saving");
    })?;
    Ok(())
}

pub fn stopped() -> bool {
    STOPPED.load(Ordering::SeqCst)
}
