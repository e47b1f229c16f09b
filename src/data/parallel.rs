use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::error::Result;

/// Calls `f` with each item on up to `threads` threads, one of which is the caller's. Returns the results in the order
/// of the items. Returns `None` if `stop` is set before the last item is taken.
///
/// The threads do not belong to rayon's pool, because `f` may wait for a disk. Also, a pool thread that waits within an
/// operation of a network would take an item, and delay this operation.
///
/// # Errors
/// Returns the error of the first item, in their order, that has one. Further items are not taken after an error.
pub(crate) fn map<T: Send, R: Send>(
    threads: usize,
    items: impl ExactSizeIterator<Item = T> + Send,
    stop: &AtomicBool,
    f: impl Fn(T) -> Result<R> + Sync,
) -> Result<Option<Vec<R>>> {
    let others = threads.min(items.len()).saturating_sub(1);
    let items = Mutex::new(items.enumerate());
    let (results, failed) = (Mutex::new(Vec::new()), AtomicBool::new(false));
    let work = || {
        while !stop.load(Ordering::Relaxed) && !failed.load(Ordering::Relaxed) {
            let Some((k, item)) = lock(&items).next() else { return };
            let result = f(item);
            if result.is_err() {
                failed.store(true, Ordering::Relaxed);
            }
            lock(&results).push((k, result));
        }
    };
    thread::scope(|scope| {
        for _ in 0..others {
            let thread = thread::Builder::new().name("ddpm-reader".into());
            // Fewer threads give the same results.
            if thread.spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Items are taken in order, so every item before one that failed has a result.
    results.sort_by_key(|(k, _)| *k);
    let results = results.into_iter().map(|(_, result)| result).collect::<Result<Vec<_>>>()?;
    let all_taken = lock(&items).next().is_none();
    Ok(all_taken.then_some(results))
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::time::Duration;

    use super::*;
    use crate::error::Error;

    #[test]
    fn results_have_the_order_of_the_items_for_any_number_of_threads() {
        let items: Vec<u64> = (0..100).collect();
        for threads in [0, 1, 2, 7, 1000] {
            let stop = AtomicBool::new(false);
            let f = |k: u64| {
                thread::sleep(Duration::from_micros(k * 37 % 11 * 20));
                Ok(k * k)
            };
            let results = map(threads, items.iter().copied(), &stop, f).unwrap().unwrap();
            assert!(results.iter().enumerate().all(|(k, &square)| square as usize == k * k));
            assert_eq!(results.len(), 100);
        }
    }

    #[test]
    fn the_first_error_in_the_order_of_the_items_is_returned() {
        for threads in [1, 2, 8] {
            let f = |k: u64| match k {
                // The later error occurs earlier.
                5 => {
                    thread::sleep(Duration::from_millis(5));
                    Err(Error::external("five"))
                }
                6 | 40 => Err(Error::external("later")),
                _ => Ok(k),
            };
            let items: Vec<u64> = (0..100).collect();
            let error = map(threads, items.into_iter(), &AtomicBool::new(false), f).unwrap_err();
            assert_eq!(error.to_string(), "five", "{threads} threads");
        }
    }

    #[test]
    fn a_request_to_stop_ends_the_work_on_all_threads() {
        let (stop, seen) = (AtomicBool::new(false), Mutex::new(HashSet::new()));
        let items: Vec<u64> = (0..1000).collect();
        let found = map(3, items.into_iter(), &stop, |k| {
            if k == 10 {
                stop.store(true, Ordering::Relaxed);
            }
            lock(&seen).insert(k);
            thread::sleep(Duration::from_millis(1));
            Ok(k)
        });
        assert!(found.unwrap().is_none());
        assert!(seen.into_inner().unwrap().len() < 20);
    }
}
