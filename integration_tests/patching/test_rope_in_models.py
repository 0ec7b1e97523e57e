"""Rotary embedding: told from what a function computes, bound per instance, with the stock one at hand."""

from __future__ import annotations

import gc
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FAMILIES, LEAF_OPS, counts, tiny_model
from side_by_side import assert_equal, assert_no_trace, batch, bound, run
from torch import nn

from barqtrain_hf import patch_model, unpatch_model
from barqtrain_hf.patching import probe, rope


def rotate(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def stock_function(
    interleaved: bool = False, partial: bool = False, keep: str = "", default: int = 1
) -> Callable[..., Any]:
    def apply_rotary_pos_emb(
        q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = default
    ) -> Any:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

        def turn(x: torch.Tensor) -> torch.Tensor:
            dtype = x.dtype
            if keep == "fp32":
                x = x.float()
            size = cos.shape[-1] if partial else x.shape[-1]
            x, rest = x[..., :size], x[..., size:]
            y = torch.cat((x * cos + rotate(x, interleaved) * sin, rest), dim=-1)
            return y.to(dtype) if keep else y

        return turn(q), turn(k)

    return apply_rotary_pos_emb


def rotation_of(function: Callable[..., Any]) -> Any:
    with probe.undisturbed(torch.device("cpu")) as generator:
        return probe.ask(lambda: rope._probe(function, generator))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("keep", ["", "stepwise", "fp32"])
@pytest.mark.parametrize("default", [1, 2])
def test_kinds_of_rotation(interleaved: bool, partial: bool, keep: str, default: int) -> None:
    found = rotation_of(stock_function(interleaved, partial, keep, default))
    assert not isinstance(found, str), found
    assert (found.interleaved, found.partial) == (interleaved, partial)
    assert found.unsqueeze_dims == (default, 3 - default)
    assert found.keep_dtype.keys() == set(rope._DTYPES) and len(rope._DTYPES) == 7
    for (q, cos), kept in found.keep_dtype.items():
        if torch.promote_types(q, cos) is not q:
            assert kept == bool(keep)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (q, k, sin, cos),
        lambda q, k, cos, sin: (q, k, cos, -sin),
        lambda q, k, cos, sin: (q * 0.5, k, cos, sin),
        lambda q, k, cos, sin: (q, k + 1e-3, cos, sin),
        # GLM: of cos only the first half is looked at.
        lambda q, k, cos, sin: (
            q,
            k,
            *(t.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for t in (cos, sin)),
        ),
        lambda q, k, cos, sin: (q[:, :1], k, cos, sin),
    ],
    ids=["swapped", "backwards", "scaled", "shifted", "first half", "one head"],
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_other_functions_are_left_alone(change: Callable[..., Any], interleaved: bool) -> None:
    stock = stock_function(interleaved)

    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return stock(*change(q, k, cos, sin))

    assert isinstance(rotation_of(apply_rotary_pos_emb), str)


def test_a_function_of_other_arguments() -> None:
    assert "missing 1 required" in rotation_of(lambda q, k, cos, sin, mask: (q, k))
    assert "into" in rotation_of(lambda q, k, cos, sin: (q.double(), k.double()))


PACKED = torch.cat([torch.arange(length) for length in (13, 20, 1, 6)])[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows(family: str) -> None:
    """Several documents in a row, each of which starts at position 0."""
    model = tiny_model(family)
    inputs = {**batch(1, PACKED.shape[1]), "position_ids": PACKED, "use_cache": False}
    stock = run(model, inputs)
    report = patch_model(model, {"rms_norm": False, "layer_norm": False, "glu": False})
    assert counts(report).get("rope", 0) == LEAF_OPS[family].get("rope", 0)
    assert_equal(run(model, inputs), stock)
    assert not report.fallbacks, str(report)


def test_bound_on_instances_and_nowhere_else() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    attention = [layer.self_attn for layer in model.model.layers]
    module = sys.modules[type(attention[0]).__module__]
    stock, cls_forward = module.apply_rotary_pos_emb, type(attention[0]).forward
    report, others = patch_model(model), patch_model(other)
    first, second = (a.__dict__["forward"].__func__ for a in attention)
    assert first is second  # one copy for all layers of a model
    assert first is not other.model.layers[0].self_attn.__dict__["forward"].__func__
    assert first.__code__ is cls_forward.__code__
    assert module.apply_rotary_pos_emb is stock is cls_forward.__globals__[rope._NAME]
    assert type(attention[0]).forward is cls_forward
    assert inspect.signature(attention[0].forward).parameters.keys() == (
        inspect.signature(cls_forward).parameters.keys() - {"self"}
    )
    assert first.__module__ == cls_forward.__module__
    # Each model counts for itself.
    q = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    cos = torch.randn(1, 3, 8, dtype=torch.float64)
    found = first.__globals__[rope._NAME](q, q, cos, cos)
    assert torch.equal(found[0], stock(q, q, cos, cos)[0])
    assert report.fallbacks.total() == 1 and not others.fallbacks
    assert_no_trace(model)
    assert bound(other)


def shapes(**changes: Any) -> dict[str, Any]:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    cos, sin = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    return {**{"q": q, "k": k, "cos": cos, "sin": sin}, **changes}


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (shapes(), None),
        (shapes(unsqueeze_dim=1), None),
        (shapes(cos=torch.randn(1, 5, 8), sin=torch.randn(1, 5, 8)), None),
        (
            shapes(q=torch.randn(2, 5, 4, 8), k=torch.randn(2, 5, 2, 8), unsqueeze_dim=2),
            None,
        ),
        (shapes(cos=torch.randn(1, 1, 8), sin=torch.randn(1, 1, 8)), "not of these tokens"),
        (
            shapes(q=torch.randn(1, 4, 5, 8), k=torch.randn(1, 2, 5, 8)),
            "not of these tokens",  # two rows of cos turn one of q
        ),
        (shapes(cos=torch.randn(5, 8), sin=torch.randn(5, 8), unsqueeze_dim=0), "arguments"),
        (shapes(q=torch.randn(1, 2, 4, 5, 8), k=torch.randn(1, 2, 2, 5, 8)), "dimensions"),
        (shapes(cos=torch.randn(2, 5, 8, requires_grad=True)), "gradient"),
        (shapes(cos=torch.randn(2, 5, 8).bfloat16()), "differ in dtype"),
        (shapes(k=torch.randn(2, 2, 5, 8).bfloat16()), "differ in dtype"),
        (shapes(q=nn.Parameter(torch.randn(2, 4, 5, 8))), "plain tensors"),
    ],
)
def test_calls(call: dict[str, Any], why: str | None) -> None:
    model = tiny_model("llama")
    report = patch_model(model)
    scope = model.model.layers[0].self_attn.forward.__func__.__globals__
    stock = sys.modules[type(model).__module__].apply_rotary_pos_emb(**call)
    ours = scope[rope._NAME](**call)
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.dtype is theirs.dtype
        torch.testing.assert_close(mine, theirs)
    reasons = [reason for op, reason in report.fallbacks if op == "rope"]
    assert len(reasons) == (why is not None)
    assert why is None or why in reasons[0]


