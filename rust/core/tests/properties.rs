//! What holds for plans of any documents: each once, no row too full, the same on any number of threads.

use barqtrain_core::{pack_sequences, plan_epoch, plan_window, PackError};
use proptest::prelude::*;

mod common;
use common::assert_valid;

/// Tokens in a row: any, and those at the ends of the words and summary words of the bitset.
fn capacities() -> impl Strategy<Value = usize> {
    let ends = [
        1, 2, 3, 63, 64, 65, 511, 513, 4095, 4096, 4097, 8192, 65_535, 65_536,
    ];
    prop_oneof![1..6000usize, prop::sample::select(ends.to_vec())]
}

/// Documents for rows of some capacity: mostly short, some of one token, some that fill a row.
fn documents(most: usize) -> impl Strategy<Value = (usize, Vec<i64>)> {
    capacities().prop_flat_map(move |capacity| {
        let full = capacity as i64;
        let length = prop_oneof![
            4 => 1..=full / 8 + 1,
            2 => 1..=full,
            1 => Just(1),
            1 => Just(full),
            1 => Just(full / 2 + 1),
        ];
        let length = length.prop_map(move |length| length.min(full));
        (Just(capacity), prop::collection::vec(length, 0..most))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_list_is_packed_whole((capacity, lengths) in documents(300)) {
        let plan = pack_sequences(&lengths, capacity).unwrap();
        assert_valid(&plan, &lengths, capacity);
        // No two rows could be one: of a best fit at most one row is half empty.
        let sizes = plan.rows().map(|row| row.iter().map(|&at| lengths[at as usize]).sum::<i64>());
        prop_assert!(sizes.filter(|&size| 2 * size <= capacity as i64).count() <= 1);
    }

    #[test]
    fn an_epoch_is_packed_whole(
        (capacity, lengths) in documents(300),
        seed: u64,
        epoch in 0..4u64,
        threads in 1..=8usize,
    ) {
        let plan = plan_epoch(&lengths, capacity, seed, epoch, None, threads).unwrap();
        assert_valid(&plan, &lengths, capacity);
        let first = plan_epoch(&lengths, capacity, seed, 0, None, 1).unwrap();
        prop_assert_eq!(plan.offsets.len(), first.offsets.len());
        let rows = Some(first.offsets.len() - 1);
        prop_assert_eq!(plan, plan_epoch(&lengths, capacity, seed, epoch, rows, 1).unwrap());
    }

    #[test]
    fn a_window_is_packed_or_carried(
        (capacity, lengths) in documents(300),
        waits in prop::collection::vec(0..=9u8, 300),
        name: [u64; 3],
        last: bool,
    ) {
        let waited = &waits[..lengths.len()];
        let packed = plan_window(&lengths, waited, capacity, name, last).unwrap();
        prop_assert!(packed.carried.is_sorted());
        prop_assert!(packed.carried.iter().all(|&at| !last && waited[at as usize] < 8));
        let mut all = packed.plan;
        for &at in &packed.carried {
            all.order.push(at);
            all.offsets.push(all.order.len());
        }
        assert_valid(&all, &lengths, capacity);
    }

    #[test]
    fn a_length_that_cannot_be_packed_is_named(
        (capacity, mut lengths) in documents(50),
        at: prop::sample::Index,
        which in 0..4usize,
        threads in 1..=8usize,
    ) {
        let index = at.index(lengths.len() + 1);
        let length = [0, -1, i64::MIN, capacity as i64 + 1][which];
        lengths.insert(index, length);
        let expected = if length < 1 {
            PackError::NotPositive { index, length }
        } else {
            PackError::TooLong { index, length, max_length: capacity }
        };
        let waited = vec![0; lengths.len()];
        let errors = [
            pack_sequences(&lengths, capacity).unwrap_err(),
            plan_epoch(&lengths, capacity, 0, 1, None, threads).unwrap_err(),
            plan_window(&lengths, &waited, capacity, [0; 3], true).unwrap_err(),
        ];
        for error in errors {
            prop_assert_eq!(&error, &expected);
        }
    }
}

proptest! {
    // Each of so many documents that they are packed in blocks: 2, 3 or more of them, paired or not.
    #![proptest_config(ProptestConfig { cases: 4, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn blocks_are_the_same_on_any_number_of_threads(
        (capacity, some) in documents(500),
        count in 100_000..420_000usize,
        seed: u64,
        threads in 2..=8usize,
    ) {
        let lengths: Vec<i64> = some.iter().copied().chain([1]).cycle().take(count).collect();
        let plan = plan_epoch(&lengths, capacity, seed, 1, None, 1).unwrap();
        assert_valid(&plan, &lengths, capacity);
        prop_assert!(plan == plan_epoch(&lengths, capacity, seed, 1, None, threads).unwrap());
    }
}
