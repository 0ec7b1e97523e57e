"""Packed batches: documents laid end to end in rows, which never see each other.

Tokenising, planning and the assembly of batches are Rust (``barqtrain_hf._rust``), on all cores and
without the GIL; no token becomes a Python object.
"""

from barqtrain_hf.data.collator import BarqDataCollator
from barqtrain_hf.data.dataset import PackedDataset
from barqtrain_hf.data.files import DataFiles
from barqtrain_hf.data.packing import pack_sequences
from barqtrain_hf.data.store import TokenStore, tokenize
from barqtrain_hf.data.stream import PackedStream
from barqtrain_hf.data.tokenizer import FastTokenizer

__all__ = [
    "BarqDataCollator",
    "DataFiles",
    "FastTokenizer",
    "PackedDataset",
    "PackedStream",
    "TokenStore",
    "pack_sequences",
    "tokenize",
]
