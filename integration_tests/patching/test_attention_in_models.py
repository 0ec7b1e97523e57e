"""Attention in models: documents kept apart, the rotation inside, stock attention where it must be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import FAMILIES, counts
from packed import (
    CU_SEQLENS,
    LENGTHS,
    ONLY_ATTENTION,
    PACKED,
    POSITIONS,
    WINDOWS,
    asked_for,
    eager,
    model_of,
    packed_batch,
    stock_packed,
)
from side_by_side import assert_as_accurate, assert_equal, batch, bound, run

from barqtrain_hf import patch_model, unpatch_model
from barqtrain_hf.ops.attention import flash_attention_reference
from barqtrain_hf.patching import attention_interface

FUSED = ("llama", "mistral_window", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox")


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_training(family: str, calls: list[dict[str, Any]]) -> None:
    """Three steps against eager attention with block-diagonal masks."""
    ours, stock = asked_for(family), eager(family)
    report = patch_model(ours, ONLY_ATTENTION)
    assert len(report.installed["attention"]) == 2, str(report)
    calls.clear()
    inputs = packed_batch()
    for _ in range(3):
        mine = run(ours, {**inputs, **PACKED})
        theirs = run(stock, {**inputs, **stock_packed(stock)})
        assert_equal(mine, theirs, 2e-5)
        with torch.no_grad():
            for model, found in ((ours, mine), (stock, theirs)):
                trained = [p for p in model.parameters() if p.requires_grad]
                for parameter, gradient in zip(trained, found.gradients, strict=True):
                    parameter -= 0.05 * gradient
    assert not report.fallbacks, str(report)
    assert len(calls) == 6
    assert all(call["cu_seqlens"] is CU_SEQLENS and call["max_seqlen"] == 20 for call in calls)
    rotated = [call["rope"] is not None for call in calls[:2]]
    if family in FUSED:
        assert all(rotated)
    assert sum(rotated) == (0 if family == "gpt2" else 1 if family in ("cohere2", "smollm3") else 2)
    windows = {call["window"] for call in calls}
    assert windows == ({None, 5} if family in ("gemma2", "gemma3", "cohere2") else windows)
    assert (5 in windows) == (family in WINDOWS)
    assert {call["softcap"] for call in calls} == ({5.0} if family == "gemma2" else {None})


REGIMES = {
    "fp32 weights, autocast": (torch.float32, True),
    "bf16 weights, autocast": (torch.bfloat16, True),
    "bf16": (torch.bfloat16, False),
}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox"])
def test_packed_in_bf16(family: str, regime: str, calls: list[dict[str, Any]]) -> None:
    dtype, autocast = REGIMES[regime]
    inputs, model = packed_batch(), asked_for(family, dtype)
    stock_model = eager(family, dtype)
    exact = copy.deepcopy(stock_model).float()
    truth = run(exact, {**inputs, **stock_packed(exact)})
    stock = run(stock_model, {**inputs, **stock_packed(stock_model)}, autocast)
    report = patch_model(model, ONLY_ATTENTION)
    calls.clear()
    assert_as_accurate(run(model, {**inputs, **PACKED}, autocast), stock, truth)
    assert not report.fallbacks, str(report)
    assert {call["dtype"] for call in calls} == {torch.bfloat16}
    # Under autocast norms of queries give fp32, which is turned in fp32 and rounded once.
    apart = family == "qwen3" and regime == "fp32 weights, autocast"
    assert all((call["rope"] is None) == apart for call in calls)


# What tells documents apart, or fails to in stock: hf.md, facts 6 and 7.
LEAKS: dict[str, dict[str, Any]] = {
    "position_ids": {"position_ids": POSITIONS, "use_cache": False},
    "a cache is made": {"position_ids": POSITIONS, "use_cache": True},
    "the config's default": {"position_ids": POSITIONS},
    "a mask of ones": {
        "position_ids": POSITIONS,
        "attention_mask": torch.ones_like(POSITIONS),
        "use_cache": False,
    },
    "cu_seq_lens alone": {
        "cu_seq_lens_q": CU_SEQLENS,
        "cu_seq_lens_k": CU_SEQLENS.clone(),
        "max_length_q": 20,
        "max_length_k": 20,
    },
    "cu_seq_lens in int64": {**PACKED, "cu_seq_lens_q": CU_SEQLENS.long()},
    "cu_seq_lens and padding": {
        **PACKED,
        "attention_mask": (torch.arange(sum(LENGTHS)) < sum(LENGTHS) - 2).long()[None],
    },
}


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "by name"])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma2", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("how", LEAKS)
def test_documents_never_see_each_other(how: str, family: str, patched: bool) -> None:
    model, inputs = asked_for(family), packed_batch()
    alone = eager(family)
    ids = inputs["input_ids"]
    if patched:
        patch_model(model, ONLY_ATTENTION)
    given = dict(LEAKS[how])
    if family == "gpt2" and "position_ids" not in given:
        given["position_ids"] = POSITIONS  # its positions are absolute
    logits = model(ids, **given).logits
    start = 0
    for length in LENGTHS:
        if how == "cu_seq_lens and padding" and start + length == sum(LENGTHS):
            length -= 2
        expected = alone(ids[:, start : start + length], use_cache=False).logits
        torch.testing.assert_close(
            logits[:, start : start + length], expected, rtol=1e-4, atol=1e-5
        )
        start += length


def test_several_packed_rows(calls: list[dict[str, Any]]) -> None:
    """Rows one behind another, the same tensor for every layer, read once."""
    model, alone = asked_for("qwen3"), eager("qwen3")
    patch_model(model, ONLY_ATTENTION)
    calls.clear()
    ids = batch(2, 12)["input_ids"]
    lengths = ((5, 7), (3, 1, 8))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    logits = model(ids, position_ids=positions, use_cache=False).logits
    for row, parts in enumerate(lengths):
        start = 0
        for n in parts:
            expected = alone(ids[row : row + 1, start : start + n], use_cache=False).logits[0]
            found = logits[row, start : start + n]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            start += n
    assert calls[0]["cu_seqlens"] is calls[1]["cu_seqlens"] is not None
    assert calls[0]["cu_seqlens"].tolist() == [0, 5, 12, 15, 16, 24]
    assert calls[0]["shape"][:2] == (1, 24)


def test_rows_of_one_document_stay_rows(calls: list[dict[str, Any]]) -> None:
    model, inputs = asked_for("llama"), batch()
    stock = run(model_of("llama"), inputs)
    report = patch_model(model, ONLY_ATTENTION)
    calls.clear()
    assert_equal(run(model, inputs), stock)
    assert not report.fallbacks
    assert all(call["cu_seqlens"] is None and call["shape"][0] == 2 for call in calls)
    # A cache is made by default, whose keys are turned before it.
    assert all(call["rope"] is None for call in calls)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_stock(family: str, side: str) -> None:
    inputs = batch(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    labels = inputs["labels"].masked_fill(mask == 0, -100)
    inputs = {**inputs, "attention_mask": mask, "labels": labels, "use_cache": False}
    model = asked_for(family)
    stock = run(model_of(family), inputs)
    report = patch_model(model, ONLY_ATTENTION)
    ours = run(model, inputs)
    # Padding itself sees nothing, and what stock makes of that differs between sdpa and eager attention.
    kept = mask.bool()
    torch.testing.assert_close(ours.logits[kept], stock.logits[kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss, stock.loss)
    for mine, theirs in zip(ours.gradients, stock.gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert any("padding" in reason for op, reason in report.fallbacks if op == "attention")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_neox", "mistral_window"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(family: str, cache: str | None) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    options["cache_implementation"] = cache
    ids = torch.arange(3, 25).view(2, 11)
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    model, stock = asked_for(family), model_of(family)
    report = patch_model(model)
    for mask in (torch.ones_like(ids), padded):
        expected = stock.generate(ids, attention_mask=mask, **options)
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)
    reasons = [reason for op, reason in report.fallbacks if op == "attention"]
    assert any("generation with a cache" in reason or "padding" in reason for reason in reasons)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_falls_back_and_keeps_documents_apart(family: str) -> None:
    drop = {"attn_pdrop": 1e-6} if family == "gpt2" else {"attention_dropout": 1e-6}
    model, stock = asked_for(family, **drop).train(), eager(family)
    inputs = packed_batch()
    report = patch_model(model, ONLY_ATTENTION)
    ours = run(model, {**inputs, **PACKED})
    assert_equal(ours, run(stock, {**inputs, **stock_packed(stock)}), 1e-3)
    assert ("attention", "attention dropout") in report.fallbacks
    model.eval()
    report.fallbacks.clear()
    run(model, {**inputs, **PACKED})
    assert not report.fallbacks


def test_gradient_checkpointing_and_copies(calls: list[dict[str, Any]]) -> None:
    model, inputs = asked_for("gemma3"), {**packed_batch(), **PACKED}
    report = patch_model(model, ONLY_ATTENTION)
    stock = run(model, inputs)
    twin = copy.deepcopy(model)
    calls.clear()
    model.gradient_checkpointing_enable()
    model.train()
    assert_equal(run(model, inputs), stock)
    assert len(calls) == 4 and all(call["rope"] is not None for call in calls)
    assert len({id(call["cu_seqlens"]) for call in calls}) == 1
    # Without cu_seq_lens too: what was derived is found again when a layer is computed again.
    calls.clear()
    run(model, {**packed_batch(), "position_ids": POSITIONS, "use_cache": False})
    assert len(calls) == 4 and len({id(call["cu_seqlens"]) for call in calls}) == 1
    assert not report.fallbacks
    unpatch_model(model)
    assert bound(twin) and torch.equal(run(twin, inputs).logits, stock.logits)
    unpatch_model(twin)
    assert bound(twin) == []


def test_peft(anywhere: None, calls: list[dict[str, Any]]) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        model = model_of("qwen3")
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(model, config)

    model, inputs = adapted(), {**packed_batch(), "position_ids": POSITIONS, "use_cache": False}
    stock = run(adapted(), inputs)
    report = patch_model(model)
    calls.clear()
    assert counts(report)["attention"] == 2
    assert_equal(run(model, inputs), stock, 1e-4)
    assert len(calls) == 2 and all(call["rope"] is not None for call in calls)
    unpatch_model(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("with_boundaries", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_window"])
def test_torch_compile(
    family: str, with_boundaries: bool, anywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No graph break of ours; the op's own PyTorch path looks documents up on the host, which is one."""

    def traceable(*tensors: torch.Tensor, max_seqlen: int | None, **options: Any) -> torch.Tensor:
        return flash_attention_reference(*tensors, **options)

    monkeypatch.setattr(attention_interface, "flash_attention", traceable)
    torch._dynamo.reset()
    model, inputs = model_of(family), {**packed_batch(), "position_ids": POSITIONS}
    inputs = {**inputs, **PACKED} if with_boundaries else {**inputs, "use_cache": False}
    stock = run(model, inputs)
    patch_model(model, ONLY_ATTENTION)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(**inputs)
    torch.testing.assert_close(outputs.logits, stock.logits, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(outputs.loss, list(model.parameters()))
    for mine, theirs in zip(found, stock.gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_two_models_and_threads(calls: list[dict[str, Any]]) -> None:
    """The hand-over from rotation to attention is each call's own."""
    from concurrent.futures import ThreadPoolExecutor

    models = [asked_for(family) for family in ("llama", "qwen3")]
    for model in models:
        patch_model(model, ONLY_ATTENTION)
    inputs = {**packed_batch(), **PACKED}
    with torch.no_grad():
        expected = [model(**inputs).logits for model in models]
        with ThreadPoolExecutor(4) as pool:
            jobs = [(i % 2, pool.submit(models[i % 2], **inputs)) for i in range(12)]
            for index, job in jobs:
                assert torch.equal(job.result().logits, expected[index])


def test_registering_is_all_that_a_name_needs() -> None:
    """Without patch_model: attention is ours, and the rotation apart."""
    inputs = {**packed_batch(), **PACKED}
    for family in ("llama", "gemma2", "starcoder2"):
        stock = eager(family)
        expected = run(stock, {**packed_batch(), **stock_packed(stock)})
        assert_equal(run(asked_for(family), inputs), expected, 2e-5)
