"""The data pipeline beside TRL's, on the CPU: `python -m barqtrain_hf.benchmarks data`.

Everything is generated: lengths are lognormal ("easy" with a mean of about 400 tokens, "hard" of 1600,
"over" of 900 with documents of up to 200,000), text is made of words of a made-up language. Both sides
use all cores unless the row says otherwise, in one process after the other.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from barqtrain_hf.benchmarks import data_rivals as trl
from barqtrain_hf.benchmarks import data_start
from barqtrain_hf.benchmarks.data_text import documents, train_tokenizer
from barqtrain_hf.benchmarks.harness import Report
from barqtrain_hf.data import (
    BarqDataCollator,
    PackedDataset,
    PackedStream,
    TokenStore,
    pack_sequences,
    tokenize,
)
from barqtrain_hf.data.packing import plan_epoch
from barqtrain_hf.data.store import _claim as claim_store
from barqtrain_hf.errors import DataError

MAX_LENGTH = 4096
ROWS_PER_BATCH = 8
PLANNED = 1_000_000
MOVED = 100_000
THREADS = 2
TEXTS = 50_000
BATCHES = 100
RESUMED_AT = 1500
OURS = "ours"

Ints = npt.NDArray[np.int64]

# (mean, sigma, shortest, longest)
_LENGTHS = {
    "easy": (400, 1.0, 8, MAX_LENGTH),
    "hard": (1600, 0.6, 64, MAX_LENGTH),
    "over": (900, 1.2, 8, 200_000),
}


def lengths(kind: str, count: int) -> Ints:
    """Tokens per document, shape ``[count]``."""
    mean, sigma, low, high = _LENGTHS[kind]
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(drawn, low, high).astype(np.int64)


def run() -> Report:
    """Plans, fill, moving tokens, text to rows, first batch, batches, resuming, tokens lost."""
    report = Report("data")
    with trl.uncached(), tempfile.TemporaryDirectory() as folder:
        _plans(report)
        for kind in ("easy", "hard"):
            _moving(report, kind, Path(folder))
        _gathering(report, Path(folder))
        _lost(report, Path(folder))
        _text(report, Path(folder))
    return report


def _timed(call: Callable[..., Any], *arguments: Any, repeats: int = 1) -> tuple[float, Any]:
    """Seconds of the median run, and the result of the last."""
    seconds, result = [], None
    for _ in range(repeats):
        result = None  # a run must not pay for freeing the one before
        start = time.perf_counter()
        result = call(*arguments)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def _first(make: Callable[[], Iterator[Any]], repeats: int = 3) -> tuple[float, Any]:
    """Seconds until the first item, in the median run, and that item; what stops it is not timed."""
    seconds, item = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        items = make()
        item = next(items)
        seconds.append(time.perf_counter() - start)
        del items
    return statistics.median(seconds), item


def _fill(sizes: Ints, rows: int) -> float:
    return float(sizes.sum() / (rows * MAX_LENGTH))


def _plans(report: Report) -> None:
    for kind in ("easy", "hard"):
        sizes = lengths(kind, PLANNED)
        row = {"part": "plan", "case": f"{PLANNED:,} documents, {kind}"}
        rows = None  # known after the first epoch
        for epoch in (0, 1):
            s, plan = _timed(plan_epoch, sizes, MAX_LENGTH, 0, epoch, rows, repeats=5)
            rows = len(plan.offsets) - 1
            fill = _fill(sizes, rows)
            report.add(**row, implementation=f"{OURS}, epoch {epoch}", ms=s * 1e3, fill=fill)
        s, packed = _timed(pack_sequences, sizes, MAX_LENGTH, repeats=3)
        name = f"{OURS}, pack_sequences, a list of arrays"
        report.add(**row, implementation=name, ms=s * 1e3, fill=_fill(sizes, len(packed)))
        s, rows = _timed(trl.pack, trl.bit_dataset(sizes), MAX_LENGTH, "bfd", None)
        name = "TRL bfd, moving a bit a token"
        report.add(**row, implementation=name, ms=s * 1e3, fill=_fill(sizes, len(rows)))


def _moving(report: Report, kind: str, folder: Path) -> None:
    """Ready tokens to rows; ours packs without moving them, so its batches are counted too."""
    sizes = lengths(kind, MOVED)
    tokens = f"{sizes.sum() / 1e6:.0f} M tokens"
    row = {"part": "move", "case": f"{MOVED:,} documents, {tokens}, {kind}"}
    dataset = trl.token_dataset(sizes, folder / f"{kind}.arrow")
    for processes in (None, 2):
        s, packed = _timed(trl.pack, dataset, MAX_LENGTH, "bfd", processes)
        name, fill = f"TRL bfd, num_proc={processes}", _fill(sizes, len(packed))
        report.add(**row, implementation=name, s=s, fill=fill)
    s, ours = _timed(PackedDataset, dataset, MAX_LENGTH)
    report.add(**row, implementation=f"{OURS}, to rows", s=s, fill=ours.fill)
    more, _ = _timed(_count_batches, ours)
    name = f"{OURS}, to rows and all batches"
    report.add(**row, implementation=name, s=s + more, fill=ours.fill)
    s, rows = _timed(_count, PackedStream(_Cut(sizes), MAX_LENGTH))
    name = f"{OURS}, stream, all rows"
    report.add(**row, implementation=name, s=s, fill=_fill(sizes, rows))


def _gathering(report: Report, folder: Path) -> None:
    """A million documents of a token store: a plan and all its batches, by threads that take turns."""
    sizes = lengths("easy", PLANNED)
    tokens = np.random.default_rng(0).integers(0, 32_000, 1 << 24, dtype=np.int32)
    writer = claim_store(folder / "gathered", bytes(32))
    if writer is None:
        raise DataError(f"{folder / 'gathered'} is being written by another process.")
    for part in np.array_split(sizes, 100):
        writer.push(tokens[: part.sum()], part)
    writer.finish()
    packed = PackedDataset(TokenStore(folder / "gathered"), MAX_LENGTH)

    def plan_and_gather() -> None:
        packed.repack(1)
        with ThreadPoolExecutor(THREADS) as pool:
            turns = range(0, THREADS * ROWS_PER_BATCH, ROWS_PER_BATCH)
            list(pool.map(lambda first: _count_batches(packed, first, THREADS), turns))

    s, _ = _timed(plan_and_gather, repeats=3)
    case = f"{PLANNED:,} documents, {sizes.sum() / 1e6:.0f} M tokens, easy"
    name = f"{OURS}, a store's plan and all batches, {THREADS} threads"
    report.add(part="move", case=case, implementation=name, s=s, fill=packed.fill)


def _count(batches: Iterable[Any]) -> int:
    return sum(1 for _ in batches)


def _count_batches(packed: PackedDataset, first_row: int = 0, turns: int = 1) -> int:
    rows = range(len(packed))
    starts = range(first_row, len(packed), turns * ROWS_PER_BATCH)
    return _count(packed.batch(rows[first : first + ROWS_PER_BATCH]) for first in starts)


class _Cut:
    """Documents of the given sizes, cut from one array."""

    def __init__(self, sizes: Ints) -> None:
        self._sizes = sizes
        self._tokens = np.random.default_rng(0).integers(0, 32_000, sizes.max(), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = self._tokens[: self._sizes[index]]
        return {"input_ids": tokens, "labels": tokens}


def _lost(report: Report, folder: Path) -> None:
    sizes = lengths("over", MOVED // 2)
    case = f"{len(sizes):,} documents, {(sizes > MAX_LENGTH).mean():.1%} longer than a row"
    dataset = trl.token_dataset(sizes, folder / "over.arrow")
    for strategy in ("bfd", "bfd_split"):
        kept = trl.num_tokens(trl.pack(dataset, MAX_LENGTH, strategy, None))
        lost = 1 - kept / int(sizes.sum())
        report.add(part="lost", case=case, implementation=f"TRL {strategy}", share_lost=lost)
    ours = PackedDataset(_Cut(sizes), MAX_LENGTH, overflow="split")
    report.add(
        part="lost",
        case=case,
        implementation=f"{OURS}, overflow='split'",
        share_lost=1 - ours.num_tokens / int(sizes.sum()),
    )


def _text(report: Report, folder: Path) -> None:
    tokenizer = train_tokenizer(folder)
    texts = list(documents(TEXTS))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    case = f"{TEXTS:,} texts, {megabytes:.1f} MB"

    def ours() -> PackedDataset:
        path = folder / "tokens"
        path.unlink(missing_ok=True)
        return PackedDataset(tokenize(texts, tokenizer, path), MAX_LENGTH, overflow="split")

    def again() -> PackedDataset:
        return PackedDataset(TokenStore(folder / "tokens"), MAX_LENGTH, overflow="split")

    row = {"part": "text to rows", "case": case}
    s, packed = _timed(ours)
    report.add(**row, implementation=OURS, s=s, mb_per_s=megabytes / s)
    s, _ = _timed(again, repeats=3)
    report.add(**row, implementation=f"{OURS}, a second run", s=s)
    dataset = trl.text_dataset(texts)
    for processes in (None, 2):
        s, rows = _timed(trl.prepare, dataset, tokenizer, MAX_LENGTH, processes)
        name = f"TRL SFTTrainer, dataset_num_proc={processes}"
        report.add(**row, implementation=name, s=s, mb_per_s=megabytes / s)

    collate = BarqDataCollator()
    _batch(report, OURS, lambda at: collate(packed.__getitems__(at)))
    _batch(report, "TRL, rows as lists and padding-free collator", trl.collate(rows))

    def ours_stream() -> Iterator[Any]:
        return iter(PackedStream(texts, MAX_LENGTH, tokenizer=tokenizer, batch_size=ROWS_PER_BATCH))

    def trl_stream() -> Iterator[Any]:
        return iter(trl.stream(dataset, tokenizer, MAX_LENGTH, ROWS_PER_BATCH))

    row = {"part": "first batch", "case": case}
    for name, make in ((f"{OURS}, stream", ours_stream), ("TRL, IterableDataset", trl_stream)):
        s, _ = _first(make)
        report.add(**row, implementation=name, s=s)
    _resume(report, texts, dataset, tokenizer)
    data_start.measure(report, texts, tokenizer, folder)


def _batch(report: Report, name: str, make: Callable[[range], Any]) -> None:
    starts = range(0, BATCHES * ROWS_PER_BATCH, ROWS_PER_BATCH)

    def make_all() -> None:
        for first in starts:
            make(range(first, first + ROWS_PER_BATCH))

    s, _ = _timed(make_all, repeats=5)
    case = f"{ROWS_PER_BATCH} rows of {MAX_LENGTH}"
    report.add(part="batch", case=case, implementation=name, ms=s / len(starts) * 1e3)


def _resume(report: Report, texts: list[str], dataset: Any, tokenizer: Any) -> None:
    case = f"at row {RESUMED_AT}"
    stream = PackedStream(texts, MAX_LENGTH, tokenizer=tokenizer)
    iterator = iter(stream)
    for _ in islice(iterator, RESUMED_AT):
        pass
    state = stream.state_dict()
    expected = next(iterator)
    del iterator

    resumed = PackedStream(texts, MAX_LENGTH, tokenizer=tokenizer)

    def ours() -> Iterator[Any]:
        resumed.load_state_dict(state)
        return iter(resumed)

    s, row = _first(ours)
    if not row["input_ids"].equal(expected["input_ids"]):
        raise DataError("the stream was resumed somewhere else than it was left.")
    report.add(part="resume", case=case, implementation=f"{OURS}, stream", ms=s * 1e3)
    s, _ = _timed(trl.skip, dataset, tokenizer, MAX_LENGTH, RESUMED_AT)
    report.add(
        part="resume",
        case=case,
        implementation="TRL, IterableDataset and skip_first_batches",
        ms=s * 1e3,
    )
