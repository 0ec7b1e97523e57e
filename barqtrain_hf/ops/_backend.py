"""Which implementation of an op runs: our CUDA kernel or PyTorch."""

from __future__ import annotations

from typing import Literal

import torch

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from barqtrain_hf.runtime import cuda_unavailable_reason

Backend = Literal["auto", "cuda", "torch"]
# The training dtypes by their names in CUDA C++.
CUDA_NAMES = {
    torch.float32: "float",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
}


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


def check_dtype(op: str, name: str, tensor: torch.Tensor) -> None:
    """Refuses tensors that are not fp32, fp16 or bf16."""
    if tensor.dtype not in CUDA_NAMES:
        raise ArgumentTypeError(
            f"{op}: {name} is {tensor.dtype}; cast it to float32, float16 or bfloat16."
        )
