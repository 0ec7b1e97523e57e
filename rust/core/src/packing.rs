//! Best-fit bin packing of documents into rows.
//!
//! Documents are taken longest first (best-fit decreasing) or in an order of the caller's, and each
//! goes to the fullest row that still has room for it.
//! Lengths are bounded integers, so nothing needs comparing: documents are ordered by a counting
//! sort, and open rows sit in one bucket per amount of free space, with a bitset over the non-empty
//! buckets. "Fullest row with room for n tokens" is then "first set bit at or after n": a few
//! instructions per document, however many rows are open.
//!
//! The plan is a pure function of its arguments. Documents of equal length go by lowest index; of
//! rows with equal free space, the one filled last is taken.

use std::fmt;

/// Which documents make up which row, in compressed sparse row form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Document indices, row after row.
    pub order: Vec<u32>,
    /// Row `r` is `order[offsets[r]..offsets[r + 1]]`; one entry more than there are rows.
    pub offsets: Vec<usize>,
}

impl Plan {
    /// The document indices of each row.
    pub fn rows(&self) -> impl Iterator<Item = &[u32]> {
        self.offsets.windows(2).map(|w| &self.order[w[0]..w[1]])
    }
}

/// Why a list of lengths cannot be packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PackError {
    /// `max_length` is zero.
    ZeroMaxLength,
    /// A document has no tokens, or fewer than none.
    NotPositive {
        /// Position in `lengths`.
        index: usize,
        /// Its value.
        length: i64,
    },
    /// A document is longer than a row.
    TooLong {
        /// Position in `lengths`.
        index: usize,
        /// Its value.
        length: i64,
        /// Tokens in a row.
        max_length: usize,
    },
    /// The order does not name each document once.
    NotAPermutation,
    /// More documents than a 32-bit index can name.
    TooManyDocuments {
        /// How many there are.
        count: usize,
    },
}

impl fmt::Display for PackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ZeroMaxLength => {
                write!(f, "max_length is 0: a row must hold at least one token.")
            }
            Self::NotPositive { index, length } => write!(
                f,
                "lengths[{index}] is {length}: remove documents without tokens before packing."
            ),
            Self::TooLong {
                index,
                length,
                max_length,
            } => write!(
                f,
                "lengths[{index}] is {length}, more than max_length={max_length}: \
                 split or truncate that document, or raise max_length."
            ),
            Self::NotAPermutation => {
                write!(f, "order must name each document of lengths exactly once.")
            }
            Self::TooManyDocuments { count } => write!(
                f,
                "lengths has {count} entries, more than {}: pack the data set in parts.",
                u32::MAX
            ),
        }
    }
}

impl std::error::Error for PackError {}

/// Packs documents of the given lengths into rows of at most `max_length` tokens.
///
/// # Errors
/// When `max_length` is zero, a length is not in `1..=max_length`, or there are more than
/// `u32::MAX` documents.
pub fn pack_sequences(lengths: &[i64], max_length: usize) -> Result<Plan, PackError> {
    let Extent { longest, total } = measure(lengths, max_length)?;
    if lengths.is_empty() {
        return Ok(Plan {
            order: Vec::new(),
            offsets: vec![0],
        });
    }

    let sorted = sort_by_length(lengths, longest);
    // Rows longer than all the data together would only cost memory.
    let capacity = max_length.min(total);
    let mut open = OpenRows::new(capacity);
    let mut row_of: Vec<u32> = Vec::with_capacity(sorted.documents.len()); // in `sorted` order
    for length in (1..=longest).rev() {
        for _ in sorted.bucket(length) {
            row_of.push(open.place(length));
        }
    }
    Ok(group_by_row(&sorted.documents, &row_of, open.count()))
}

