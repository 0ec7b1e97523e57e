//! Seeded plans: one for all documents in each epoch, or one for each window of a stream.
//!
//! Best-fit-decreasing alone fills a row with documents of one length. Where length tells the task, as
//! it does in instruction data, each batch would then be of one task, and training on such batches
//! converges more slowly. So only documents longer than an eighth of a row go first, longest first; the
//! rest follow in random order. Rows of long documents come out first, so the rows are shuffled too.
//!
//! A plan is a pure function of the lengths, `max_length` and the name of its random numbers (seed,
//! epoch, window): any machine, number of threads or ranks makes the same one.

use crate::open_rows::OpenRows;
use crate::packing::{group_by_row, measure, PackError, Plan};
use crate::parallel;
use crate::random::Random;

/// A row with at most this share of its capacity free counts as full.
const FULL_SHARE: usize = 1024;
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
const BLOCK: usize = 1 << 16;

/// Plans all documents for one epoch.
///
/// Many documents are dealt at random into blocks, which are packed by several threads; the emptiest
/// rows of all blocks are taken apart and packed once more, together. The plan does not depend on
/// `threads`.
///
/// Every epoch has as many rows as the first: a trainer counts the steps of an epoch once. A plan with
/// more is made again from other random numbers, in one with fewer rows are split.
///
/// # Errors
/// As [`crate::pack_sequences`].
pub fn plan_epoch(
    lengths: &[i64],
    max_length: usize,
    seed: u64,
    epoch: u64,
    threads: usize,
) -> Result<Plan, PackError> {
    measure(lengths, max_length)?;
    let first = pack_in_blocks(lengths, max_length, [seed, 0, 0], threads);
    let rows = first.offsets.len() - 1;
    let rows = rows + rows / SPARE_SHARE;
    let first = split_rows(first, rows);
    if epoch == 0 {
        return Ok(first);
    }
    for attempt in 0..MOST_ATTEMPTS {
        let plan = pack_in_blocks(lengths, max_length, [seed, epoch, attempt], threads);
        if plan.offsets.len() - 1 <= rows {
            return Ok(split_rows(plan, rows));
        }
    }
    Ok(shuffle_rows(&first, &mut Random::new(&[seed, epoch])))
}

fn pack_in_blocks(lengths: &[i64], max_length: usize, name: [u64; 3], threads: usize) -> Plan {
    let [seed, epoch, attempt] = name;
    let numbers = |block: usize| Random::new(&[seed, epoch, attempt, block as u64]);
    let blocks = deal(lengths.len(), &mut Random::new(&name));
    let share = (blocks.len() > 1).then_some(REPACKED_SHARE);
    let packed = parallel::map(blocks.len(), threads, |block| {
        let random = numbers(block);
        pack(lengths, &blocks[block], max_length, random, share, |_| true)
    });

    let apart: Vec<u32> = packed
        .iter()
        .flat_map(|packed| packed.carried.iter().copied())
        .collect();
    let rest = pack(
        lengths,
        &apart,
        max_length,
        numbers(blocks.len()),
        None,
        |_| true,
    );
    let mut plan = Plan {
        order: Vec::with_capacity(lengths.len()),
        offsets: vec![0],
    };
    for part in packed.into_iter().chain([rest]) {
        let before = plan.order.len();
        plan.order.extend(part.plan.order);
        let ends = &part.plan.offsets[1..];
        plan.offsets.extend(ends.iter().map(|end| before + end));
    }
    plan
}

