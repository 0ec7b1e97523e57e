//! Best-fit bin packing of documents into rows.
//!
//! Documents are taken longest first (best-fit decreasing), by a counting sort, and each goes to the
//! fullest row that still has room for it.
//!
//! The plan is a pure function of its arguments. Documents of equal length go by lowest index; of
//! rows with equal free space, the one filled last is taken.

use std::fmt;

use crate::open_rows::OpenRows;

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
    /// A document has fewer tokens than none.
    Negative {
        /// Position in `lengths`.
        index: usize,
        /// Its value.
        length: i64,
    },
    /// Documents are longer than a row, and may not be cut or left out.
    Overflow {
        /// How many.
        count: usize,
        /// The longest one.
        index: usize,
        /// Its tokens.
        length: i64,
        /// Tokens in a row.
        max_length: usize,
    },
    /// No policy for long documents has that name.
    UnknownOverflow {
        /// The name given.
        name: String,
    },
    /// Not one waiting time for each document.
    WaitedMismatch {
        /// How many there are.
        waited: usize,
        /// For how many documents.
        documents: usize,
    },
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
            Self::Negative { index, length } => write!(
                f,
                "lengths[{index}] is {length}: a document has zero tokens or more."
            ),
            Self::Overflow {
                count,
                index,
                length,
                max_length,
            } => write!(
                f,
                "dataset has {count} documents longer than max_length={max_length}; the longest, \
                 document {index}, has {length} tokens: pass overflow='split', 'truncate' or 'drop', \
                 or raise max_length."
            ),
            Self::UnknownOverflow { name } => write!(
                f,
                "overflow is '{name}': choose one of error, split, truncate, drop."
            ),
            Self::WaitedMismatch { waited, documents } => write!(
                f,
                "waited has {waited} entries for {documents} documents: pass one for each."
            ),
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
    check_lengths(lengths, max_length)?;
    let total = lengths.iter().map(|&length| length as usize).sum();
    let (documents, sorted) = sort_by_length(lengths);
    let mut row_of = vec![0; documents.len()];
    let mut open = OpenRows::default();
    let sorted = sorted.into_iter();
    open.fill(row_capacity(max_length, total), sorted, &mut row_of);
    Ok(group_by_row(&documents, &row_of, &open))
}

/// The most tokens a row can hold: `cu_seq_lens` counts them in 32 bits.
const LONGEST_ROW: usize = i32::MAX as usize;

/// Tokens in a row for documents of `total` tokens: longer rows would only cost memory.
pub(crate) fn row_capacity(max_length: usize, total: usize) -> u32 {
    max_length.min(total).min(LONGEST_ROW) as u32
}

/// Makes sure that there is not more than can be packed; returns the longest document there may be.
pub(crate) fn check_size(documents: usize, max_length: usize) -> Result<i64, PackError> {
    if max_length == 0 {
        return Err(PackError::ZeroMaxLength);
    }
    // Leaves u32::MAX itself free, so that it can mean "no row".
    if documents >= u32::MAX as usize {
        return Err(PackError::TooManyDocuments { count: documents });
    }
    Ok(max_length.min(LONGEST_ROW) as i64)
}

/// Makes sure that documents can be packed.
pub(crate) fn check_lengths(lengths: &[i64], max_length: usize) -> Result<(), PackError> {
    let longest = check_size(lengths.len(), max_length)?;
    match lengths
        .iter()
        .position(|length| !(1..=longest).contains(length))
    {
        None => Ok(()),
        Some(index) if lengths[index] < 1 => Err(PackError::NotPositive {
            index,
            length: lengths[index],
        }),
        Some(index) => Err(PackError::TooLong {
            index,
            length: lengths[index],
            max_length: longest as usize,
        }),
    }
}

/// Documents by decreasing length, equal lengths by increasing index; and their lengths.
fn sort_by_length(lengths: &[i64]) -> (Vec<u32>, Vec<u32>) {
    let longest = lengths.iter().max().map_or(0, |&longest| longest as usize);
    let mut next = vec![0u32; longest + 2]; // first place of each length, then the next one
    for &length in lengths {
        next[longest - length as usize + 1] += 1;
    }
    let mut sorted = Vec::with_capacity(lengths.len());
    for (length, count) in (0u32..=longest as u32 + 1).rev().zip(&mut next) {
        // Cannot truncate: `check_size`. Places before a length are those of longer documents.
        sorted.resize(sorted.len() + *count as usize, length);
        *count = sorted.len() as u32;
    }
    let mut documents = vec![0u32; lengths.len()];
    for (index, &length) in (0u32..).zip(lengths) {
        let slot = &mut next[longest - length as usize];
        documents[*slot as usize] = index;
        *slot += 1;
    }
    (documents, sorted)
}

/// Turns "document -> row" into "row -> documents", keeping the order of placement within a row.
fn group_by_row(documents: &[u32], row_of: &[u32], open: &OpenRows) -> Plan {
    let mut offsets = Vec::with_capacity(open.count() + 1);
    let mut next = Vec::with_capacity(open.count());
    offsets.push(0);
    let mut end = 0;
    for row in 0..open.count() {
        next.push(end);
        end += open.size(row as u32);
        offsets.push(end as usize);
    }
    let mut order = vec![0u32; documents.len()];
    for (&document, &row) in documents.iter().zip(row_of) {
        let slot = &mut next[row as usize];
        order[*slot as usize] = document;
        *slot += 1;
    }
    Plan { order, offsets }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counting_sort_is_stable_and_decreasing() {
        let (documents, lengths) = sort_by_length(&[2, 5, 2, 1, 5]);
        assert_eq!(documents, [1, 4, 0, 2, 3]);
        assert_eq!(lengths, [5, 5, 2, 2, 1]);
    }
}
