//! Any text, prompts, spans and settings, and JSON that is almost a tokenizer's: an error, or tokens that
//! go together.
//!
//! `BARQ_FUZZ=1000000 cargo test --release fuzz` tries as many texts; a case that fails is named, and
//! `BARQ_FUZZ_FIRST` begins with it.

use std::time::{Duration, Instant};

use tokenizers::models::bpe::Vocab;
use tokenizers::models::unigram::Unigram;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::bert::BertNormalizer;
use tokenizers::normalizers::unicode::NFKC;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::metaspace::Metaspace;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::tests::tokenizer as byte_level;
use super::{Options, Span, TextTokenizer, NO_LOSS};

const CASES: u64 = 2_000;
const TEXTS_PER_CASE: u64 = 8;
/// Reading JSON takes as long as many texts.
const TEXTS_PER_JSON: u64 = 20;
const HANGS: Duration = Duration::from_secs(20);

/// `SplitMix64`, as in barqtrain-core.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }

    fn of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

/// What tokenizers take apart or put together.
const PARTS: [&str; 22] = [
    "the",
    "in",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\0",
    "<bos>",
    "<eos>",
    "<",
    "12345",
    "can't",
    "é",
    "e\u{301}",
    "日本",
    "\u{200B}",
    "\u{FEFF}",
    "\u{1F469}\u{200D}\u{1F467}",
    "\u{FDFA}",
    "\u{10FFFF}",
    "İ",
];

fn text(random: &mut Random) -> String {
    let count = match random.below(20) {
        0 => 0,
        1 => random.below(600),
        _ => random.below(12),
    };
    let mut text = String::new();
    for _ in 0..count {
        if random.below(3) == 0 {
            let planes = [0x80, 0x800, 0x1_0000, 0x11_0000];
            let plane = *random.of(&planes);
            let code = random.below(plane) as u32;
            text.extend(char::from_u32(code));
        } else {
            let part: &str = random.of::<&str>(&PARTS);
            text.push_str(part);
        }
    }
    text
}

/// Often the beginning of the text, as it should be; cut anywhere.
fn prompt(random: &mut Random, of: &str) -> String {
    match random.below(4) {
        0 => text(random),
        _ => of
            .chars()
            .take(random.below(of.chars().count() + 1))
            .collect(),
    }
}

fn spans(random: &mut Random, of: &str) -> Vec<Span> {
    let characters = of.chars().count();
    let mut place = || match random.below(8) {
        0 => *random.of(&[0, usize::MAX, usize::MAX - 1, 1 << 32]),
        _ => random.below(characters + 3),
    };
    let pairs: Vec<Span> = (0..3).map(|_| (place(), place())).collect();
    pairs[..random.below(4)].to_vec()
}

fn word_piece() -> Tokenizer {
    let words = [
        "[UNK]", "the", "in", "##n", "##e", "t", "##h", "1", "##2", "日", "本",
    ];
    let vocabulary: Vocab = words
        .iter()
        .map(|word| (*word).to_owned())
        .zip(0..)
        .collect();
    let model = WordPiece::builder().vocab(vocabulary).build().unwrap();
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(BertNormalizer::default()))
        .unwrap();
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer
}

fn unigram() -> Tokenizer {
    let pieces = ["<unk>", "▁", "▁the", "the", "in", "e", "▁in", "日本"];
    let scored = pieces
        .iter()
        .map(|piece| (*piece).to_owned())
        .zip((0..).map(|i| -f64::from(i)));
    let mut tokenizer = Tokenizer::new(Unigram::from(scored.collect(), Some(0), false).unwrap());
    tokenizer.with_normalizer(Some(NFKC)).unwrap();
    tokenizer.with_pre_tokenizer(Some(Metaspace::default()));
    tokenizer
}

/// Byte-level, normalised and split by two steps before.
fn split_first() -> Tokenizer {
    let mut tokenizer = byte_level();
    let words = SplitPattern::Regex(r"\s?\p{L}+|\s+(?!\S)".to_owned());
    let words = Split::new(words, SplitDelimiterBehavior::MergedWithPrevious, false).unwrap();
    let steps = vec![
        Digits::new(true).into(),
        words.into(),
        ByteLevel::new(false, true, false).into(),
    ];
    tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
    tokenizer.with_normalizer(Some(NFKC)).unwrap();
    tokenizer
}

fn kinds() -> Vec<Tokenizer> {
    vec![byte_level(), split_first(), word_piece(), unigram()]
}

fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value}")))
}

/// A case, and for how many texts it counts.
struct Case(u64, u64);

impl Drop for Case {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("BARQ_FUZZ_FIRST={} BARQ_FUZZ={}", self.0, self.1);
        }
    }
}

