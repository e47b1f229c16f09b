use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvError, TryRecvError, sync_channel};
use std::thread;
use std::time::Duration;

use super::dataset::Dataset;
use super::loader::{HostBatch, Loader, Position};
use crate::error::{Error, Result};

/// Calls `f` with a function that returns the next of `batches` batches, the first one at `at`. A thread reads each
/// batch while the previous one is used. The thread ends before this function returns. After an error no further batch
/// is read.
///
/// The thread does not belong to the pool: a data set may wait for a disk or a network, and a waiting thread of the
/// pool computes nothing. The thread takes no part in the computation, so results do not depend on it.
///
/// # Errors
/// Returns the errors of `f`, and an error if no thread can be started.
pub(crate) fn prefetch<R>(
    mut loader: Loader,
    dataset: &dyn Dataset,
    mut at: Position,
    batches: u64,
    f: impl FnOnce(&mut dyn FnMut() -> Result<HostBatch>) -> Result<R>,
) -> Result<R> {
    let stop = &AtomicBool::new(false);
    // The capacity is 0: the thread hands over a batch before it reads the next.
    let (sender, receiver) = sync_channel::<Result<HostBatch>>(0);
    let read = move || {
        for _ in 0..batches {
            let Some(batch) = loader.read(dataset, at, stop).transpose() else { return };
            let failed = batch.is_err();
            if sender.send(batch).is_err() || failed {
                return;
            }
            at = loader.after(at);
        }
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("ddpm-loader".into());
        let thread = thread.spawn_scoped(scope, read).map_err(Error::external)?;
        // Stops the thread even after a panic of `f`. The scope would wait for it otherwise.
        let stopping = Stopping(stop);
        let result = f(&mut || match receive(&receiver) {
            Ok(batch) => batch,
            // The thread panicked, which the scope passes on, or all batches were taken.
            Err(_) => Err(Error::config("batches", "all taken", format!("at most {batches}"))),
        });
        drop((stopping, receiver));
        match thread.join() {
            Ok(()) => result,
            Err(panic) => resume_unwind(panic),
        }
    })
}

/// Waits for a batch. A thread of a rayon pool does other jobs of the pool meanwhile: the data set may have submitted
/// some on which the batch depends.
fn receive<T>(receiver: &Receiver<T>) -> std::result::Result<T, RecvError> {
    if rayon::current_thread_index().is_none() {
        return receiver.recv();
    }
    loop {
        match receiver.try_recv() {
            Ok(batch) => return Ok(batch),
            Err(TryRecvError::Disconnected) => return Err(RecvError),
            Err(TryRecvError::Empty) => {
                if rayon::yield_now() != Some(rayon::Yield::Executed) {
                    thread::sleep(Duration::from_micros(100));
                }
            }
        }
    }
}

/// Stops the thread when this value is dropped.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
