//! `fit`: no token is lost unless the policy says so, and then it is counted.

use barqtrain_core::{fit, Fitted, Losses, Overflow, PackError};

mod common;
use common::Rng;

fn fitted(lengths: &[i64], overflow: Overflow) -> Fitted {
    fit(lengths, 10, overflow).unwrap()
}

#[test]
fn documents_that_fit_are_left_alone() {
    for (_, policy) in Overflow::NAMES {
        let Fitted {
            starts,
            lengths,
            losses,
        } = fitted(&[10, 0, 1, 9], policy);
        assert_eq!(
            (&starts[..], &lengths[..]),
            (&[0, 10, 11][..], &[10, 1, 9][..])
        );
        let expected = Losses {
            kept_documents: 3,
            dropped_documents: 1,
            ..Losses::default()
        };
        assert_eq!(losses, expected);
    }
}

#[test]
fn each_policy_counts_what_it_costs() {
    let lengths = [3, 25, 11, 20];
    let split = fitted(&lengths, Overflow::Split);
    assert_eq!(split.starts, [0, 3, 13, 23, 28, 38, 39, 49]);
    assert_eq!(split.lengths, [3, 10, 10, 5, 10, 1, 10, 10]);
    assert_eq!(
        (split.losses.kept_documents, split.losses.split_documents),
        (4, 3)
    );

    let truncated = fitted(&lengths, Overflow::Truncate);
    assert_eq!(truncated.starts, [0, 3, 28, 39]);
    assert_eq!(truncated.lengths, [3, 10, 10, 10]);
    assert_eq!(truncated.losses.truncated_tokens, 15 + 1 + 10);

    let dropped = fitted(&lengths, Overflow::Drop);
    assert_eq!((dropped.starts, dropped.lengths), (vec![0], vec![3]));
    assert_eq!(dropped.losses.kept_documents, 1);
    assert_eq!(dropped.losses.dropped_documents, 3);
    assert_eq!(dropped.losses.dropped_tokens, 25 + 11 + 20);
}

#[test]
fn tokens_in_are_tokens_kept_plus_tokens_counted() {
    let mut rng = Rng(2);
    for _ in 0..200 {
        let capacity = 1 + rng.below(50);
        let lengths: Vec<i64> = (0..rng.below(60))
            .map(|_| rng.below(capacity * 4) as i64)
            .collect();
        for policy in [Overflow::Split, Overflow::Truncate, Overflow::Drop] {
            let fitted = fit(&lengths, capacity, policy).unwrap();
            let kept: i64 = fitted.lengths.iter().sum();
            let lost = fitted.losses.truncated_tokens + fitted.losses.dropped_tokens;
            assert_eq!(kept + lost as i64, lengths.iter().sum::<i64>());
            let documents = fitted.losses.kept_documents + fitted.losses.dropped_documents;
            assert_eq!(documents as usize, lengths.len());
            let mut end = 0;
            for (&start, &length) in fitted.starts.iter().zip(&fitted.lengths) {
                assert!(start >= end && (1..=capacity as i64).contains(&length));
                end = start + length;
            }
        }
    }
}

#[test]
fn refusals_name_the_document() {
    let error = fit(&[3, 9, 12, 12], 8, Overflow::Error).unwrap_err();
    assert_eq!(
        error.to_string(),
        "dataset has 3 documents longer than max_length=8; the longest, document 2, has 12 tokens: \
         pass overflow='split', 'truncate' or 'drop', or raise max_length."
    );
    assert_eq!(fit(&[1], 0, Overflow::Split), Err(PackError::ZeroMaxLength));
    let negative = PackError::Negative {
        index: 1,
        length: -4,
    };
    for (name, policy) in Overflow::NAMES {
        assert_eq!(name.parse(), Ok(policy));
    }
    let error = "wrap".parse::<Overflow>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "overflow is 'wrap': choose one of error, split, truncate, drop."
    );
    assert_eq!(fit(&[1, -4], 8, Overflow::Drop), Err(negative));
}