/// Splits rows of the most documents until there are `rows`, which must not exceed the documents.
fn split_rows(mut plan: Plan, rows: usize) -> Plan {
    while plan.offsets.len() - 1 < rows {
        let sizes = plan.offsets.windows(2).map(|w| w[1] - w[0]);
        let Some((row, size)) = sizes.enumerate().max_by_key(|&(_, size)| size) else {
            break;
        };
        let middle = plan.offsets[row] + size / 2;
        plan.offsets.insert(row + 1, middle);
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

/// Deals all documents into blocks of about [`BLOCK`].
fn deal(count: usize, random: &mut Random) -> Vec<Vec<u32>> {
    let blocks = (count / BLOCK).max(1);
    let mut dealt = vec![Vec::with_capacity(count / blocks + count / blocks / 16); blocks];
    for document in (0u32..).take(count) {
        dealt[random.below(blocks)].push(document);
    }
    dealt
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
    measure(lengths, max_length)?;
    let documents: Vec<u32> = (0u32..).take(lengths.len()).collect();
    let share = (!last).then_some(CARRIED_SHARE);
    let mut packed = pack(
        lengths,
        &documents,
        max_length,
        Random::new(&name),
        share,
        |document| waited[document as usize] < MOST_WAITED,
    );
    packed.carried.sort_unstable();
    Ok(packed)
}

/// Packs some of the documents into shuffled rows, and takes the emptiest ones apart again: at most one
/// in `share`, and only where all documents may wait.
fn pack(
    lengths: &[i64],
    documents: &[u32],
    max_length: usize,
    mut random: Random,
    share: Option<usize>,
    may_wait: impl Fn(u32) -> bool,
) -> WindowPlan {
    // Each with its length, since looking that up again would cost a cache miss a document.
    let mut documents: Vec<(u32, usize)> = documents
        .iter()
        .map(|&document| (document, lengths[document as usize] as usize))
        .collect();
    random.shuffle(&mut documents);
    let documents = mixed_order(&documents, max_length / 8);
    // Rows longer than all the data together would only cost memory.
    let total = documents
        .iter()
        .fold(0usize, |total, &(_, length)| total.saturating_add(length));
    let capacity = max_length.min(total);
    let mut open = OpenRows::new(capacity);
    let row_of: Vec<u32> = documents
        .iter()
        .map(|&(_, length)| open.place(length))
        .collect();

    let rows = open.count();
    let mut free = vec![capacity; rows];
    let mut waits = vec![share.is_some(); rows];
    for (&(document, length), &row) in documents.iter().zip(&row_of) {
        free[row as usize] -= length;
        waits[row as usize] &= may_wait(document);
    }
    let mut emptiest: Vec<usize> = (0..rows)
        .filter(|&row| waits[row] && free[row] > max_length / FULL_SHARE)
        .collect();
    emptiest.sort_by_key(|&row| std::cmp::Reverse(free[row]));
    emptiest.truncate(share.map_or(0, |share| rows.div_ceil(share)));
    waits.fill(false);
    for row in emptiest {
        waits[row] = true;
    }

    let mut ready: Vec<usize> = (0..rows).filter(|&row| !waits[row]).collect();
    random.shuffle(&mut ready);
    let mut position = vec![None; rows];
    for (place, &row) in ready.iter().enumerate() {
        position[row] = Some(place);
    }
    let order: Vec<u32> = documents.iter().map(|&(document, _)| document).collect();
    WindowPlan {
        plan: group_by_row(&order, &row_of, |row| position[row as usize], ready.len()),
        carried: order
            .iter()
            .zip(&row_of)
            .filter(|&(_, &row)| waits[row as usize])
            .map(|(&document, _)| document)
            .collect(),
    }
}

/// Documents above `short` tokens by decreasing length, then the others as they come.
fn mixed_order(shuffled: &[(u32, usize)], short: usize) -> Vec<(u32, usize)> {
    // A stable counting sort, in which all short documents are of one class.
    let longest = shuffled.iter().map(|&(_, length)| length).max();
    let classes = longest.unwrap_or(0).saturating_sub(short);
    let class = |length: usize| (classes + short).saturating_sub(length).min(classes);
    let mut next = vec![0usize; classes + 2];
    for &(_, length) in shuffled {
        next[class(length) + 1] += 1;
    }
    for class in 0..=classes {
        next[class + 1] += next[class];
    }
    let mut order = vec![(0, 0); shuffled.len()];
    for &document in shuffled {
        let slot = &mut next[class(document.1)];
        order[*slot] = document;
        *slot += 1;
    }
    order
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
