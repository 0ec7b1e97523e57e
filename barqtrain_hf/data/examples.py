"""What a row of text is: a text, a chat, or a prompt with its completion."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from barqtrain_hf.data.tokenizer import FastTokenizer
from barqtrain_hf.errors import ArgumentError, DataError

_TEXT_COLUMN = "text"
_CHAT_KEYS = ("messages", "prompt", "completion", "tools", "chat_template_kwargs")


class Example(NamedTuple):
    """Text to train on; with a prompt, only what comes after it bears a loss."""

    text: Any
    prompt: Any
    rendered: bool
    """Whether a chat template made it, which writes the special tokens itself."""

    @property
    def size(self) -> int:
        """Characters of the text, to know when there are many."""
        return len(self.text) if isinstance(self.text, str) else 0


def encode_examples(
    tokenizer: FastTokenizer, examples: Sequence[Example], first: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """`FastTokenizer.encode` of examples of one kind, the first of which is row ``first``."""
    prompts = [example.prompt for example in examples] if examples[0].prompt is not None else None
    return tokenizer.encode(
        [example.text for example in examples],
        "dataset",
        first,
        prompts=prompts,
        rendered=examples[0].rendered,
    )


class Schema:
    """Reads rows that are all of the kind of the first one, as TRL's SFTTrainer does.

    - ``prompt`` and ``completion``, both strings or both lists of messages: the completion bears a loss.
    - ``messages``: a chat; every token bears a loss.
    - text: a string, or a dict with ``text_column``; every token bears a loss.

    A row that is several of these is the first. Chats are rendered by ``tokenizer.apply_chat_template``
    with the ``tools`` and ``chat_template_kwargs`` of the row.

    Args:
        tokenizer: the Hugging Face tokenizer.
        text_column: the key of the text. None is ``"text"``; another name than that was asked for, so it
            comes before all else.

    Attributes:
        columns: the keys of a row that are read.
        wanted: what a row must have, for messages.
    """

    def __init__(self, tokenizer: Any, text_column: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._text_column = text_column or _TEXT_COLUMN
        self._text_only = self._text_column != _TEXT_COLUMN
        self._kind: str | None = None
        self.columns = (self._text_column, *(() if self._text_only else _CHAT_KEYS))
        self.wanted = repr(self._text_column) + (
            "" if self._text_only else ", no messages and no prompt with completion"
        )

    @property
    def is_chat(self) -> bool:
        """Whether the rows so far were chats."""
        return self._kind in ("messages", "prompt and completion messages")

    def read(self, row: Any, index: int) -> Example:
        """The example in a row.

        Raises:
            DataError: the row is of no kind, or of another than the rows before it.
            ArgumentError: a chat, and the tokenizer has no chat template.
        """
        kind = self._kind_of(row, index)
        if self._kind is None:
            self._kind = kind
        if kind != self._kind:
            raise DataError(
                f"dataset[{index}] has {kind} and the rows before it {self._kind}: all rows must be "
                "alike."
            )
        if kind == "text":
            text = row[self._text_column] if isinstance(row, Mapping) else row
            return Example(text, None, False)
        if kind == "messages":
            return Example(self._render(row, row["messages"]), None, True)
        prompt, completion = row["prompt"], row["completion"]
        if kind == "prompt and completion":
            return Example(prompt + completion, prompt, False)
        rendered = self._render(row, prompt, add_generation_prompt=True)
        return Example(self._render(row, [*prompt, *completion]), rendered, True)

    def _kind_of(self, row: Any, index: int) -> str:
        if not isinstance(row, Mapping):
            return "text"
        if self._text_only and self._text_column in row:
            return "text"
        # A datasets.Dataset fills missing keys with None.
        there = {key for key in self.columns if row.get(key) is not None}
        if {"prompt", "completion"} <= there:
            texts = {_is_text(row, key, index) for key in ("prompt", "completion")}
            if len(texts) == 2:
                raise DataError(
                    f"dataset[{index}] has a prompt and a completion of which one is text and the other "
                    "a chat: make both text, or both lists of messages."
                )
            return "prompt and completion" + ("" if texts == {True} else " messages")
        if "messages" in there:
            if _is_text(row, "messages", index):
                raise DataError(
                    f"dataset[{index}]['messages'] is text: pass a list of messages, or "
                    "text_column='messages'."
                )
            return "messages"
        if self._text_column in row:
            return "text"
        raise DataError(
            f"dataset[{index}] has no {self.wanted}, only {', '.join(map(str, row))}: pass text_column."
        )

    def _render(
        self, row: Mapping[str, Any], messages: Any, add_generation_prompt: bool = False
    ) -> Any:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise ArgumentError(
                "dataset holds chats, and the tokenizer has no chat_template: set one, or pass text."
            )
        tools = row.get("tools")
        return self._tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
        )


def _is_text(row: Mapping[str, Any], key: str, index: int) -> bool:
    """Whether it is text rather than a list of messages; numpy has types of its own for both."""
    value = row[key]
    if isinstance(value, str):
        return True
    if isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (bytes, bytearray)):
        return False
    raise DataError(
        f"dataset[{index}][{key!r}] is {reprlib.repr(value)} ({type(value).__name__}): pass "
        f"{'' if key == 'messages' else 'text or '}a list of messages."
    )