/// Packs as [`pack_sequences`] does, but takes the documents in the given order, which keeps what
/// shares a row as mixed as the order is.
///
/// # Errors
/// As for [`pack_sequences`], or when `order` is no permutation of the documents.
pub fn pack_in_order(lengths: &[i64], order: &[u32], max_length: usize) -> Result<Plan, PackError> {
    let Extent { total, .. } = measure(lengths, max_length)?;
    let mut seen = vec![false; lengths.len()];
    for &document in order {
        match seen.get_mut(document as usize) {
            Some(slot) if !*slot => *slot = true,
            _ => return Err(PackError::NotAPermutation),
        }
    }
    if order.len() != lengths.len() {
        return Err(PackError::NotAPermutation);
    }
    let mut open = OpenRows::new(max_length.min(total));
    let row_of: Vec<u32> = order
        .iter()
        .map(|&document| open.place(lengths[document as usize] as usize))
        .collect();
    Ok(group_by_row(order, &row_of, open.count()))
}

struct Extent {
    longest: usize,
    total: usize,
}

fn measure(lengths: &[i64], max_length: usize) -> Result<Extent, PackError> {
    if max_length == 0 {
        return Err(PackError::ZeroMaxLength);
    }
    // Leaves u32::MAX itself free, so that it can mean "no row".
    if lengths.len() >= u32::MAX as usize {
        return Err(PackError::TooManyDocuments {
            count: lengths.len(),
        });
    }
    let mut extent = Extent {
        longest: 0,
        total: 0,
    };
    for (index, &length) in lengths.iter().enumerate() {
        if length <= 0 {
            return Err(PackError::NotPositive { index, length });
        }
        match usize::try_from(length) {
            Ok(tokens) if tokens <= max_length => {
                extent.longest = extent.longest.max(tokens);
                extent.total = extent.total.saturating_add(tokens);
            }
            _ => {
                return Err(PackError::TooLong {
                    index,
                    length,
                    max_length,
                })
            }
        }
    }
    Ok(extent)
}

/// Documents by decreasing length, equal lengths by increasing index.
struct Sorted {
    documents: Vec<u32>,
    /// Documents longer than `length` come before position `longer[length]`.
    longer: Vec<u32>,
}

impl Sorted {
    fn bucket(&self, length: usize) -> std::ops::Range<u32> {
        self.longer[length]..self.longer[length - 1]
    }
}

fn sort_by_length(lengths: &[i64], longest: usize) -> Sorted {
    let mut longer = vec![0u32; longest + 1];
    for &length in lengths {
        longer[length as usize - 1] += 1;
    }
    for length in (0..longest).rev() {
        longer[length] += longer[length + 1];
    }
    let mut next = longer.clone();
    let mut documents = vec![0u32; lengths.len()];
    for (index, &length) in (0u32..).zip(lengths) {
        let slot = &mut next[length as usize];
        documents[*slot as usize] = index;
        *slot += 1;
    }
    Sorted { documents, longer }
}

/// Rows that can still take a document, bucketed by free space.
struct OpenRows {
    capacity: usize,
    /// Last row put into each bucket; a bucket is a linked stack through `below`.
    top: Vec<u32>,
    /// Per row ever opened: the row under it in its bucket.
    below: Vec<u32>,
    occupied: FreeSpaces,
}

const NO_ROW: u32 = u32::MAX;

impl OpenRows {
    fn new(capacity: usize) -> Self {
        Self {
            capacity,
            top: vec![NO_ROW; capacity + 1],
            below: Vec::new(),
            occupied: FreeSpaces::new(capacity),
        }
    }

    /// Puts a document of `length` tokens into the fullest row that takes it, and names that row.
    fn place(&mut self, length: usize) -> u32 {
        let (row, free) = match self.occupied.first_from(length) {
            Some(free) => (self.pop(free), free),
            None => (self.open(), self.capacity),
        };
        self.push(row, free - length);
        row
    }

    fn count(&self) -> usize {
        self.below.len()
    }

    fn open(&mut self) -> u32 {
        // Cannot truncate: there are no more rows than documents.
        let row = self.below.len() as u32;
        self.below.push(NO_ROW);
        row
    }

