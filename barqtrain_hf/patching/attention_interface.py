"""``"barq"`` among transformers' attention implementations, and how it decides who computes a call."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, __version__
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from barqtrain_hf.errors import UnsupportedError
from barqtrain_hf.ops import Rope, flash_attention
from barqtrain_hf.ops._backend import autocast_dtype
from barqtrain_hf.patching import documents, probe
from barqtrain_hf.patching.attention_mask import is_ours, mask, window_of
from barqtrain_hf.patching.stock_attention import CHOSEN, is_given, stock_attention

logger = logging.get_logger(__name__)

NAME = "barq"
_MAX_HEAD_DIM = 256
# Arguments by which a stock function adds to the scores, to the softmax or to the result.
_ADDED = ("s_aux", "sinks", "position_bias", "cache", "output_attentions", *CHOSEN)
_PADDED = "a mask that is more than documents and a window (padding, a cache, or the model's own)"
_OTHER_KEYS = (
    "queries and keys differ in number (generation with a cache, or another sequence's keys)"
)
_COMPILED = "torch.compile cannot look for documents; pass cu_seq_lens_q and cu_seq_lens_k"


def register_attention() -> None:
    """Makes ``"barq"`` known to transformers, for ``from_pretrained(..., attn_implementation="barq")`` and
    ``model.set_attn_implementation("barq")``; `patch_model` does it where it installs attention.

    A model that asks for it by name gets attention; `patch_model` adds RoPE inside, and a report.

    Raises:
        UnsupportedError: masks are not made by lengths in this transformers.
    """
    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise UnsupportedError(
            f"attn_implementation={NAME!r} needs masks as transformers 5.4 makes them, not {__version__}.",
            "Upgrade it.",
        )
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


class Rotation(NamedTuple):
    """A rotation of q and k that was not done yet.

    Attributes:
        turn: does it, from q, k, cos and sin.
        cos, sin, interleaved: as in `Rope`.
    """

    turn: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    def of(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k, turned."""
        return self.turn(q, k, self.cos, self.sin)


class Unturned:
    """q or k on its way from the rotary embedding to attention: whatever else touches it gets an error."""

    __slots__ = ("rotation", "tensor")

    def __init__(self, tensor: torch.Tensor, rotation: Rotation) -> None:
        self.tensor, self.rotation = tensor, rotation


class How(NamedTuple):
    """What `attend` knows about a model.

    Attributes:
        stock: "sdpa" or "eager", whichever stands in.
        eager: the model's own eager attention.
        dtypes: those in which the op was found equal.
        tell: is given the reason whenever stock attention is called.
    """

    stock: str
    eager: Callable[..., Any]
    dtypes: frozenset[torch.dtype]
    tell: Callable[[str], None]


