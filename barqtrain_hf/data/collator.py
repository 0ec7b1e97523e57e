"""From rows to the one batch layout that keeps documents apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data._utils.collate import default_collate_fn_map

from barqtrain_hf.data.batch import packed_batch, sequence_index
from barqtrain_hf.data.dataset import PackedItem, PackedRow
from barqtrain_hf.data.packing import non_negative_int, positive_int
from barqtrain_hf.data.rows import IGNORE_INDEX, join, read_row
from barqtrain_hf.errors import DataError


@dataclass
class BarqDataCollator:
    """Lays all documents of a batch end to end in one row.

    Attention stays within a document: transformers finds the documents in ``position_ids`` for
    sdpa, eager and flex attention, and in ``cu_seq_lens_*`` for FlashAttention.

    On the rows of TRL's SFTTrainer the tensors are equal to those of its
    ``DataCollatorForLanguageModeling(padding_free=True)``, except that there every token of padding is a
    document. Unlike there, a row without ``labels`` and masks is refused: a stock Trainer takes the masks
    of a row away, and nobody would see that the loss is on all tokens. It takes ``seq_lengths`` away, too:
    for rows that need them pass it ``remove_unused_columns=False``.

    Args:
        pad_to_multiple_of: lengthens the row to a multiple of this by one more document, without
            labels, at its end.
        pad_token_id: what that document is made of.
        return_seq_idx: whether to tell the document of each token, which the convolutions of
            linear-attention layers need.

    Raises:
        ArgumentError: ``pad_to_multiple_of`` is not positive, or ``pad_token_id`` is negative or too
            large for an id.
        ArgumentTypeError: one of them is not an integer.
    """

    pad_to_multiple_of: int | None = None
    pad_token_id: int = 0
    return_seq_idx: bool = False

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of is not None:
            positive_int("pad_to_multiple_of", self.pad_to_multiple_of)
        non_negative_int("pad_token_id", self.pad_token_id, 31)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collates rows of a `PackedDataset`, plain documents, or both.

        Args:
            features: each has ``input_ids`` and ``labels``; or instead of labels ``completion_mask``,
                ``assistant_masks`` or both, and a loss where they are 1. ``attention_mask`` may mark
                padding at the ends, which is cut off; ``seq_lengths`` or else restarting
                ``position_ids`` mark documents within a feature; without them a feature is one
                document.

        Returns:
            ``input_ids``, ``labels`` and ``position_ids``, int64 of shape ``[1, T]``;
            ``cu_seq_lens_q`` and ``cu_seq_lens_k``, int32 of shape ``[documents + 1]``;
            ``max_length_q`` and ``max_length_k``, ints; ``use_cache``, False; where it was asked for
            ``seq_idx``, int32 of shape ``[1, T]``. The first label of each document is -100 and its
            positions start at 0.

        Raises:
            DataError: there are no tokens, or a feature lacks labels or does not add up.
        """
        batch = self._collate(features)
        if self.return_seq_idx:
            batch["seq_idx"] = sequence_index(batch["cu_seq_lens_q"])
        return batch

    def _collate(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not features:
            raise DataError("features is empty: a batch needs at least one row.")
        lazy = [row for row in features if isinstance(row, PackedRow)]
        if len(lazy) == len(features) and len({id(row.dataset) for row in lazy}) == 1:
            indices = [row.row for row in lazy]
            return lazy[0].dataset.batch(indices, self.pad_to_multiple_of, self.pad_token_id)
        rows = [read_row(feature, "features", index) for index, feature in enumerate(features)]
        input_ids, labels, lengths = join(rows)
        total = len(input_ids)
        if not total:
            raise DataError(f"features has {len(rows)} rows without tokens: leave empty rows out.")

        lengths = lengths[lengths > 0]
        padding = -total % self.pad_to_multiple_of if self.pad_to_multiple_of else 0
        if padding:
            # One document, with positions that go up: a repeated 0 would start one per token.
            lengths = np.append(lengths, padding)
            input_ids = np.append(input_ids, np.full(padding, self.pad_token_id))
            labels = np.append(labels, np.full(padding, IGNORE_INDEX))
        ends = np.cumsum(lengths)
        begins = ends - lengths
        labels[begins] = IGNORE_INDEX  # nothing of this document predicts its first token
        positions = np.arange(ends[-1]) - np.repeat(begins, lengths)

        boundaries = np.append(0, ends).astype(np.int32)
        return packed_batch(input_ids, labels, positions, boundaries, int(lengths.max()))


def _collate_by_default(batch: Sequence[Mapping[str, Any]], **_: Any) -> dict[str, Any]:
    return BarqDataCollator()(batch)


# A DataLoader without a collator would stack rows that are equally long, and lose where documents begin.
default_collate_fn_map.update({PackedRow: _collate_by_default, PackedItem: _collate_by_default})
