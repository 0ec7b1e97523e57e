"""Tiny models of the families the tests cover, built from configs."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4200,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral_window": ("Mistral", {"sliding_window": 5}),
    # Every expert takes every token: in 16 bits a choice may be another one, which is no error.
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    # One layer of experts, one without.
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
    # Small enough caps that a forgotten one changes the loss in the third digit.
    "gemma2": ("Gemma2", {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3Text", {"layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"logits_scaling": 8.0, "attention_multiplier": 0.25}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    # One layer with rotary embedding, one without.
    "cohere2": (
        "Cohere2",
        {"logit_scale": 0.25, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "gpt2": ("GPT2", {}),
    # A quarter of each head is turned.
    "gpt_neox": ("GPTNeoX", {}),
    "starcoder2": ("Starcoder2", {}),
}
# In how many modules each op must be.
_LLAMA = {"rms_norm": 5, "glu": 2, "rope": 2}
_LAYER_NORM = {"layer_norm": 5, "glu": 2, "rope": 2}
LEAF_OPS: dict[str, dict[str, int]] = {
    **{family: _LLAMA for family in FAMILIES},
    # Norms of queries and keys, or norms behind attention and MLP too.
    **{family: {**_LLAMA, "rms_norm": 9} for family in ("qwen3", "qwen3_moe", "gemma2", "olmo2")},
    "gemma3": {**_LLAMA, "rms_norm": 13},
    "cohere": {**_LAYER_NORM, "layer_norm": 3},
    "cohere2": {**_LAYER_NORM, "layer_norm": 3},
    "gpt_neox": _LAYER_NORM,
    "starcoder2": _LAYER_NORM,
    "gpt2": {"layer_norm": 5, "glu": 2},
}


def counts(report: Any) -> dict[str, int]:
    """In how many modules each leaf op is, from a `PatchReport`."""
    loss = "linear_cross_entropy"
    return {op: len(names) for op, names in report.installed.items() if op != loss}


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A freshly initialised model of a family; the same weights every time."""
    name, options = FAMILIES[family]
    config_class = getattr(transformers, f"{name}Config")
    if name == "GPT2":
        options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 4200, **options}
        common = {
            k: _COMMON[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
        }
        # Dropout would draw different masks in two runs that differ in anything random.
        common.update(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    else:
        common = dict(_COMMON)
    config = config_class(**{**common, **options, **overrides})
    torch.manual_seed(1234)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, name.removesuffix("Text") + head)(config)
    with torch.no_grad():
        # At initialisation norm weights are constant and biases zero: errors in either would not show.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3.0)
    return model.to(dtype)