def attention(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What transformers calls by the name: for modules that `patch_model` has not bound."""
    if not _takes_functions(type(module).__module__):
        raise UnsupportedError(
            f"{type(module).__name__} works on masks that only its own attention gets.",
            'Load the model with attn_implementation="eager".',
        )
    how = How("sdpa", _eager_of(type(module)), frozenset(probe.DTYPES), _warn_once)
    return attend(module, query, key, value, attention_mask, how, kwargs)


@functools.cache
def _takes_functions(file: str) -> bool:
    """Whether a model of a file says that it takes sdpa or flash attention, if there is a model."""
    names = vars(sys.modules.get(file, object)).values()
    models: list[type[PreTrainedModel]] = [
        c for c in names if isinstance(c, type) and issubclass(c, PreTrainedModel)
    ]
    models = [c for c in models if c is not PreTrainedModel]
    return not models or any(c._supports_sdpa or c._supports_flash_attn for c in models)


def _warn_once(reason: str) -> None:
    if not torch.compiler.is_compiling():
        logger.warning_once(f"attn_implementation={NAME!r} takes stock attention: {reason}")


def _eager_of(cls: type[nn.Module]) -> Callable[..., Any]:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{cls.__name__} has no eager attention to stand in for {NAME!r}."
        )

    scope = getattr(cls.forward, "__globals__", {})
    return scope.get("eager_attention_forward", missing)  # type: ignore[no-any-return]


def attend(
    module: nn.Module,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    how: How,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`flash_attention` where it computes what stock attention does, else stock attention.

    Args:
        module, query, key, value, attention_mask, kwargs: what an attention function is given; query and
            key, [B, H, T, D], may be `Unturned`.
        how: what is known about the model.

    Returns:
        The output [B, T, H, D], and the weights if eager attention took the call.
    """
    rotation: Rotation | None = None
    if isinstance(query, Unturned):
        rotation, query, key = query.rotation, query.tensor, key.tensor
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    causal = causal or is_ours(attention_mask)
    cu_seqlens = None
    unusual = _unusual(query, key, value, attention_mask, how.dtypes, kwargs)
    if unusual is None:
        found = _documents(query, attention_mask, causal, kwargs)
        if isinstance(found, str):
            unusual = found
        else:
            cu_seqlens = found
    if unusual is None:
        window = window_of(attention_mask)
        return _attend(query, key, value, rotation, cu_seqlens, window, causal, kwargs), None
    how.tell(unusual)
    if rotation is not None:
        query, key = rotation.of(query, key)
    use_eager = how.stock == "eager"
    return stock_attention(
        module, query, key, value, attention_mask, use_eager, how.eager, causal, kwargs
    )


def _unusual(
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dtypes: frozenset[torch.dtype],
    kwargs: dict[str, Any],
) -> str | None:
    """Why a call is left to stock attention, or None."""
    if not (type(query) is type(key) is type(value) is torch.Tensor):
        return "called with something else than plain tensors"
    if attention_mask is not None and not is_ours(attention_mask):
        return _PADDED
    if kwargs.get("dropout"):
        return "attention dropout"
    for name in _ADDED:
        if is_given(kwargs, name):
            return f"called with {name}"
    q_shape, k_shape = query.shape, key.shape
    if q_shape[2] != k_shape[2]:
        return _OTHER_KEYS
    if q_shape[0] != k_shape[0] or k_shape != value.shape or q_shape[3] != k_shape[3]:
        return "queries, keys and values differ in batch or head size"
    if q_shape[3] > _MAX_HEAD_DIM or q_shape[1] % k_shape[1]:
        return f"{q_shape[1]} heads of {q_shape[3]} dimensions over {k_shape[1]} key heads"
    if query.device.type not in ("cpu", "cuda") or not (query.device == key.device == value.device):
        return f"queries are on {query.device}, keys on {key.device}, values on {value.device}"
    computed_in = autocast_dtype(value) or value.dtype
    if not (query.dtype in dtypes and value.dtype in dtypes and computed_in in dtypes):
        return f"not probed, or not equal, for queries in {query.dtype} and values in {value.dtype}"
    return None


def _documents(
    query: torch.Tensor, attention_mask: torch.Tensor | None, causal: bool, kwargs: dict[str, Any]
) -> torch.Tensor | str | None:
    """cu_seqlens, None for rows of one document each, or why they are not known."""
    cu_q = kwargs.get("cu_seq_lens_q")
    if cu_q is not None:
        return documents.given(cu_q, kwargs.get("cu_seq_lens_k"), query.device)
    batch, length = query.shape[0], query.shape[2]
    source = documents.source(attention_mask, batch, length, kwargs) if causal else None
    if source is None:
        return None
    if torch.compiler.is_compiling():
        return _COMPILED
    return documents.boundaries(*source, batch)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rotation: Rotation | None,
    cu_seqlens: torch.Tensor | None,
    window: int | None,
    causal: bool,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    # What stock attention computes in.
    dtype, rope = autocast_dtype(value) or value.dtype, None
    if rotation is not None:
        # The op rounds once, to ``dtype``. Queries in another, as normed ones are under autocast, are turned
        # in that one, as stock does.
        if query.dtype is dtype and rotation.cos.dtype in (dtype, torch.float32):
            rope = Rope(rotation.cos, rotation.sin, rotation.interleaved)
        else:
            query, key = rotation.of(query, key)
    batch, _, length, _ = query.shape
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    longest = None
    if cu_seqlens is not None:
        if batch > 1:  # rows one behind another
            q, k, v = (x.reshape(1, batch * length, *x.shape[2:]) for x in (q, k, v))
            if rope is not None:
                cos, sin = (x.expand(batch, -1, -1).flatten(0, 1)[None] for x in rope[:2])
                rope = Rope(cos, sin, rope.interleaved)
        if kwargs.get("cu_seq_lens_q") is not None and type(kwargs.get("max_length_q")) is int:
            longest = kwargs["max_length_q"]
    out = flash_attention(
        q,
        k,
        v,
        causal=causal,
        scale=kwargs.get("scaling"),
        cu_seqlens=cu_seqlens,
        max_seqlen=longest,
        window=window,
        softcap=kwargs.get("softcap"),
        rope=rope,
    )
    return out.view(batch, length, *out.shape[2:])
