//! `balance`: every row once, equally many for each rank, costs closer than as they come.

use barqtrain_core::{balance, row_cost, UnevenError};

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
            let order = balance(&costs, ranks).unwrap();
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
    assert_eq!(balance(&[6, 9, 7, 8], 2), Ok(vec![1, 0, 3, 2]));
}

#[test]
fn a_cost_is_linear_plus_quadratic() {
    assert_eq!(row_cost([3, 4], 10), 3 * 10 + 9 + 4 * 10 + 16);
    assert_eq!(row_cost([], 10), 0);
    assert_eq!(row_cost([u64::MAX, 1], 1), u64::MAX); // and no overflow
}

#[test]
fn uneven_numbers_are_refused() {
    for (rows, ranks) in [(3, 2), (4, 0)] {
        let error = balance(&vec![1; rows], ranks).unwrap_err();
        assert_eq!(error, UnevenError { rows, ranks });
        assert!(error.to_string().contains("multiple of a positive number"));
    }
}
