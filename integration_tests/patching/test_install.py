"""patch_model: what it matches, what it leaves alone, and that it comes out without a trace."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from models import FAMILIES, LEAF_OPS, counts, tiny_model
from side_by_side import (
    assert_as_accurate,
    assert_equal,
    assert_no_trace,
    batch,
    bound,
    run,
)
from torch import nn

from barqtrain_hf import BarqConfig, patch_model, unpatch_model
from barqtrain_hf.errors import ArgumentTypeError
from barqtrain_hf.patching import FusedLoss, head_unsupported, probe

IDS = torch.arange(3, 23)[None]


# The three dtype regimes of training, and fp32.
REGIMES = {
    "fp32": (torch.float32, False),
    "fp32 weights, autocast": (torch.float32, True),
    "bf16 weights, autocast": (torch.bfloat16, True),
    "bf16": (torch.bfloat16, False),
}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_model_computes_the_same(family: str, regime: str) -> None:
    dtype, autocast = REGIMES[regime]
    model, inputs = tiny_model(family, dtype), batch()
    truth = run(copy.deepcopy(model).float(), inputs)
    stock = run(model, inputs, autocast)
    report = patch_model(model)
    assert "linear_cross_entropy" in report.installed, str(report)
    assert counts(report) == LEAF_OPS[family], str(report)
    # GPT-2 has no rotary embedding; attention is for GPUs.
    skipped = {op for op, _ in report.skipped}
    assert skipped == ({"rope", "attention"} if family == "gpt2" else {"attention"}), str(report)
    ours = run(model, inputs, autocast, fused=True)
    if regime == "fp32":
        assert_equal(ours, stock)
    else:
        assert_as_accurate(ours, stock, truth)
    assert not report.fallbacks, str(report)
    assert_no_trace(model)
    assert torch.equal(run(model, inputs, autocast).logits, stock.logits)


def test_installing_twice_is_installing_once() -> None:
    model = tiny_model("llama")
    first = patch_model(model)
    forwards = {
        n: m.__dict__["forward"] for n, m in model.named_modules() if "forward" in m.__dict__
    }
    assert patch_model(model) is first
    assert forwards == {
        n: m.__dict__["forward"] for n, m in model.named_modules() if "forward" in m.__dict__
    }
    unpatch_model(model)
    unpatch_model(model)  # and out twice is out once
    assert bound(model) == []
    assert patch_model(model).installed
    assert len(first.installed["rms_norm"]) == 5


def test_config_chooses() -> None:
    model = tiny_model("llama")
    report = patch_model(model, {"rms_norm": False, "glu": False, "rope": False})
    assert set(report.installed) == {"linear_cross_entropy"}
    assert len(bound(model)) == 2
    patch_model(model, {"rms_norm": False})  # what is missing comes in
    assert counts(report) == {"glu": 2, "rope": 2}
    patch_model(model)
    assert counts(report) == LEAF_OPS["llama"]
    unpatch_model(model)
    assert bound(model) == []
    report = patch_model(tiny_model("llama"), BarqConfig(linear_cross_entropy=False))
    assert set(report.installed) == {"rms_norm", "glu", "rope"}
    report = patch_model(tiny_model("gpt2"), {"rms_norm": True, "layer_norm": False})
    assert counts(report) == {"glu": 2}


def test_a_model_that_was_unpatched_has_a_new_report() -> None:
    model = tiny_model("llama")
    before = patch_model(model)
    installed = dict(before.installed)
    unpatch_model(model)
    after = patch_model(model, {"rope": False, "linear_cross_entropy": False})
    assert before.installed == installed and {"rope", "linear_cross_entropy"} <= set(installed)
    assert set(after.installed) == set(installed) - {"rope", "linear_cross_entropy"}


def test_no_class_and_no_random_state_is_touched() -> None:
    model = tiny_model("gemma2")
    classes = {type(m) for m in model.modules()}
    before = {c: dict(vars(c)) for c in classes}
    module = sys.modules[type(model).__module__]
    globals_before = dict(vars(module))
    state = torch.random.get_rng_state()
    patch_model(model)
    model(IDS)
    assert dict(vars(module)) == globals_before
    unpatch_model(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(dict(vars(c)) == before[c] for c in classes)
    assert not any(p.grad is not None for p in model.parameters())


def test_a_custom_loss_is_left_alone() -> None:
    model = tiny_model("llama")
    model.loss_function = lambda logits, labels, **kwargs: logits.float().square().mean()
    report = patch_model(model)
    assert "linear_cross_entropy" not in report.installed
    assert "not plain cross-entropy" in str(report)
    assert "lm_head" not in bound(model)


def test_a_model_someone_else_patched_is_left_alone() -> None:
    model = tiny_model("llama")
    norm = model.model.norm
    norm.forward = lambda x: x
    report = patch_model(model)
    assert "already patched" in str(report)
    assert "model.norm" not in report.installed["rms_norm"]
    root = tiny_model("llama")
    root.forward = root.forward
    assert "already patched" in str(patch_model(root))


def test_use_kernels_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "use_kernels", True)
    assert "use_kernels=True" in str(patch_model(model))


def test_a_model_without_a_head() -> None:
    report = patch_model(tiny_model("llama").model)
    assert "has no LM head" in str(report)
    assert "rms_norm" in report.installed
    assert "not a transformers model" in str(patch_model(nn.Linear(3, 3)))


def test_unusual_calls_fall_back_and_are_counted() -> None:
    model = tiny_model("llama")
    report = patch_model(model)
    norm, x = model.model.norm, torch.randn(2, 3, 32, dtype=torch.float64)
    assert torch.equal(norm(x), type(norm).forward(norm, x))
    reason = "not probed, or not equal, for torch.float64 and a weight in torch.float32"
    assert report.fallbacks == {("rms_norm", reason): 1}
    assert "1 calls took the stock forward" in str(report)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_copy_of_a_patched_model_stands_alone(family: str) -> None:
    model = tiny_model(family)
    patch_model(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fresh = tiny_model(family)
    torch.testing.assert_close(twin(IDS).logits, fresh(IDS).logits)
    loss = twin(input_ids=IDS, labels=IDS, fused_loss=FusedLoss()).loss
    torch.testing.assert_close(loss, fresh(IDS, labels=IDS).loss)
    unpatch_model(twin)
    assert bound(twin) == [] != bound(model)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_pickled_model_is_loaded_stock_and_can_be_patched(family: str, anywhere: None) -> None:
    """Mixtral's experts have another method than forward."""
    model = tiny_model(family)
    installed = patch_model(model).installed
    pickled = pickle.dumps(model)
    fresh, loaded = tiny_model(family), pickle.loads(pickled)
    assert torch.equal(loaded(IDS).logits, fresh(IDS).logits)
    assert head_unsupported(loaded, {"labels": IDS}) is not None
    report = patch_model(loaded, leaves=False)  # as BarqTrainer does, leaves only when it trains
    assert set(report.installed) == {"linear_cross_entropy"}
    assert patch_model(loaded).installed == installed
    assert_equal(run(loaded, batch(), fused=True), run(fresh, batch()))
    assert not report.fallbacks
    assert_no_trace(loaded)
    assert_no_trace(pickle.loads(pickled))


