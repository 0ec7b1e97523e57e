//! Properties of `plan_epoch` and `plan_window`.

use barqtrain_core::{plan_epoch, plan_window, PackError, Plan};

mod common;
use common::{assert_valid, Rng};

const CAPACITIES: [usize; 9] = [1, 2, 7, 63, 64, 1000, 4095, 4096, 4097];

fn rows(plan: &Plan) -> Vec<&[u32]> {
    plan.rows().collect()
}

/// Share of the capacity of the rows that holds tokens.
fn fill(tokens: i64, rows: usize, capacity: usize) -> f64 {
    tokens as f64 / (rows * capacity) as f64
}

/// Sum of 12 uniforms, scaled: lognormal lengths as in instruction data.
fn lognormal(rng: &mut Rng, mean: f64, sigma: f64, capacity: usize) -> i64 {
    let normal: f64 = (0..12)
        .map(|_| rng.below(1 << 20) as f64 / f64::from(1 << 20))
        .sum::<f64>()
        - 6.0;
    let length = (mean.ln() - sigma * sigma / 2.0 + sigma * normal).exp();
    (length as i64).clamp(1, capacity as i64)
}

#[test]
fn golden_plan() {
    const GOLDEN: [&[u32]; 4] = [&[7, 3, 6], &[2, 5], &[4], &[1, 0]];
    // The same on every machine and in every release: a resumed run depends on it.
    let lengths = [3, 7, 5, 2, 10, 5, 1, 4];
    let plan = plan_epoch(&lengths, 10, 0, 0, None, 2).unwrap();
    assert_eq!(rows(&plan), GOLDEN);

    let lengths: Vec<i64> = (0..150_000).map(|at| 1 + at * at % 509).collect(); // in blocks
    let plan = plan_epoch(&lengths, 512, 3, 1, None, 2).unwrap();
    let documents = plan.order.iter().map(|&document| document as usize);
    let hash = documents.chain(plan.offsets).fold(0u64, |hash, number| {
        (hash ^ number as u64).wrapping_mul(0x0100_0000_01B3)
    });
    assert_eq!(hash, 6_488_333_104_244_242_737);
}

#[test]
fn an_epoch_has_every_document_once_and_no_row_too_full() {
    let mut rng = Rng(3);
    for capacity in CAPACITIES {
        for count in [0, 1, 2, 17, 700] {
            let lengths = rng.lengths(count, capacity);
            let plan = plan_epoch(&lengths, capacity, 5, 1, None, 2).unwrap();
            assert_valid(&plan, &lengths, capacity);
            assert_eq!(plan, plan_epoch(&lengths, capacity, 5, 1, None, 2).unwrap());
        }
    }
}

#[test]
fn many_documents_make_the_same_plan_on_any_number_of_threads() {
    let lengths = Rng(7).lengths(150_000, 512); // two blocks
    let plan = plan_epoch(&lengths, 512, 1, 2, None, 1).unwrap();
    assert_valid(&plan, &lengths, 512);
    for threads in 2..=8 {
        assert!(plan == plan_epoch(&lengths, 512, 1, 2, None, threads).unwrap());
    }
}

#[test]
fn every_epoch_has_as_many_rows() {
    let mut rng = Rng(12);
    for _ in 0..100 {
        let capacity = 1 + rng.below(64);
        let count = rng.below(60);
        let lengths = rng.lengths(count, capacity);
        let rows = plan_epoch(&lengths, capacity, 3, 0, None, 1)
            .unwrap()
            .offsets
            .len();
        for epoch in 1..10 {
            let plan = plan_epoch(&lengths, capacity, 3, epoch, None, 1).unwrap();
            assert_valid(&plan, &lengths, capacity);
            assert_eq!(plan.offsets.len(), rows, "epoch {epoch}");
        }
    }
}

#[test]
fn epochs_and_seeds_pack_differently() {
    let lengths = Rng(4).lengths(500, 64);
    let plans: Vec<Plan> = [(0, 0), (0, 1), (1, 0), (1, 1)]
        .iter()
        .map(|&(seed, epoch)| plan_epoch(&lengths, 64, seed, epoch, None, 2).unwrap())
        .collect();
    for (i, a) in plans.iter().enumerate() {
        for b in &plans[..i] {
            let same = rows(a).iter().filter(|row| rows(b).contains(row)).count();
            assert!(same < 50, "{same} rows of {} are the same", a.offsets.len());
        }
    }
}

#[test]
fn rows_of_long_documents_are_not_all_in_front() {
    let lengths = Rng(5).lengths(4000, 256);
    let plan = plan_epoch(&lengths, 256, 0, 0, None, 2).unwrap();
    let counts: Vec<usize> = plan.rows().map(<[u32]>::len).collect();
    let (front, back) = counts.split_at(counts.len() / 2);
    let (front, back): (usize, usize) = (front.iter().sum(), back.iter().sum());
    assert!(front.abs_diff(back) < 400, "{front} and {back} documents");
}

