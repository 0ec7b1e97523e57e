"""A layer's input that is cheap to compute again is not kept for the layer's backward pass.

That is the product in a gated MLP and, for LoRA layers, a norm's output. The layer runs under saved-tensor
hooks. What it saves of its input is replaced by the recipe, whose own inputs the graph holds anyway; all else
is saved as ever. The recipe runs again in the backward pass, just before the layer needs the tensor, and
gives the same bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import distributed, nn
from torch.autograd.graph import saved_tensors_hooks

from barqtrain_hf.ops._backend import SMALL

_autograd = torch._C._autograd
_PLAIN = (torch.Tensor, nn.Parameter)
_CAST = "ToCopyBackward0"
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")  # none permutes


def applies(layer: nn.Module, product: torch.Tensor) -> bool:
    """Whether autograd would keep ``product`` for the backward pass of ``layer``, and nobody else decides."""
    if type(layer) is nn.Linear and not layer.weight.requires_grad:
        return False  # a frozen layer saves its weight only
    return _may_replace(product)


def _may_replace(product: torch.Tensor) -> bool:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not product.requires_grad:
        return False
    # Checkpointing and offloading work by hooks of their own, of which only the innermost are called.
    return (
        _autograd._saved_tensors_hooks_is_enabled()
        and _autograd._top_saved_tensors_default_hooks(True) is None
        and product.numel() > 0
    )


def call_without_saving(
    layer: nn.Module,
    product: torch.Tensor,
    op: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
) -> Any:
    """``layer(product)``; what autograd would keep of the product is computed again instead.

    Args:
        layer: called as a module, so that its hooks fire.
        product: ``op(*inputs)``.
        op: deterministic; its own backward pass keeps ``inputs``.
        inputs: plain tensors.
    """
    with saved_tensors_hooks(_Pack(product, op, inputs), _unpack):
        return layer(product)


class Noted:
    """The product that was noted last. Of two threads that note at once, one keeps its products.

    Attributes:
        wanted: whether any layer has asked; until then nobody needs to note.
    """

    wanted: ClassVar[bool] = False
    last: ClassVar[_Pack | None] = None

    @classmethod
    def forget(cls, product: weakref.ref[torch.Tensor]) -> None:
        """Lets go of the inputs when the product is gone."""
        last = cls.last
        if last is not None and last.product is product:
            cls.last = None


def note(
    product: torch.Tensor, op: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]
) -> None:
    """Tells `without_saving` how ``product`` was made; arguments as of `call_without_saving`.

    Only the last product is remembered, and only while it lives: it is meant for the layers that are called
    with it next. Small ones are not worth the time that it takes.
    """
    if _may_replace(product) and product.numel() > SMALL:
        Noted.last = _Pack(product, op, inputs)


def without_saving(x: torch.Tensor) -> AbstractContextManager[Any]:
    """While it lasts, what autograd would keep of ``x`` is computed again instead, if it was noted."""
    Noted.wanted = True
    pack = Noted.last
    if pack is None or pack.product() is not x or not _may_replace(x):
        return nullcontext()
    return saved_tensors_hooks(pack, _unpack)


class _Recipe:
    """How to get a saved tensor back."""

    __slots__ = ("dtype", "inputs", "op", "size", "stride", "versions")

    def __init__(self, pack: _Pack, saved: torch.Tensor) -> None:
        self.op = pack.op
        # A sharded parameter's data may be gone in another layer's backward pass; it is small.
        self.inputs = tuple(
            t.clone() if p else t for t, p in zip(pack.inputs, pack.sharded, strict=True)
        )
        self.versions = tuple(
            0 if p else version for version, p in zip(pack.versions, pack.sharded, strict=True)
        )
        self.dtype, self.size, self.stride = saved.dtype, saved.size(), saved.stride()

    def run(self) -> torch.Tensor:
        for tensor, version in zip(self.inputs, self.versions, strict=True):
            _check_version(tensor, version)
        with torch.no_grad():
            tensor = self.op(*self.inputs).to(self.dtype)
            if tensor.size() != self.size or tensor.stride() != self.stride:
                tensor = tensor.as_strided(self.size, self.stride)
            return tensor


class _Kept(NamedTuple):
    """A saved tensor with its version, which autograd does not check where there are hooks."""

    tensor: torch.Tensor
    version: int


class _Pack:
    """Tells the product among the tensors that a layer saves. Holds no reference to it."""

    def __init__(
        self,
        product: torch.Tensor,
        op: Callable[..., torch.Tensor],
        inputs: Sequence[torch.Tensor],
    ) -> None:
        # Without their history: a saved tensor must not keep a part of the graph alive.
        self.op, self.inputs = op, tuple(tensor.detach() for tensor in inputs)
        self.versions = tuple(tensor._version for tensor in inputs)
        several = distributed.is_available() and distributed.is_initialized()
        self.sharded = tuple(several and type(tensor) is nn.Parameter for tensor in inputs)
        self.product = weakref.ref(product, Noted.forget)
        self.address, self.version = product.data_ptr(), product._version
        self.dtype, self.numel, self.device = product.dtype, product.numel(), product.device
        self.node = _behind_views(product.grad_fn)

    def __call__(self, tensor: torch.Tensor) -> _Kept | _Recipe:
        plain = type(tensor) in _PLAIN and tensor.layout is torch.strided
        if plain and (self._is_product(tensor) or self._is_cast(tensor)):
            return _Recipe(self, tensor)
        # A leaf as it is: under ZeRO-3 its data comes and goes. Of others only the data: a layer that
        # saves its output would hold itself alive.
        return _Kept(tensor if tensor.grad_fn is None else tensor.detach(), tensor._version)

    def _is_product(self, tensor: torch.Tensor) -> bool:
        """The product or a view of all of it, which nothing has written to since."""
        return (
            tensor.data_ptr() == self.address
            and tensor.device == self.device
            and tensor.dtype is self.dtype
            and tensor.numel() == self.numel
            and tensor._version == self.version
        )

    def _is_cast(self, tensor: torch.Tensor) -> bool:
        """The product in another dtype: LoRA casts its input to its weights' dtype, and autocast may cast
        that back. Only where a single cast of the product as it was made gives the same bits.
        """
        product = self.product()
        if product is None or product._version != self.version or not product.is_contiguous():
            return False
        if tensor.device != self.device:
            return False
        if tensor._version or tensor.numel() != self.numel or not tensor.is_contiguous():
            return False
        node = _behind_views(tensor.grad_fn)
        if node is None or node.name() != _CAST:
            return False
        source = _behind_views(node.next_functions[0][0])
        if source is self.node:
            return True
        if source is None or source.name() != _CAST:
            return False
        between = [metadata.dtype for metadata in getattr(source, "_input_metadata", ())]
        return (
            _behind_views(source.next_functions[0][0]) is self.node
            and between == [torch.float32]
            and tensor.dtype is self.dtype  # there and back again
        )


def _behind_views(node: Any) -> Any:
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node


def _unpack(saved: _Kept | _Recipe) -> torch.Tensor:
    if type(saved) is _Recipe:
        return saved.run()
    _check_version(*saved)  # type: ignore[misc]
    return saved[0]  # type: ignore[index]


def _check_version(tensor: torch.Tensor, version: int) -> None:
    """As autograd does for what it saves itself."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: [{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; "
            f"expected version {version} instead."
        )
