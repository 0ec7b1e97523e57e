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
    Ok(group_by_row(
        &sorted.documents,
        &row_of,
        |row| Some(row as usize),
        open.count(),
    ))
}

pub(crate) struct Extent {
    pub(crate) longest: usize,
    pub(crate) total: usize,
}

pub(crate) fn measure(lengths: &[i64], max_length: usize) -> Result<Extent, PackError> {
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

/// Turns "document -> row" into "row -> documents", keeping the order of placement within a row.
///
/// `position` says which of `count` places in the plan a row gets; None leaves it out.
pub(crate) fn group_by_row(
    documents: &[u32],
    row_of: &[u32],
    position: impl Fn(u32) -> Option<usize>,
    count: usize,
) -> Plan {
    let mut offsets = vec![0usize; count + 1];
    for place in row_of.iter().filter_map(|&row| position(row)) {
        offsets[place + 1] += 1;
    }
    for place in 0..count {
        offsets[place + 1] += offsets[place];
    }
    let mut next = offsets.clone();
    let mut order = vec![0u32; offsets[count]];
    for (&document, &row) in documents.iter().zip(row_of) {
        if let Some(place) = position(row) {
            let slot = &mut next[place];
            order[*slot] = document;
            *slot += 1;
        }
    }
    Plan { order, offsets }
}

#[cfg(test)]
mod tests {
    use super::*;

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
