"""The plans of `linear_cross_entropy`, its vocabularies and what it returns per token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate
from test_linear_cross_entropy import DEVICES, DTYPES, with_gradients

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.ops import CountedTarget, linear_cross_entropy, raise_bad_target
from barqtrain_hf.ops._cross_entropy_autograd import LinearCrossEntropy
from barqtrain_hf.ops.linear_cross_entropy import linear_cross_entropy_reference

COMBINED: dict[str, Any] = {"softcap": 20.0, "label_smoothing": 0.1, "z_loss": 1e-3}


def case(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: str, ignored: float = 0.2
) -> tuple[torch.Tensor, ...]:
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(vocabulary, width, device=device) * 2 / width**0.5).to(dtype)
    target = torch.randint(vocabulary, (rows,), device=device)
    target[torch.rand(rows, device=device) < ignored] = -100
    return hidden, weight, target


def gate(draw: Any, options: dict[str, Any], budget: int | None, draws: int = 4) -> None:
    """Loss per row, and the gradients of their sum, against fp64 and PyTorch with all logits."""
    one = torch.ones(())
    for reduction in ("none", "sum"):
        ours = {**options, "reduction": reduction, "max_extra_bytes": budget}
        stock = {**options, "reduction": reduction}

        def call(function: Any, opts: dict[str, Any], dtype: torch.dtype | None = None) -> Any:
            def run(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Any:
                upstream = one.to(hidden.device)
                if opts["reduction"] == "none":
                    upstream = upstream.expand(target.shape)
                got = with_gradients(function, opts, dtype)(hidden, weight, None, target, upstream)
                return got if opts["reduction"] == "none" else got[1:]

            return run

        assert_as_accurate(
            draw,
            call(linear_cross_entropy, ours),
            call(linear_cross_entropy_reference, stock),
            call(linear_cross_entropy_reference, stock, torch.float64),
            draws=draws,
        )


# Of [1100, 96] x 1003 columns in 16 bits: everything kept; summed in fp32; a slab, a stash in the weight's
# gradient and some rows computed again; a slab and the stash; nearly everything computed again.
PLANS = {"kept": 1.2, "slab and stash": 0.9, "some again": 0.66, "all again": 0.04}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("options", [{}, COMBINED], ids=["", "combined"])
def test_plans(options: dict[str, Any], plan: str, device: str) -> None:
    rows, width, vocabulary = 1100, 96, 1003
    per_logit = 2 if device == "cuda" else 2 + 4 * (1 + ("softcap" in options))
    budget = int(PLANS[plan] * rows * 1008 * per_logit)
    gate(lambda: case(rows, width, vocabulary, torch.bfloat16, device, 0.0), options, budget)


@pytest.mark.parametrize("device", DEVICES)
def test_summed_in_fp32(device: str) -> None:
    rows, width, vocabulary = 2500, 24, 515
    gate(lambda: case(rows, width, vocabulary, torch.bfloat16, device), {}, 1100 * 520 * 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, COMBINED], ids=["", "combined"])
@pytest.mark.parametrize(
    "vocabulary",
    # Every way a row is laid out over threads and blocks, its borders, and sizes with a rest.
    [17, 255, 4096, 16384, 16385, 32000, 50257, 65536, 65537, 131072, 151936, 262144],
)
@pytest.mark.gpu
def test_vocabularies(vocabulary: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    gate(lambda: case(33, 64, vocabulary, dtype, "cuda"), options, None, draws=6)


@pytest.mark.parametrize("vocabulary", [17, 515])
def test_vocabularies_in_pytorch(vocabulary: int) -> None:
    gate(lambda: case(33, 64, vocabulary, torch.bfloat16, "cpu"), COMBINED, None, draws=20)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_in_every_plan(dtype: torch.dtype, device: str) -> None:
    given = case(700, 64, 1003, dtype, device)
    for budget in (None, 600 * 1008 * 2, 40 * 1008 * 14):
        call = with_gradients(linear_cross_entropy, {"max_extra_bytes": budget})
        one = torch.ones((), device=device)
        first = call(given[0], given[1], None, given[2], one)
        for _ in range(3):
            again = call(given[0], given[1], None, given[2], one)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", [None, 12 * 304 * 14])
def test_per_token_statistics(budget: int | None, dtype: torch.dtype, device: str) -> None:
    hidden, weight, target = case(64, 32, 301, dtype, device)
    weight[7] = weight[3]  # two logits are equal: the first one is the top
    hidden[0] = weight[3] * 8
    hidden[1] = weight[7] * 8
    target[0], target[1] = 3, 7
    shape = (4, 16)
    loss, tokens = linear_cross_entropy(
        hidden.view(*shape, -1).requires_grad_(),
        weight,
        target.view(shape),
        softcap=30.0,
        per_token=True,
        max_extra_bytes=budget,
    )
    logits = 30.0 * torch.tanh(F.linear(hidden, weight).double() / 30.0)
    valid = target != -100
    log_p = logits.log_softmax(-1)
    expected = torch.where(valid, log_p.gather(1, target.clamp(min=0).unsqueeze(1))[:, 0], 0.0)
    entropy = torch.where(valid, -(log_p.exp() * log_p).sum(-1), 0.0)
    torch.testing.assert_close(tokens.log_prob.flatten().double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(tokens.entropy.flatten().double(), entropy, rtol=2e-5, atol=2e-5)
    assert tokens.is_top1.dtype is torch.bool and tokens.is_top1.shape == shape
    top = F.linear(hidden, weight).float()
    first = torch.stack([(row == row.max()).nonzero()[0, 0] for row in top])
    assert torch.equal(tokens.is_top1.flatten(), (first == target) & valid)
    assert not any(t.requires_grad for t in tokens)
    torch.testing.assert_close(loss, -tokens.log_prob.sum() / valid.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_row_weight(trained: bool, reduction: str, device: str) -> None:
    hidden, weight, target = case(40, 24, 61, torch.float32, device)
    row_weight = torch.rand(40, device=device)
    upstream = torch.rand(40, device=device) if reduction == "none" else torch.tensor(1.5)
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        loss = function(h, w, target, row_weight=row_weight, reduction=reduction)
        loss.backward(upstream.to(device))
        results.append([loss.detach(), h.grad, *([w.grad] if trained else [])])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("budget", [None, 12 * 64 * 12])
def test_lora(budget: int | None, reduction: str, dtype: torch.dtype, device: str) -> None:
    """u @ b.T added to the product, with gradients of u and b and none of the weight."""

    def call(function: Any, compute: torch.dtype | None, extra: dict[str, Any]) -> Any:
        def run(
            hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *lora: torch.Tensor
        ) -> list[torch.Tensor]:
            h, u, b = (t.detach().to(compute or t.dtype).requires_grad_() for t in (hidden, *lora))
            loss = function(
                h, weight.to(h.dtype), target, lora=(u, b), reduction=reduction, **extra
            )
            return list(torch.autograd.grad(loss.sum(), (h, u, b)))

        return run

    def draw() -> tuple[torch.Tensor, ...]:
        u = torch.randn(53, 4, device=device).to(dtype)
        b = torch.randn(61, 4, device=device).to(dtype) * 0.3
        return (*case(53, 24, 61, dtype, device), u, b)

    assert_as_accurate(
        draw,
        call(linear_cross_entropy, None, {"max_extra_bytes": budget}),
        call(linear_cross_entropy_reference, None, {}),
        call(linear_cross_entropy_reference, torch.float64, {}),
        draws=20,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_misaligned_and_strided_inputs(trained: bool) -> None:
    hidden, weight, target = case(50, 41, 999, torch.bfloat16, "cuda")
    options: dict[str, Any] = {"max_extra_bytes": 20 * 1000 * 2}
    views = hidden[:, 1:], weight[:, 1:]
    results = []
    for h, w in (views, [v.contiguous() for v in views]):
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_(trained)
        loss = linear_cross_entropy(h, w, target, **options)
        results.append([loss.detach(), *torch.autograd.grad(loss, [h, w] if trained else [h])])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.gpu
def test_cuda_graph_replays_with_other_targets() -> None:
    """No sync is made under capture; ignored rows are then taken along."""
    hidden, weight, target = case(96, 64, 1003, torch.bfloat16, "cuda")
    h, w = hidden.requires_grad_(), weight.requires_grad_()

    def step() -> torch.Tensor:
        h.grad = w.grad = None
        loss = linear_cross_entropy(h, w, target, num_items=torch.ones((), device="cuda"))
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    h.grad = w.grad = None
    with torch.cuda.graph(graph):
        captured = step()
    gradients = [h.grad, w.grad]
    for ignored in (0.1, 0.9):
        target.copy_(case(96, 64, 1003, torch.bfloat16, "cuda", ignored)[2])
        graph.replay()
        torch.cuda.synchronize()
        replayed = [captured.detach().clone(), *(g.clone() for g in gradients)]
        loss = step()
        for mine, theirs in zip(replayed, (loss.detach(), h.grad, w.grad), strict=True):
            assert (mine - theirs).norm() <= 1e-2 * theirs.norm()
    target[3] = 1003
    graph.replay()
    assert torch.isnan(captured)
    with pytest.raises(ArgumentError, match=r"target\[3\] = 1003 is outside"):
        raise_bad_target()
    raise_bad_target()


def test_bad_target_under_compile_is_raised_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call that must not sync notes, the next one that may raises."""
    hidden, weight, target = case(16, 8, 61, torch.float32, "cpu")
    target[:2] = torch.tensor([61, -7])
    apply = LinearCrossEntropy.apply

    def without_sync(*arguments: Any) -> Any:
        *tensors, options, per_row, needs = arguments
        return apply(*tensors, options._replace(counted=None), per_row, needs)

    with monkeypatch.context() as patch:
        patch.setattr(LinearCrossEntropy, "apply", without_sync)
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, target)
    loss.backward()
    assert torch.isnan(loss) and torch.isfinite(hidden.grad).all()
    assert not hidden.grad[:2].any()
    target[:2] = -100
    with pytest.raises(ArgumentError, match=r"target\[0\] = 61 is outside the vocabulary;"):
        linear_cross_entropy(hidden, weight, target)
    assert torch.isfinite(linear_cross_entropy(hidden, weight, target))
    raise_bad_target()


