"""What is known of a batch's documents on the host, so that nobody has to ask the device for it.

At every forward pass transformers looks into ``position_ids`` for documents, and so does our attention. Each
waits for the device, which then has nothing to do until the layers are queued. No one needs to look

- into a batch that came with its boundaries on the host, and
- where the caller gives nothing but ids, neither positions nor a mask nor a cache: a model of transformers
  then numbers each row's tokens from 0 on. Whether it does is looked up once for each model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import masking_utils

from barqtrain_hf.ops._documents import know_documents
from barqtrain_hf.ops._targets import capturing

_stock = masking_utils.find_packed_sequence_indices
# Of position_ids: their version, and whether a row has more than one document.
_packed = WeakTensorKeyDictionary()
# The model that makes its positions itself in the current forward pass.
_making: ContextVar[nn.Module | None] = ContextVar("_making", default=None)
# Models that number each row's tokens from 0 on whatever the tokens are.
_counts_from_zero: WeakSet[nn.Module] = WeakSet()
_lock, _users = threading.Lock(), 0


def remember(position_ids: torch.Tensor, cu_seqlens: torch.Tensor, boundaries: list[int]) -> None:
    """Tells what is in a packed row.

    Args:
        position_ids: [1, T], as the model will get them.
        cu_seqlens: [documents + 1] int32, the same.
        boundaries: the values of ``cu_seqlens``.
    """
    know_documents(cu_seqlens, boundaries)
    _note(position_ids, len(boundaries) > 2)


def are_single(position_ids: torch.Tensor) -> bool:
    """Whether each row of these positions is known to be one document."""
    packed = _known(position_ids)
    if packed is None and _making.get() in _counts_from_zero:
        # Also for layers that run again in the backward pass, after this forward pass.
        _note(position_ids, False)
        return True
    return packed is False


@contextmanager
def forward_pass(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Lets transformers know of documents what is known, while ``model`` runs on keyword ``inputs``."""
    # Positions may depend on what else is given: on images, on lists of lengths. Flags say nothing of them.
    given = {n for n, value in inputs.items() if value is not None and type(value) is not bool}
    makes = given == {"input_ids"} and isinstance(inputs["input_ids"], torch.Tensor)
    token = _making.set(model if makes and _is_stock(model) else None)
    _answer(+1)
    try:
        yield
    finally:
        _answer(-1)
        _making.reset(token)


def _is_stock(model: nn.Module) -> bool:
    """Whether transformers makes the positions: another's code may start anew behind some tokens, and that a
    batch had none of those says nothing about the next one."""
    base: Any = getattr(model, "base_model", model)
    # FSDP2 makes a class of its own of every class.
    classes = [cls.__module__.partition(".")[0] for cls in type(base).__mro__]
    return next((package for package in classes if package != "torch"), "") == "transformers"


def _answer(step: int) -> None:
    """transformers asks us as long as there is a forward pass, in any thread."""
    global _users
    with _lock:
        _users += step
        masking_utils.find_packed_sequence_indices = _find if _users else _stock


def _find(position_ids: torch.Tensor) -> torch.Tensor | None:
    """``find_packed_sequence_indices`` of transformers."""
    if _is_traced(position_ids):  # what is known of this batch would be taken for known of all
        return _stock(position_ids)  # type: ignore[no-any-return]
    packed = _known(position_ids)
    if packed is not None:
        # The same as theirs, which asks whether the last of each row is 0.
        steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
        return (steps != 1).cumsum(-1) if packed else None
    model = _making.get()
    if model in _counts_from_zero:
        return None
    # A single token is numbered 0 by many.
    if model is not None and position_ids.dim() == 2 and position_ids.shape[1] > 1:
        count = torch.arange(position_ids.shape[1], device=position_ids.device)
        if bool((position_ids == count).all()):
            _counts_from_zero.add(model)
            return None
    return _stock(position_ids)  # type: ignore[no-any-return]


def _is_traced(position_ids: torch.Tensor) -> bool:
    """Whether a compiler, an exporter or a CUDA graph records this pass; as transformers' is_tracing."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(position_ids) is not torch.Tensor  # a fake one, or torch.fx's
        or capturing(position_ids.device)
    )


def _note(position_ids: torch.Tensor, packed: bool) -> None:
    if not position_ids.is_inference():  # nothing says whether such a tensor was written to
        _packed[position_ids] = position_ids._version, packed


def _known(position_ids: torch.Tensor) -> bool | None:
    if position_ids.is_inference():
        return None
    version, packed = _packed.get(position_ids, (-1, None))
    return packed if version == position_ids._version else None
