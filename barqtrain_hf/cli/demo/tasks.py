"""The demo's own instruction data: eight families of short tasks with checkable answers.

Every example is made from a *key* (what the task is about) and a wording. The split hashes the key,
so a held-out example asks about a combination of words, or a number, that no training example asks
about in any wording. Each single word does occur in training: what is held out is combinations,
not vocabulary.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from barqtrain_hf.errors import ArgumentError

HELD_OUT_SHARE = 0.1


def _words(text: str) -> list[str]:
    return text.split()


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in _words(text))


OPPOSITES = _pairs(
    "hot:cold big:small tall:short fast:slow light:dark happy:sad old:young wet:dry open:closed "
    "loud:quiet rich:poor hard:soft"
)
OPPOSITES.update({second: first for first, second in tuple(OPPOSITES.items())})
PLURALS = _pairs(
    "cat:cats box:boxes child:children mouse:mice city:cities leaf:leaves foot:feet bus:buses "
    "tree:trees knife:knives baby:babies tooth:teeth dish:dishes wolf:wolves man:men story:stories"
)
KINDS = {
    "animal": _words("tiger horse rabbit eagle shark camel"),
    "fruit": _words("apple banana cherry grape lemon mango"),
    "tool": _words("hammer saw drill wrench chisel pliers"),
    "vehicle": _words("car truck train boat tram bicycle"),
    "instrument": _words("piano violin flute drum guitar trumpet"),
}
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
WORDS = sorted(KIND_OF)
NAMES = _words("Ana Ben Cora Dan Eva Finn Gita Hugo Ines Jon Kira Leo Mina Noor Omar Pia")
# One sentence per kind, and some that answer nothing: a story is a few of them in any order.
FACTS = {
    "animal": "On the way there was {}.",
    "fruit": "At noon it was time to eat {}.",
    "tool": "On the table lay {}.",
    "vehicle": "Everybody had to wait for {}.",
    "instrument": "The neighbours listened to {} all evening.",
}
FILLERS = (
    "It rained all morning.",
    "The shops were closed.",
    "There was a letter from an old friend.",
    "Nobody said a word about it.",
    "The evening was long and quiet.",
    "The kitchen smelled of fresh bread.",
    "Later the sun came out and the street was full of people.",
    "Then the lights went out and came back after an hour.",
)


@dataclass(frozen=True)
class Example:
    """One question and its only right answer.

    Attributes:
        family: which kind of task it is.
        key: what it is about, apart from the wording; the split never divides a key.
        prompt: what the user says.
        answer: what the assistant must say, character for character.
    """

    family: str
    key: str
    prompt: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The example as a chat."""
        return [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.answer},
        ]


def _each(rng: random.Random, family: str, table: dict[str, str], *wordings: str) -> Example:
    """A table looked up for one to three words: ``hot, wet`` → ``hot: cold, wet: dry``."""
    words = rng.sample(sorted(table), rng.randint(1, 3))
    listed = ", ".join(words)
    answer = ", ".join(f"{word}: {table[word]}" for word in words)
    return Example(family, listed, rng.choice(wordings).format(listed), answer)


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def opposite(rng: random.Random) -> Example:
    """``What are the opposites of hot, wet?`` → ``hot: cold, wet: dry``."""
    return _each(
        rng,
        "opposite",
        OPPOSITES,
        "Give the opposite of each word: {}.",
        "What are the opposites of {}?",
        "Write down the opposites of these words, in the same order: {}.",
    )


def plural(rng: random.Random) -> Example:
    """``What are the plurals of cat, mouse?`` → ``cat: cats, mouse: mice``."""
    return _each(
        rng,
        "plural",
        PLURALS,
        "Write the plural of each word: {}.",
        "What are the plurals of {}?",
        "There is more than one of each, so put these words into the plural: {}.",
    )


def kind(rng: random.Random) -> Example:
    """``Say what these are: saw, lemon.`` → ``saw: tool, lemon: fruit``."""
    return _each(
        rng, "kind", KIND_OF, "What kind of thing is each of these: {}?", "Say what these are: {}."
    )


