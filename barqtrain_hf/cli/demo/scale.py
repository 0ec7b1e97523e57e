"""How big the demo is: what two CPU cores, or one GPU, do in about two minutes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 4096


@dataclass(frozen=True)
class Plan:
    """How one kind of data is trained on.

    Attributes:
        row_length: tokens in a packed row.
        rows_per_step: packed rows in a batch.
        epochs: passes over the data.
        learning_rate: peak of a cosine schedule.
    """

    row_length: int
    rows_per_step: int
    epochs: int
    learning_rate: float


@dataclass(frozen=True)
class Scale:
    """Sizes of the model and of the data.

    Attributes:
        hidden_size: width of the model.
        layers: its depth.
        heads: its attention heads.
        intermediate_size: width of its MLP.
        initializer_range: standard deviation of its weights. The library's 0.02 suits wide models;
            attention of a narrow one would start out flat and stay so for most of the run.
        examples: how many task examples to train on.
        tasks: how the tasks are trained.
        own_bytes: at most so much of the user's own text.
        own_vocab_size: size of the tokenizer trained on it.
        own: how that text is trained.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    initializer_range: float
    examples: int
    tasks: Plan
    own_bytes: int
    own_vocab_size: int
    own: Plan


CPU = Scale(
    hidden_size=128,
    layers=2,
    heads=4,
    intermediate_size=384,
    initializer_range=0.05,
    examples=10_000,
    tasks=Plan(row_length=512, rows_per_step=1, epochs=2, learning_rate=2e-3),
    own_bytes=2_500_000,
    own_vocab_size=2048,
    own=Plan(row_length=512, rows_per_step=1, epochs=1, learning_rate=2e-3),
)
GPU = Scale(
    hidden_size=1024,
    layers=16,
    heads=16,
    intermediate_size=2816,
    initializer_range=0.02,
    examples=16_000,
    tasks=Plan(row_length=4096, rows_per_step=1, epochs=4, learning_rate=5e-4),
    own_bytes=12_000_000,
    own_vocab_size=8192,
    own=Plan(row_length=2048, rows_per_step=2, epochs=1, learning_rate=5e-4),
)


def uses_gpu(device: str) -> bool:
    """Whether ``--device`` comes down to a CUDA GPU here."""
    return device == "auto" and torch.cuda.is_available()


def device_name(device: str) -> str:
    """The device in words, for the report."""
    if uses_gpu(device):
        return str(torch.cuda.get_device_name(0))
    return f"CPU, {torch.get_num_threads()} threads"


def build_model(scale: Scale, tokenizer: Any, seed: int) -> Any:
    """A Llama with random weights; the same weights for the same arguments."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=scale.hidden_size,
            intermediate_size=scale.intermediate_size,
            num_hidden_layers=scale.layers,
            num_attention_heads=scale.heads,
            num_key_value_heads=scale.heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=scale.initializer_range,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