def test_signature_is_the_stock_one() -> None:
    import inspect

    model: Any = tiny_model("llama")
    stock = inspect.signature(model.forward)
    patch_model(model)
    assert inspect.signature(model.forward) == stock


@pytest.mark.parametrize(
    "setting",
    [
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.set_float32_matmul_precision('high')",
        "pass",
    ],
)
def test_probes_work_in_full_precision(setting: str) -> None:
    """Stock in TF32 is too far from fp64 to be compared with."""

    def precision() -> str:
        return str(torch.backends.cuda.matmul.fp32_precision)

    legacy, inside = "allow" in setting or "set_" in setting, []
    try:
        exec(setting)
        before = precision()
        probe.full_precision()(lambda: inside.append(precision()))()
        assert inside == ["ieee"] and precision() == before
        if legacy:  # torch refuses to say if the two ways do not agree
            assert torch.backends.cuda.matmul.allow_tf32
    finally:
        if legacy:
            torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


def test_report_of_nothing() -> None:
    report = patch_model(nn.ReLU(), {"linear_cross_entropy": False})
    assert "nothing to install" in str(report)
    assert repr(report) == "<PatchReport installed: nothing; print it for the reasons>"


def test_report_in_a_line_and_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from barqtrain_hf.patching import install

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(install, "cuda_unavailable_reason", lambda: "torch sees no CUDA device")
    model = tiny_model("llama")
    report = patch_model(model)
    model.model.norm(torch.randn(2, 5, 32).double())
    assert repr(patch_model(model)).startswith(
        "<PatchReport installed: linear_cross_entropy ×1, rms_norm ×5, glu ×2, rope ×2; not everywhere: "
    )
    assert "; 1 calls took the stock forward; print it" in repr(report)
    assert str(report).count("no CUDA device: what is installed runs as its PyTorch reference") == 1


@pytest.mark.parametrize("patch", [patch_model, unpatch_model])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("gpt2", r"model is 'gpt2', a name: load it first .*from_pretrained\('gpt2'\)"),
        (None, "model is of type NoneType: pass a model"),
        (nn.ReLU, "model is ReLU: pass a model, an instance"),
    ],
)
def test_what_is_no_model(patch: Any, wrong: Any, words: str) -> None:
    with pytest.raises(ArgumentTypeError, match=words):
        patch(wrong)


def test_fp64_is_left_alone() -> None:
    report = patch_model(tiny_model("llama").double())
    assert not report.installed
    assert "float64" in str(report)


def test_mixture_of_experts_and_its_router_loss() -> None:
    model = tiny_model("mixtral")
    report = patch_model(model)
    assert "linear_cross_entropy" in report.installed, str(report)
    inputs = {"input_ids": IDS, "labels": IDS}
    fused = model(**inputs, fused_loss=FusedLoss()).loss
    torch.testing.assert_close(fused, model(**inputs).loss)
    assert head_unsupported(model, inputs) is None
    assert "router" in str(head_unsupported(model, {**inputs, "output_router_logits": True}))
    model.config.output_router_logits = True
    assert "router" in str(head_unsupported(model, inputs))


def test_calls_that_need_the_stock_forward() -> None:
    model = tiny_model("llama")
    inputs: dict[str, Any] = {"input_ids": IDS, "labels": IDS}
    assert "not patched" in str(head_unsupported(model, inputs))
    patch_model(model)
    assert head_unsupported(model, inputs) is None
    for extra in (
        {"labels": None},
        {"logits_to_keep": 1},
        {"logits_to_keep": torch.tensor([0])},
        {"output_hidden_states": True},
        {"output_attentions": True},
    ):
        assert head_unsupported(model, {**inputs, **extra}), extra
    unpatch_model(model)
    assert "unpatched" in str(head_unsupported(model, inputs))


def test_missing_kernels_are_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from barqtrain_hf.patching import install

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        install, "cuda_unavailable_reason", lambda: "CuPy cannot be imported: pip …"
    )
    model = nn.Sequential(nn.ReLU())
    report = patch_model(model)
    assert "CuPy cannot be imported" in str(patch_model(model)) == str(report)
    assert len(caplog.records) == 1 and "without its CUDA kernels" in caplog.text
