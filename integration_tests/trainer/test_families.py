"""Every family trains with BarqTrainer as with stock Trainer, and every op of the family is in it.

On a GPU, with our kernels: test_gpu.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, LEAF_OPS, counts, tiny_model
from test_parity import assert_equal_runs
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    trainer = assert_equal_runs(lambda: tiny_model(family), tmp_path)
    assert counts(trainer.barq_report) == LEAF_OPS[family], str(trainer.barq_report)


ADAPTED = {
    "llama": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}


@pytest.mark.parametrize("family", ADAPTED)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_lora(family: str, dropout: float, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def model() -> Any:
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, target_modules=ADAPTED[family], lora_dropout=dropout)
        wrapped = peft.get_peft_model(tiny_model(family), config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # zero at initialisation, which would hide the adapters
                torch.nn.init.normal_(parameter, std=0.1)
        return wrapped

    # GPT-2's layers are Conv1D, which are not fused.
    adapters = {} if family == "gpt2" else {"lora": 2 * len(ADAPTED[family])}
    fallbacks = [("lora", "its adapter has dropout")] if dropout and adapters else []
    trainer = assert_equal_runs(model, tmp_path, fallbacks=fallbacks)
    expected = {**LEAF_OPS[family], **adapters}
    assert counts(trainer.barq_report) == expected, str(trainer.barq_report)


@pytest.mark.parametrize("family", ["phi3", "mixtral", "gpt_neox"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family: str, reentrant: bool, tmp_path: Path) -> None:
    trainer = assert_equal_runs(
        lambda: tiny_model(family),
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert counts(trainer.barq_report) == LEAF_OPS[family], str(trainer.barq_report)


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere2"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {"bf16": True}), (torch.bfloat16, {"bf16": True}), (torch.bfloat16, {})],
    ids=["fp32 weights, autocast", "bf16 weights, autocast", "bf16"],
)
def test_dtype_regimes(
    family: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    # Two steps: AdamW divides a gradient by its own size, so a component that is all rounding moves a
    # weight as far as any other.
    trainer = assert_equal_runs(
        lambda: tiny_model(family, dtype), tmp_path, tolerance=1000, max_steps=2, **options
    )
    assert counts(trainer.barq_report) == LEAF_OPS[family], str(trainer.barq_report)


class OddConfig(PretrainedConfig):
    model_type = "odd"
    hidden_size = 32
    vocab_size = 97


class UnitNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class CubedMLP(nn.Module):
    """A gated MLP whose gate is cubed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48), nn.Linear(32, 48)
        self.down_proj = nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x) ** 3 * self.up_proj(x))


class MeanAttention(nn.Module):
    """Each token looks at the mean of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.v_proj = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.v_proj(x).cumsum(1) / count


class Odd(PreTrainedModel):
    config_class = OddConfig
    main_input_name = "input_ids"

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(97, 32)
        self.unit_norm, self.attention = UnitNorm(), MeanAttention()
        self.layer_norm, self.mlp = nn.LayerNorm(32), CubedMLP()
        self.plain = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.lm_head = nn.Linear(32, 97)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: Any = None, **kwargs: Any) -> dict[str, Any]:
        x = self.embed_tokens(input_ids)
        x = x + self.attention(self.unit_norm(x))
        x = x + self.mlp(self.layer_norm(x))
        logits = self.lm_head(x + self.plain(x))
        loss = self.loss_function(logits, labels, vocab_size=97, **kwargs)
        return {"loss": loss, "logits": logits}


def test_an_unknown_model_trains_and_is_told_what_did_not_match(tmp_path: Path) -> None:
    def model() -> Odd:
        torch.manual_seed(3)
        return Odd(OddConfig(tie_word_embeddings=False))

    trainer = assert_equal_runs(model, tmp_path, fused=False)
    report = trainer.barq_report
    assert counts(report) == {"layer_norm": 1, "glu": 1}
    assert report.installed["glu"] == ["plain.1"]
    skipped = [((op, name), why) for (op, why), names in report.skipped.items() for name in names]
    reasons = {name: why for (op, name), why in skipped if op != "rope"}
    assert reasons["unit_norm"] == "it has no weight"
    assert "CubedMLP: what down_proj gets is no SwiGLU or GeGLU" in reasons["mlp"]
    assert reasons["attention"] == "its forward does not call ALL_ATTENTION_FUNCTIONS"
    assert dict(skipped)["rope", "attention"] == "its forward does not call apply_rotary_pos_emb"
    assert "base model cannot be told" in reasons[""]  # the loss
