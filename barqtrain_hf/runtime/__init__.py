"""The only code that knows CuPy: compiles `cuda/*.cu` at run time and launches it on torch's stream."""

from barqtrain_hf.runtime.device import (
    architecture,
    cuda_unavailable_reason,
    peak_flops,
    sm_count,
)
from barqtrain_hf.runtime.launch import Kernel, Launch
from barqtrain_hf.runtime.tensor_map import Matrix, TensorMaps

__all__ = [
    "Kernel",
    "Launch",
    "Matrix",
    "TensorMaps",
    "architecture",
    "cuda_unavailable_reason",
    "peak_flops",
    "sm_count",
]
