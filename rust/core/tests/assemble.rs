//! `assemble`: the layout of a packed batch.

use barqtrain_core::{assemble, AssembleError, Batch, PackedRows, Padding, Tokens, NO_LOSS};

const IDS: [i32; 9] = [10, 11, 12, 13 | NO_LOSS, 14, 15, 16, 17, 18];

fn tokens() -> Tokens<'static> {
    Tokens {
        ids: &IDS,
        labels: None,
    }
}

#[test]
fn documents_lie_end_to_end_without_their_first_label() {
    let batch = assemble(tokens(), &[(2, 3), (7, 2), (0, 1)], None).unwrap();
    let expected = Batch {
        input_ids: vec![12, 13, 14, 17, 18, 10],
        labels: vec![-100, -100, 14, -100, 18, -100],
        position_ids: vec![0, 1, 2, 0, 1, 0],
        cu_seq_lens: vec![0, 3, 5, 6],
        max_length: 3,
    };
    assert_eq!(batch, expected);
}

#[test]
fn labels_may_be_anything() {
    let labels = [-100, 1, 2, -100, 4, 5, 6, 7, 8];
    let given = Tokens {
        ids: &IDS,
        labels: Some(&labels),
    };
    let batch = assemble(given, &[(0, 3), (3, 3)], None).unwrap();
    assert_eq!(batch.labels, [-100, 1, 2, -100, 4, 5]);
    assert_eq!(batch.input_ids, [10, 11, 12, 13, 14, 15]);
    let short = Tokens {
        ids: &IDS,
        labels: Some(&labels[1..]),
    };
    let error = assemble(short, &[], None).unwrap_err();
    assert_eq!(error, AssembleError::LabelsMismatch { labels: 8, ids: 9 });
}

#[test]
fn padding_is_one_more_document() {
    let padding = |multiple| {
        Some(Padding {
            multiple,
            token: 99,
        })
    };
    let batch = assemble(tokens(), &[(0, 2), (4, 3)], padding(4)).unwrap();
    assert_eq!(batch.input_ids, [10, 11, 14, 15, 16, 99, 99, 99]);
    assert_eq!(batch.labels[5..], [-100; 3]);
    assert_eq!(batch.position_ids, [0, 1, 0, 1, 2, 0, 1, 2]);
    assert_eq!(batch.cu_seq_lens, [0, 2, 5, 8]);
    let even = assemble(tokens(), &[(0, 2), (4, 3)], padding(5)).unwrap();
    assert_eq!(even.cu_seq_lens, [0, 2, 5]);
    let longest = assemble(tokens(), &[(0, 2)], padding(8)).unwrap();
    assert_eq!(longest.max_length, 6); // the padding
}

#[test]
fn nothing_is_read_out_of_bounds() {
    for (start, length) in [
        (0, 10),
        (9, 1),
        (-1, 2),
        (3, 0),
        (3, -1),
        (i64::MAX, 1),
        (1, i64::MAX),
        (i64::MIN, i64::MIN),
    ] {
        let error = assemble(tokens(), &[(0, 1), (start, length)], None).unwrap_err();
        let expected = AssembleError::OutOfBounds {
            start,
            length,
            tokens: 9,
        };
        assert_eq!(error, expected);
    }
    let huge = Padding {
        multiple: 1 << 31,
        token: 0,
    };
    assert_eq!(
        assemble(tokens(), &[(0, 1)], Some(huge)),
        Err(AssembleError::TooManyTokens)
    );
}

#[test]
fn rows_are_taken_from_the_plan() {
    let rows = PackedRows {
        tokens: tokens(),
        starts: &[0, 2, 5],
        lengths: &[2, 3, 4],
        order: &[2, 0, 1],
        offsets: &[0, 1, 3],
    };
    let batch = rows.batch(&[1, 0], None).unwrap();
    let expected = assemble(tokens(), &[(0, 2), (2, 3), (5, 4)], None).unwrap();
    assert_eq!(batch, expected);
    assert_eq!(rows.batch(&[], None).unwrap().cu_seq_lens, [0]);

    let no_row = |row| Err(AssembleError::NoSuchRow { row });
    assert_eq!(rows.batch(&[2], None), no_row(2));
    assert_eq!(rows.batch(&[usize::MAX - 1], None), no_row(usize::MAX - 1));
    for offsets in [[0, 1, 4], [0, 3, 2], [0, -1, 3]] {
        let broken = PackedRows {
            offsets: &offsets,
            ..rows
        };
        assert_eq!(broken.batch(&[1], None), no_row(1));
    }
    let broken = PackedRows {
        order: &[2, 0, 3],
        ..rows
    };
    let error = AssembleError::NoSuchDocument { document: 3 };
    assert_eq!(broken.batch(&[1], None), Err(error));
}
