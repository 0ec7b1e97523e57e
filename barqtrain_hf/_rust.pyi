"""The compiled half of `barqtrain_hf.data`; sources in rust/."""

import numpy as np
import numpy.typing as npt

Plan = tuple[npt.NDArray[np.uint32], npt.NDArray[np.uintp]]

def pack_sequences(lengths: npt.NDArray[np.int64], max_length: int) -> Plan: ...
def plan_epoch(
    lengths: npt.NDArray[np.int64], max_length: int, seed: int, epoch: int, threads: int
) -> Plan: ...
def fit(
    lengths: npt.NDArray[np.int64], max_length: int, overflow: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], tuple[int, int, int, int, int]]: ...
