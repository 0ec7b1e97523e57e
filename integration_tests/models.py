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
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    # Small enough caps that a forgotten one changes the loss in the third digit.
    "gemma2": ("Gemma2", {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 5.0}),
    "granite": ("Granite", {"logits_scaling": 8.0}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "gpt2": ("GPT2", {}),
}
# Norms of these are LayerNorms.
WITHOUT_RMS_NORM = ("cohere", "gpt2")


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
    model = getattr(transformers, name + head)(config)
    with torch.no_grad():
        # At initialisation norm weights are constant and biases zero: errors in either would not show.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3.0)
    return model.to(dtype)
