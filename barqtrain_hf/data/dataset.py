"""A data set whose items are packed rows."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, Protocol, SupportsIndex, get_args

import numpy as np
import numpy.typing as npt
import torch

from barqtrain_hf import _rust
from barqtrain_hf.data.batch import PackedBatch, packed_batch
from barqtrain_hf.data.files import DataFiles
from barqtrain_hf.data.fit import fit_documents
from barqtrain_hf.data.packing import non_negative_int, plan_epoch, positive_int
from barqtrain_hf.data.progress import progress
from barqtrain_hf.data.ranks import row_costs
from barqtrain_hf.data.rows import ROW_KEYS, Row, Tokens, join, read_row, stored
from barqtrain_hf.data.source import open_dataset
from barqtrain_hf.data.store import TokenStore
from barqtrain_hf.data.summary import Packed, summary_of
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, DataError

logger = logging.getLogger(__name__)

Overflow = Literal["error", "split", "truncate", "drop"]

# Enough to hide the cost of a read, few enough that their int64 copies stay in cache.
_ROWS_PER_READ = 1000


class SizedRows(Protocol):
    """What `PackedDataset` reads: a list of dicts, a torch or Hugging Face data set."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class PackedDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Documents packed into rows of at most ``max_length`` tokens; map-style, one item per row.

    All tokens are read once, into two flat int32 arrays, or stay in the file of a `TokenStore`. The
    rows are a pure function of the document lengths, ``max_length``, ``seed`` and the epoch
    (`repack`).

    Rows become a batch by `BarqDataCollator`, which `BarqTrainer` and a plain DataLoader take by
    themselves; pass it as ``data_collator`` to a stock Trainer. Rows stacked by another collator would
    not keep documents apart in every model.

    Args:
        dataset: sized and indexable, or `DataFiles`; rows are dicts with ``input_ids`` and ``labels``
            (lists, tensors or arrays, equally long). Masks, ``seq_lengths`` and ``position_ids`` are
            honoured as `BarqDataCollator` honours them. A ``datasets.Dataset`` is read by column,
            without making Python lists. Or a `TokenStore`.
        max_length: tokens a row can hold.
        overflow: what happens to a document longer than that. ``"error"`` refuses it; ``"split"``
            cuts it into documents of ``max_length`` tokens, each of which loses the label of its
            first token; ``"truncate"`` keeps its start; ``"drop"`` leaves it out. Pieces of cut
            documents that bear no loss, such as those of a long prompt, are left out.
        seed: chooses which short documents share a row, and shuffles the rows, since those of long
            documents are made first.

    Attributes:
        num_documents: documents in the rows; a split document counts once.
        num_tokens: tokens in the rows.
        split_documents: documents cut into several.
        truncated_tokens: tokens cut off by ``"truncate"``.
        dropped_documents: documents left out by ``"drop"``, for having no tokens, or because all that
            was left of them bears no loss.
        dropped_tokens: tokens in them, and in pieces left out for bearing no loss.
        fill: share of the rows' capacity that holds tokens.
        lengths: tokens of each row in this epoch, int64, shape ``[len(self)]``.

    Raises:
        DataError: ``dataset`` is empty or unlabelled, a row is malformed, an id is out of range, or
            a document is too long and ``overflow`` is ``"error"``.
        ArgumentError: ``max_length``, ``overflow`` or ``seed`` has an impossible value.
        ArgumentTypeError: ``dataset`` has no length or is no data set (a DatasetDict), or
            ``max_length`` or ``seed`` is not an integer.
    """

    def __init__(
        self,
        dataset: SizedRows | TokenStore,
        max_length: int,
        *,
        overflow: Overflow = "error",
        seed: int = 0,
    ) -> None:
        started = time.perf_counter()
        self.max_length = positive_int("max_length", max_length)
        if overflow not in get_args(Overflow):
            raise ArgumentError(
                f"overflow is {overflow!r}: choose one of {', '.join(get_args(Overflow))}."
            )
        self._seed = non_negative_int("seed", seed)

        self._tokens = dataset if isinstance(dataset, TokenStore) else _read_tokens(dataset)
        lengths = self._tokens.lengths
        try:
            self._starts, self._lengths, counts = fit_documents(
                self._tokens.input_ids, self._tokens.labels, lengths, self.max_length, overflow
            )
        except ValueError as error:
            raise DataError(str(error)) from None
        self.num_tokens = int(self._lengths.sum())
        (
            self.num_documents,
            self.split_documents,
            self.truncated_tokens,
            self.dropped_documents,
            self.dropped_tokens,
        ) = counts
        if not self.num_documents:
            raise DataError(
                f"dataset has {len(lengths)} documents and none is left to train on "
                f"({self.dropped_documents} dropped): pass documents of 1 to "
                f"max_length={self.max_length} tokens, or overflow='split'."
            )

        self._num_rows: int | None = None
        self.repack(0)
        self.fill = self.num_tokens / (len(self) * self.max_length)

        lost = self.split_documents or self.truncated_tokens or self.dropped_documents
        logger.log(
            logging.WARNING if lost else logging.INFO,
            "%s It took %.1f s.",
            self.summary(),
            time.perf_counter() - started,
        )

    def repack(self, epoch: int) -> None:
        """Packs anew for ``epoch``: other documents share a row, in another order.

        `len`, `fill` and the counts are the same in every epoch. `BarqTrainer` calls this; under a
        stock Trainer the rows stay those of epoch 0. It is not named ``set_epoch``, which accelerate
        calls in some set-ups only, and not when it resumes within an epoch.

        Raises:
            ArgumentError: ``epoch`` is negative, or 2**64 or more.
            ArgumentTypeError: it is not an integer.
        """
        self._order, self._offsets = plan_epoch(
            self._lengths, self.max_length, self._seed, epoch, self._num_rows
        )
        self._num_rows = len(self)
        self.lengths = np.add.reduceat(self._lengths[self._order], self._offsets[:-1])

    def costs(self, linear: int) -> npt.NDArray[np.int64]:
        """What each row of this epoch costs to train on; see `barqtrain_hf.data.ranks.row_costs`."""
        return row_costs(self._lengths, self._order, self._offsets, linear)

    def summary(self) -> str:
        """One line: what was packed, how full the rows are, and what was lost."""
        losses = (
            self.num_documents,
            self.split_documents,
            self.truncated_tokens,
            self.dropped_documents,
            self.dropped_tokens,
        )
        packed = Packed(self.num_documents, len(self), self.num_tokens)
        return summary_of(packed, self.max_length, losses)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __repr__(self) -> str:
        size = f"{self.num_documents:,} documents, {self.num_tokens:,} tokens"
        rows = f"{len(self):,} rows of {self.max_length:,}, {self.fill:.1%} full"
        return f"<PackedDataset {size} in {rows}>"

    def __getitem__(self, index: SupportsIndex) -> dict[str, torch.Tensor]:
        """The packed row: int64 tensors, ready for `BarqDataCollator`.

        Returns:
            ``input_ids``, ``labels`` and ``position_ids`` of shape ``[T]``, ``T <= max_length``,
            and ``seq_lengths`` of shape ``[documents]``. Positions restart with each document,
            whose first label is -100.
        """
        row = operator.index(index)
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of a PackedDataset with {len(self)} rows")
        input_ids, labels, positions, boundaries, _ = self._assemble([row], None)
        return PackedItem(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            # They too say where documents begin: Trainer takes what is no argument of the model,
            # such as seq_lengths, out of each row before it collates.
            position_ids=torch.from_numpy(positions),
            seq_lengths=torch.from_numpy(np.diff(boundaries).astype(np.int64)),
        )

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[PackedRow]:
        """What a DataLoader hands to its collator: rows that `BarqDataCollator` makes a batch of at once."""
        return [PackedRow(self, operator.index(index)) for index in indices]

    def batch(
        self, rows: Sequence[int], pad_to_multiple_of: int | None = None, pad_token_id: int = 0
    ) -> PackedBatch:
        """What `BarqDataCollator` makes of these rows, in one call and without Python lists.

        Args:
            rows: indices of rows, zero or more.
            pad_to_multiple_of: as in `BarqDataCollator`.
            pad_token_id: as in `BarqDataCollator`.

        Raises:
            IndexError: there is no such row.
            ArgumentError: ``pad_to_multiple_of`` or ``pad_token_id`` has an impossible value.
            ArgumentTypeError: one of them is not an integer.
            DataError: there are no rows, or more than 2**31 - 1 tokens in them.
        """
        if not rows:
            raise DataError("rows is empty: a batch needs at least one row.")
        padding = None
        if pad_to_multiple_of is not None:
            multiple = positive_int("pad_to_multiple_of", pad_to_multiple_of)
            padding = multiple, non_negative_int("pad_token_id", pad_token_id, 31)
        count = len(self)
        for row in rows:
            if not 0 <= row < count:
                raise IndexError(f"row {row} of a PackedDataset with {count} rows")
        return packed_batch(*self._assemble(rows, padding))

    def _assemble(self, rows: Sequence[int], padding: tuple[int, int] | None) -> Any:
        try:
            return _rust.assemble(
                self._tokens.input_ids,
                self._tokens.labels,
                self._starts,
                self._lengths,
                self._order,
                self._offsets,
                rows,
                padding,
            )
        except ValueError as error:
            raise DataError(str(error)) from None


class PackedItem(dict[str, torch.Tensor]):
    """A row's tensors, of a type by which torch's default collation knows them."""


class PackedRow(Mapping[str, torch.Tensor]):
    """Row ``row`` of a `PackedDataset`, read when it is looked at."""

    def __init__(self, dataset: PackedDataset, row: int) -> None:
        self.dataset = dataset
        self.row = row

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.dataset[self.row][key]

    def __iter__(self) -> Iterator[str]:
        return iter(("input_ids", "labels", "position_ids", "seq_lengths"))

    def __len__(self) -> int:
        return 4


def _read_tokens(dataset: Any) -> Tokens:
    """All tokens, labels and document lengths of ``dataset``."""
    dataset = open_dataset(dataset)
    if isinstance(dataset, DataFiles):
        return _read_files(dataset)
    try:
        num_rows = len(dataset)
    except TypeError:
        raise ArgumentTypeError(
            f"dataset is a {type(dataset).__name__}, which has no length: PackedDataset plans all "
            "rows ahead, so pass a list or a map-style data set."
        ) from None
    if not num_rows:
        raise DataError("dataset is empty: pass at least one document.")
    # Rows made by a transform exist only when they are asked for one by one.
    by_column = hasattr(dataset, "with_format") and dataset.format["type"] != "custom"
    arrow = dataset.with_format("arrow") if by_column else None
    chunks = []
    with progress("Reading tokens", "rows", num_rows) as bar:
        for first in range(0, num_rows, _ROWS_PER_READ):
            indices = range(first, min(first + _ROWS_PER_READ, num_rows))
            chunk = (
                _read_rows(dataset, indices)
                if arrow is None
                else _read_columns(dataset, arrow, indices)
            )
            chunks.append(stored(chunk, "dataset"))
            bar.update(len(indices))
    return Tokens(*map(np.concatenate, zip(*chunks, strict=True)))


def _read_files(files: DataFiles) -> Tokens:
    chunks, rows = [], iter(files.only(ROW_KEYS))
    with progress("Reading tokens", "rows") as bar:
        while found := list(islice(rows, _ROWS_PER_READ)):
            chunk = join([read_row(row, "dataset", index) for index, row in enumerate(found)])
            chunks.append(stored(chunk, "dataset"))
            bar.update(len(found))
    if not chunks:
        raise DataError(f"{files!r} has no rows: pass files with at least one document.")
    return Tokens(*map(np.concatenate, zip(*chunks, strict=True)))


def _read_rows(dataset: SizedRows, indices: range) -> Row:
    return join([read_row(dataset[index], "dataset", index) for index in indices])


def _read_columns(dataset: Any, arrow: Any, indices: range) -> Row:
    """`_read_rows` for a ``datasets.Dataset``, by Arrow column and without Python lists."""
    table = arrow[indices.start : indices.stop]
    columns = {key: _flat_column(table[key]) for key in ROW_KEYS if key in table.column_names}
    if not columns.keys() >= {"input_ids", "labels"} or None in columns.values():
        return _read_rows(dataset, indices)  # which names the row at fault
    flat = {key: column[0] for key, column in columns.items() if column}
    lengths = {key: column[1] for key, column in columns.items() if column}
    mask = flat.get("attention_mask")
    if (
        not columns.keys() & {"seq_lengths", "position_ids"}
        and np.array_equal(lengths["input_ids"], lengths["labels"])
        and (mask is None or (len(mask) == len(flat["labels"]) and (mask == 1).all()))
    ):
        return Row(flat["input_ids"], flat["labels"], lengths["input_ids"])
    split = {key: np.split(flat[key], np.cumsum(lengths[key])[:-1]) for key in columns}
    return join(
        [
            read_row({key: split[key][at] for key in columns}, "dataset", index)
            for at, index in enumerate(indices)
        ]
    )


def _flat_column(column: Any) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]] | None:
    """Items and row lengths of an Arrow column of integer lists; None for any other column."""
    lists = column.combine_chunks()
    if not hasattr(lists, "value_lengths") or lists.null_count:
        return None
    items = lists.flatten()
    if items.null_count:
        return None
    values = items.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "iub":
        return None
    return values, lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
