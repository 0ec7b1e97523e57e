//! Rows that are being filled, and the search for the fullest one with room.
//!
//! Lengths are bounded integers, so nothing needs comparing: open rows sit in one bucket per amount of
//! free space, with a bitset over the non-empty buckets. "Fullest row with room for n tokens" is then
//! "first set bit at or after n": a few instructions per document, however many rows are open.

/// Rows that can still take a document, bucketed by free space.
pub(crate) struct OpenRows {
    capacity: usize,
    /// Last row put into each bucket; a bucket is a linked stack through `below`.
    top: Vec<u32>,
    /// Per row ever opened: the row under it in its bucket.
    below: Vec<u32>,
    occupied: FreeSpaces,
}

const NO_ROW: u32 = u32::MAX;

impl OpenRows {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            top: vec![NO_ROW; capacity + 1],
            below: Vec::new(),
            occupied: FreeSpaces::new(capacity),
        }
    }

    /// Puts a document of `length` tokens into the fullest row that takes it, and names that row.
    pub(crate) fn place(&mut self, length: usize) -> u32 {
        let (row, free) = match self.occupied.first_from(length) {
            Some(free) => (self.pop(free), free),
            None => (self.open(), self.capacity),
        };
        self.push(row, free - length);
        row
    }

    pub(crate) fn count(&self) -> usize {
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
}
