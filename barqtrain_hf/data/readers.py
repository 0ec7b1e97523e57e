"""What makes tokens of the rows of a stream; `barqtrain_hf.data.window.Reader` says how."""

from __future__ import annotations

from typing import Any

import numpy as np

from barqtrain_hf.data.examples import Example, Schema, encode_examples
from barqtrain_hf.data.rows import IGNORE_INDEX, ROW_KEYS, Row, Tokens, join, read_row, stored
from barqtrain_hf.data.tokenizer import FastTokenizer


class TextReader:
    """Tokenises texts, chats, and prompts with their completions."""

    def __init__(
        self,
        tokenizer: FastTokenizer,
        text_column: str | None,
        assistant_only_loss: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._schema = Schema(tokenizer.tokenizer, text_column, assistant_only_loss)
        self.columns = self._schema.columns
        self._plain = True

    def example(self, row: Any, index: int) -> tuple[Example, int]:
        example = self._schema.read(row, index)
        self._plain = example.prompt is None and not example.rendered
        return example, example.size

    def read(self, examples: list[Example], first: int) -> Tokens:
        ids, lengths = encode_examples(self._tokenizer, examples, first)
        labels = np.where(ids < 0, np.int32(IGNORE_INDEX), ids)
        return Tokens(ids & np.iinfo(np.int32).max, labels, lengths)

    @property
    def overflow(self) -> str:
        # A text goes on in its next piece; a chat or a completion makes no sense without its beginning.
        return "split" if self._plain else "error"


class TokenReader:
    """Takes rows that hold ``input_ids`` and ``labels``."""

    overflow = "error"
    columns = ROW_KEYS

    def example(self, row: Any, index: int) -> tuple[Row, int]:
        found = read_row(row, "dataset", index)
        return found, len(found.input_ids)

    def read(self, examples: list[Row], first: int) -> Tokens:
        return stored(join(examples), "dataset")
