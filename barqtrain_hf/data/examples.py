"""What a row of text is: a text, a chat, or a prompt with its completion."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from barqtrain_hf.data.chats import ChatTemplate
from barqtrain_hf.data.rows import FileRow, where
from barqtrain_hf.data.tokenizer import FastTokenizer, Span
from barqtrain_hf.errors import ArgumentError, DataError

_TEXT_COLUMN = "text"
_CHAT_KEYS = ("messages", "prompt", "completion", "tools", "chat_template_kwargs")


class Example(NamedTuple):
    """Text to train on; with a prompt, only what comes after it bears a loss."""

    text: Any
    prompt: Any
    rendered: bool
    """Whether a chat template made it, which writes the special tokens itself."""
    spans: Sequence[Span] | None = None
    """If not None, the characters of the text that bear a loss, as far as they come after the prompt."""
    origin: str | None = None
    """Where it is from, if a row of a file."""

    @property
    def size(self) -> int:
        """Characters of the text, to know when there are many."""
        return len(self.text) if isinstance(self.text, str) else 0


def encode_examples(
    tokenizer: FastTokenizer, examples: Sequence[Example], first: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """`FastTokenizer.encode` of examples of one kind, the first of which is row ``first``.

    Raises:
        DataError: one is no text, or spans of it bear a loss and no token is in them.
    """
    prompts = [example.prompt for example in examples] if examples[0].prompt is not None else None
    spans = [example.spans or () for example in examples] if examples[0].spans is not None else None
    names = [example.origin for example in examples]
    ids, lengths = tokenizer.encode(
        [example.text for example in examples],
        "dataset",
        first,
        prompts=prompts,
        spans=spans,
        rendered=examples[0].rendered,
        names=names,
    )
    if spans is not None and prompts is None:
        with_loss = np.append(0, np.cumsum(ids >= 0))
        ends = np.cumsum(lengths)
        (silent,) = np.nonzero(with_loss[ends] == with_loss[ends - lengths])
        if len(silent):
            name = names[silent[0]] or f"dataset[{first + silent[0]}]"
            raise DataError(
                f"{name} has no tokens of the assistant, and assistant_only_loss is True: leave such chats "
                "out, or put {% generation %} around all that the assistant says in the chat template."
            )
    return ids, lengths


class Schema:
    """Reads rows that are all of the kind of the first one, as TRL's SFTTrainer does.

    - ``prompt`` and ``completion``, both strings or both lists of messages: the completion bears a loss.
    - ``messages``: a chat; every token bears a loss.
    - text: a string, or a dict with ``text_column``; every token bears a loss.

    A row that is several of these is the first. Chats are rendered by the tokenizer's chat template with
    the ``tools`` and ``chat_template_kwargs`` of the row.

    Args:
        tokenizer: the Hugging Face tokenizer.
        text_column: the key of the text. None is ``"text"``; another name than that was asked for, so it
            comes before all else.
        assistant_only_loss: whether only what the assistant says bears a loss; rows must be chats.

    Attributes:
        columns: the keys of a row that are read.
        wanted: what a row must have, for messages.
    """

    def __init__(
        self, tokenizer: Any, text_column: str | None = None, assistant_only_loss: bool = False
    ) -> None:
        self._template = ChatTemplate(tokenizer, assistant_only_loss)
        self._assistant_only = assistant_only_loss
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
            ArgumentError: a chat, and the tokenizer has no chat template; or the loss is to be the
                assistant's only, and this is no chat, or the template does not tell.
        """
        kind = self._kind_of(row, index)
        if self._kind is None:
            self._kind = kind
            if self._assistant_only and not self.is_chat:
                raise ArgumentError(
                    f"assistant_only_loss is True, and {where(row, index)} is no chat but has {kind}: pass "
                    "messages, or leave it False."
                )
        if kind != self._kind:
            raise DataError(
                f"{where(row, index)} has {kind} and the rows before it {self._kind}: all rows must be alike."
            )
        origin = row.origin if isinstance(row, FileRow) else None
        if kind == "text":
            text = row[self._text_column] if isinstance(row, Mapping) else row
            return Example(text, None, False, None, origin)
        if kind == "messages":
            text, spans = self._template.render_and_find(row, row["messages"])
            return Example(text, None, True, spans, origin)
        prompt, completion = row["prompt"], row["completion"]
        if kind == "prompt and completion":
            return Example(prompt + completion, prompt, False, None, origin)
        rendered = self._template.render(row, prompt, add_generation_prompt=True)
        text, spans = self._template.render_and_find(row, [*prompt, *completion])
        return Example(text, rendered, True, spans, origin)

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
                    f"{where(row, index)} has a prompt and a completion of which one is text and the other a "
                    "chat: make both text, or both lists of messages."
                )
            return "prompt and completion" + ("" if texts == {True} else " messages")
        if "messages" in there:
            if _is_text(row, "messages", index):
                raise DataError(
                    f"{where(row, index)}['messages'] is text: pass a list of messages, or "
                    "text_column='messages'."
                )
            return "messages"
        if self._text_column in row:
            return "text"
        raise DataError(
            f"{where(row, index)} has no {self.wanted}, only {', '.join(map(str, _keys(row)))}: pass "
            "text_column."
        )


def _is_text(row: Mapping[str, Any], key: str, index: int) -> bool:
    """Whether it is text rather than a list of messages; numpy has types of its own for both."""
    value = row[key]
    if isinstance(value, str):
        return True
    if isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (bytes, bytearray)):
        return False
    raise DataError(
        f"{where(row, index)}[{key!r}] is {reprlib.repr(value)} ({type(value).__name__}): pass "
        f"{'' if key == 'messages' else 'text or '}a list of messages."
    )


def _keys(row: Mapping[str, Any]) -> Iterable[Any]:
    """Those of the row as the user has it, of which not all may have been read."""
    return row.columns if isinstance(row, FileRow) and row.columns else row
