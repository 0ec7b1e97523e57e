"""The compiled half of `barqtrain_hf.data`; sources in rust/."""

import numpy as np
import numpy.typing as npt

def pack_sequences(
    lengths: npt.NDArray[np.int64], max_length: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uintp]]: ...
