//! From text to tokens on several threads, with Hugging Face's own `tokenizers`.
//!
//! A crate of its own: `barqtrain-core` has no dependencies and `barqtrain-py` no logic.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::panic::{catch_unwind, AssertUnwindSafe};

use barqtrain_core::{map_with, NO_LOSS};
use tokenizers::{Encoding, Tokenizer};

use memo::Memo;

mod memo;

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
    /// Not one prompt for each text.
    PromptsMismatch {
        /// How many prompts.
        prompts: usize,
        /// For how many texts.
        texts: usize,
    },
    /// Not one list of spans for each text.
    SpansMismatch {
        /// How many lists.
        spans: usize,
        /// For how many texts.
        texts: usize,
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
            Self::PromptsMismatch { prompts, texts } => {
                write!(f, "{prompts} prompts for {texts} texts: pass one for each.")
            }
            Self::SpansMismatch { spans, texts } => {
                write!(
                    f,
                    "{spans} lists of spans for {texts} texts: pass one for each."
                )
            }
        }
    }
}

impl std::error::Error for TextError {}

/// Tokens of some documents, end to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Documents {
    /// Ids of all documents, with [`NO_LOSS`] where there is no loss.
    pub tokens: Vec<i32>,
    /// Tokens of each document.
    pub lengths: Vec<i64>,
}

/// Characters of a text, from the first to before the second.
pub type Span = (usize, usize);

/// What is added to texts.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Whether the tokenizer adds its special tokens, such as a BOS in front.
    pub add_special_tokens: bool,
    /// Text to put after each text that does not end with it, such as that of EOS.
    pub eos: Option<String>,
}

/// A fast tokenizer with a clone for every thread.
///
/// Clones share nothing: a word cache, such as that of Unigram, would be locked by the others, which costs
/// more than half of the speed on many cores (huggingface/tokenizers#1900).
pub struct TextTokenizer {
    workers: Vec<Worker>,
    chunk_bytes: usize,
}

/// What a thread has for itself.
struct Worker {
    tokenizer: Tokenizer,
    memo: Option<Memo>,
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
        let read = guarded(|| json.parse::<Tokenizer>());
        let read = read.map_err(|reason| TextError::Json { reason })?;
        let mut tokenizer = read.map_err(failed)?;
        tokenizer.with_truncation(None).map_err(failed)?;
        tokenizer.with_padding(None);
        tokenizer.set_encode_special_tokens(split_special_tokens);
        let worker = |tokenizer| Worker {
            memo: Memo::new(&tokenizer),
            tokenizer,
        };
        Ok(Self {
            workers: vec![tokenizer; threads.max(1)]
                .into_iter()
                .map(worker)
                .collect(),
            chunk_bytes: CHUNK_BYTES,
        })
    }

    /// Tokenises texts; the result does not depend on the number of threads.
    ///
    /// `prompts` are the beginnings of the texts that bear no loss: [`NO_LOSS`] is set in the tokens
    /// that a text and its prompt have in common at their front. Where a prompt alone ends in other
    /// tokens than it does within the text, the loss begins at the first other token, as in TRL.
    ///
    /// `spans` are the parts of each text that bear a loss: [`NO_LOSS`] is set in all other tokens, those
    /// that transformers' `apply_chat_template(return_assistant_tokens_mask=True)` leaves out.
    ///
    /// # Errors
    /// When the tokenizer refuses a text, the first of which is named, or there is not a prompt or a
    /// list of spans for each text.
    pub fn encode<S: AsRef<str> + Sync>(
        &mut self,
        texts: &[S],
        prompts: Option<&[S]>,
        spans: Option<&[Vec<Span>]>,
        options: &Options,
    ) -> Result<Documents, TextError> {
        if let Some(prompts) = prompts.filter(|prompts| prompts.len() != texts.len()) {
            return Err(TextError::PromptsMismatch {
                prompts: prompts.len(),
                texts: texts.len(),
            });
        }
        if let Some(spans) = spans.filter(|spans| spans.len() != texts.len()) {
            return Err(TextError::SpansMismatch {
                spans: spans.len(),
                texts: texts.len(),
            });
        }
        let chunks = chunks(texts, self.chunk_bytes);
        let encoded = map_with(&mut self.workers, chunks.len(), |worker, chunk| {
            let mut documents = Documents::default();
            for index in chunks[chunk].clone() {
                let prompt = prompts.map(|prompts| prompts[index].as_ref());
                let spans = spans.map(|spans| spans[index].as_slice());
                let text = texts[index].as_ref();
                guarded(|| documents.push(worker, text, prompt, spans, options))
                    .and_then(|pushed| pushed)
                    .map_err(|reason| TextError::Encode { index, reason })?;
            }
            Ok(documents)
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

/// The result of the work, or what a panic in it said: `tokenizers` panics on some malformed JSON, and on
/// what such a tokenizer cannot encode. What the work wrote to is not looked at after a panic.
fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let said = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        format!("tokenizers panicked: {}", said.unwrap_or("for no reason"))
    })
}

impl Documents {
    fn push(
        &mut self,
        worker: &mut Worker,
        text: &str,
        prompt: Option<&str>,
        spans: Option<&[Span]>,
        options: &Options,
    ) -> Result<(), String> {
        let mut text = Cow::Borrowed(text);
        if let Some(eos) = options.eos.as_deref().filter(|eos| !text.ends_with(eos)) {
            text.to_mut().push_str(eos);
        }
        let special = options.add_special_tokens;
        let Worker { tokenizer, memo } = worker;
        let mut encode = |text: &str, offsets: bool| {
            let encoding = match memo {
                _ if offsets => tokenizer.encode_char_offsets(text, special),
                Some(memo) => memo.encode(tokenizer, text, special),
                None => tokenizer.encode_fast(text, special),
            };
            encoding.map_err(|error| error.to_string())
        };
        let encoding = encode(&text, spans.is_some())?;
        let before = self.tokens.len();
        for &id in encoding.get_ids() {
            let id = i32::try_from(id).map_err(|_| format!("token id {id} is beyond int32"))?;
            self.tokens.push(id);
        }
        let tokens = &mut self.tokens[before..];
        if let Some(prompt) = prompt {
            let prompt = encode(prompt, false)?;
            let pairs = encoding.get_ids().iter().zip(prompt.get_ids());
            let common = pairs.take_while(|(a, b)| a == b).count();
            for token in &mut tokens[..common] {
                *token |= NO_LOSS;
            }
        }
        if let Some(spans) = spans {
            for (token, inside) in tokens.iter_mut().zip(in_spans(&encoding, spans)) {
                *token |= if inside { 0 } else { NO_LOSS };
            }
        }
        self.lengths.push((self.tokens.len() - before) as i64);
        Ok(())
    }
}

/// Which tokens are in the spans: what transformers' `apply_chat_template` takes for an assistant's.
fn in_spans(encoding: &Encoding, spans: &[Span]) -> Vec<bool> {
    let mut inside = vec![false; encoding.len()];
    for &(begin, end) in spans {
        let Some(first) = encoding.char_to_token(begin, 0) else {
            break; // nor are there tokens for what comes later
        };
        let Some(last) = end.checked_sub(1) else {
            continue;
        };
        // There, too, a span whose last character is in no token, or in the very first, has no end.
        let last = encoding.char_to_token(last, 0).filter(|&token| token > 0);
        let past = last.map_or(inside.len(), |token| token + 1);
        if first < past {
            inside[first..past].fill(true);
        }
    }
    inside
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
mod fuzz;
#[cfg(test)]
mod tests;
