"""Packed batches: documents laid end to end in rows, which never see each other.

The planning is Rust (``barqtrain_hf._rust``); tokens stay in NumPy until a batch is made.
"""

from barqtrain_hf.data.collator import BarqDataCollator
from barqtrain_hf.data.dataset import PackedDataset
from barqtrain_hf.data.packing import pack_sequences

__all__ = ["BarqDataCollator", "PackedDataset", "pack_sequences"]
