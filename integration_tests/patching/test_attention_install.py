"""Where attention is installed, where not and why, and that nothing of it stays."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import _COMMON, LEAF_OPS, counts
from packed import (
    ONLY_ATTENTION,
    PACKED,
    POSITIONS,
    asked_for,
    eager,
    model_of,
    packed_batch,
)
from side_by_side import assert_equal, assert_no_trace, batch, run
from torch import nn
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import (
    ALL_ATTENTION_FUNCTIONS,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from barqtrain_hf import patch_model, unpatch_model
from barqtrain_hf.errors import UnsupportedError
from barqtrain_hf.patching import (
    attention,
    attention_interface,
    attention_mask,
)


def test_the_name_is_set_while_patched_and_not_saved(anywhere: None, tmp_path: Path) -> None:
    for family, before in (("llama", "sdpa"), ("gemma2", "eager")):
        model, inputs = model_of(family), batch()
        stock = run(model, inputs)
        report = patch_model(model)
        assert counts(report) == {**LEAF_OPS[family], "attention": 2}, str(report)
        assert model.config._attn_implementation == "barq"
        assert_equal(run(model, inputs), stock)
        model.save_pretrained(tmp_path / family)
        for file in (tmp_path / family).glob("*.json"):
            assert "barq" not in file.read_text()
        saved = json.loads((tmp_path / family / "config.json").read_text())
        assert type(model).from_pretrained(tmp_path / family).config._attn_implementation == before
        assert_no_trace(model)
        assert model.config._attn_implementation == before
        assert {k: v for k, v in saved.items() if "attn_impl" in k} == {}
        assert torch.equal(run(model, inputs).logits, stock.logits)


def test_another_name_set_since_stays(anywhere: None) -> None:
    model = model_of("llama")
    patch_model(model)
    inputs = batch()
    model.set_attn_implementation("eager")
    stock = run(eager("llama"), inputs)
    assert_equal(run(model, {**inputs, "use_cache": False}), stock)  # turned before eager attention
    unpatch_model(model)
    assert model.config._attn_implementation == "eager"


def test_installed_in_any_order(anywhere: None) -> None:
    model, inputs = model_of("llama"), {**packed_batch(), **PACKED}
    report = patch_model(model, {**ONLY_ATTENTION, "rope": False, "linear_cross_entropy": False})
    assert counts(report) == {"attention": 2}
    first = run(model, inputs)
    patch_model(model, {**ONLY_ATTENTION, "linear_cross_entropy": False})
    assert counts(report) == {"attention": 2, "rope": 2}
    assert_equal(run(model, inputs), first)
    patch_model(model)
    assert counts(report) == {**LEAF_OPS["llama"], "attention": 2}
    assert_no_trace(model)
    assert model.config._attn_implementation == "sdpa"


def test_what_keeps_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def reasons(model: Any) -> str:
        report = patch_model(model, ONLY_ATTENTION)
        assert "attention" not in report.installed
        return " ".join(reason for op, reason in report.skipped if op == "attention")

    if not torch.cuda.is_available():
        assert "our kernels do not run on cpu" in reasons(model_of("llama"))
    monkeypatch.setattr(attention, "_unusable", lambda module, asked_for: None)
    for name in ("eager", "flex_attention"):
        model = model_of("llama")
        model.config._attn_implementation_internal = name
        assert f"attn_implementation={name!r}" in reasons(model)
        assert model.config._attn_implementation == name
    model = model_of("llama")
    model.model.layers[0].self_attn.forward = lambda *args, **kwargs: None
    assert "already patched" in reasons(model)
    assert model.config._attn_implementation == "sdpa"
    model = model_of("gemma2", output_attentions=True, attn_implementation="eager")
    assert "output_attentions" in reasons(model)
    model = model_of("llama")
    monkeypatch.setattr(type(model), "_supports_flash_attn", False)
    assert "does not take attention functions" in reasons(model)
    monkeypatch.undo()
    monkeypatch.setattr(attention, "_unusable", lambda module, asked_for: None)
    monkeypatch.setattr(attention, "_ASKS_FOR_SDPA", "class LlamaAttention")
    assert "under the name of sdpa" in reasons(model_of("llama"))


def test_classes_of_a_notebook_keep_theirs(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their source is nowhere, and transformers may have asked the class above them already."""
    stock = type(model_of("llama"))
    monkeypatch.setattr(stock, "_can_set_attn_implementation_cached_value", True, raising=False)
    monkeypatch.setitem(sys.modules, "a_notebook", types.ModuleType("a_notebook"))
    model = model_of("llama")
    model.__class__ = type("Mine", (stock,), {"__module__": "a_notebook"})
    report = patch_model(model)
    assert counts(report) == LEAF_OPS["llama"]
    assert "attention: not in 2 modules" in str(report)
    assert "the source of Mine cannot be read" in str(report)
    # What a class inherits is looked at too.
    monkeypatch.setattr(attention, "_ASKS_FOR_SDPA", "class LlamaForCausalLM")
    model = model_of("llama")
    model.__class__ = type("Mine", (stock,), {"__module__": __name__})
    assert "does something else under the name of sdpa" in str(patch_model(model))


