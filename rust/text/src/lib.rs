//! From text to tokens on several threads, with Hugging Face's own `tokenizers`.
//!
//! A crate of its own: `barqtrain-core` has no dependencies and `barqtrain-py` no logic.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

use std::fmt;
use std::ops::Range;

use barqtrain_core::map_with;
use tokenizers::Tokenizer;

/// Text that a thread takes at once: short enough to share evenly, long enough to be worth a lock.
const CHUNK_BYTES: usize = 256 << 10;

/// Why text cannot be tokenised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TextError {
    /// The JSON is not that of a fast tokenizer.
    Json {
        /// What `tokenizers` said.
        reason: String,
    },
    /// A text is refused by the tokenizer.
    Encode {
        /// Its position in the list.
        index: usize,
        /// What `tokenizers` said.
        reason: String,
    },
    /// A token has an id that int32 cannot hold.
    IdTooLarge {
        /// The id.
        id: u32,
    },
}

impl fmt::Display for TextError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Json { reason } => write!(
                f,
                "the JSON of the tokenizer cannot be read: {reason}. It may be from a release of \
                 tokenizers other than 0.23, which this was built with."
            ),
            Self::Encode { index, reason } => {
                write!(f, "texts[{index}] cannot be tokenised: {reason}.")
            }
            Self::IdTooLarge { id } => {
                write!(
                    f,
                    "token id {id} is more than {}, the largest int32.",
                    i32::MAX
                )
            }
        }
    }
}

impl std::error::Error for TextError {}

/// Tokens of some documents, end to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Documents {
    /// Ids of all documents.
    pub tokens: Vec<i32>,
    /// Tokens of each document.
    pub lengths: Vec<i64>,
}

/// A fast tokenizer with a clone for every thread.
///
/// Clones share nothing: the word cache of one would otherwise be locked by the others, which costs
/// more than half of the speed on many cores (huggingface/tokenizers#1900).
pub struct TextTokenizer {
    clones: Vec<Tokenizer>,
    chunk_bytes: usize,
}

impl TextTokenizer {
    /// Reads a tokenizer from the JSON that `tokenizers` writes; truncation and padding are off.
    ///
    /// `split_special_tokens` tokenises the text of special tokens as any other text.
    ///
    /// # Errors
    /// When the JSON is not of a tokenizer.
    pub fn from_json(
        json: &str,
        split_special_tokens: bool,
        threads: usize,
    ) -> Result<Self, TextError> {
        let failed = |error: tokenizers::Error| TextError::Json {
            reason: error.to_string(),
        };
        let mut tokenizer: Tokenizer = json.parse().map_err(failed)?;
        tokenizer.with_truncation(None).map_err(failed)?;
        tokenizer.with_padding(None);
        tokenizer.set_encode_special_tokens(split_special_tokens);
        Ok(Self {
            clones: vec![tokenizer; threads.max(1)],
            chunk_bytes: CHUNK_BYTES,
        })
    }

    /// Tokenises texts; the result does not depend on the number of threads.
    ///
    /// # Arguments
    /// - `add_special_tokens`: as in `tokenizers`, such as a BOS in front.
    /// - `append`: a token to put after each text that does not end with it, such as EOS.
    ///
    /// # Errors
    /// When the tokenizer refuses a text; the first such text is named.
    pub fn encode<S: AsRef<str> + Sync>(
        &mut self,
        texts: &[S],
        add_special_tokens: bool,
        append: Option<u32>,
    ) -> Result<Documents, TextError> {
        let chunks = chunks(texts, self.chunk_bytes);
        let encoded = map_with(&mut self.clones, chunks.len(), |tokenizer, chunk| {
            encode(
                tokenizer,
                texts,
                chunks[chunk].clone(),
                add_special_tokens,
                append,
            )
        });
        let mut documents = Documents::default();
        for chunk in encoded {
            let chunk = chunk?;
            documents.tokens.extend(chunk.tokens);
            documents.lengths.extend(chunk.lengths);
        }
        Ok(documents)
    }
}

fn encode<S: AsRef<str>>(
    tokenizer: &Tokenizer,
    texts: &[S],
    chunk: Range<usize>,
    add_special_tokens: bool,
    append: Option<u32>,
) -> Result<Documents, TextError> {
    let mut documents = Documents::default();
    for index in chunk {
        let encoding = tokenizer
            .encode_fast(texts[index].as_ref(), add_special_tokens)
            .map_err(|error| TextError::Encode {
                index,
                reason: error.to_string(),
            })?;
        let before = documents.tokens.len();
        let ids = encoding.get_ids();
        let appended = append.filter(|id| ids.last() != Some(id));
        for &id in ids.iter().chain(&appended) {
            let id = i32::try_from(id).map_err(|_| TextError::IdTooLarge { id })?;
            documents.tokens.push(id);
        }
        documents
            .lengths
            .push((documents.tokens.len() - before) as i64);
    }
    Ok(documents)
}

/// Cuts texts into runs of at least `bytes`, but for the last, each as short as that allows.
fn chunks<S: AsRef<str>>(texts: &[S], bytes: usize) -> Vec<Range<usize>> {
    let mut chunks = Vec::new();
    let (mut start, mut size) = (0, 0);
    for (index, text) in texts.iter().enumerate() {
        size += text.as_ref().len();
        if size >= bytes {
            chunks.push(start..index + 1);
            (start, size) = (index + 1, 0);
        }
    }
    if start < texts.len() {
        chunks.push(start..texts.len());
    }
    chunks
}

#[cfg(test)]
mod tests;