def choose(rng: random.Random) -> Example:
    """``saw, lemon, tram: find a fruit in this list.`` → ``fruit: lemon``."""
    wanted = rng.choice(sorted(KINDS))
    answer = rng.choice(KINDS[wanted])
    others = [word for word in WORDS if KIND_OF[word] != wanted]
    words = [answer, *rng.sample(others, rng.choice((1, 2, 3, 4, 5, 8, 12)))]
    rng.shuffle(words)
    listed = ", ".join(words)
    wording = rng.choice(
        ("{}: find {} in this list.", "{}: only one of these words is the name of {}.")
    )
    return Example(
        "choose", f"{wanted}: {listed}", wording.format(listed, _a(wanted)), f"{wanted}: {answer}"
    )


def position(rng: random.Random) -> Example:
    """``saw, lemon, tram: what is the last word of this list?`` → ``tram``."""
    words = rng.sample(WORDS, rng.choice((3, 4, 5, 6, 8, 12, 16, 24)))
    place, answer = rng.choice((("first", words[0]), ("last", words[-1])))
    listed = ", ".join(words)
    wording = rng.choice(
        (
            "{}: what is the {} word of this list?",
            "{}: read this from left to right and write down the {} word.",
        )
    )
    return Example("position", f"{place}: {listed}", wording.format(listed, place), answer)


def reverse(rng: random.Random) -> Example:
    """``Reverse the order of these words: saw, lemon.`` → ``lemon, saw``."""
    words = rng.sample(WORDS, rng.randint(2, 4))
    listed = ", ".join(words)
    wording = rng.choice(
        (
            "Reverse the order of these words: {}.",
            "Write this list backwards, starting from its end: {}.",
        )
    )
    return Example("reverse", listed, wording.format(listed), ", ".join(reversed(words)))


def story(rng: random.Random) -> Example:
    """A few sentences, one of which holds what is asked for."""
    name = rng.choice(NAMES)
    kinds = rng.sample(sorted(KINDS), rng.randint(2, 5))
    facts = {kind: rng.choice(KINDS[kind]) for kind in kinds}
    wanted = rng.choice(kinds)
    sentences = [FACTS[kind].format(_a(word)) for kind, word in facts.items()]
    sentences += rng.sample(FILLERS, rng.choice((0, 0, 1, 2, 4, 6, 8)))
    rng.shuffle(sentences)
    text = " ".join(sentences)
    return Example(
        "story",
        f"{wanted}: {text}",
        f"{name} wrote about a day in town. {text} Which {wanted} does {name} write about?",
        f"{wanted}: {facts[wanted]}",
    )


def successor(rng: random.Random) -> Example:
    """``What number comes after 347?`` → ``348``."""
    number = rng.randint(100, 998)
    wording = rng.choice(
        (
            "What number comes after {}?",
            "Add one to {}.",
            "I have counted up to {}. Which number do I say next?",
        )
    )
    return Example("successor", str(number), wording.format(number), str(number + 1))


FAMILIES: dict[str, Callable[[random.Random], Example]] = {
    make.__name__: make
    for make in (opposite, plural, kind, choose, position, reverse, story, successor)
}


def is_held_out(example: Example, seed: int) -> bool:
    """Whether the example's key is on the held-out side; a function of key and seed alone."""
    text = f"{seed}/{example.family}/{example.key}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def generate(seed: int, train: int, held_out: int) -> tuple[list[Example], list[Example]]:
    """Makes a train and a held-out set, with the same number of examples of each family.

    Args:
        seed: the whole result is a function of it and the two sizes.
        train: how many training examples.
        held_out: how many held-out examples.

    Returns:
        Both sets, shuffled. No prompt occurs twice, and no key occurs in both.
    """
    rng = random.Random(seed)
    sides: tuple[list[Example], list[Example]] = ([], [])
    for make in FAMILIES.values():
        _fill(make, rng, seed, (train, held_out), sides)
    for side in sides:
        rng.shuffle(side)
    return sides


def _fill(
    make: Callable[[random.Random], Example],
    rng: random.Random,
    seed: int,
    sizes: tuple[int, int],
    sides: tuple[list[Example], list[Example]],
) -> None:
    """Adds one family's share to both sides."""
    missing = [-(-size // len(FAMILIES)) for size in sizes]
    seen: set[str] = set()
    misses = 0
    while any(missing):
        example = make(rng)
        side = int(is_held_out(example, seed))
        if example.prompt in seen or not missing[side]:
            misses += 1
            if misses > 100_000:
                raise ArgumentError(
                    f"train={sizes[0]} and held_out={sizes[1]} are too many: the task family "
                    f"{make.__name__!r} has run out of different examples."
                )
            continue
        seen.add(example.prompt)
        sides[side].append(example)
        missing[side] -= 1
