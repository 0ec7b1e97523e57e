"""Which implementation of an op runs: our CUDA kernel or PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from barqtrain_hf.runtime import cuda_unavailable_reason

Backend = Literal["auto", "cuda", "torch"]
_Result = TypeVar("_Result")
# The training dtypes by their names in CUDA C++.
CUDA_NAMES = {
    torch.float32: "float",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
}

SMALL = 2**20


def small(x: torch.Tensor) -> bool:
    """Whether PyTorch's own kernels are the better ones for an op of one or two of them.

    Up to `SMALL` elements all of them take less than 10 us on the GPU, so that host time is what counts: a
    Python autograd.Function needs some 20 us more than C++ (docs/benchmarks/h200/norms.json).
    """
    return x.is_cuda and x.numel() <= SMALL and not torch.compiler.is_compiling()


def cached(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """functools.lru_cache, but for torch.compile, which would warn that it looks through it."""
    memo = functools.lru_cache(maxsize=1024)(function)  # bounded: some are asked about shapes
    is_compiling = torch.compiler.is_compiling

    @functools.wraps(function)
    def call(*arguments: Any) -> _Result:
        return function(*arguments) if is_compiling() else memo(*arguments)

    return call


@cached
def capability(device: int) -> tuple[int, int]:
    """Of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast computes in where x is, or None where it is off: there an op computes in x's dtype."""
    kind = "cuda" if x.is_cuda else x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def use_cuda(op: str, backend: Backend, tensor: torch.Tensor, unsupported: str | None) -> bool:
    """True if the op's kernel runs for this call.

    Args:
        op: name of the op, for messages.
        backend: what the caller asked for.
        tensor: the main input; it must be on a CUDA device for the kernel.
        unsupported: why the kernel cannot take these inputs, or None.

    Raises:
        ArgumentError: ``backend`` is not one of the three.
        UnsupportedError: ``backend="cuda"`` where the kernel cannot run; says why.
    """
    if backend == "torch":
        return False
    if backend not in ("auto", "cuda"):
        raise ArgumentError(f"{op}: backend={backend!r} must be 'auto', 'cuda' or 'torch'.")
    if tensor.is_cuda:
        reason = unsupported or cuda_unavailable_reason()
        if reason is None:
            return True
    else:
        reason = f"the input is on {tensor.device}; move it to a CUDA device."
    if backend == "cuda":
        raise UnsupportedError(f"{op}: backend='cuda' cannot be used: {reason}")
    return False


def check_dtypes(op: str, **dtypes: torch.dtype) -> None:
    """Refuses dtypes, each given under its argument's name, that are not fp32, fp16 or bf16."""
    for name, dtype in dtypes.items():
        if dtype not in CUDA_NAMES:
            raise ArgumentTypeError(
                f"{op}: {name} is {dtype}; cast it to float32, float16 or bfloat16."
            )
