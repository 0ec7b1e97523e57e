//! Seeded plans: one for all documents in each epoch, or one for each window of a stream.
//!
//! Best-fit-decreasing alone fills a row with documents of one length. Where length tells the task, as
//! it does in instruction data, each batch would then be of one task, and training on such batches
//! converges more slowly. So only documents longer than an eighth of a row go first, longest first; the
//! rest follow in random order. Rows of long documents come out first, so the rows are shuffled too.
//!
//! A plan is a pure function of the lengths, `max_length` and the name of its random numbers (seed,
//! epoch, window): any machine, number of threads or ranks makes the same one.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Mutex, PoisonError};

use crate::deal::Deal;
use crate::fill::{Filled, Filler};
use crate::packing::{check_lengths, check_size, PackError, Plan};
use crate::parallel::map_with;
use crate::random::Random;

/// Of the rows of a window at most this share waits for the next one.
const CARRIED_SHARE: usize = 4;
/// Of the rows of a block of an epoch at most this share is packed again with those of other blocks.
const REPACKED_SHARE: usize = 16;
/// A document waits for at most this many windows.
const MOST_WAITED: u8 = 8;
/// One of so many rows is spare, so that the plans of other epochs rarely have more rows than the first.
const SPARE_SHARE: usize = 1 << 14;
/// Plans tried for an epoch before the rows of the first epoch are used again.
const MOST_ATTEMPTS: u64 = 8;
/// Documents in a block of an epoch: few enough for a core's cache, enough to fill rows as well as all
/// documents together would.
const BLOCK: usize = 3 << 14;
/// Lengths that a thread checks at once.
const CHECKED: usize = 1 << 16;

/// Plans all documents for one epoch.
///
/// Many documents are dealt at random into blocks, which are packed by several threads; the emptiest
/// rows of several blocks are taken apart and packed once more, together. The plan does not depend on
/// `threads`.
///
/// Every epoch has as many rows as the first: a trainer counts the steps of an epoch once. A plan with
/// more is made again from other random numbers, in one with fewer rows are split.
///
/// # Arguments
/// - `rows`: how many the plan of epoch 0 has, if that is known; else it is made, to count them.
///
/// # Errors
/// As [`crate::pack_sequences`].
pub fn plan_epoch(
    lengths: &[i64],
    max_length: usize,
    seed: u64,
    epoch: u64,
    rows: Option<usize>,
    threads: usize,
) -> Result<Plan, PackError> {
    let longest = check_size(lengths.len(), max_length)?;
    let mut fillers: Vec<[Filler; 2]> = Vec::new();
    fillers.resize_with(threads.max(1), Default::default);
    // Each block looks for its documents among all: the fewer bytes the lengths take the better.
    let plan = if longest <= i64::from(u16::MAX) {
        convert::<u16>(lengths, longest, threads)
            .map(|lengths| plan_epoch_of(&lengths, max_length, [seed, epoch], rows, &mut fillers))
    } else {
        convert::<u32>(lengths, longest, threads)
            .map(|lengths| plan_epoch_of(&lengths, max_length, [seed, epoch], rows, &mut fillers))
    };
    match plan {
        Some(plan) => Ok(plan),
        None => Err(check_lengths(lengths, max_length).expect_err("a length was refused")),
    }
}

/// The lengths in fewer bytes; None if one is not in `1..=longest`.
fn convert<L: Copy + Default + Send + TryFrom<i64>>(
    lengths: &[i64],
    longest: i64,
    threads: usize,
) -> Option<Vec<L>> {
    let mut converted = vec![L::default(); lengths.len()];
    let parts = lengths.chunks(CHECKED).zip(converted.chunks_mut(CHECKED));
    let parts: Vec<_> = parts.map(Mutex::new).collect();
    let mut workers = vec![(); threads.max(1)];
    let valid = map_with(&mut workers, parts.len(), |(), part| {
        let mut part = parts[part].lock().unwrap_or_else(PoisonError::into_inner);
        let (lengths, converted) = &mut *part;
        let mut valid = true;
        for (&length, converted) in lengths.iter().zip(converted.iter_mut()) {
            valid &= (1..=longest).contains(&length);
            *converted = L::try_from(length).unwrap_or_default();
        }
        valid
    });
    drop(parts);
    valid.into_iter().all(|valid| valid).then_some(converted)
}

fn plan_epoch_of<L: Copy + Into<u32> + Sync>(
    lengths: &[L],
    max_length: usize,
    [seed, epoch]: [u64; 2],
    rows: Option<usize>,
    fillers: &mut [[Filler; 2]],
) -> Plan {
    let mut pack = |epoch, attempt| {
        let name = [seed, epoch, attempt];
        pack_in_blocks(lengths, max_length, name, fillers)
    };
    let with_spare_rows = |plan: Plan| {
        let rows = plan.offsets.len() - 1;
        split_rows(plan, rows + rows / SPARE_SHARE)
    };
    if epoch == 0 {
        return with_spare_rows(pack(0, 0));
    }
    let rows = match rows {
        Some(rows) => rows,
        None => with_spare_rows(pack(0, 0)).offsets.len() - 1,
    };
    for attempt in 0..MOST_ATTEMPTS {
        let plan = pack(epoch, attempt);
        if plan.offsets.len() - 1 <= rows {
            return split_rows(plan, rows);
        }
    }
    let plan = with_spare_rows(pack(0, 0));
    shuffle_rows(&plan, &mut Random::new(&[seed, epoch]))
}