#[test]
fn an_epoch_is_as_full_as_the_targets_ask() {
    for (mean, sigma, least) in [(396.0, 1.0, 0.9995), (1563.0, 0.6, 0.996)] {
        let mut rng = Rng(8);
        let lengths: Vec<i64> = (0..300_000)
            .map(|_| lognormal(&mut rng, mean, sigma, 4096))
            .collect();
        let plan = plan_epoch(&lengths, 4096, 0, 0, None, 2).unwrap();
        let fill = fill(lengths.iter().sum(), plan.offsets.len() - 1, 4096);
        assert!(fill >= least, "mean {mean}: fill {fill}");
    }
}

/// What came of packing a stream window by window.
struct Streamed {
    rows: Vec<Vec<u32>>,
    most_held: usize,
    most_waited: u8,
}

fn stream(lengths: &[i64], window: usize, capacity: usize, seed: u64) -> Streamed {
    let mut held: Vec<(u32, u8)> = Vec::new();
    let mut streamed = Streamed {
        rows: Vec::new(),
        most_held: 0,
        most_waited: 0,
    };
    let mut next = 0;
    for number in 0.. {
        let end = lengths.len().min(next + window);
        held.extend((next..end).map(|document| (document as u32, 0)));
        next = end;
        let last = next == lengths.len();
        streamed.most_held = streamed.most_held.max(held.len());
        let sizes: Vec<i64> = held.iter().map(|&(d, _)| lengths[d as usize]).collect();
        let waited: Vec<u8> = held.iter().map(|&(_, waited)| waited).collect();
        let name = [seed, 0, number];
        let planned = plan_window(&sizes, &waited, capacity, name, last).unwrap();
        for row in planned.plan.rows() {
            streamed
                .rows
                .push(row.iter().map(|&at| held[at as usize].0).collect());
        }
        held = planned
            .carried
            .iter()
            .map(|&at| (held[at as usize].0, held[at as usize].1 + 1))
            .collect();
        let waited = held.iter().map(|&(_, waited)| waited).max();
        streamed.most_waited = streamed.most_waited.max(waited.unwrap_or(0));
        if last {
            assert!(held.is_empty(), "the last window leaves nothing behind");
            return streamed;
        }
    }
    unreachable!("the loop ends with the documents");
}

fn as_plan(rows: &[Vec<u32>]) -> Plan {
    let mut plan = Plan {
        order: Vec::new(),
        offsets: vec![0],
    };
    for row in rows {
        plan.order.extend(row);
        plan.offsets.push(plan.order.len());
    }
    plan
}

#[test]
fn a_stream_has_every_document_once_and_no_row_too_full() {
    let mut rng = Rng(6);
    for capacity in CAPACITIES {
        for (count, window) in [(0, 1), (1, 1), (5, 1), (700, 1), (700, 64), (700, 5000)] {
            let lengths = rng.lengths(count, capacity);
            let streamed = stream(&lengths, window, capacity, 9);
            assert_valid(&as_plan(&streamed.rows), &lengths, capacity);
            assert!(streamed.most_waited <= 8, "{}", streamed.most_waited);
            assert!(streamed.most_held <= 9 * window, "{}", streamed.most_held);
        }
    }
}

#[test]
fn a_stream_is_as_full_as_the_targets_ask_and_holds_little() {
    for (mean, sigma, least) in [(396.0, 1.0, 0.9995), (1563.0, 0.6, 0.996)] {
        let mut rng = Rng(8);
        let lengths: Vec<i64> = (0..300_000)
            .map(|_| lognormal(&mut rng, mean, sigma, 4096))
            .collect();
        let streamed = stream(&lengths, 4096, 4096, 1);
        let fill = fill(lengths.iter().sum(), streamed.rows.len(), 4096);
        assert!(fill >= least, "mean {mean}: fill {fill}");
        assert!(streamed.most_held < 4096 * 3 / 2, "{}", streamed.most_held);
    }
}

#[test]
fn nothing_is_held_for_ever_though_nothing_fits() {
    // No two of these share a row, so every row is as empty as the others.
    let streamed = stream(&[6; 400], 16, 10, 0);
    assert_eq!(streamed.rows.len(), 400);
    assert!(streamed.most_held <= 16 * 2, "{}", streamed.most_held);
}

#[test]
fn a_window_in_between_keeps_back_the_emptiest_quarter() {
    // Rows of 10: full, and 9, 8, 7 tokens; one of four may wait, the one of 7.
    let planned = plan_window(&[10, 9, 8, 7], &[0; 4], 10, [0; 3], false).unwrap();
    assert_eq!(planned.carried, [3]);
    let mut ready = planned.plan.order;
    ready.sort_unstable();
    assert_eq!(ready, [0, 1, 2]);
    // After eight windows it may not.
    let planned = plan_window(&[10, 9, 8, 7], &[0, 0, 0, 8], 10, [0; 3], false).unwrap();
    assert_eq!(planned.carried, [2]);
}

#[test]
fn refusals_are_those_of_packing() {
    assert_eq!(
        plan_epoch(&[1], 0, 0, 0, None, 1),
        Err(PackError::ZeroMaxLength)
    );
    assert_eq!(
        plan_epoch(&[1, 0], 4, 0, 0, None, 1),
        Err(PackError::NotPositive {
            index: 1,
            length: 0
        })
    );
    let error = plan_window(&[1, 2], &[0], 4, [0; 3], true).unwrap_err();
    assert_eq!(
        error.to_string(),
        "waited has 1 entries for 2 documents: pass one for each."
    );
}
