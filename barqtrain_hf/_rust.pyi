"""The compiled half of `barqtrain_hf.data`; sources in rust/."""

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt32 = npt.NDArray[np.uint32]
Plan = tuple[UInt32, npt.NDArray[np.uintp]]
Layout = tuple[int, int, int, int]

def pack_sequences(lengths: Int64, max_length: int) -> Plan: ...
def plan_epoch(
    lengths: Int64, max_length: int, seed: int, epoch: int, rows: int | None, threads: int
) -> Plan: ...
def plan_window(
    lengths: Int64,
    waited: npt.NDArray[np.uint8],
    max_length: int,
    name: tuple[int, int, int],
    last: bool,
) -> tuple[UInt32, npt.NDArray[np.uintp], UInt32]: ...
def balance(costs: Sequence[int], ranks: int, turns: int) -> list[int]: ...
def fit(
    lengths: Int64, max_length: int, overflow: str
) -> tuple[Int64, Int64, tuple[int, int, int, int, int]]: ...
def assemble(
    ids: Int32,
    labels: Int32 | None,
    starts: Int64,
    lengths: Int64,
    order: UInt32,
    offsets: Int64,
    rows: Sequence[int],
    padding: tuple[int, int] | None,
) -> tuple[Int64, Int64, Int64, Int32, int]: ...
def verify_store(path: str | os.PathLike[str], key: bytes | None) -> Layout: ...

class StoreWriter:
    @staticmethod
    def claim(path: str | os.PathLike[str], key: bytes) -> StoreWriter | None: ...
    def push(self, tokens: Int32, lengths: Int64) -> None: ...
    def finish(self) -> Layout: ...
    def abandon(self) -> None: ...

class TextTokenizer:
    def __init__(self, json: str, split_special_tokens: bool, threads: int) -> None: ...
    def encode(
        self,
        texts: Sequence[str],
        prompts: Sequence[str] | None,
        add_special_tokens: bool,
        eos: str | None,
        spans: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> tuple[Int32, Int64]: ...
