"""Text of a made-up language, and a tokenizer for it.

Words are built of syllables and drawn by the law of Zipf and Mandelbrot, frequent words are short;
there are capitals, punctuation, numbers, line breaks and 1 % unseen words, so that the splitting and
the word cache of a tokenizer have as much to do as in English.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_ONSETS = [*"bcdfghklmnprstvwbcdfhlmnprstw", "st", "tr", "th", "sh", "pr", "", "", ""]
_NUCLEI = [*"aeioueaio", "ea", "ou", "ai", "ee", "io"]
_CODAS = ["", "", "", "", "", "", "n", "r", "s", "t", "l", "d", "ng", "st"]
_WORDS = 60_000
# Llama 3's
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _vocabulary() -> list[str]:
    random = np.random.default_rng(1234)  # one language for all seeds
    words: dict[str, None] = {}
    while len(words) < _WORDS:
        rank = len(words)
        syllables = 1 + sum(
            int(random.integers(0, 2)) for limit in (80, 2000, 20_000) if rank > limit
        )
        word = "".join(
            part[random.integers(len(part))]
            for _ in range(syllables)
            for part in (_ONSETS, _NUCLEI, _CODAS)
        )
        words.setdefault(word)
    return list(words)


def documents(count: int, seed: int = 0) -> Iterator[str]:
    """Texts with a lognormal number of words, 300 on average."""
    words = np.array(_vocabulary(), dtype=object)
    frequency = np.cumsum(1.0 / (np.arange(_WORDS) + 2.7) ** 1.08)
    marks = np.array(["", ",", ".", "?", "!", ";", ":", ".\n\n"], dtype=object)
    mark_frequency = np.cumsum([0.85, 0.055, 0.06, 0.006, 0.004, 0.004, 0.003, 0.018])
    random = np.random.default_rng(seed)
    for size in np.clip(random.lognormal(np.log(300) - 0.5, 1.0, count), 4, 20_000).astype(int):
        drawn = np.searchsorted(frequency, random.random(size) * frequency[-1])
        after = np.searchsorted(mark_frequency, random.random(size)).clip(0, 7)
        text, capital = [], True
        for index, mark, roll in zip(
            drawn.tolist(), after.tolist(), random.random(size).tolist(), strict=True
        ):
            word = words[index]
            if roll < 0.01:
                word = word[::-1] + words[int(roll * 1e6)]
            elif roll < 0.02:
                word = str(int(roll * 1e7) % 3000)
            text.append((word.capitalize() if capital else word) + marks[mark])
            capital = mark in (2, 3, 4, 7)
        yield " ".join(text)


def train_tokenizer(folder: Path) -> Any:
    """A byte-level BPE with 32,000 tokens and the splits of Llama 3."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(20_000, seed=7), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<eos>", pad_token="<pad>"
    )
