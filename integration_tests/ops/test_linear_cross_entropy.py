"""linear_cross_entropy against fp64 and against materialised PyTorch, in all its options."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from barqtrain_hf.ops import linear_cross_entropy
from barqtrain_hf.ops.linear_cross_entropy import linear_cross_entropy_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_items": 50.0},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"softcap": 5.0},
    {"logit_scale": 0.3},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 3.0, "logit_scale": 2.0, "label_smoothing": 0.2, "z_loss": 1e-2},
    {"softcap": 3.0, "label_smoothing": 0.2, "z_loss": 1e-2, "reduction": "none"},
]
# Memory for all rows at once, or for ten: full chunks, a last one that is not, strips of 16-bit columns.
BUDGETS = {"kept": None, "chunked": 10 * 64 * 12}
N, H, V = 53, 24, 61


def inputs(dtype: torch.dtype, device: str, bias: bool, reduction: str, factor: float = 1.5) -> Any:
    hidden = torch.randn(2, N, H, device=device).to(dtype)
    weight = (torch.randn(V, H, device=device) * 0.3).to(dtype)
    target = torch.randint(V, (2, N), device=device)
    target[0, :11] = -100
    target[1, ::7] = -100
    # 1.5 is no power of two: an upstream gradient that rounding does not let through for free.
    upstream = torch.rand(2, N) if reduction == "none" else torch.tensor(factor)
    upstream = upstream.to(device)
    return (
        hidden,
        weight,
        torch.randn(V, device=device).to(dtype) if bias else None,
        target,
        upstream,
    )


def with_gradients(function: Any, options: dict[str, Any], dtype: torch.dtype | None = None) -> Any:
    def call(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        upstream: torch.Tensor,
    ) -> list[torch.Tensor]:
        leaves = [
            t.detach().to(dtype or t.dtype).requires_grad_()
            for t in (hidden, weight, bias)
            if t is not None
        ]
        loss = function(
            leaves[0], leaves[1], target, bias=leaves[2] if bias is not None else None, **options
        )
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]

    return call


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_accurate_as_stock(
    options: dict[str, Any], budget: str, bias: bool, dtype: torch.dtype, device: str
) -> None:
    ours = {**options, "max_extra_bytes": BUDGETS[budget]}
    stock = with_gradients(linear_cross_entropy_reference, options)
    exact = with_gradients(linear_cross_entropy_reference, options, torch.float64)
    reduction = options.get("reduction", "mean")
    # A bf16 gradient of weight in strips is rounded before the upstream gradient is known: a power of
    # two is then exact, another number is a second rounding.
    factor = 2.0 if budget == "chunked" and dtype is torch.bfloat16 else 1.5
    skip = 0 if reduction == "none" else 1
    # A scalar loss is one number, whose error is luck; its per-row parts are compared by "none".
    assert_as_accurate(
        lambda: inputs(dtype, device, bias, reduction, factor),
        lambda *args: with_gradients(linear_cross_entropy, ours)(*args)[skip:],
        lambda *args: stock(*args)[skip:],
        lambda *args: exact(*args)[skip:],
        draws=20,
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_in_fp32(options: dict[str, Any]) -> None:
    case = inputs(torch.float32, "cpu", True, options.get("reduction", "mean"))
    ours = with_gradients(linear_cross_entropy, {**options, "max_extra_bytes": 7 * V * 8})(*case)
    exact = with_gradients(linear_cross_entropy_reference, options, torch.float64)(*case)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=2e-6, atol=2e-6)


def test_reference_is_torch_cross_entropy() -> None:
    hidden, weight, bias, target, _ = inputs(torch.float32, "cpu", True, "mean")
    logits = F.linear(hidden, weight, bias).flatten(0, 1)
    expected = F.cross_entropy(logits, target.flatten(), label_smoothing=0.1)
    ours = linear_cross_entropy(hidden, weight, target, bias=bias, label_smoothing=0.1)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "trained", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0)], ids=str
)
def test_only_what_is_trained_gets_a_gradient(trained: tuple[int, ...], reduction: str) -> None:
    hidden, weight, bias, target, upstream = inputs(torch.float32, "cpu", True, reduction)
    for tensor, wanted in zip((hidden, weight, bias), trained, strict=True):
        tensor.requires_grad_(bool(wanted))
    loss = linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction)
    loss.backward(upstream)
    truth = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    reference = linear_cross_entropy_reference(
        truth[0], truth[1], target, bias=truth[2], reduction=reduction
    )
    reference.backward(upstream.double())
    for tensor, exact, wanted in zip((hidden, weight, bias), truth, trained, strict=True):
        if wanted:
            torch.testing.assert_close(tensor.grad.double(), exact.grad, rtol=2e-5, atol=2e-6)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction: str, device: str) -> None:
    hidden = torch.randn(5, H, device=device, requires_grad=True)
    weight = torch.randn(V, H, device=device, requires_grad=True)
    target = torch.full((5,), -100, device=device)
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction)
    assert loss.requires_grad and torch.equal(loss, torch.zeros_like(loss))
    loss.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_no_rows() -> None:
    hidden, weight = torch.randn(0, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0 and not weight.grad.any()


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, _, target, _ = inputs(torch.float32, "cpu", False, "mean")
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight.requires_grad_(), target)
    assert not loss.requires_grad


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_stays_within_the_budget(
    dtype: torch.dtype, softcap: float | None, trained: bool
) -> None:
    """All large tensors alive at once, but for inputs and gradients, fit into max_extra_bytes."""
    rows, vocabulary = 512, 4099
    per_logit = dtype.itemsize + 4 + (4 if softcap else 0)
    budget = 16 * 4104 * per_logit
    hidden = torch.randn(rows, 8).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 8).to(dtype).requires_grad_(trained)
    target = torch.randint(vocabulary, (rows,))
    known = {hidden.untyped_storage().data_ptr(), weight.untyped_storage().data_ptr()}
    alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
    peak = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                # Masks of logits are bool, and gone before the next fp32 copy is made.
                if isinstance(tensor, torch.Tensor) and tensor.dtype is not torch.bool:
                    storage = tensor.untyped_storage()
                    # Beside gradients, of 16-bit products the CPU makes fp32 copies of the weight.
                    sizes = [t.numel() * b for t in (hidden, weight) for b in (2, 4)]
                    if storage.data_ptr() not in known and storage.nbytes() not in sizes:
                        alive[storage.data_ptr()] = weakref.ref(storage)
            storages = [ref() for ref in alive.values()]
            sizes = [s.nbytes() for s in storages if s is not None]
            peak = max(peak, sum(size for size in sizes if size > 2**16))
            return out

    with Watch():
        loss = linear_cross_entropy(hidden, weight, target, softcap=softcap, max_extra_bytes=budget)
    loss.backward()
    assert budget / 3 < peak <= budget


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("slabs", [0.07, 0.3, 1.5])
def test_memory_on_the_gpu(slabs: float, trained: bool) -> None:
    """Beside its gradients the op takes no more than max_extra_bytes and some per-row numbers."""
    rows, width, vocabulary = 4096, 512, 32003
    hidden = torch.randn(rows, width, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, width, device="cuda").bfloat16().requires_grad_(trained)
    target = torch.randint(vocabulary, (rows,), device="cuda")
    budget = int(slabs * rows * vocabulary * 2)

    def step() -> None:
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, target, max_extra_bytes=budget).backward()

    step()
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    gradients = 2 * hidden.numel() * 3 + (2 * weight.numel() if trained else 0)
    assert torch.cuda.max_memory_allocated() - before <= budget + gradients + 2**20


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_bit_for_bit(device: str) -> None:
    case = inputs(torch.bfloat16, device, True, "mean")
    call = with_gradients(linear_cross_entropy, {"max_extra_bytes": 10 * V * 8})
    first = call(*case)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, call(*case), strict=True))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_loss_and_second_backward(dtype: torch.dtype, budget: str) -> None:
    hidden, weight, _, target, _ = inputs(dtype, "cpu", False, "mean")
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def loss() -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, target, max_extra_bytes=BUDGETS[budget])

    once = loss()
    first = torch.autograd.grad(once * 1024.0, leaves, retain_graph=True)
    # A GradScaler's power of two goes through exactly. (Not from 1: there fp16 has subnormal numbers.)
    for mine, theirs in zip(torch.autograd.grad(loss() * 2048.0, leaves), first, strict=True):
        assert torch.equal(mine / 2.0, theirs)
    # What the first pass used up is computed again, with its own factor; what it gave is left alone.
    copies = [g.clone() for g in first]
    again = torch.autograd.grad(once, leaves, torch.tensor(3072.0))
    for mine, theirs, copy in zip(again, first, copies, strict=True):
        assert torch.equal(theirs, copy)
        assert (mine / 3.0 - theirs).norm() <= 5e-3 * theirs.norm()


def test_autocast_computes_in_its_dtype_and_returns_master_gradients() -> None:
    hidden, weight, _, target, _ = inputs(torch.float32, "cpu", False, "mean")
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target)
        stock = F.cross_entropy(
            F.linear(hidden, weight).float().flatten(0, 1), target.flatten(), ignore_index=-100
        )
    torch.testing.assert_close(loss, stock, rtol=1e-5, atol=1e-5)
    assert loss.dtype is torch.float32
    grads = torch.autograd.grad(loss, (hidden, weight))
    for mine, theirs in zip(grads, torch.autograd.grad(stock, (hidden, weight)), strict=True):
        assert mine.dtype is torch.float32
        assert (mine - theirs).norm() < 1e-2 * theirs.norm()


def test_a_batch_without_any_target() -> None:
    hidden = torch.randn(3, H, requires_grad=True)
    target = torch.full((3,), -100)
    loss = linear_cross_entropy(hidden, torch.randn(V, H), target, num_items=torch.tensor(0.0))
    loss.backward()
    assert loss.item() == 0.0 and not hidden.grad.any()


def test_num_items_as_tensor_or_number() -> None:
    hidden, weight, _, target, _ = inputs(torch.float32, "cpu", False, "mean")
    losses = [
        linear_cross_entropy(hidden, weight, target, num_items=n).item()
        for n in (
            50,
            50.0,
            torch.tensor(50),
            torch.tensor(50.0),
            torch.tensor(50, dtype=torch.int32),
        )
    ]
    assert len(set(losses)) == 1
    total = linear_cross_entropy(hidden, weight, target, reduction="sum").item()
    assert math.isclose(losses[0], total / 50, rel_tol=1e-6)


def test_compiled_without_graph_break_or_recompilation() -> None:
    hidden, weight, _, target, _ = inputs(torch.float32, "cpu", False, "mean")
    graphs = 0

    def counting(graph: Any, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    compiled = torch.compile(
        lambda h, w, t: linear_cross_entropy(h, w, t, max_extra_bytes=20 * V * 4) * 1.0,
        fullgraph=True,
        backend=counting,
    )
    for ignored in (0, 3, 17):  # as many rows as there happen to be: no new graph
        t = target.clone()
        t[0, :ignored] = -100
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = compiled(h, w, t)
        grads = torch.autograd.grad(loss, (h, w))
        expected = linear_cross_entropy(h, w, t, max_extra_bytes=20 * V * 4)
        torch.testing.assert_close(loss, expected)
        for mine, theirs in zip(grads, torch.autograd.grad(expected, (h, w)), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert graphs == 1


def test_compiled_per_row_loss_recomputes() -> None:
    hidden, weight, _, target, upstream = inputs(torch.float32, "cpu", False, "none")
    compiled = torch.compile(
        lambda h, w: linear_cross_entropy(h, w, target, reduction="none"),
        fullgraph=True,
        backend="aot_eager",
    )
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    grads = torch.autograd.grad(compiled(h, w), (h, w), upstream)
    expected = linear_cross_entropy(h, w, target, reduction="none")
    for mine, theirs in zip(grads, torch.autograd.grad(expected, (h, w), upstream), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_registered_ops_pass_opcheck() -> None:
    hidden, weight, _, target, _ = inputs(torch.float32, "cpu", False, "mean")
    divisor = torch.tensor(7.0)
    arguments = (
        *(hidden.flatten(0, 1).requires_grad_(), weight.requires_grad_(), None, None, None),
        *(target.flatten(), None, divisor, -100, 0.0, 0.0, None, 1.0, 2**20, torch.float32),
        *(False, True, True, False, [True, True, False, False, False]),
    )
    torch.library.opcheck(torch.ops.barq.linear_cross_entropy.default, arguments)


@pytest.mark.parametrize("label", [V, -1, -99, 2**40])
@pytest.mark.parametrize("device", DEVICES)
def test_label_out_of_range(label: int, device: str) -> None:
    hidden, weight, _, target, _ = inputs(torch.float32, device, False, "mean")
    target[1, 5] = label
    with pytest.raises(ArgumentError, match=rf"target\[{N + 5}\] = {label} is outside .* {V}"):
        linear_cross_entropy(hidden, weight, target)


def test_bad_arguments_name_the_argument() -> None:
    hidden, weight = torch.randn(3, H), torch.randn(V, H)
    target = torch.zeros(3, dtype=torch.int64)

    def fails(error: type[Exception], match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            linear_cross_entropy(*args, **options)

    fails(ArgumentError, r"weight of shape \(61, 23\)", hidden, weight[:, 1:], target)
    fails(ArgumentError, r"target of shape \(2,\)", hidden, weight, target[:2])
    fails(ArgumentError, "target is torch.int32", hidden, weight, target.int())
    fails(ArgumentError, r"bias of shape \(3,\)", hidden, weight, target, bias=torch.zeros(3))
    fails(ArgumentTypeError, "hidden is torch.float64", hidden.double(), weight, target)
    fails(ArgumentTypeError, "weight is torch.float64", hidden, weight.double(), target)
    fails(ArgumentError, "reduction='avg'", hidden, weight, target, reduction="avg")
    fails(ArgumentError, "label_smoothing=1.5", hidden, weight, target, label_smoothing=1.5)
    fails(ArgumentError, "softcap=0", hidden, weight, target, softcap=0.0)
    fails(
        ArgumentError,
        "max_extra_bytes=100 .* at least 512",
        hidden,
        weight,
        target,
        max_extra_bytes=100,
    )
    fails(ArgumentError, "num_items divides", hidden, weight, target, reduction="sum", num_items=3)
    fails(UnsupportedError, "cpu; move it", hidden, weight, target, backend="cuda")
