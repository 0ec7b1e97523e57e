//! `TextTokenizer`: the tokens of `tokenizers`, in order, whatever the number of threads.

use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::utils::truncation::TruncationParams;
use tokenizers::{AddedToken, Tokenizer};

use super::{chunks, Options, Span, TextError, TextTokenizer, NO_LOSS};

const PLAIN: Options = Options {
    add_special_tokens: false,
    eos: None,
};

/// Byte-level BPE with a few merges, a special token in front, and truncation that must not happen.
pub(crate) fn tokenizer() -> Tokenizer {
    let mut vocabulary: Vec<(String, u32)> = ByteLevel::alphabet()
        .into_iter()
        .map(String::from)
        .collect::<std::collections::BTreeSet<_>>()
        .into_iter()
        .zip(0..)
        .collect();
    let merges = [("t", "h"), ("th", "e"), ("i", "n")];
    for (a, b) in merges {
        vocabulary.push((format!("{a}{b}"), vocabulary.len() as u32));
    }
    let merges = merges.map(|(a, b)| (a.to_owned(), b.to_owned())).to_vec();
    let bpe = BPE::builder()
        .vocab_and_merges(
            vocabulary
                .into_iter()
                .collect::<Vec<_>>()
                .into_iter()
                .collect::<tokenizers::models::bpe::Vocab>(),
            merges,
        )
        .build()
        .unwrap();
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer
        .add_special_tokens([
            AddedToken::from("<bos>", true),
            AddedToken::from("<eos>", true),
        ])
        .unwrap();
    let bos = tokenizer.token_to_id("<bos>").unwrap();
    let template = TemplateProcessing::builder()
        .try_single("<bos> $A")
        .unwrap()
        .special_tokens(vec![("<bos>", bos)])
        .build()
        .unwrap();
    tokenizer.with_post_processor(Some(template));
    tokenizer
        .with_truncation(Some(TruncationParams {
            max_length: 4,
            ..TruncationParams::default()
        }))
        .unwrap();
    tokenizer
}

pub(crate) fn texts() -> Vec<String> {
    let words = [
        "the thin inn",
        "",
        "Größe \u{1F600} the",
        "<bos>in<eos>",
        "\n\t  in",
        "日本語",
    ];
    (0..200)
        .map(|i| words[i % words.len()].repeat(1 + i * i % 40))
        .collect()
}

#[test]
fn tokens_are_those_of_the_tokenizer_on_any_number_of_threads() {
    let tokenizer = tokenizer();
    let json = tokenizer.to_string(false).unwrap();
    let mut plain = tokenizer.clone();
    plain.with_truncation(None).unwrap();
    let texts = texts();
    for special in [false, true] {
        let expected: Vec<Vec<i32>> = texts
            .iter()
            .map(|text| {
                let encoding = plain.encode(text.as_str(), special).unwrap();
                encoding.get_ids().iter().map(|&id| id as i32).collect()
            })
            .collect();
        for threads in [0, 1, 2, 8] {
            let mut ours = TextTokenizer::from_json(&json, false, threads).unwrap();
            ours.chunk_bytes = 1000;
            let options = Options {
                add_special_tokens: special,
                eos: None,
            };
            let documents = ours.encode(&texts, None, None, &options).unwrap();
            let lengths: Vec<i64> = expected.iter().map(|ids| ids.len() as i64).collect();
            assert_eq!(documents.lengths, lengths, "{threads} threads");
            assert_eq!(documents.tokens, expected.concat(), "{threads} threads");
        }
    }
}

#[test]
fn eos_is_appended_where_it_is_not_the_end() {
    let tokenizer = tokenizer();
    let eos = tokenizer.token_to_id("<eos>").unwrap();
    let json = tokenizer.to_string(false).unwrap();
    let mut ours = TextTokenizer::from_json(&json, false, 2).unwrap();
    let options = Options {
        add_special_tokens: false,
        eos: Some("<eos>".to_owned()),
    };
    let documents = ours
        .encode(&["the", "", "in<eos>"], None, None, &options)
        .unwrap();
    let id = |token: &str| tokenizer.token_to_id(token).unwrap() as i32;
    assert_eq!(documents.lengths, [2, 1, 2]);
    assert_eq!(
        documents.tokens,
        [id("the"), eos as i32, eos as i32, id("in"), eos as i32]
    );
}

