"""The compiled half of `barqtrain_hf.data`; sources in rust/."""

import numpy as np
import numpy.typing as npt

def pack_sequences(
    lengths: npt.NDArray[np.int64], max_length: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uintp]]: ...
def pack_in_order(
    lengths: npt.NDArray[np.int64], order: npt.NDArray[np.uint32], max_length: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uintp]]: ...
