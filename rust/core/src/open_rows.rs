//! Rows that are being filled, and the search for the fullest one with room.
//!
//! Lengths are bounded integers, so nothing needs comparing: open rows sit in one bucket per amount of
//! free space, with a bitset over the non-empty buckets. "Fullest row with room for n tokens" is then
//! "first set bit at or after n": a few instructions per document, however many rows are open.
//!
//! Which bucket a row comes from and goes to is as good as random, and a branch on it would be guessed
//! wrong as often as right, at the price of all the rest. So there are none, and a new row comes from a
//! bucket as every other does: from the last one, which holds all that have not been opened.

use std::hint::select_unpredictable;

use crate::fill::Document;

const NO_ROW: u32 = u32::MAX;
/// Values that a summary of one word covers.
const SMALL: usize = 64 * 64;

/// A row that is being filled.
#[derive(Clone, Copy, Default)]
struct Row {
    /// The row under it in its bucket.
    below: u32,
    /// How many documents it has.
    size: u32,
}

/// Rows that can still take a document, bucketed by free space.
#[derive(Default)]
pub(crate) struct OpenRows {
    /// The bucket of full rows, which no search finds; each one after it has a token more free.
    full: usize,
    /// Last row put into each bucket; a bucket is a linked stack through `below`. In the last one are those that
    /// have not been opened.
    top: Vec<u32>,
    rows: Vec<Row>,
    /// Which buckets have rows: a bit each.
    words: Vec<u64>,
}

impl OpenRows {
    /// Puts documents of 1 to `capacity` tokens into rows, one after the other, each into the fullest
    /// that takes it; `row_of` gets the row of each.
    pub(crate) fn fill(
        &mut self,
        capacity: u32,
        lengths: impl ExactSizeIterator<Item = u32>,
        row_of: &mut [u32],
    ) {
        self.reset(capacity, lengths.len());
        if capacity as usize <= SMALL {
            self.place_all(0u64, lengths, row_of);
        } else {
            let mut summary = vec![0u64; self.top.len().div_ceil(SMALL)];
            Summary::insert(&mut summary, self.words.len() - 1);
            self.place_all(summary, lengths, row_of);
        }
    }

    fn place_all<S: Summary>(
        &mut self,
        summary: S,
        lengths: impl Iterator<Item = u32>,
        row_of: &mut [u32],
    ) {
        let mut placer = Placer::new(self, summary);
        for (length, row) in lengths.zip(row_of) {
            *row = placer.place::<true>(length);
        }
    }

    /// `fill` of two, in less time than one after the other: every placement needs the one before, and
    /// a core that waits for one of them does the other.
    pub(crate) fn fill_both(
        both: [&mut Self; 2],
        capacities: [u32; 2],
        documents: [&[Document]; 2],
        row_of: [&mut [u32]; 2],
    ) {
        let [a, b] = both;
        let [rows_a, rows_b] = row_of;
        if capacities.iter().any(|&capacity| capacity as usize > SMALL) {
            a.fill(capacities[0], lengths(documents[0]), rows_a);
            b.fill(capacities[1], lengths(documents[1]), rows_b);
            return;
        }
        a.reset(capacities[0], documents[0].len());
        b.reset(capacities[1], documents[1].len());
        let (mut placer_a, mut placer_b) = (Placer::new(a, 0u64), Placer::new(b, 0u64));
        let common = documents[0].len().min(documents[1].len());
        let (first_a, rest_a) = documents[0].split_at(common);
        let (first_b, rest_b) = documents[1].split_at(common);
        let (rows_a, more_a) = rows_a.split_at_mut(common);
        let (rows_b, more_b) = rows_b.split_at_mut(common);
        let pairs = first_a.iter().zip(first_b).zip(rows_a).zip(rows_b);
        for (((document_a, document_b), row_a), row_b) in pairs {
            *row_a = placer_a.place::<false>(document_a.length());
            *row_b = placer_b.place::<false>(document_b.length());
        }
        for (document, row) in rest_a.iter().zip(more_a) {
            *row = placer_a.place::<false>(document.length());
        }
        for (document, row) in rest_b.iter().zip(more_b) {
            *row = placer_b.place::<false>(document.length());
        }
    }

