"""The built-in tasks: the same for the same seed, split without overlap, with answers that are right."""

from __future__ import annotations

import re

import pytest

from barqtrain_hf.cli.demo import tasks
from barqtrain_hf.errors import ArgumentError

TRAIN, HELD_OUT = tasks.generate(seed=3, train=4_000, held_out=256)


def test_seed_decides() -> None:
    assert tasks.generate(3, 4_000, 256) == (TRAIN, HELD_OUT)
    assert tasks.generate(4, 4_000, 256) != (TRAIN, HELD_OUT)


def test_sizes_and_families() -> None:
    for side, size in ((TRAIN, 4_000), (HELD_OUT, 256)):
        assert len(side) == size
        for family in tasks.FAMILIES:
            assert sum(e.family == family for e in side) == size / len(tasks.FAMILIES)


def test_no_overlap() -> None:
    prompts = [e.prompt for e in TRAIN + HELD_OUT]
    assert len(set(prompts)) == len(prompts)
    train, held_out = ({(e.family, e.key) for e in side} for side in (TRAIN, HELD_OUT))
    assert not train & held_out


def test_held_out_words_occur_in_training() -> None:
    seen = set(re.findall(r"[A-Za-z]+", " ".join(e.prompt + " " + e.answer for e in TRAIN)))
    asked = set(re.findall(r"[A-Za-z]+", " ".join(e.prompt + " " + e.answer for e in HELD_OUT)))
    assert asked <= seen


def _solve(family: str, prompt: str) -> str:
    """The answer, found from the prompt alone."""
    if family == "successor":
        (number,) = re.findall(r"\d+", prompt)
        return str(int(number) + 1)
    if family in ("choose", "story"):
        known = [w for w in re.findall(r"[a-z]+", prompt) if w in tasks.KIND_OF]
        (wanted,) = set(re.findall("|".join(tasks.KINDS), prompt))
        (answer,) = [w for w in known if tasks.KIND_OF[w] == wanted]
        return f"{wanted}: {answer}"
    # What is listed comes either before or after the one colon, or at the end of the question.
    before, colon, after = prompt.partition(": ")
    if family == "position":
        words = before.split(", ")
        return words[0] if "first" in after else words[-1]
    listed = after if colon else re.sub(r"What are the (opposites|plurals) of ", "", prompt)
    words = listed.strip(".?").split(", ")
    if family == "reverse":
        return ", ".join(reversed(words))
    table = {"opposite": tasks.OPPOSITES, "plural": tasks.PLURALS, "kind": tasks.KIND_OF}[family]
    return ", ".join(f"{word}: {table[word]}" for word in words)


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_answers_are_right(family: str) -> None:
    examples = [e for e in TRAIN + HELD_OUT if e.family == family]
    for example in examples:
        assert _solve(family, example.prompt) == example.answer


def test_lengths_spread() -> None:
    lengths = sorted(len(e.prompt) for e in TRAIN)
    assert lengths[len(lengths) // 10] * 4 < lengths[-len(lengths) // 20]


def test_too_many_examples() -> None:
    with pytest.raises(ArgumentError, match=r"train=80000 .* has run out of different"):
        tasks.generate(0, 80_000, 256)
