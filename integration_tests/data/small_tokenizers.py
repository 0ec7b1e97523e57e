"""Tokenizers of every kind, trained here on a few lines, and texts that they disagree about."""

from __future__ import annotations

import json

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "The quick brown fox jumps over the lazy dog; the dog doesn't care.",
    "Die Straße führt über den Fluß, cafe\u0301 und café.",
    "日本語のテキスト 한국어 العربية עברית हिन्दी ไทย",
    "🙂👩‍👩‍👧🇩🇪 \u200b\ufeff\x00 \U0010fffd",
    "   leading and trailing   \n\n\t12345 1,234.5\r\n",
    "<s>text with special tokens</s> <pad> <tool>and added ones<tool>",
    "a",
    "",
    " ",
    "x" * 3000,
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """As Llama 2 and Gemma: characters that are not in the vocabulary become bytes."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(
        TEXTS[:2],
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=[*SPECIAL, *bytes_], show_progress=False
        ),
    )
    vocabulary = trained.get_vocab()
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False),
    )
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )
    return tokenizer


_KINDS = {
    "byte_level": _byte_level,
    "byte_fallback": _byte_fallback,
    "word_piece": _word_piece,
    "unigram": _unigram,
}
KINDS = tuple(_KINDS)


def small_tokenizer(kind: str = "byte_level") -> PreTrainedTokenizerFast:
    """A tokenizer with a BOS in front, added tokens that take spaces along, and truncation set."""
    tokenizer = _KINDS[kind]()
    tokenizer.add_tokens(
        [AddedToken("<tool>", lstrip=True, rstrip=True), AddedToken("quick", single_word=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=16,
    )
    # What a batch of the user's has left behind; none of it may reach our tokens.
    fast(["a text that is longer than eight tokens, surely"], truncation=True, max_length=8)
    fast(["short", "a little longer"], padding=True)
    return fast