    fn reset(&mut self, capacity: u32, documents: usize) {
        let capacity = capacity as usize;
        let unopened = capacity.max(SMALL); // then it is the first one after a summary of one word
        self.full = unopened - capacity;
        self.top.clear();
        self.top.resize(unopened, NO_ROW);
        self.top.push(0);
        self.rows.clear();
        let unopened_rows = (1..=documents as u32).map(|below| Row { below, size: 0 });
        self.rows.extend(unopened_rows);
        self.words.clear();
        self.words.resize(unopened / 64, 0);
        self.words.resize(unopened / 64 + 1, 1 << (unopened % 64));
    }

    pub(crate) fn count(&self) -> usize {
        self.top.last().map_or(0, |&unopened| unopened as usize)
    }

    /// How many documents a row has.
    pub(crate) fn size(&self, row: u32) -> u32 {
        self.rows[row as usize].size
    }

    /// Rows that are not full with the tokens each could still take, emptiest first.
    pub(crate) fn by_free_space(&self) -> impl Iterator<Item = (u32, usize)> + '_ {
        let open = self.full + 1..self.top.len().saturating_sub(1);
        open.rev().flat_map(|bucket| {
            let (top, free) = (self.top[bucket], bucket - self.full);
            let below =
                |&row: &u32| Some(self.rows[row as usize].below).filter(|&row| row != NO_ROW);
            let rows = std::iter::successors(Some(top).filter(|&row| row != NO_ROW), below);
            rows.map(move |row| (row, free))
        })
    }
}

pub(crate) fn lengths(documents: &[Document]) -> impl ExactSizeIterator<Item = u32> + '_ {
    documents.iter().map(|document| document.length())
}

/// Open rows while documents are placed, with what changes all the time at hand.
struct Placer<'a, S> {
    full: usize,
    top: &'a mut [u32],
    rows: &'a mut [Row],
    words: &'a mut [u64],
    summary: S,
}

impl<'a, S: Summary> Placer<'a, S> {
    fn new(open: &'a mut OpenRows, summary: S) -> Self {
        Self {
            full: open.full,
            top: &mut open.top,
            rows: &mut open.rows,
            words: &mut open.words,
            summary,
        }
    }

    /// Places a document. Whether `FORESEEABLE` or not decides on branches only.
    #[inline(always)]
    fn place<const FORESEEABLE: bool>(&mut self, length: u32) -> u32 {
        let length = length as usize;
        let bucket = if FORESEEABLE {
            self.first_from(self.full + length)
        } else {
            self.first_of_any(self.full + length)
        };
        let (row, size) = self.pop(bucket);
        self.push(row, bucket - length, size + 1);
        row
    }

    /// The first bucket from this one on that has a row; the last one always does.
    #[inline(always)]
    fn first_from(&self, bucket: usize) -> usize {
        let word = bucket / 64;
        let here = self.words[word] & (!0 << (bucket % 64));
        if here != 0 {
            return word * 64 + here.trailing_zeros() as usize;
        }
        let after = self.summary.first_after(word);
        after * 64 + self.words[after].trailing_zeros() as usize
    }

    /// `first_from` without branches on what it finds.
    #[inline(always)]
    fn first_of_any(&self, bucket: usize) -> usize {
        let word = bucket / 64;
        let here = self.words[word] & (!0 << (bucket % 64));
        // Both are looked at, whichever is needed.
        let after = self.summary.first_after(word);
        let there = self.words[after];
        let word = select_unpredictable(here != 0, word, after);
        let bits = select_unpredictable(here != 0, here, there);
        word * 64 + bits.trailing_zeros() as usize
    }

    /// Takes a row out of a bucket; it and how many documents it has.
    #[inline(always)]
    fn pop(&mut self, bucket: usize) -> (u32, u32) {
        let row = self.top[bucket];
        let Row { below, size } = self.rows[row as usize];
        self.top[bucket] = below;
        let word = bucket / 64;
        let left = self.words[word] & !(u64::from(below == NO_ROW) << (bucket % 64));
        self.words[word] = left;
        self.summary.remove_if(word, left == 0);
        (row, size)
    }

    #[inline(always)]
    fn push(&mut self, row: u32, bucket: usize, size: u32) {
        let below = std::mem::replace(&mut self.top[bucket], row);
        self.rows[row as usize] = Row { below, size };
        let word = bucket / 64;
        self.words[word] |= 1 << (bucket % 64);
        self.summary.insert(word);
    }
}