def test_without_sync_equals_compacted() -> None:
    hidden, weight, target = case(40, 24, 61, torch.float32, "cpu", 0.5)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), leaves)
    compiled = torch.compile(
        lambda h, w, t: linear_cross_entropy(h, w, t), fullgraph=True, backend="aot_eager"
    )
    for mine, theirs in zip(
        torch.autograd.grad(compiled(hidden, weight, target), leaves), expected, strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ignored", [0.0, 0.02, 0.5, 1.0])
def test_counted_target(ignored: float, device: str) -> None:
    hidden, weight, target = case(200, 24, 61, torch.float32, device, ignored)
    counted = CountedTarget(target.view(2, 100))
    assert counted.numbers()[0] == int((target != -100).sum())
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    expected = linear_cross_entropy(hidden, weight, target)
    loss = linear_cross_entropy(hidden.view(2, 100, -1), weight, counted)
    assert torch.equal(loss, expected)
    grads = torch.autograd.grad(loss, leaves)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ArgumentError, match="ignore_index=0, but target was counted with -100"):
        linear_cross_entropy(hidden.view(2, 100, -1), weight, counted, ignore_index=0)


def test_bad_extras_name_the_argument() -> None:
    hidden, weight, target = case(5, 8, 61, torch.float32, "cpu")
    with pytest.raises(ArgumentError, match=r"row_weight of shape \(4,\)"):
        linear_cross_entropy(hidden, weight, target, row_weight=torch.ones(4))
    with pytest.raises(ArgumentError, match=r"lora of shapes \(5, 2\) and \(61, 3\)"):
        linear_cross_entropy(hidden, weight, target, lora=(torch.ones(5, 2), torch.ones(61, 3)))