#[test]
fn any_text_with_any_prompt_and_spans_gives_tokens_that_go_together() {
    let kinds = kinds();
    let json: Vec<String> = kinds
        .iter()
        .map(|kind| kind.to_string(false).unwrap())
        .collect();
    let mut ours: Vec<TextTokenizer> = (0..2 * kinds.len())
        .map(|at| TextTokenizer::from_json(&json[at / 2], at % 2 == 1, 2).unwrap())
        .collect();
    for tokenizer in &mut ours {
        tokenizer.chunk_bytes = 40; // so that both threads have something to do
    }
    let mut theirs: Vec<Tokenizer> = (0..ours.len()).map(|at| kinds[at / 2].clone()).collect();
    for (at, tokenizer) in theirs.iter_mut().enumerate() {
        tokenizer.with_truncation(None).unwrap();
        tokenizer.set_encode_special_tokens(at % 2 == 1);
    }
    let first = setting("BARQ_FUZZ_FIRST").unwrap_or(0);
    let cases = setting("BARQ_FUZZ").unwrap_or(CASES) / TEXTS_PER_CASE;
    let (mut tokens, mut slowest) = (0, Duration::ZERO);
    for case in first..first + cases {
        let named = Case(case, TEXTS_PER_CASE);
        let mut random = Random(case);
        let at = random.below(ours.len());
        let texts: Vec<String> = (0..TEXTS_PER_CASE).map(|_| text(&mut random)).collect();
        let prompts: Option<Vec<String>> = (random.below(2) == 0)
            .then(|| texts.iter().map(|text| prompt(&mut random, text)).collect());
        let spans: Option<Vec<Vec<Span>>> = (random.below(2) == 0)
            .then(|| texts.iter().map(|text| spans(&mut random, text)).collect());
        let options = Options {
            add_special_tokens: random.below(2) == 0,
            eos: (random.below(2) == 0).then(|| "<eos>".to_owned()),
        };
        let started = Instant::now();
        let found = ours[at].encode(&texts, prompts.as_deref(), spans.as_deref(), &options);
        slowest = slowest.max(started.elapsed());
        assert!(started.elapsed() < HANGS, "it took {:?}", started.elapsed());
        let found = found.unwrap();
        assert_eq!(found.lengths.len(), texts.len());
        assert!(found.lengths.iter().all(|&length| length >= 0));
        assert_eq!(found.lengths.iter().sum::<i64>(), found.tokens.len() as i64);
        let size = kinds[at / 2].get_vocab_size(true) as i32;
        assert!(found
            .tokens
            .iter()
            .all(|&id| (0..size).contains(&(id & !NO_LOSS))));
        // What bears a loss is no matter of which tokens there are, nor is who else is in the call.
        let alone = ours[at].encode(&texts[..1], None, None, &options).unwrap();
        let same = found
            .tokens
            .iter()
            .zip(&alone.tokens)
            .all(|(a, b)| a & !NO_LOSS == *b);
        assert!(same && found.lengths[0] == alone.lengths[0]);
        let mut text = texts[0].clone();
        if let Some(eos) = options.eos.filter(|eos| !text.ends_with(eos)) {
            text.push_str(&eos);
        }
        let expected = theirs[at].encode(text, options.add_special_tokens).unwrap();
        let expected = expected.get_ids().iter().map(|&id| id as i32);
        assert!(expected.eq(alone.tokens));
        tokens += found.tokens.len();
        drop(named);
    }
    println!(
        "{} texts, {tokens} tokens; the slowest 8 took {slowest:?}",
        cases * TEXTS_PER_CASE
    );
}

#[test]
fn json_that_is_almost_a_tokenizers_is_refused_or_works() {
    let json: Vec<String> = kinds()
        .iter()
        .map(|kind| kind.to_string(false).unwrap())
        .collect();
    let first = setting("BARQ_FUZZ_FIRST").unwrap_or(0);
    let cases = setting("BARQ_FUZZ").unwrap_or(CASES) / TEXTS_PER_JSON;
    let mut read = 0;
    for case in first..first + cases {
        let named = Case(case, TEXTS_PER_JSON);
        let mut random = Random(case);
        let mut bytes = random.of(&json).clone().into_bytes();
        for _ in 0..1 + random.below(3) {
            if bytes.is_empty() {
                break;
            }
            let at = random.below(bytes.len());
            let end = (at + random.below(30)).min(bytes.len());
            match random.below(5) {
                0 => bytes[at] = *random.of(b"0123456789{}[]\",:-x"),
                1 => drop(bytes.drain(at..end)),
                2 => {
                    let part = bytes[at..end].to_vec();
                    let to = random.below(bytes.len() + 1);
                    bytes.splice(to..to, part);
                }
                3 => bytes.truncate(at),
                // A number in place of another: ids out of the vocabulary, scores, lengths.
                _ => {
                    if let Some(from) = (at..bytes.len()).find(|&i| bytes[i].is_ascii_digit()) {
                        let number =
                            *random.of(&["-1", "4294967295", "4294967296", "1e99", "null"]);
                        bytes.splice(from..=from, number.bytes());
                    }
                }
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        if let Ok(mut tokenizer) = TextTokenizer::from_json(&text, false, 1) {
            read += 1;
            let texts = ["the inn can't", "日本 <eos>", ""];
            if let Ok(found) = tokenizer.encode(&texts, None, None, &Options::default()) {
                assert_eq!(found.lengths.iter().sum::<i64>(), found.tokens.len() as i64);
            }
        }
        drop(named);
    }
    println!("{cases} times JSON, {read} of them read");
}
