"""A Hugging Face fast tokenizer, run by threads of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from barqtrain_hf import _rust
from barqtrain_hf.data.packing import num_threads
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, DataError, UnsupportedError

Span = tuple[int, int]
"""Characters of a text, from the first to before the second."""

# What tokenizers differ over: contractions, digits, runs of spaces, combining marks and their
# composed forms, scripts without spaces, right to left, emoji with joiners, control characters.
_PROBES = (
    "The quick brown fox can't jump 1234567 times; it's 3.14% off!",
    "  leading, double  and trailing spaces \n\n\ttabs\r\n ",
    "naïve café cafe\u0301 Ångström ﬁ ½ Straße İstanbul",
    "日本語のテキスト 한국어 ไทย हिन्दी العربية עברית",
    "👩‍👩‍👧 🇩🇪 \u200b\ufeff \x00\x07 \U0010fffd",
    "<s></s> <|endoftext|> [CLS] <unk>",
    "",
)


class FastTokenizer:
    """Gives the tokens of a fast tokenizer, many texts at once, on all cores, without the GIL.

    The tokens are those of ``tokenizer(text)`` without truncation and padding. That is tried on a
    number of difficult texts when this is made.

    Args:
        tokenizer: a `transformers.PreTrainedTokenizerFast`.
        add_special_tokens: as in ``tokenizer(text, add_special_tokens=...)``.
        append_eos: whether ``tokenizer.eos_token`` goes after every text that does not end with it.

    Attributes:
        identity: text that is equal for two of these only if they give the same tokens.

    Raises:
        UnsupportedError: the tokenizer has no fast version, or adds something of its own in Python.
        ArgumentError: ``append_eos`` without an ``eos_token``.
        ArgumentTypeError: ``tokenizer`` is a name.
    """

    def __init__(
        self, tokenizer: Any, *, add_special_tokens: bool = True, append_eos: bool = True
    ) -> None:
        if isinstance(tokenizer, (str, os.PathLike)):
            raise ArgumentTypeError(
                f"tokenizer is {tokenizer!r}, a name: pass AutoTokenizer.from_pretrained({str(tokenizer)!r})."
            )
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if not getattr(tokenizer, "is_fast", False) or not hasattr(backend, "to_str"):
            raise UnsupportedError(
                f"{type(tokenizer).__name__} has no fast version, which is what our threads run.",
                "Load it with AutoTokenizer.from_pretrained(name, use_fast=True), or tokenise with "
                "datasets.map and pass the input_ids.",
            )
        self._eos: str | None = None
        if append_eos:
            self._eos = tokenizer.eos_token
            if self._eos is None:
                raise ArgumentError(
                    "append_eos is True and the tokenizer has no eos_token: set tokenizer.eos_token, "
                    "or pass append_eos=False."
                )
        self.tokenizer = tokenizer
        self._add_special_tokens = add_special_tokens
        self._split = bool(getattr(tokenizer, "split_special_tokens", False))
        self._json = _plain(backend.to_str())
        self._of_parents: list[_rust.TextTokenizer] = []
        try:
            self._make()
        except ValueError as error:
            raise UnsupportedError(
                str(error), "Tokenise with datasets.map and pass the input_ids."
            ) from None
        template = getattr(tokenizer, "chat_template", None)
        # Templates write bos_token and others by name.
        named = None if template is None else getattr(tokenizer, "special_tokens_map", None)
        named = sorted((named or {}).items())
        settings = (self._split, add_special_tokens, self._eos, template, named)
        self.identity = f"{settings!r} {self._json}"
        self._probe(tokenizer)

    def _make(self) -> None:
        self._rust = _rust.TextTokenizer(self._json, self._split, num_threads())
        self._pid = os.getpid()

    def _ours(self) -> _rust.TextTokenizer:
        """The tokenizer of this process.

        A fork copies the parent's as it is at that moment: if a thread was using it, locked for ever.
        """
        if self._pid != os.getpid():
            # Not freed: that thread, which is gone, may have left it half changed.
            self._of_parents.append(self._rust)
            self._make()
        return self._rust

    def _probe(self, tokenizer: Any) -> None:
        tokens, lengths = self._ours().encode(_PROBES, None, self._add_special_tokens, None)
        ours = np.split(tokens, np.cumsum(lengths)[:-1])
        for text, ids in zip(_PROBES, ours, strict=True):
            # verbose: a probe may be longer than the model's context, which is no reason to warn.
            theirs = tokenizer(text, add_special_tokens=self._add_special_tokens, verbose=False)
            theirs = list(theirs["input_ids"])
            if ids.tolist() != theirs:
                raise UnsupportedError(
                    f"{type(tokenizer).__name__} gives other tokens than its own JSON does, such as "
                    f"{theirs} instead of {ids.tolist()} for {text!r}.",
                    "It does something in Python: tokenise with datasets.map and pass the input_ids.",
                )

    def encode(
        self,
        texts: Sequence[str],
        source: str = "texts",
        first: int = 0,
        *,
        prompts: Sequence[str] | None = None,
        spans: Sequence[Sequence[Span]] | None = None,
        rendered: bool = False,
        names: Sequence[str | None] | None = None,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Tokens of all texts, end to end, and how many each has.

        Args:
            texts: any number of strings.
            source: what they are items of, for messages.
            first: the place of the first of them there, for messages.
            prompts: how each text begins. No loss is borne by the tokens that a text and its prompt,
                tokenised by itself, have in common at their front.
            spans: the parts of each text that bear a loss, in characters from the first to before the
                second; nothing else of it does.
            rendered: texts come from a chat template; neither special tokens nor EOS are added.
            names: what texts are called in messages; None is their place in ``source``.

        Returns:
            ids of shape ``[T]``, with the top bit set where there is no loss, and lengths of shape
            ``[texts]``, which may be zero.

        Raises:
            DataError: an item is no string, or one that has no UTF-8.
        """
        for strings in (texts, prompts or ()):
            _check(strings, source, first, names)
        special = self._add_special_tokens and not rendered
        eos = None if rendered else self._eos
        try:
            return self._ours().encode(texts, prompts, special, eos, spans)
        except ValueError as error:
            raise DataError(f"{source}[{first}:{first + len(texts)}]: {error}") from None


def _plain(serialized: str) -> str:
    """A tokenizer's JSON without truncation and padding, which every call of it sets anew."""
    content = json.loads(serialized)
    content.update(truncation=None, padding=None)
    return json.dumps(content, ensure_ascii=False)


def _check(
    strings: Sequence[str], source: str, first: int, names: Sequence[str | None] | None
) -> None:
    for index, text in enumerate(strings):
        if isinstance(text, str) and text.isascii():
            continue
        name = (names and names[index]) or f"{source}[{first + index}]"
        if not isinstance(text, str):
            raise DataError(
                f"{name} is {text!r} ({type(text).__name__}) instead of text: remove such rows, or choose "
                "the column that holds the text."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{name} has no UTF-8: {error.reason} at character {error.start}. Read it with the right "
                "encoding, or with errors='replace'."
            ) from None
