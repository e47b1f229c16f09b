use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::train::{Frontend, Observer};

/// When a terminal is closed, SIGHUP may arrive twice: from the terminal and from its shell. Signals within this time
/// count as one.
const SAME: Duration = Duration::from_secs(1);

/// Stops the run after the present update at the first Ctrl-C, or at the first signal to terminate. The second one ends
/// the process.
///
/// The other observers see the stop through [`Run::is_stopping`](crate::train::Run::is_stopping), so that
/// [`SaveEvery`](super::SaveEvery) saves and nothing is lost.
#[derive(Debug, Clone)]
pub struct StopOnSignal {
    stopped: Arc<AtomicBool>,
}

impl StopOnSignal {
    /// The exit code of a process that a signal stopped, which shells expect. The second signal ends the process with
    /// it.
    pub const EXIT_CODE: u8 = 130;

    /// Installs the process's handler of signals. The first signal calls `announce`, in a thread of the handler.
    ///
    /// # Errors
    /// Returns an error if the process has such a handler already.
    pub fn install(announce: impl Fn() + Send + 'static) -> Result<Self> {
        let stopped = Arc::new(AtomicBool::new(false));
        let (flag, mut first) = (Arc::clone(&stopped), None);
        let handler = move || match first {
            None => {
                first = Some(Instant::now());
                flag.store(true, Ordering::SeqCst);
                announce();
            }
            Some(first) if first.elapsed() < SAME => {}
            Some(_) => process::exit(Self::EXIT_CODE.into()),
        };
        ctrlc::set_handler(handler).map_err(Error::external)?;
        Ok(Self { stopped })
    }

    /// Returns whether a signal was received.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }
}

impl Frontend for StopOnSignal {
    fn wants_stop(&self) -> bool {
        self.is_stopped()
    }
}

impl Observer for StopOnSignal {
    fn frontends(&self) -> Vec<Arc<dyn Frontend>> {
        vec![Arc::new(self.clone())]
    }
}
