//! Properties of `pack_sequences`, through its public face.

use barqtrain_core::{pack_sequences, PackError, Plan};

mod common;
use common::{assert_valid, Rng};

/// Best-fit decreasing as a textbook has it: sort, then look at every row for every document.
fn textbook(lengths: &[i64], capacity: i64) -> Plan {
    struct Row {
        free: i64,
        filled_at: usize,
        documents: Vec<u32>,
    }
    let mut by_length: Vec<usize> = (0..lengths.len()).collect();
    by_length.sort_by_key(|&i| (-lengths[i], i));
    let mut rows: Vec<Row> = Vec::new();
    for (now, &document) in by_length.iter().enumerate() {
        let length = lengths[document];
        let best = rows
            .iter_mut()
            .filter(|row| row.free >= length)
            .min_by_key(|row| (row.free, usize::MAX - row.filled_at));
        match best {
            Some(row) => {
                row.free -= length;
                row.filled_at = now;
                row.documents.push(document as u32);
            }
            None => rows.push(Row {
                free: capacity - length,
                filled_at: now,
                documents: vec![document as u32],
            }),
        }
    }
    let mut plan = Plan {
        order: Vec::new(),
        offsets: vec![0],
    };
    for row in rows {
        plan.order.extend(row.documents);
        plan.offsets.push(plan.order.len());
    }
    plan
}

#[test]
fn golden_plan() {
    let plan = pack_sequences(&[3, 7, 5, 2, 10, 5, 1, 4], 10).unwrap();
    let rows: Vec<&[u32]> = plan.rows().collect();
    // 10 | 7 .. | 5 5 | 4 .. ; then 3 fills the row of 7, 2 and 1 join the 4.
    assert_eq!(rows, [&[4][..], &[1, 0], &[2, 5], &[7, 3, 6]]);
}

#[test]
fn equals_the_textbook() {
    let mut rng = Rng(7);
    // Powers of two, their neighbours, odd numbers, and both ends of a 64- and a 4096-wide word.
    for capacity in [
        1, 2, 3, 7, 63, 64, 65, 127, 1000, 1023, 4095, 4096, 4097, 9999, 131_072,
    ] {
        for count in [0, 1, 2, 17, 300] {
            let lengths = rng.lengths(count, capacity);
            let plan = pack_sequences(&lengths, capacity).unwrap();
            assert_eq!(
                plan,
                textbook(&lengths, capacity as i64),
                "capacity {capacity}, {count} documents"
            );
        }
    }
}

#[test]
fn every_document_once_and_no_row_too_full() {
    let mut rng = Rng(11);
    for trial in 0..200 {
        let capacity = 1 + rng.below(5000);
        let count = rng.below(3000);
        let lengths = rng.lengths(count, capacity);
        let plan = pack_sequences(&lengths, capacity).unwrap();
        assert_valid(&plan, &lengths, capacity);
        assert_eq!(plan, pack_sequences(&lengths, capacity).unwrap(), "{trial}");
    }
}

#[test]
fn no_two_rows_could_have_been_one() {
    let mut rng = Rng(13);
    let lengths = rng.lengths(2000, 777);
    let plan = pack_sequences(&lengths, 777).unwrap();
    let half_empty = plan
        .rows()
        .map(|row| row.iter().map(|&d| lengths[d as usize]).sum::<i64>())
        .filter(|&tokens| tokens * 2 <= 777)
        .count();
    assert!(half_empty <= 1, "{half_empty} rows at most half full");
}

#[test]
fn no_documents_make_no_rows() {
    let plan = pack_sequences(&[], 4096).unwrap();
    assert_eq!(plan.rows().count(), 0);
    assert_eq!(plan.offsets, [0]);
}

#[test]
fn documents_of_row_length_get_a_row_each() {
    let plan = pack_sequences(&[4096; 5], 4096).unwrap();
    let rows: Vec<&[u32]> = plan.rows().collect();
    assert_eq!(rows, [[0], [1], [2], [3], [4]]);
}

#[test]
fn a_huge_row_length_costs_no_memory() {
    let plan = pack_sequences(&[3, 1, 2], usize::MAX).unwrap();
    assert_eq!(plan.rows().collect::<Vec<_>>(), [[0, 2, 1]]);
}

#[test]
fn refusals_name_the_document_and_the_value() {
    assert_eq!(pack_sequences(&[1], 0), Err(PackError::ZeroMaxLength));
    assert_eq!(
        pack_sequences(&[4, 0], 8),
        Err(PackError::NotPositive {
            index: 1,
            length: 0
        })
    );
    assert_eq!(
        pack_sequences(&[-3, 4], 8),
        Err(PackError::NotPositive {
            index: 0,
            length: -3
        })
    );
    let error = pack_sequences(&[8, 9], 8).unwrap_err();
    assert_eq!(
        error.to_string(),
        "lengths[1] is 9, more than max_length=8: split or truncate that document, \
         or raise max_length."
    );
    assert!(pack_sequences(&[i64::MAX], 8).is_err());
}