/// Plans all documents, whose lengths are valid.
fn pack_in_blocks<L: Copy + Into<u32> + Sync>(
    lengths: &[L],
    max_length: usize,
    name: [u64; 3],
    fillers: &mut [[Filler; 2]],
) -> Plan {
    let [seed, epoch, attempt] = name;
    let numbers = |part: usize| Random::new(&[seed, epoch, attempt, part as u64]);
    let blocks = match lengths.len() / BLOCK {
        0 | 1 => {
            let documents = (0..).zip(lengths.iter().map(|&length| length.into()));
            let random = Random::new(&name);
            return pack(documents, lengths.len(), max_length, random, None, None).plan;
        }
        blocks @ 2..8 => blocks,
        // Pairs of them for each of two threads.
        blocks => blocks / 4 * 4,
    };
    let deal = Deal::new(lengths.len(), blocks as u32, &mut Random::new(&name));
    // Each block is packed in a part of the list that is long enough; then the rows move together.
    let room = deal.hands();
    let mut order = vec![0; blocks * room];
    let filled = fill_parts(
        order.chunks_mut(room),
        fillers,
        Some(REPACKED_SHARE),
        |filler, block| {
            filler.take(deal.block(lengths, block as u32), room, max_length);
            numbers(block)
        },
    );

    let groups = blocks.div_ceil(REPACKED_SHARE);
    let together = blocks.div_ceil(groups); // as many each, that all threads have as much to do
    let mut apart: Vec<Vec<u32>> = vec![Vec::new(); groups];
    let mut end = 0;
    for (block, filled) in filled.iter().enumerate() {
        let from = block * room;
        let (ready, all) = (from + filled.ready(), from + filled.documents);
        apart[block / together].extend(&order[ready..all]);
        order.copy_within(from..ready, end);
        end += filled.ready();
    }
    order.truncate(lengths.len());
    let mut rest = &mut order[end..];
    let parts = apart.iter().map(|apart| {
        let (part, after) = std::mem::take(&mut rest).split_at_mut(apart.len());
        rest = after;
        part
    });
    let refilled = fill_parts(parts, fillers, None, |filler, group| {
        let apart = &apart[group];
        let documents = apart
            .iter()
            .map(|&index| (index, lengths[index as usize].into()));
        filler.take(documents, apart.len(), max_length);
        numbers(blocks + group)
    });

    let rows = || filled.iter().chain(&refilled).map(|filled| &filled.ends);
    let mut offsets = Vec::with_capacity(1 + rows().map(Vec::len).sum::<usize>());
    offsets.push(0);
    let mut begin = 0;
    for ends in rows() {
        offsets.extend(ends.iter().map(|&end| begin + end as usize));
        begin += ends.last().map_or(0, |&end| end as usize);
    }
    Plan { order, offsets }
}

/// Packs documents, at most `most` of an index and a length each, all together.
fn pack(
    documents: impl Iterator<Item = (u32, u32)>,
    most: usize,
    max_length: usize,
    mut random: Random,
    share: Option<usize>,
    may_wait: Option<&dyn Fn(u32) -> bool>,
) -> WindowPlan {
    let mut filler = Filler::default();
    filler.take(documents, most, max_length);
    filler.shuffle_long(&mut random);
    filler.fill(random, share, may_wait)
}

/// Packs parts of the documents, each in its part of a list, with the documents and the random numbers
/// that `take` gives it.
fn fill_parts<'a>(
    parts: impl Iterator<Item = &'a mut [u32]>,
    fillers: &mut [[Filler; 2]],
    share: Option<usize>,
    take: impl Fn(&mut Filler, usize) -> Random + Sync,
) -> Vec<Filled> {
    let mut parts: Vec<&mut [u32]> = parts.collect();
    // By two, unless a thread would have nothing to do then.
    let together = if parts.len() < 2 * fillers.len() {
        1
    } else {
        2
    };
    let tasks: Vec<_> = parts.chunks_mut(together).map(Mutex::new).collect();
    let filled = map_with(fillers, tasks.len(), |fillers, task| {
        let mut orders = tasks[task].lock().unwrap_or_else(PoisonError::into_inner);
        let first = task * together;
        if let [a, b] = &mut **orders {
            let random = [0, 1].map(|at| take(&mut fillers[at], first + at));
            return Filler::fill_both(fillers, random, share, [a, b]).into();
        }
        let one_by_one = (first..).zip(orders.iter_mut()).map(|(part, order)| {
            let random = take(&mut fillers[0], part);
            fillers[0].fill_into(random, share, None, order)
        });
        one_by_one.collect::<Vec<Filled>>()
    });
    filled.into_iter().flatten().collect()
}