def test_a_pickled_model_runs_where_it_is_loaded(anywhere: None, tmp_path: Path) -> None:
    model, inputs = model_of("llama"), batch()
    patch_model(model)
    torch.save((model, inputs, model(**inputs).logits), tmp_path / "all.pt")
    code = (
        "import sys, torch\n"
        "model, inputs, logits = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(model(**inputs).logits, logits)\n"
        "from barqtrain_hf import unpatch_model\n"
        "unpatch_model(model)\n"
        "assert model.config._attn_implementation == 'sdpa'\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "all.pt")], check=True)


def test_weights_of_attention_are_still_to_be_had(anywhere: None) -> None:
    """Gemma 2 has no sdpa, so its attention weights could be asked for."""
    model, inputs = model_of("gemma2"), batch()
    stock = model(**inputs, output_attentions=True)
    report = patch_model(model)
    ours = model(**inputs, output_attentions=True)
    for mine, theirs in zip(ours.attentions, stock.attentions, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert any("output_attentions" in reason for _, reason in report.fallbacks)


# Other forwards, and why the rotation stays outside of attention there, if it does.
OTHERS: dict[str, tuple[dict[str, Any], str | None]] = {
    "Olmo3": ({"sliding_window": 5}, None),
    "Nemotron": ({}, None),
    "Exaone4": ({"sliding_window": 5}, None),
    "Glm": ({"partial_rotary_factor": 0.5}, ""),  # of which the rotation is not ours
    "Phi": ({}, "PhiAttention turns queries and keys before it"),
    "StableLm": ({}, "StableLmAttention turns queries and keys before it"),
    "HunYuanDenseV1": ({}, "query_layernorm is called with a Unturned"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_forwards(name: str, anywhere: None, calls: list[dict[str, Any]]) -> None:
    options, why = OTHERS[name]
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    inputs = {**packed_batch(), "position_ids": POSITIONS, "use_cache": False}
    stock = run(model, inputs)
    report = patch_model(model, ONLY_ATTENTION)
    calls.clear()
    assert_equal(run(model, inputs), stock, 1e-4)
    assert len(report.installed["attention"]) == len(calls) == 2, str(report)
    assert not report.fallbacks, str(report)
    assert all(call["rope"] is None for call in calls) == (why is not None)
    assert (why or "attention") in str(report)
    assert_no_trace(model)


def test_a_mask_given_by_its_name(anywhere: None, calls: list[dict[str, Any]]) -> None:
    config = transformers.AfmoeConfig(**_COMMON, sliding_window=5, num_dense_layers=2)
    model, inputs = transformers.AfmoeForCausalLM(config).eval(), batch()
    stock = run(model, inputs)
    report = patch_model(model, ONLY_ATTENTION)
    calls.clear()
    assert_equal(run(model, inputs), stock, 1e-4)
    assert len(calls) == 2 and not report.fallbacks, str(report)


def test_models_of_their_own_attention_refuse_the_name() -> None:
    common = {k: v for k, v in _COMMON.items() if k != "num_hidden_layers"}
    config = transformers.BigBirdPegasusConfig(
        **common, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48
    )
    model = transformers.BigBirdPegasusForCausalLM(config)
    attention_interface.register_attention()
    model.set_attn_implementation("barq")
    with pytest.raises(UnsupportedError, match="works on masks that only its own attention gets"):
        model(**batch())


def test_a_forward_that_does_more_between_is_not_fused() -> None:
    class Scaled(modeling_llama.LlamaAttention):
        def forward(
            self: Any,
            hidden_states: Any,
            position_embeddings: Any,
            attention_mask: Any = None,
            **kwargs: Any,
        ) -> Any:
            shape = (*hidden_states.shape[:-1], -1, self.head_dim)
            q, k, v = (
                p(hidden_states).view(shape).transpose(1, 2)
                for p in (self.q_proj, self.k_proj, self.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
            q = q * 1.5
            function = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            y, weights = function(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
            return self.o_proj(y.flatten(2)), weights

    model = asked_for("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = Scaled
    inputs = {**packed_batch(), **PACKED}
    stock = run(model, inputs)
    report = patch_model(model, ONLY_ATTENTION)
    assert counts(report) == {"rope": 2, "attention": 2}
    assert "Scaled turns queries and keys before it" in str(report)
    assert_equal(run(model, inputs), stock)
    assert not report.fallbacks


def test_what_another_function_adds_is_a_mismatch() -> None:
    class Sinks(modeling_llama.LlamaAttention):
        def forward(
            self: Any, hidden_states: Any, attention_mask: Any = None, **kwargs: Any
        ) -> Any:
            shape = (*hidden_states.shape[:-1], -1, self.head_dim)
            q, k, v = (
                p(hidden_states).view(shape).transpose(1, 2)
                for p in (self.q_proj, self.k_proj, self.v_proj)
            )
            function = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            y, weights = function(self, q, k, v, attention_mask, scaling=0.1, s_aux=q[0, :, 0, 0])
            return self.o_proj(y.flatten(2)), weights

    model = asked_for("llama")
    model.model.layers[1].self_attn.__class__ = Sinks
    report = patch_model(model, ONLY_ATTENTION)
    assert "attention" not in report.installed
    assert (
        "one that keeps its own. Sinks: it is called in a way that ours does not cover: called with s_aux"
        in str(report)
    )


def test_other_calls_are_stock() -> None:
    """Called by itself: fp64, other keys, head sizes, a subclass of tensors."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = model_of("llama").model.layers[0].self_attn

    def tensors(
        dtype: torch.dtype = torch.float32, keys: int = 6, size: int = 8, values: int | None = None
    ) -> list[torch.Tensor]:
        return [
            torch.randn(2, heads, tokens, d, dtype=dtype)
            for heads, tokens, d in ((4, 6, size), (2, keys, size), (2, keys, values or size))
        ]

    told: list[str] = []
    how = attention_interface.How("sdpa", nn.Identity(), frozenset([torch.float32]), told.append)
    for q_k_v, why in (
        (tensors(torch.float64), "not probed"),
        (tensors(torch.bfloat16), "not probed"),
        (tensors(keys=9), "differ in number"),
        (tensors(values=4), "head size"),
        (tensors(size=264), "264 dimensions"),
        ([nn.Parameter(x) for x in tensors()], "plain tensors"),
    ):
        ours, _ = attention_interface.attend(module, *q_k_v, None, how, {"scaling": 0.3})
        assert torch.equal(ours, sdpa_attention_forward(module, *q_k_v, None, scaling=0.3)[0])
        assert why in told.pop()
    assert not told
    ours = attention_mask.mask(2, 6, 6, mask_function=sliding_window_causal_mask_function(3))
    with pytest.raises(UnsupportedError, match="1 queries of 6 tokens"):
        q, k, v = tensors()
        attention_interface.attend(module, q[:, :, -1:], k, v, ours[:, :, -1:], how, {})  # type: ignore[index]
    told.clear()
    cu_seqlens = torch.tensor([0, 6, 12], dtype=torch.int32)
    other = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": torch.tensor([0, 5, 12])}
    attention_interface.attend(module, *tensors(), None, how, {"scaling": 0.3, **other})
    assert told.pop() == "queries and keys have other documents"
    with pytest.raises(UnsupportedError, match="hands over indices"):
        attention_interface.attend(module, *tensors(), None, how, {"indices": cu_seqlens})


def test_patched_again_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    monkeypatch.setattr(attention, "_unusable", lambda module, asked_for: "not here")
    assert "attention: not in 2 modules" in str(patch_model(model))
    monkeypatch.setattr(attention, "_unusable", lambda module, asked_for: None)
    report = patch_model(model)
    assert counts(report) == {**LEAF_OPS["llama"], "attention": 2}
    assert not report.skipped
    assert_no_trace(model)


def test_many_layers_are_probed_once(monkeypatch: pytest.MonkeyPatch, anywhere: None) -> None:
    asked: list[Any] = []
    examine = attention.attention_probe.examine
    monkeypatch.setattr(
        attention.attention_probe, "examine", lambda *a: asked.append(a) or examine(*a)
    )
    monkeypatch.setattr(attention, "_probed", {})
    report = patch_model(model_of("llama", num_hidden_layers=6), ONLY_ATTENTION)
    assert counts(report)["attention"] == 6 and len(asked) == 1
    patch_model(model_of("llama", num_hidden_layers=6), ONLY_ATTENTION)
    assert len(asked) == 1


def test_what_autocast_computes_in_must_be_probed() -> None:
    q = torch.zeros(1, 2, 4, 8)
    arguments = (q, q, q, None, frozenset({torch.float32}), {})
    assert attention_interface._unusual(*arguments) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert "not probed" in str(attention_interface._unusual(*arguments))
