//! `balance`: every row once, equally many for each rank, costs closer than as they come.

use barqtrain_core::{balance, UnevenError};

mod common;
use common::Rng;

fn dearest(costs: &[u64], order: &[u32], ranks: usize) -> u64 {
    order
        .chunks(costs.len() / ranks)
        .map(|rows| rows.iter().map(|&row| costs[row as usize]).sum())
        .max()
        .unwrap()
}

#[test]
fn every_row_once_and_the_slowest_rank_is_no_slower() {
    let mut rng = Rng(21);
    let (mut before, mut after, mut ideal) = (0, 0, 0);
    for ranks in [1, 2, 3, 8] {
        for share in [1, 2, 5, 16] {
            let costs: Vec<u64> = (0..ranks * share)
                .map(|_| 1 + rng.below(1000) as u64)
                .collect();
            let order = balance(&costs, ranks, 1).unwrap();
            let mut rows = order.clone();
            rows.sort_unstable();
            let identity: Vec<u32> = (0..costs.len() as u32).collect();
            assert_eq!(rows, identity);
            before += dearest(&costs, &identity, ranks);
            after += dearest(&costs, &order, ranks);
            // No rank is cheaper than its share, nor than the dearest row.
            let mean = costs.iter().sum::<u64>().div_ceil(ranks as u64);
            ideal += mean.max(*costs.iter().max().unwrap());
        }
    }
    assert!(
        after * 100 <= ideal * 105,
        "{after}, at least {ideal}, unbalanced {before}"
    );
}

#[test]
fn golden_order() {
    // 9 | 8 7, then 6 to the cheaper, which has room: (9, 6) and (8, 7).
    assert_eq!(balance(&[6, 9, 7, 8], 2, 1), Ok(vec![1, 0, 3, 2]));
}

#[test]
fn in_turns_the_slowest_rank_is_no_slower_and_rows_of_a_turn_are_alike() {
    let mut rng = Rng(5);
    let (ranks, turns, share) = (4, 8, 1);
    let (mut most, mut mean, mut waits, mut unsorted) = (0, 0, 0, 0);
    let wait = |costs: &[u64]| -> u64 {
        let turns = costs.chunks(ranks * share);
        turns
            .map(|turn| turn.iter().max().unwrap() * ranks as u64 - turn.iter().sum::<u64>())
            .sum()
    };
    for _ in 0..50 {
        let costs: Vec<u64> = (0..ranks * turns * share)
            .map(|_| 1 + rng.below(1000) as u64)
            .collect();
        let order = balance(&costs, ranks, turns).unwrap();
        let mut rows = order.clone();
        rows.sort_unstable();
        assert!(rows.into_iter().eq(0..costs.len() as u32));
        let dealt: Vec<u64> = order.iter().map(|&row| costs[row as usize]).collect();
        let of_rank = |rank| dealt.iter().skip(rank).step_by(ranks).sum::<u64>();
        most += (0..ranks).map(of_rank).max().unwrap();
        mean += costs.iter().sum::<u64>() / ranks as u64;
        waits += wait(&dealt);
        unsorted += wait(&costs);
    }
    assert!(most * 100 <= mean * 101, "{most}, {mean} at least");
    assert!(
        waits * 4 < unsorted,
        "{waits} of waiting, {unsorted} as they came"
    );
}

#[test]
fn uneven_numbers_are_refused() {
    for (rows, ranks, turns) in [
        (3, 2, 1),
        (4, 0, 1),
        (4, 1, 0),
        (4, 2, 4),
        (4, usize::MAX, 2),
    ] {
        let error = balance(&vec![1; rows], ranks, turns).unwrap_err();
        assert_eq!(error, UnevenError { rows, ranks, turns });
        assert!(error
            .to_string()
            .contains("pass a multiple of their product"));
    }
    assert_eq!(balance(&[], 2, 3), Ok(vec![]));
}
