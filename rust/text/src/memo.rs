//! Tokens of the pieces that texts are split into, remembered: most pieces of a text were seen before.
//!
//! A byte-level tokenizer splits text, turns the bytes of a piece into characters and merges those. The
//! last two, most of the work, look at nothing but the piece; the cache of `tokenizers` saves the merges.

use ahash::AHashMap;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::pattern::Pattern;
use tokenizers::{
    Encoding, Model, ModelWrapper, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    PreTokenizerWrapper, Result, SplitDelimiterBehavior, Tokenizer,
};
use SplitDelimiterBehavior::{Isolated, Removed};

/// What `ByteLevel` splits by: GPT-2's.
const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// About 25 MB. When there are so many, all are forgotten: what comes next may be in another language.
const MOST_PIECES: usize = 1 << 18;
/// Of a piece; longer ones rarely come again.
const MOST_BYTES: usize = 64;

/// The steps of one tokenizer before it merges, and what came of pieces.
pub(crate) struct Memo {
    split: Vec<PreTokenizerWrapper>,
    /// The last of them, where its pieces can be looked up where they stand.
    last: Option<Split>,
    seen: Seen,
}

impl Memo {
    /// None unless the tokenizer is byte-level and always gives a piece the same tokens.
    pub(crate) fn new(tokenizer: &Tokenizer) -> Option<Self> {
        match tokenizer.get_model() {
            ModelWrapper::BPE(bpe) if bpe.dropout.is_none_or(|dropout| dropout == 0.0) => {}
            _ => return None,
        }
        let mut split = match tokenizer.get_pre_tokenizer()? {
            PreTokenizerWrapper::Sequence(steps) => steps.as_ref().to_vec(),
            step => vec![step.clone()],
        };
        let Some(PreTokenizerWrapper::ByteLevel(mut bytes)) = split.pop() else {
            return None;
        };
        if bytes.add_prefix_space {
            return None; // the space would go into pieces, or before they are split
        }
        if bytes.use_regex {
            let pattern = SplitPattern::Regex(GPT_2.to_owned());
            let step = Split::new(pattern, Isolated, false);
            split.push(step.expect("a pattern of Oniguruma").into());
            bytes.use_regex = false;
        }
        let last = match split.pop() {
            Some(PreTokenizerWrapper::Split(last))
                if matches!(last.behavior, Isolated | Removed) =>
            {
                Some(last)
            }
            other => {
                split.extend(other);
                None
            }
        };
        Some(Self {
            split,
            last,
            seen: Seen {
                bytes,
                places: AHashMap::new(),
                ids: Vec::new(),
                most_pieces: MOST_PIECES,
            },
        })
    }

    /// `tokenizer.encode_fast`, of the tokenizer that this was made for.
    pub(crate) fn encode(
        &mut self,
        tokenizer: &Tokenizer,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<Encoding> {
        let model = tokenizer.get_model();
        let mut parts = tokenizer
            .get_added_vocabulary()
            .extract_and_normalize(tokenizer.get_normalizer(), text);
        for step in &self.split {
            step.pre_tokenize(&mut parts)?;
        }
        let mut ids = Vec::with_capacity(text.len() / 3);
        for (part, _, tokens) in parts.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            match (tokens, &self.last) {
                (Some(tokens), _) => ids.extend(tokens.iter().map(|token| token.id)),
                (None, None) => self.seen.push(model, part, &mut ids)?,
                (None, Some(last)) => {
                    for ((from, to), found) in (&last.regex).find_matches(part)? {
                        if last.behavior == Isolated || found == last.invert {
                            self.seen.push(model, &part[from..to], &mut ids)?;
                        }
                    }
                }
            }
        }
        // As `encode_fast` fills it.
        let encoding = ids
            .into_iter()
            .map(|id| (id, String::new(), (0, 0), None, 0))
            .collect();
        tokenizer.post_process(encoding, None, add_special_tokens)
    }
}

struct Seen {
    bytes: ByteLevel,
    /// Where the ids of a piece are: from, to.
    places: AHashMap<Box<str>, (u32, u32)>,
    ids: Vec<u32>,
    most_pieces: usize,
}

