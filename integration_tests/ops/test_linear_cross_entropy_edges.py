"""`linear_cross_entropy` where two of its features meet, and at its limits."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from test_linear_cross_entropy import DEVICES
from test_linear_cross_entropy_plans import case
from torch.utils.checkpoint import checkpoint

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.ops import linear_cross_entropy
from barqtrain_hf.ops import linear_cross_entropy as op
from barqtrain_hf.ops._chunked_cross_entropy import Batch
from barqtrain_hf.ops.linear_cross_entropy import linear_cross_entropy_reference


def everything(dtype: torch.dtype, rows: int = 60, device: str = "cpu") -> dict[str, torch.Tensor]:
    """All tensors that the op takes, by name."""
    hidden, weight, target = case(rows, 24, 61, dtype, device)
    return {
        "hidden": hidden,
        "weight": weight,
        "target": target,
        "bias": torch.randn(61, device=device).to(dtype),
        "u": torch.randn(rows, 4, device=device).to(dtype),
        "b": (torch.randn(61, 4, device=device) * 0.3).to(dtype),
        "row_weight": torch.rand(rows, device=device) + 0.5,
    }


def gradients(
    function: Any, given: dict[str, torch.Tensor], trained: str, **options: Any
) -> list[torch.Tensor]:
    """Loss, and gradients of the inputs whose names are in ``trained``."""
    leaves = {k: v.detach().clone() for k, v in given.items()}
    for name in trained.split():
        leaves[name].requires_grad_()
    hidden, weight, target = (leaves.pop(k) for k in ("hidden", "weight", "target"))
    all_leaves = {"hidden": hidden, "weight": weight, **leaves}
    if "u" in leaves:
        leaves["lora"] = (leaves.pop("u"), leaves.pop("b"))  # type: ignore[assignment]
    loss = function(hidden, weight, target, **leaves, **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).view(loss.shape)
    grads = torch.autograd.grad(loss, [all_leaves[k] for k in trained.split()], upstream)
    return [loss.detach(), *grads]


def assert_near(mine: list[torch.Tensor], truth: list[torch.Tensor], tolerance: float) -> None:
    for i, (m, t) in enumerate(zip(mine, truth, strict=True)):
        assert (m.double() - t).norm() <= tolerance * t.norm().clamp(min=1e-9), f"output {i}"


def exact(given: dict[str, torch.Tensor], trained: str, **options: Any) -> list[torch.Tensor]:
    wide = {k: v if v.dtype is torch.int64 else v.double() for k, v in given.items()}
    return gradients(linear_cross_entropy_reference, wide, trained, **options)


ALL = "hidden weight bias u b"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("trained", [ALL, "hidden", "hidden bias u b", "weight", "b"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_everything_at_once_compiled(
    trained: str, reduction: str, dtype: torch.dtype, device: str
) -> None:
    torch._dynamo.reset()
    given = everything(dtype, device=device)
    # A scale that fp16 gradients need, as GradScaler gives it.
    options: dict[str, Any] = {"reduction": reduction}
    compiled = torch.compile(
        lambda *args, **kwargs: op(*args, **kwargs) * 64.0, fullgraph=True, backend="aot_eager"
    )
    mine = gradients(compiled, given, trained, **options)
    truth = [64.0 * t for t in exact(given, trained, **options)]
    assert_near(mine, truth, TOLERANCE[dtype])
    eager = gradients(lambda *a, **k: op(*a, **k) * 64.0, given, trained, **options)
    assert_near(eager, truth, TOLERANCE[dtype])


def test_compiled_under_autocast() -> None:
    given = everything(torch.float32)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        mine = gradients(compiled, given, ALL)
        eager = gradients(op, given, ALL)
    assert all(g.dtype is torch.float32 for g in mine)
    assert not torch.equal(mine[1], gradients(op, given, ALL)[1])  # it did compute in bf16
    assert_near(mine, [e.double() for e in eager], 2e-2)


def test_compiled_statistics_have_no_gradient() -> None:
    hidden, weight, target = case(30, 24, 61, torch.float32, "cpu")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    loss, tokens = compiled(hidden.requires_grad_(), weight, target, per_token=True)
    assert loss.requires_grad and not any(t.requires_grad for t in tokens)


@pytest.mark.parametrize("trained", [ALL, "hidden bias u b"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_many_chunks_and_a_second_backward(
    trained: str, reduction: str, dtype: torch.dtype, device: str
) -> None:
    """Sums over chunks stay in fp32, whichever pass takes them; strips take bias and LoRA along."""
    given = everything(dtype, rows=3000, device=device)
    extra = 64 * 16 * 12
    truth = exact(given, trained, reduction=reduction)
    mine = gradients(op, given, trained, reduction=reduction, max_extra_bytes=extra)
    assert_near(mine, truth, TOLERANCE[dtype])
    if reduction == "mean":
        leaves = {k: v.clone().requires_grad_() for k, v in given.items() if k in trained.split()}
        tensors = {**given, **leaves}
        loss = op(
            *(tensors[k] for k in ("hidden", "weight", "target")),
            bias=tensors["bias"],
            lora=(tensors["u"], tensors["b"]),
            row_weight=tensors["row_weight"],
            max_extra_bytes=extra,
        )
        torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        again = torch.autograd.grad(loss, list(leaves.values()), torch.tensor(0.5, device=device))
        order = [trained.split().index(k) + 1 for k in leaves]
        assert_near(list(again), [truth[i] for i in order], TOLERANCE[dtype])


@pytest.mark.parametrize("ignored", [0.02, 0.5])
@pytest.mark.parametrize("device", DEVICES)
def test_a_class_that_is_ignored(ignored: float, device: str) -> None:
    hidden, weight, target = case(200, 24, 61, torch.float32, device, 0.0)
    target[torch.rand(200, device=device) < ignored] = 7
    target[3] = 7
    for options in ({}, {"max_extra_bytes": 20 * 64 * 8}):
        results = []
        for function, extra in ((op, options), (linear_cross_entropy_reference, {})):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            function(h, w, target, ignore_index=7, **extra).backward()
            results.append([h.grad, w.grad])
        assert not results[0][0][3].any()
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_inside_a_checkpoint(trained: bool) -> None:
    hidden, weight, target = case(40, 24, 61, torch.float32, "cpu")
    results = []
    for wrapped in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)

        def loss_of(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return op(h * 1.5, w, target) * 2.0

        loss = checkpoint(loss_of, h, w, use_reentrant=False) if wrapped else loss_of(h, w)
        loss.backward()
        results.append([h.grad, *([w.grad] if trained else [])])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_loss_without_backward_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = case(40, 24, 61, torch.float32, "cpu")
    made: list[weakref.ref[torch.Tensor]] = []
    empty = torch.empty

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(weakref.ref(out := empty(*args, **kwargs)))
        return out

    gc.collect()
    gc.disable()
    try:
        for extra in (None, 10 * 64 * 8):
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", watched)
                loss = op(
                    hidden.requires_grad_(), weight.requires_grad_(), target, max_extra_bytes=extra
                )
            del loss
        assert made and all(ref() is None for ref in made)
    finally:
        gc.enable()


@pytest.mark.parametrize("ignored", [0.0, 0.02, 0.5])
def test_only_rows_with_a_target_are_multiplied(
    ignored: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, target = case(400, 24, 61, torch.float32, "cpu", ignored)
    rows: list[int] = []
    of = Batch.of.__func__  # type: ignore[attr-defined]

    def watched(cls: Any, *args: Any) -> Batch:
        batch = of(cls, *args)
        rows.append(batch.head.rows)
        return batch

    monkeypatch.setattr(Batch, "of", classmethod(watched))
    op(hidden, weight, target)
    assert rows == [400 if ignored < 0.05 else int((target != -100).sum())]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"per_token": True}], ids=str)
def test_the_smallest_budget(options: dict[str, Any], dtype: torch.dtype) -> None:
    """One row is always enough, whether the budget is given or chosen."""
    for rows in (1, 4):
        hidden, weight, target = case(rows, 8, 1024, dtype, "cpu", 0.0)
        for trained in (False, True):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
            for extra in (None, 1024 * (dtype.itemsize + 4 * (1 + len(options)))):
                result = op(h, w, target, max_extra_bytes=extra, **options)
                loss = result[0] if "per_token" in options else result
                loss.backward()
                assert torch.isfinite(h.grad).all()


def test_the_users_precision_setting_is_left_alone() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    pair = torch._C._get_cublas_allow_bf16_reduced_precision_reduction()
    hidden, weight, target = case(5, 8, 61, torch.float32, "cpu")
    op(hidden.requires_grad_(), weight, target).backward()
    assert matmul.allow_bf16_reduced_precision_reduction is before
    assert torch._C._get_cublas_allow_bf16_reduced_precision_reduction() == pair


def test_limits_of_the_extras() -> None:
    hidden, weight, target = case(6, 8, 61, torch.float32, "cpu", 0.0)
    target[2] = -100
    row_weight = torch.ones(6)
    row_weight[2] = torch.inf
    assert torch.isfinite(op(hidden, weight, target, row_weight=row_weight))
    assert op(hidden, weight, target, num_items=torch.tensor([3.0])).shape == ()
    with pytest.raises(ArgumentError, match=r"num_items of shape \(2,\) must be one number"):
        op(hidden, weight, target, num_items=torch.ones(2))
    with pytest.raises(ArgumentError, match=r"logit_scale=0\.0 must be positive"):
        op(hidden, weight, target, logit_scale=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [12288, 24576, 98304, 196608])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_of_just_48_kib(vocabulary: int, dtype: torch.dtype) -> None:
    """Shared memory beyond 48 KiB must be asked for, the kernel's own included."""
    for rows in (20, 300):
        hidden, weight, target = case(rows, 16, vocabulary, dtype, "cuda", 0.0)
        h = hidden.requires_grad_()
        loss = linear_cross_entropy(h, weight, target, max_extra_bytes=2**26)
        (grad,) = torch.autograd.grad(loss, h)
        wide = hidden.detach().double().requires_grad_()
        truth = linear_cross_entropy_reference(wide, weight.double(), target)
        assert_near([grad], list(torch.autograd.grad(truth, wide)), 2e-2)


@pytest.mark.gpu
def test_a_strided_target() -> None:
    hidden, weight, target = case(50, 24, 61, torch.float32, "cuda", 0.0)
    pair = torch.stack((target, target.flip(0)), 1)
    assert torch.equal(op(hidden, weight, pair[:, 0]), op(hidden, weight, target))
