//! Work on several threads whose result does not tell how many there were.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// `[work(0), .., work(count - 1)]`, on at most `threads` threads, the caller's among them.
///
/// Threads take the next index when they are free, so uneven work is shared evenly.
pub(crate) fn map<T: Send>(
    count: usize,
    threads: usize,
    work: impl Fn(usize) -> T + Sync,
) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<T>>> = (0..count).map(|_| Mutex::new(None)).collect();
    let run = || loop {
        // Relaxed: the index is all that is passed on; results are handed over by the locks.
        let index = next.fetch_add(1, Ordering::Relaxed);
        let Some(slot) = results.get(index) else {
            return;
        };
        let result = work(index);
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(count) {
            scope.spawn(run);
        }
        run();
    });
    results
        .into_iter()
        .filter_map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::map;

    #[test]
    fn results_are_in_order_whatever_the_number_of_threads() {
        for threads in [0, 1, 2, 8] {
            for count in [0, 1, 7, 100] {
                let expected: Vec<usize> = (0..count).map(|i| i * i).collect();
                assert_eq!(map(count, threads, |i| i * i), expected);
            }
        }
    }
}