impl Seen {
    fn push(&mut self, model: &ModelWrapper, piece: &str, ids: &mut Vec<u32>) -> Result<()> {
        if let Some(&(from, to)) = self.places.get(piece) {
            ids.extend_from_slice(&self.ids[from as usize..to as usize]);
            return Ok(());
        }
        let before = ids.len();
        let mut characters = PreTokenizedString::from(piece);
        self.bytes.pre_tokenize(&mut characters)?;
        for (word, ..) in characters.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            ids.extend(model.tokenize(word)?.iter().map(|token| token.id));
        }
        if piece.len() <= MOST_BYTES {
            if self.places.len() == self.most_pieces {
                self.places.clear();
                self.ids.clear();
            }
            let from = self.ids.len() as u32; // at most two for each byte of the pieces
            self.ids.extend_from_slice(&ids[before..]);
            self.places
                .insert(piece.into(), (from, self.ids.len() as u32));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::models::bpe::BPE;
    use tokenizers::normalizers::unicode::NFC;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::pre_tokenizers::digits::Digits;
    use tokenizers::pre_tokenizers::metaspace::Metaspace;
    use tokenizers::pre_tokenizers::sequence::Sequence;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::SplitDelimiterBehavior::{self, Isolated, MergedWithNext, Removed};
    use tokenizers::Tokenizer;

    use super::super::tests::{texts, tokenizer};
    use super::{Memo, MOST_BYTES};

    fn plain() -> Tokenizer {
        let mut plain = tokenizer();
        plain.with_truncation(None).unwrap();
        plain
    }

    fn with_digits() -> Tokenizer {
        let mut tokenizer = plain();
        let steps = vec![
            Digits::new(true).into(),
            ByteLevel::new(false, true, true).into(),
        ];
        tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
        tokenizer.with_normalizer(Some(NFC)).unwrap();
        tokenizer
    }

    fn with_split(behavior: SplitDelimiterBehavior, invert: bool) -> Tokenizer {
        let mut tokenizer = plain();
        let split = SplitPattern::Regex(r"\s?\p{L}+|\s".to_owned());
        let steps = vec![
            Split::new(split, behavior, invert).unwrap().into(),
            ByteLevel::new(false, true, false).into(),
        ];
        tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
        tokenizer
    }

    #[test]
    fn tokens_are_those_of_encode_fast_whatever_is_remembered() {
        let mut texts = texts();
        texts.extend(["in12 the 3e\u{301}", "in 12the \u{E9}  the  "].map(String::from));
        texts.push("the".repeat(MOST_BYTES));
        let tokenizers = [
            plain(),
            with_digits(),
            with_split(Isolated, true),
            with_split(Removed, false),
            with_split(Removed, true),
            with_split(MergedWithNext, false),
        ];
        for tokenizer in tokenizers {
            for most_pieces in [1, 4, 1000] {
                let mut memo = Memo::new(&tokenizer).unwrap();
                memo.seen.most_pieces = most_pieces;
                for text in texts.iter().chain(&texts) {
                    for special in [false, true] {
                        let found = memo.encode(&tokenizer, text, special).unwrap();
                        let expected = tokenizer.encode_fast(text.as_str(), special).unwrap();
                        assert_eq!(found, expected, "{text:?}");
                        assert!(memo.seen.places.len() <= most_pieces);
                    }
                }
                assert!(memo
                    .seen
                    .places
                    .keys()
                    .all(|piece| piece.len() <= MOST_BYTES));
            }
        }
    }

    #[test]
    fn a_piece_is_merged_once() {
        let tokenizer = plain();
        let mut memo = Memo::new(&tokenizer).unwrap();
        memo.encode(&tokenizer, "the inn the inn", false).unwrap();
        let (pieces, ids) = (memo.seen.places.len(), memo.seen.ids.len());
        assert_eq!(pieces, 3); // "the", " inn", " the"
        memo.encode(&tokenizer, " inn the", true).unwrap();
        assert_eq!((memo.seen.places.len(), memo.seen.ids.len()), (pieces, ids));
    }

    #[test]
    fn there_is_none_where_a_piece_does_not_tell_its_tokens() {
        let mut prefixed = plain();
        prefixed.with_pre_tokenizer(Some(ByteLevel::new(true, true, true)));
        let mut words = plain();
        words.with_pre_tokenizer(Some(Metaspace::default()));
        let mut random = plain();
        let bpe = BPE::builder().dropout(0.5).build().unwrap();
        random.with_model(bpe);
        for tokenizer in [prefixed, words, random] {
            assert!(Memo::new(&tokenizer).is_none());
        }
    }
}
