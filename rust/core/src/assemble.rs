//! From documents in a flat token array to the arrays a model is given.

use std::fmt;
use std::hint::black_box;
use std::ops::Range;

/// Label of a token without loss, in transformers and torch alike.
pub const IGNORE_INDEX: i64 = -100;
/// Set in a stored token that bears no loss; the id is in the other 31 bits.
pub const NO_LOSS: i32 = i32::MIN;

/// Documents read ahead at once: few enough that they stay in the cache until they are written.
const FETCHED: usize = 8;
/// Tokens in one line of the cache.
const TOKENS_PER_LINE: usize = 16;

/// Tokens of all documents, end to end.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    /// Ids; without `labels` the bit [`NO_LOSS`] says which of them bear no loss.
    pub ids: &'a [i32],
    /// A label for each id, where labels are not the ids.
    pub labels: Option<&'a [i32]>,
}

/// Lengthens a batch to a multiple of `multiple` by one more document of `token`s without labels.
#[derive(Clone, Copy, Debug)]
pub struct Padding {
    /// What the number of tokens becomes a multiple of.
    pub multiple: usize,
    /// The id that fills.
    pub token: i64,
}

/// Documents end to end: T tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// `[T]`
    pub input_ids: Vec<i64>,
    /// `[T]`, [`IGNORE_INDEX`] where there is no loss, as on the first token of each document.
    pub labels: Vec<i64>,
    /// `[T]`, from 0 in each document.
    pub position_ids: Vec<i64>,
    /// `[documents + 1]`, where each document begins, and T.
    pub cu_seq_lens: Vec<i32>,
    /// Tokens of the longest document.
    pub max_length: i64,
}

/// Why a batch cannot be assembled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AssembleError {
    /// A document reaches beyond the tokens.
    OutOfBounds {
        /// Its first token.
        start: i64,
        /// Its tokens.
        length: i64,
        /// Tokens there are.
        tokens: usize,
    },
    /// Not one label for each id.
    LabelsMismatch {
        /// How many labels.
        labels: usize,
        /// For how many ids.
        ids: usize,
    },
    /// The plan has no such row.
    NoSuchRow {
        /// Its number.
        row: usize,
    },
    /// The plan names a document that is not there.
    NoSuchDocument {
        /// Its number.
        document: u32,
    },
    /// More tokens than a 32-bit offset can count.
    TooManyTokens,
}

impl fmt::Display for AssembleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfBounds {
                start,
                length,
                tokens,
            } => write!(
                f,
                "a document of {length} tokens from token {start} is outside the {tokens} tokens there \
                 are: the plan belongs to other data."
            ),
            Self::LabelsMismatch { labels, ids } => {
                write!(f, "{labels} labels for {ids} input_ids: pass one per token.")
            }
            Self::NoSuchRow { row } => write!(f, "the plan has no row {row}."),
            Self::NoSuchDocument { document } => {
                write!(f, "the plan names document {document}, which is not there.")
            }
            Self::TooManyTokens => write!(
                f,
                "the batch has more than {} tokens, the most that cu_seq_lens can count: take fewer rows.",
                i32::MAX
            ),
        }
    }
}

impl std::error::Error for AssembleError {}

/// Documents in a flat token array and the plan that puts them into rows.
#[derive(Clone, Copy, Debug)]
pub struct PackedRows<'a> {
    /// Tokens of all documents.
    pub tokens: Tokens<'a>,
    /// First token of each document.
    pub starts: &'a [i64],
    /// Tokens of each document.
    pub lengths: &'a [i64],
    /// Documents, row after row.
    pub order: &'a [u32],
    /// Row `r` is `order[offsets[r]..offsets[r + 1]]`.
    pub offsets: &'a [i64],
}

impl PackedRows<'_> {
    /// The documents of some rows, laid end to end by [`assemble`].
    ///
    /// # Errors
    /// When there is no such row, the plan names documents that are not there, or as [`assemble`].
    pub fn batch(&self, rows: &[usize], padding: Option<Padding>) -> Result<Batch, AssembleError> {
        let mut documents = Vec::new();
        for &row in rows {
            let bounds = self.offsets.get(row).zip(self.offsets.get(row + 1));
            let range = bounds
                .and_then(|(&begin, &end)| {
                    let begin = usize::try_from(begin).ok()?;
                    self.order.get(begin..usize::try_from(end).ok()?)
                })
                .ok_or(AssembleError::NoSuchRow { row })?;
            for &document in range {
                let at = document as usize;
                let piece = self.starts.get(at).zip(self.lengths.get(at));
                let (&start, &length) = piece.ok_or(AssembleError::NoSuchDocument { document })?;
                documents.push((start, length));
            }
        }
        assemble(self.tokens, &documents, padding)
    }
}