/// Splits rows of the most documents until there are `rows`, which must not exceed the documents.
fn split_rows(mut plan: Plan, rows: usize) -> Plan {
    let missing = (rows + 1).saturating_sub(plan.offsets.len());
    if missing == 0 {
        return plan;
    }
    // Only the largest rows can be among those to split, no more of them than are missing.
    let mut largest = BinaryHeap::with_capacity(missing + 1);
    let mut least = 0;
    for (&begin, &end) in plan.offsets.iter().zip(&plan.offsets[1..]) {
        if end - begin > least {
            largest.push(Reverse((end - begin, begin)));
            if largest.len() > missing {
                largest.pop();
                least = largest.peek().map_or(0, |Reverse((size, _))| *size);
            }
        }
    }
    let mut largest: BinaryHeap<(usize, usize)> =
        largest.into_iter().map(|Reverse(row)| row).collect();

    let mut middles = Vec::with_capacity(missing);
    while middles.len() < missing {
        let Some((size, begin)) = largest.pop().filter(|&(size, _)| size > 1) else {
            break;
        };
        let middle = begin + size / 2;
        middles.push(middle);
        largest.push((middle - begin, begin));
        largest.push((begin + size - middle, middle));
    }
    // Merged from behind, where there is room.
    middles.sort_unstable();
    let mut from = plan.offsets.len();
    plan.offsets.resize(from + middles.len(), 0);
    let mut to = plan.offsets.len();
    while let Some(&middle) = middles.last() {
        to -= 1;
        if plan.offsets[from - 1] > middle {
            from -= 1;
            plan.offsets[to] = plan.offsets[from];
        } else {
            plan.offsets[to] = middle;
            middles.pop();
        }
    }
    plan
}

fn shuffle_rows(plan: &Plan, random: &mut Random) -> Plan {
    let mut rows: Vec<&[u32]> = plan.rows().collect();
    random.shuffle(&mut rows);
    let mut shuffled = Plan {
        order: Vec::with_capacity(plan.order.len()),
        offsets: vec![0],
    };
    for row in rows {
        shuffled.order.extend(row);
        shuffled.offsets.push(shuffled.order.len());
    }
    shuffled
}

/// The rows of one window of a stream, and what waits for the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WindowPlan {
    /// Rows that are ready.
    pub plan: Plan,
    /// Documents that wait, in the order they came.
    pub carried: Vec<u32>,
}

/// Plans the documents of one window of a stream.
///
/// The emptiest rows, at most a quarter, are taken apart again, and their documents wait for the next
/// window, which has better company for them. No document waits more than eight times, so none is
/// held for ever, and memory is bounded whatever the lengths.
///
/// # Arguments
/// - `waited`: for how many windows each document has waited already.
/// - `name`: (seed, epoch, window), which name the random numbers.
/// - `last`: no window follows, so nothing may wait.
///
/// # Errors
/// As [`crate::pack_sequences`], or when `waited` has not one entry for each document.
pub fn plan_window(
    lengths: &[i64],
    waited: &[u8],
    max_length: usize,
    name: [u64; 3],
    last: bool,
) -> Result<WindowPlan, PackError> {
    if waited.len() != lengths.len() {
        return Err(PackError::WaitedMismatch {
            waited: waited.len(),
            documents: lengths.len(),
        });
    }
    check_lengths(lengths, max_length)?;
    // Cannot truncate: `check_lengths`.
    let documents = (0..).zip(lengths.iter().map(|&length| length as u32));
    let share = (!last).then_some(CARRIED_SHARE);
    let may_wait = |document: u32| waited[document as usize] < MOST_WAITED;
    let random = Random::new(&name);
    let (most, may_wait) = (lengths.len(), Some(&may_wait as &dyn Fn(u32) -> bool));
    let mut packed = pack(documents, most, max_length, random, share, may_wait);
    packed.carried.sort_unstable();
    Ok(packed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_split_where_documents_are_most() {
        let plan = Plan {
            order: vec![5, 1, 0, 2, 3, 4],
            offsets: vec![0, 1, 6],
        };
        let split = split_rows(plan.clone(), 4);
        assert_eq!(split.order, plan.order);
        let rows: Vec<&[u32]> = split.rows().collect();
        assert_eq!(rows, [&[5][..], &[1, 0], &[2], &[3, 4]]);
        assert_eq!(split_rows(plan.clone(), 2), plan);
    }

    #[test]
    fn shuffled_rows_are_the_same_rows() {
        let plan = Plan {
            order: (0..60).collect(),
            offsets: (0..=20).map(|row| 3 * row).collect(),
        };
        let shuffled = shuffle_rows(&plan, &mut Random::new(&[1]));
        assert_ne!(shuffled, plan);
        let mut rows: Vec<&[u32]> = shuffled.rows().collect();
        rows.sort_unstable();
        assert_eq!(rows, plan.rows().collect::<Vec<_>>());
    }
}
