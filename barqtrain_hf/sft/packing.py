"""SFTTrainer's packing by our pipeline: its tokens and losses in best-fit rows, without losing a token.

A data set is tokenised by `tokenize` where that gives SFTTrainer's tokens and losses; everything else
(a formatting function, the assistant's turns alone, slow tokenizers) is prepared by SFTTrainer, and
packed here. What SFTTrainer alone can pack stays with it.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from barqtrain_hf.data import (
    BarqDataCollator,
    PackedDataset,
    TokenStore,
    tokenize,
)
from barqtrain_hf.data.batch import sequence_index
from barqtrain_hf.errors import UnsupportedError
from barqtrain_hf.patching import PatchReport

logger = logging.getLogger(__name__)


class Packer:
    """Packs data sets for BarqSFTTrainer and remembers what of it TRL did, and why."""

    def __init__(self) -> None:
        self._reasons: dict[tuple[str, str], str | None] = {}

    def prepare(
        self,
        dataset: Any,
        tokenizer: Any,
        args: Any,
        formatting_func: Any,
        name: str,
        completion_only: bool,
        by_trl: Callable[[Any, bool], Any],
    ) -> Any:
        """A `PackedDataset`, or what SFTTrainer packs.

        Args:
            dataset: the user's.
            tokenizer: the processing class.
            args: an `SFTConfig`.
            formatting_func: makes text of a row, or None.
            name: "train" or what an evaluation is called.
            completion_only: whether prompts bear no loss.
            by_trl: SFTTrainer's preparation of ``dataset``, with a config, packed or not.
        """
        reason = _packing_unsupported(dataset, args)
        self._note("packing", name, reason)
        if reason is not None:
            return by_trl(args, True)
        reason = _tokenizing_unsupported(dataset, tokenizer, args, formatting_func, completion_only)
        if reason is None:
            try:
                tokens: Any = _store(dataset, tokenizer, args.dataset_text_field)
            except UnsupportedError as error:  # of a tokenizer that does something in Python
                reason = error.reason.rstrip(".")
        self._note("tokenizing", name, reason)
        if reason is not None:
            whole = copy.copy(args)
            whole.max_length = None  # what is too long is split, not cut off
            tokens = by_trl(whole, False)
        return PackedDataset(tokens, args.max_length, overflow="split", seed=args.seed)

    def _note(self, op: str, name: str, reason: str | None) -> None:
        self._reasons[op, name] = reason
        if reason is not None:
            logger.info("%s of the %s data set is left to TRL: %s", op, name, reason)

    def tell(self, report: PatchReport) -> None:
        """Puts what was done into a report, instead of what this told it before."""
        for op in ("packing", "tokenizing"):
            report.forget(op)
        for (op, name), reason in self._reasons.items():
            if reason is None:
                report.add(op, f"the {name} data set")
            else:
                report.skip(op, f"the {name} data set", f"{reason}, so TRL does it")


def _packing_unsupported(dataset: Any, args: Any) -> str | None:
    """Why SFTTrainer must pack this data set itself, or None."""
    if not isinstance(dataset, datasets.Dataset):
        return f"{type(dataset).__name__} has no length to plan rows with"
    if args.packing_strategy not in ("bfd", "bfd_split"):
        return f"packing_strategy={args.packing_strategy!r} lets documents run on into the next row"
    if args.max_length is None or dataset.format["type"] == "custom":
        return "it refuses the data set or its max_length"  # TRL raises, and says why
    return None


def _tokenizing_unsupported(
    dataset: Any, tokenizer: Any, args: Any, formatting_func: Any, completion_only: bool
) -> str | None:
    """Why SFTTrainer must make the tokens of this data set itself, or None."""
    columns = set(dataset.column_names)
    kinds = columns & {"prompt", "completion", "messages"}
    if "input_ids" in columns:
        return "it is tokenised already"
    if formatting_func is not None:
        return "there is a formatting_func"
    if args.assistant_only_loss:
        return "assistant_only_loss takes masks from the chat template"
    if "conversations" in columns:
        return "conversations are converted to messages first"
    if kinds and args.dataset_text_field in columns and args.dataset_text_field != "text":
        return f"it has {args.dataset_text_field!r} beside {', '.join(sorted(kinds))}"
    if "prompt" in columns and not completion_only:
        return "completion_only_loss=False puts a loss on prompts, too"
    if not getattr(tokenizer, "is_fast", False):
        return f"{type(tokenizer).__name__} has no fast version"
    if tokenizer.eos_token is None:
        return "the tokenizer has no eos_token"
    return None


def _store(dataset: Any, tokenizer: Any, text_field: str) -> TokenStore:
    """The tokens of a ``datasets.Dataset``, from the file of an earlier run where there is one.

    The file is beside the data set's own, where the results of ``map`` are too. A data set that lives in
    memory has its tokens in a temporary file, which goes with the store.
    """
    # The store knows what its tokens depend on; the name keeps those of other runs from being replaced.
    parts = (
        dataset._fingerprint,
        text_field,
        tokenizer.name_or_path,
        len(tokenizer),
        tokenizer.chat_template,
    )
    name = f"barq-{hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()}.tokens"
    column = text_field if text_field in dataset.column_names else None
    files = dataset.cache_files if datasets.is_caching_enabled() else []
    if files and os.access(folder := Path(files[0]["filename"]).parent, os.W_OK):
        return tokenize(dataset, tokenizer, folder / name, text_column=column)
    temporary = tempfile.mkdtemp(prefix="barqtrain_hf-")
    try:
        store = tokenize(dataset, tokenizer, Path(temporary) / name, text_column=column)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    weakref.finalize(store, shutil.rmtree, temporary, ignore_errors=True)
    return store


@dataclass
class SFTCollator(BarqDataCollator):
    """`BarqDataCollator` with what SFTTrainer's own adds: the document of each token, for convolutions."""

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As `BarqDataCollator`, with ``seq_idx``, int32 of shape ``[1, T]``."""
        batch = super().__call__(features)
        batch["seq_idx"] = sequence_index(batch["cu_seq_lens_q"])  # in place: it is a PackedBatch
        return batch