/// A set of the words that have bits.
trait Summary {
    /// The first member after `word`.
    fn first_after(&self, word: usize) -> usize;
    fn insert(&mut self, word: usize);
    fn remove_if(&mut self, word: usize, remove: bool);
}

/// Of the first 64 words, for rows of the usual lengths: it stays in a register. Word 64 is in it unsaid.
impl Summary for u64 {
    #[inline(always)]
    fn first_after(&self, word: usize) -> usize {
        // After word 64 there is none to look for, and any answer does.
        (self & (!1u64).wrapping_shl(word as u32)).trailing_zeros() as usize
    }

    #[inline(always)]
    fn insert(&mut self, word: usize) {
        *self |= 1 << (word % 64);
    }

    #[inline(always)]
    fn remove_if(&mut self, word: usize, remove: bool) {
        *self &= !(u64::from(remove) << (word % 64));
    }
}

/// Of any number: at most 32 of these for rows of 131,072 tokens.
impl Summary for Vec<u64> {
    #[inline]
    fn first_after(&self, word: usize) -> usize {
        let mut mask = !1 << (word % 64);
        for (at, words) in self.iter().enumerate().skip(word / 64) {
            let words = words & mask;
            if words != 0 {
                return at * 64 + words.trailing_zeros() as usize;
            }
            mask = !0;
        }
        0
    }

    #[inline]
    fn insert(&mut self, word: usize) {
        self[word / 64].insert(word);
    }

    #[inline]
    fn remove_if(&mut self, word: usize, remove: bool) {
        self[word / 64].remove_if(word, remove);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Agrees with a look at every row for every document.
    fn check(capacity: u32, documents: &[Document], row_of: &[u32], open: &OpenRows) {
        let mut rows: Vec<(u32, usize)> = Vec::new(); // (free, when filled)
        for (now, (document, &row)) in documents.iter().zip(row_of).enumerate() {
            let length = document.length();
            let fits = rows
                .iter()
                .enumerate()
                .filter(|(_, (free, _))| *free >= length);
            let best = fits.min_by_key(|(_, &(free, at))| (free, usize::MAX - at));
            let best = best.map_or(rows.len(), |(row, _)| row);
            if best == rows.len() {
                rows.push((capacity, 0));
            }
            assert_eq!(row as usize, best, "capacity {capacity}, document {now}");
            rows[best] = (rows[best].0 - length, now);
        }
        let mut left: Vec<(u32, usize, u32)> = (0u32..)
            .zip(&rows)
            .filter(|(_, (free, _))| *free > 0)
            .map(|(row, &(free, at))| (free, at, row))
            .collect();
        left.sort_unstable();
        let left = left
            .into_iter()
            .rev()
            .map(|(free, _, row)| (row, free as usize));
        assert!(open.by_free_space().eq(left));
        let mut sizes = vec![0; rows.len()];
        row_of.iter().for_each(|&row| sizes[row as usize] += 1);
        assert!((0..open.count() as u32).map(|row| open.size(row)).eq(sizes));
    }

    #[test]
    fn documents_go_where_a_search_of_all_rows_puts_them() {
        let mut state = 1u64;
        let mut below = |bound: u32| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) as u32 % bound
        };
        let mut open = [OpenRows::default(), OpenRows::default()];
        // 4095..4097 and 64 * 64 * 2 straddle the ends of a word and of a summary word.
        for capacity in [1, 2, 63, 64, 65, 4095, 4096, 4097, 8192, 20_000] {
            let sizes = [300, 0, 257];
            let lengths = sizes.map(|count| {
                let longest = 1 + below(capacity);
                let lengths = (0..count).map(|_| 1 + below(longest));
                (0..).zip(lengths).map(Document::from).collect::<Vec<_>>()
            });
            let mut rows = sizes.map(|count| vec![0; count]);
            for (lengths, rows) in lengths.iter().zip(&mut rows) {
                open[0].fill(capacity, super::lengths(lengths), rows);
                check(capacity, lengths, rows, &open[0]);
            }
            let [mut first, _, mut last] = rows.map(|rows| vec![0; rows.len()]);
            let lengths = [lengths[2].as_slice(), &lengths[0]];
            let [a, b] = &mut open;
            OpenRows::fill_both([a, b], [capacity; 2], lengths, [&mut last, &mut first]);
            check(capacity, lengths[0], &last, a);
            check(capacity, lengths[1], &first, b);
        }
    }
}