/// Lays documents, each given as (first token, tokens), end to end.
///
/// # Errors
/// When a document is empty or lies outside `tokens`, or there are too many tokens.
pub fn assemble(
    tokens: Tokens<'_>,
    documents: &[(i64, i64)],
    padding: Option<Padding>,
) -> Result<Batch, AssembleError> {
    if let Some(labels) = tokens.labels {
        if labels.len() != tokens.ids.len() {
            return Err(AssembleError::LabelsMismatch {
                labels: labels.len(),
                ids: tokens.ids.len(),
            });
        }
    }
    let ranges = documents
        .iter()
        .map(|&(start, length)| range(start, length, tokens.ids.len()))
        .collect::<Result<Vec<_>, _>>()?;
    let total: usize = ranges.iter().map(ExactSizeIterator::len).sum();
    let filled = match padding {
        Some(Padding { multiple, .. }) if multiple > 0 => total.next_multiple_of(multiple),
        _ => total,
    };
    if i32::try_from(filled).is_err() {
        return Err(AssembleError::TooManyTokens);
    }

    let mut batch = Batch {
        input_ids: Vec::with_capacity(filled),
        labels: Vec::with_capacity(filled),
        position_ids: Vec::with_capacity(filled),
        cu_seq_lens: Vec::with_capacity(ranges.len() + 2),
        max_length: 0,
    };
    batch.cu_seq_lens.push(0);
    for ranges in ranges.chunks(FETCHED) {
        for range in ranges {
            fetch(&tokens.ids[range.clone()]);
            if let Some(labels) = tokens.labels {
                fetch(&labels[range.clone()]);
            }
        }
        for range in ranges {
            batch.add(tokens, range.clone());
        }
    }
    if let Some(Padding { token, .. }) = padding.filter(|_| filled > total) {
        batch.input_ids.resize(filled, token);
        batch.labels.resize(filled, IGNORE_INDEX);
        // Positions that go up: a repeated 0 would start a document per token.
        batch.end_document(filled - total);
    }
    Ok(batch)
}

/// Brings tokens into the cache. Documents of a row lie anywhere, and reads that wait for nothing else come
/// from memory many at a time; those of a loop that also writes would come one after the other.
fn fetch(tokens: &[i32]) {
    let lines = tokens.iter().step_by(TOKENS_PER_LINE);
    black_box(lines.fold(0, |all, &token| all ^ token));
}

impl Batch {
    /// Adds a document.
    fn add(&mut self, tokens: Tokens<'_>, range: Range<usize>) {
        let ids = &tokens.ids[range.clone()];
        let first = self.labels.len();
        let widened = ids.iter().map(|&id| i64::from(id & !NO_LOSS));
        self.input_ids.extend(widened);
        match tokens.labels {
            Some(labels) => self
                .labels
                .extend(labels[range].iter().map(|&label| i64::from(label))),
            None if ids.iter().fold(0, |all, id| all | id) >= 0 => {
                self.labels.extend_from_slice(&self.input_ids[first..]);
            }
            None => self.labels.extend(ids.iter().map(|&id| {
                if id < 0 {
                    IGNORE_INDEX
                } else {
                    i64::from(id)
                }
            })),
        }
        self.labels[first] = IGNORE_INDEX; // nothing of this document predicts its first token
        self.end_document(ids.len());
    }

    /// Adds what says that the last `length` tokens are a document.
    fn end_document(&mut self, length: usize) {
        let length = length as i64;
        self.position_ids.extend(0..length);
        // Cannot truncate: the number of tokens fits.
        self.cu_seq_lens.push(self.input_ids.len() as i32);
        self.max_length = self.max_length.max(length);
    }
}

fn range(start: i64, length: i64, tokens: usize) -> Result<Range<usize>, AssembleError> {
    let begin = usize::try_from(start).ok();
    let end = begin.zip(usize::try_from(length).ok().filter(|&n| n > 0));
    let end = end.and_then(|(begin, length)| begin.checked_add(length));
    match begin.zip(end) {
        Some((begin, end)) if end <= tokens => Ok(begin..end),
        _ => Err(AssembleError::OutOfBounds {
            start,
            length,
            tokens,
        }),
    }
}
