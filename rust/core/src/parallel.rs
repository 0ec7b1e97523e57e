//! Work on several threads whose result does not tell how many there were.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// `[work(.., 0), .., work(.., count - 1)]`, each by one of the workers: the first on the caller's
/// thread, every other on one of its own.
///
/// Workers take the next index when they are free, so uneven work is shared evenly.
///
/// # Panics
/// When there are no workers, or `work` panics.
pub fn map_with<W: Send, T: Send>(
    workers: &mut [W],
    count: usize,
    work: impl Fn(&mut W, usize) -> T + Sync,
) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<T>>> = (0..count).map(|_| Mutex::new(None)).collect();
    let run = |worker: &mut W| loop {
        // Relaxed: the index is all that is passed on; results are handed over by the locks.
        let index = next.fetch_add(1, Ordering::Relaxed);
        let Some(slot) = results.get(index) else {
            return;
        };
        let result = work(worker, index);
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    };
    let (first, others) = workers.split_first_mut().expect("at least one worker");
    std::thread::scope(|scope| {
        for worker in others.iter_mut().take(count.saturating_sub(1)) {
            scope.spawn(|| run(worker));
        }
        run(first);
    });
    results
        .into_iter()
        .filter_map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::map_with;

    #[test]
    fn results_are_in_order_whatever_the_number_of_threads() {
        for threads in [1, 2, 8] {
            for count in [0, 1, 7, 100] {
                let expected: Vec<usize> = (0..count).map(|i| i * i).collect();
                let mut workers = vec![(); threads];
                assert_eq!(map_with(&mut workers, count, |(), i| i * i), expected);
            }
        }
    }

    #[test]
    fn every_result_is_made_once_by_some_worker() {
        let mut made = [0usize; 3];
        let results = map_with(&mut made, 50, |made, index| {
            *made += 1;
            index
        });
        assert_eq!(results, (0..50).collect::<Vec<_>>());
        assert_eq!(made.iter().sum::<usize>(), 50);
    }

    #[test]
    #[should_panic(expected = "a scoped thread panicked")]
    fn a_panic_is_passed_on() {
        map_with(&mut [(); 4], 100, |(), index| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            assert!(std::thread::current().name().is_some() || index < 3);
        });
    }
}