def test_a_part_of_the_head_is_turned_where_the_function_says_so() -> None:
    for family, partial in (("gpt_neox", True), ("llama", False)):
        original = sys.modules[type(tiny_model(family)).__module__].apply_rotary_pos_emb
        assert rotation_of(original).partial == partial


def test_generation() -> None:
    for family in ("llama", "cohere2", "gpt_neox"):
        model = tiny_model(family)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        ids = torch.arange(3, 12)[None]
        stock = model.generate(ids, **options)
        report = patch_model(model)
        assert torch.equal(model.generate(ids, **options), stock)
        assert not report.fallbacks, str(report)


@pytest.mark.parametrize("family", ["llama", "cohere2"])
def test_torch_compile(family: str) -> None:
    model = tiny_model(family)
    inputs = {**batch(), "use_cache": False}
    stock = run(model, inputs)
    patch_model(model, {"rms_norm": False, "layer_norm": False, "glu": False})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(**inputs)
    torch.testing.assert_close(outputs.logits, stock.logits, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(outputs.loss, list(model.parameters()))
    for mine, theirs in zip(found, stock.gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    unpatch_model(model)  # the guards see that the forward is another one
    torch.testing.assert_close(compiled(**inputs).logits, stock.logits, rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def logged(forward: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    wrapper.__wrapped__ = forward
    return wrapper


class WrappedAttention(Attention):
    @logged
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return apply_rotary_pos_emb(x, x, x, x)[0]


class StrangeAttention(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return apply_rotary_pos_emb(x, x, x, x)[0]


class AttentionByAttribute(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_rotary_pos_emb(x, x, x, x)[0]


def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return q + cos, k + cos


def test_the_report_names_other_attention() -> None:
    model = nn.ModuleList(
        [Attention(), WrappedAttention(), StrangeAttention(), AttentionByAttribute()]
    )
    report = patch_model(model, {"linear_cross_entropy": False})
    reasons = {n: why for (op, why), names in report.skipped.items() if op == "rope" for n in names}
    assert reasons["0"] == reasons["3"] == "its forward does not call apply_rotary_pos_emb"
    assert "is wrapped" in reasons["1"]
    expected = f"{__name__}.apply_rotary_pos_emb is another rotation: its stock code fails"
    assert expected in reasons["2"]
    assert {op for op, _ in report.skipped} == {"rope", "attention"}


def test_a_patched_model_is_freed() -> None:
    model = tiny_model("llama")
    report = weakref.ref(patch_model(model))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None and report() is None


class Base(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x


class KeywordsAndSuper(Base):
    def forward(self, x: torch.Tensor, *, scale: float = 3.0) -> torch.Tensor:
        x = super().forward(x)  # a closure
        cos = torch.ones_like(x[:, 0])
        return scale * apply_rotary_pos_emb(x, x, cos, cos)[0]


def test_defaults_of_keywords_and_closures_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), rope._NAME, stock_function())
    attention, x = KeywordsAndSuper(), torch.randn(2, 3, 5, 8)
    stock = attention(x)
    report = patch_model(attention, {"linear_cross_entropy": False})
    assert report.installed == {"rope": [""]}, str(report)
    torch.testing.assert_close(attention(x), stock)