#[test]
fn what_a_text_and_its_prompt_share_bears_no_loss() {
    let tokenizer = tokenizer();
    let json = tokenizer.to_string(false).unwrap();
    let mut ours = TextTokenizer::from_json(&json, false, 2).unwrap();
    let options = Options {
        add_special_tokens: true,
        eos: Some("<eos>".to_owned()),
    };
    // The second prompt ends within what becomes the token "the"; the third is all of its text.
    let texts = ["in the", "in the", "in", "in"];
    let prompts = ["in", "in t", "in", ""];
    let masked = ours.encode(&texts, Some(&prompts), None, &options).unwrap();
    let plain = ours.encode(&texts, None, None, &options).unwrap();
    assert_eq!(masked.lengths, plain.lengths);
    let ids: Vec<i32> = masked.tokens.iter().map(|id| id & !NO_LOSS).collect();
    assert_eq!(ids, plain.tokens);
    let mut at = 0;
    for (&length, shared) in masked.lengths.iter().zip([2, 3, 2, 1]) {
        let tokens = &masked.tokens[at..at + length as usize];
        let without: Vec<bool> = tokens.iter().map(|&id| id < 0).collect();
        let expected: Vec<bool> = (0..tokens.len()).map(|place| place < shared).collect();
        assert_eq!(without, expected);
        at += length as usize;
    }
    let error = ours
        .encode(&texts, Some(&prompts[1..]), None, &options)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "3 prompts for 4 texts: pass one for each."
    );
}

#[test]
fn only_what_is_in_spans_bears_a_loss() {
    let tokenizer = tokenizer();
    let json = tokenizer.to_string(false).unwrap();
    let mut ours = TextTokenizer::from_json(&json, false, 2).unwrap();
    // Spans count characters, of which the face is one, with four tokens. A token of which a part is in
    // a span is in it, but of the last character only the first; and no span ends in the first token. So
    // it is in transformers.
    let cases: [(&str, &[Span], &[usize]); 9] = [
        ("<bos>the<eos>in", &[(5, 8)], &[1]),
        ("\u{1F600}the", &[(1, 4)], &[4]),
        ("\u{1F600}the", &[(0, 1)], &[0, 1, 2, 3, 4]),
        ("the\u{1F600}the", &[(0, 4)], &[0, 1]),
        ("in the in", &[(4, 5), (6, 7)], &[2, 3]),
        ("inin<eos>", &[(2, 9)], &[1, 2]),
        ("inin", &[], &[]),
        ("in<eos>", &[(7, 9), (0, 2)], &[]),
        ("inin", &[(0, 0), (2, 99)], &[1]),
    ];
    for (text, spans, expected) in cases {
        let documents = ours
            .encode(&[text], None, Some(&[spans.to_vec()]), &PLAIN)
            .unwrap();
        let plain = ours.encode(&[text], None, None, &PLAIN).unwrap();
        let ids: Vec<i32> = documents.tokens.iter().map(|id| id & !NO_LOSS).collect();
        assert_eq!(ids, plain.tokens);
        let with: Vec<usize> = (0..ids.len())
            .filter(|&place| documents.tokens[place] >= 0)
            .collect();
        assert_eq!(with, expected, "{text:?} {spans:?}");
    }
    // With a prompt, what is in neither.
    let documents = ours
        .encode(&["in<eos>in"], Some(&["in"]), Some(&[vec![(0, 7)]]), &PLAIN)
        .unwrap();
    let with: Vec<bool> = documents.tokens.iter().map(|&id| id >= 0).collect();
    assert_eq!(with, [false, true, false]);
    let error = ours.encode(&["in"], None, Some(&[]), &PLAIN).unwrap_err();
    assert_eq!(
        error.to_string(),
        "0 lists of spans for 1 texts: pass one for each."
    );
}

#[test]
fn special_tokens_may_be_text() {
    let json = tokenizer().to_string(false).unwrap();
    let mut whole = TextTokenizer::from_json(&json, false, 1).unwrap();
    let mut split = TextTokenizer::from_json(&json, true, 1).unwrap();
    assert_eq!(
        whole
            .encode(&["<eos>"], None, None, &PLAIN)
            .unwrap()
            .lengths,
        [1]
    );
    assert_eq!(
        split
            .encode(&["<eos>"], None, None, &PLAIN)
            .unwrap()
            .lengths,
        [5]
    );
}

#[test]
fn what_is_no_tokenizer_is_refused() {
    // On the last two tokenizers 0.23 panics.
    let cut = "{\"version\": \"1.0\", \"decoder\": {";
    let short = "{\"model\": {\"type\": \"BPE\", \"continuing_subword_prefix\": \"###\", \
                 \"vocab\": {\"a\": 0, \"b\": 1}, \"merges\": [\"a b\"]}}";
    for json in [
        "",
        "{}",
        "[1]",
        "{\"model\": {\"type\": \"none\"}}",
        cut,
        short,
    ] {
        let error = TextTokenizer::from_json(json, false, 1).err().unwrap();
        assert!(matches!(error, TextError::Json { .. }), "{error}");
        assert!(error.to_string().contains("cannot be read"), "{error}");
    }
}

#[test]
fn chunks_have_enough_bytes_and_every_text_once() {
    let texts = ["aaaa", "b", "c", "dddddddd", "", "e", ""];
    assert_eq!(chunks(&texts, 5), [0..2, 2..4, 4..7]);
    assert_eq!(chunks(&texts, 1), [0..1, 1..2, 2..3, 3..4, 4..6, 6..7]);
    assert_eq!(chunks(&texts, 100).len(), 1);
    assert!(chunks(&[""; 0], 5).is_empty());
}
