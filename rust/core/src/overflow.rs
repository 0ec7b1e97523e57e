//! Documents longer than a row: refused, split, truncated or dropped, and counted.

use std::str::FromStr;

use crate::packing::PackError;

/// What happens to a document with more than `max_length` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// It is refused.
    Error,
    /// It is cut into documents of `max_length` tokens and a rest.
    Split,
    /// Its first `max_length` tokens are kept.
    Truncate,
    /// It is left out.
    Drop,
}

impl Overflow {
    /// All policies by the names users give them.
    pub const NAMES: [(&'static str, Self); 4] = [
        ("error", Self::Error),
        ("split", Self::Split),
        ("truncate", Self::Truncate),
        ("drop", Self::Drop),
    ];
}

impl FromStr for Overflow {
    type Err = PackError;

    fn from_str(name: &str) -> Result<Self, PackError> {
        let named = Self::NAMES.iter().find(|(known, _)| *known == name);
        named
            .map(|&(_, policy)| policy)
            .ok_or_else(|| PackError::UnknownOverflow {
                name: name.to_owned(),
            })
    }
}

/// Pieces of documents, each of 1 to `max_length` tokens, and what making them cost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fitted {
    /// First token of each piece, counted from the first token of the first document.
    pub starts: Vec<i64>,
    /// Tokens of each piece.
    pub lengths: Vec<i64>,
    /// What became of the documents.
    pub losses: Losses,
}

/// Counts of documents and tokens that did not come through whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Documents of which at least one token is kept.
    pub kept_documents: u64,
    /// Documents cut into several pieces; each cut costs the label of one token.
    pub split_documents: u64,
    /// Tokens cut off by [`Overflow::Truncate`].
    pub truncated_tokens: u64,
    /// Documents left out by [`Overflow::Drop`] or for having no tokens.
    pub dropped_documents: u64,
    /// Tokens in them.
    pub dropped_tokens: u64,
}

/// Makes every document 1 to `max_length` tokens long; documents lie end to end.
///
/// # Errors
/// When `max_length` is zero, a length is negative, or a document is too long for
/// [`Overflow::Error`].
pub fn fit(lengths: &[i64], max_length: usize, overflow: Overflow) -> Result<Fitted, PackError> {
    let row = match i64::try_from(max_length) {
        Ok(0) => return Err(PackError::ZeroMaxLength),
        Ok(row) => row,
        Err(_) => i64::MAX,
    };
    let mut fitted = Fitted {
        starts: Vec::with_capacity(lengths.len()),
        lengths: Vec::with_capacity(lengths.len()),
        losses: Losses::default(),
    };
    let losses = &mut fitted.losses;
    let mut start = 0;
    for (index, &length) in lengths.iter().enumerate() {
        if length < 0 {
            return Err(PackError::Negative { index, length });
        }
        let mut push = |start, length| {
            fitted.starts.push(start);
            fitted.lengths.push(length);
        };
        if length == 0 {
            losses.dropped_documents += 1;
        } else if length <= row {
            losses.kept_documents += 1;
            push(start, length);
        } else {
            match overflow {
                Overflow::Error => return Err(too_long(lengths, max_length)),
                Overflow::Split => {
                    losses.kept_documents += 1;
                    losses.split_documents += 1;
                    let mut at = 0;
                    while at < length {
                        push(start + at, row.min(length - at));
                        at += row;
                    }
                }
                Overflow::Truncate => {
                    losses.kept_documents += 1;
                    losses.truncated_tokens += (length - row) as u64;
                    push(start, row);
                }
                Overflow::Drop => {
                    losses.dropped_documents += 1;
                    losses.dropped_tokens += length as u64;
                }
            }
        }
        start += length;
    }
    Ok(fitted)
}

fn too_long(lengths: &[i64], max_length: usize) -> PackError {
    let over = |&length: &i64| usize::try_from(length).is_ok_and(|length| length > max_length);
    let mut longest = 0;
    for (index, length) in lengths.iter().enumerate() {
        if *length > lengths[longest] {
            longest = index; // the first, of several as long
        }
    }
    PackError::Overflow {
        count: lengths.iter().filter(|length| over(length)).count(),
        index: longest,
        length: lengths[longest],
        max_length,
    }
}
