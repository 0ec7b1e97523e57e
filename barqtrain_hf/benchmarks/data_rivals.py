"""What TRL does with the same data: packing, `SFTTrainer`'s preparation, its collator and streams."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from barqtrain_hf.errors import UnsupportedError

try:
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc
    import trl
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
except ImportError as error:
    raise UnsupportedError(
        f"This benchmark measures TRL beside ours, and {error.name} is not installed.",
        "pip install 'barqtrain_hf[sft]'",
    ) from None


@contextmanager
def uncached() -> Iterator[None]:
    """While it lasts ``datasets`` does all work anew, and shows no bars."""
    caching, bars = datasets.is_caching_enabled(), not datasets.are_progress_bars_disabled()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if caching:
            datasets.enable_caching()
        if bars:
            datasets.enable_progress_bars()


def token_dataset(sizes: npt.NDArray[np.int64], path: Path) -> Any:
    """Documents of the given sizes: input_ids int32 and labels int64, as SFTTrainer has them.

    In a file, which the processes of ``datasets.map`` map; of a table in memory each gets a copy.
    """
    random = np.random.default_rng(0)
    types = (("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int64())))
    schema = pa.schema(types)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for first in range(0, len(sizes), 1000):
            part = sizes[first : first + 1000]
            offsets = pa.array(np.append(0, np.cumsum(part)).astype(np.int32))
            ids = random.integers(0, 32_000, int(part.sum()), dtype=np.int32)
            columns = (pa.array(ids), pa.array(ids.astype(np.int64)))
            lists = [pa.ListArray.from_arrays(offsets, column) for column in columns]
            writer.write_batch(pa.RecordBatch.from_arrays(lists, schema=schema))
    return datasets.Dataset.from_file(str(path))


def bit_dataset(sizes: npt.NDArray[np.int64]) -> Any:
    """Documents of the given sizes with a bit for each token, so that next to nothing is moved."""
    offsets = pa.array(np.append(0, np.cumsum(sizes)).astype(np.int32))
    bits = pa.array(np.zeros(int(sizes.sum()), dtype=bool))
    return datasets.Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, bits)}))


def text_dataset(texts: list[str]) -> Any:
    """A data set with the column ``text``."""
    return datasets.Dataset.from_dict({"text": texts})


def pack(dataset: Any, max_length: int, strategy: str, processes: int | None) -> Any:
    """Rows, with the windows of 1000 documents that SFTTrainer has."""
    return trl.pack_dataset(dataset, max_length, strategy, {"num_proc": processes})


def num_tokens(packed: Any) -> int:
    """Tokens in all rows."""
    chunks = packed.data.column("input_ids").chunks
    return sum(pc.sum(pc.list_value_length(chunk)).as_py() for chunk in chunks)


def prepare(dataset: Any, tokenizer: Any, max_length: int, processes: int | None) -> Any:
    """The packed rows that SFTTrainer makes when it is constructed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(
            output_dir=folder,
            packing=True,
            max_length=max_length,
            dataset_num_proc=processes,
            report_to=[],
            use_cpu=True,
            bf16=False,
        )
        trainer = trl.SFTTrainer(
            model=LlamaForCausalLM(config),
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        return trainer.train_dataset


def collate(rows: Any) -> Callable[[Iterable[int]], Any]:
    """Fetches rows and collates them, as a DataLoader without workers does."""
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    rows.reset_format()
    return lambda indices: collator(rows.__getitems__(list(indices)))


def stream(dataset: Any, tokenizer: Any, max_length: int, batch_size: int) -> Any:
    """A DataLoader over text that is tokenised and packed as it is read."""
    from torch.utils.data import DataLoader

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenizer([text + tokenizer.eos_token for text in batch["text"]])["input_ids"]
        return {"input_ids": ids, "labels": ids}

    tokens = dataset.to_iterable_dataset().map(encode, batched=True, remove_columns=["text"])
    rows = trl.pack_dataset(tokens, max_length, "bfd")
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return DataLoader(rows, batch_size=batch_size, collate_fn=collator)


def skip(dataset: Any, tokenizer: Any, max_length: int, rows: int) -> Any:
    """The batch after ``rows`` rows of a stream, the way Trainer resumes."""
    from accelerate import skip_first_batches

    return next(iter(skip_first_batches(stream(dataset, tokenizer, max_length, 1), rows)))