    fn pop(&mut self, free: usize) -> u32 {
        let row = self.top[free];
        self.top[free] = self.below[row as usize];
        if self.top[free] == NO_ROW {
            self.occupied.remove(free);
        }
        row
    }

    fn push(&mut self, row: u32, free: usize) {
        if free == 0 {
            return;
        }
        self.below[row as usize] = self.top[free];
        self.top[free] = row;
        self.occupied.insert(free);
    }
}

/// A set of integers in `0..=max`: one bit each, and one summary bit per word of 64.
///
/// A search reads one word, then summary words, each of which covers 4096 values: one or two for
/// the usual row lengths, at most 33 for rows of 131,072 tokens.
struct FreeSpaces {
    words: Vec<u64>,
    summary: Vec<u64>,
}

impl FreeSpaces {
    fn new(max: usize) -> Self {
        let words = max / 64 + 1;
        Self {
            words: vec![0; words],
            summary: vec![0; words.div_ceil(64)],
        }
    }

    fn insert(&mut self, value: usize) {
        let word = value / 64;
        self.words[word] |= 1 << (value % 64);
        self.summary[word / 64] |= 1 << (word % 64);
    }

    fn remove(&mut self, value: usize) {
        let word = value / 64;
        self.words[word] &= !(1 << (value % 64));
        if self.words[word] == 0 {
            self.summary[word / 64] &= !(1 << (word % 64));
        }
    }

    /// The smallest member that is at least `from`.
    fn first_from(&self, from: usize) -> Option<usize> {
        let word = from / 64;
        let here = self.words.get(word)? & (!0 << (from % 64));
        if here != 0 {
            return Some(word * 64 + here.trailing_zeros() as usize);
        }
        let next = word + 1;
        let mut mask = !0 << (next % 64);
        for at in next / 64..self.summary.len() {
            let words = self.summary[at] & mask;
            if words != 0 {
                let word = at * 64 + words.trailing_zeros() as usize;
                return Some(word * 64 + self.words[word].trailing_zeros() as usize);
            }
            mask = !0;
        }
        None
    }
}

/// Turns "document -> row" into "row -> documents", keeping the order of placement within a row.
fn group_by_row(documents: &[u32], row_of: &[u32], rows: usize) -> Plan {
    let mut offsets = vec![0usize; rows + 1];
    for &row in row_of {
        offsets[row as usize + 1] += 1;
    }
    for row in 0..rows {
        offsets[row + 1] += offsets[row];
    }
    let mut next = offsets.clone();
    let mut order = vec![0u32; documents.len()];
    for (&document, &row) in documents.iter().zip(row_of) {
        let slot = &mut next[row as usize];
        order[*slot] = document;
        *slot += 1;
    }
    Plan { order, offsets }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_spaces_agree_with_a_plain_scan() {
        // 4095..4097 and 64 * 64 * 2 straddle the ends of a word and of a summary word.
        for max in [1usize, 63, 64, 65, 4095, 4096, 4097, 8192, 20_000] {
            let mut set = FreeSpaces::new(max);
            let mut plain = vec![false; max + 1];
            let mut state = max as u64;
            for _ in 0..400 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let value = (state >> 33) as usize % (max + 1);
                if plain[value] {
                    set.remove(value);
                } else {
                    set.insert(value);
                }
                plain[value] = !plain[value];
                for from in [0, value, value + 1, max] {
                    let expected = (from..=max).find(|&v| plain[v]);
                    assert_eq!(set.first_from(from), expected, "max {max}, from {from}");
                }
            }
        }
    }

    #[test]
    fn counting_sort_is_stable_and_decreasing() {
        let sorted = sort_by_length(&[2, 5, 2, 1, 5], 5);
        assert_eq!(sorted.documents, [1, 4, 0, 2, 3]);
        assert_eq!(sorted.bucket(5), 0..2);
        assert_eq!(sorted.bucket(4), 2..2);
        assert_eq!(sorted.bucket(2), 2..4);
        assert_eq!(sorted.bucket(1), 4..5);
    }
}
