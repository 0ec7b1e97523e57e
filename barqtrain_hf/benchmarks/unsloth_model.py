"""Unsloth's model for `steps`: the same weights, loaded and adapted as Unsloth's users do it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch


def unsloth_model(
    config: dict[str, Any], length: int, lora: bool, checkpointing: bool, modules: Sequence[str]
) -> Any:
    """A Llama of this config under Unsloth, with its adapters if `lora`.

    Unsloth replaces code of transformers for the whole process, so that nothing else can be measured in it.
    It loads from a folder only: random weights, those of ``torch.manual_seed(0)``, are saved first.
    """
    from unsloth import FastLanguageModel  # isort: skip  # before transformers, which it changes
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tempfile.mkdtemp()
    torch.manual_seed(0)
    with torch.device("cuda"):
        LlamaForCausalLM(LlamaConfig(**config)).bfloat16().save_pretrained(folder)
    _save_tokenizer(folder)
    model, _ = FastLanguageModel.from_pretrained(
        folder,
        max_seq_length=length,
        dtype=torch.bfloat16,
        load_in_4bit=False,
        full_finetuning=not lora,
        local_files_only=True,
    )
    if lora:
        model = FastLanguageModel.get_peft_model(
            model,
            r=16,
            lora_alpha=32,
            lora_dropout=0,
            bias="none",
            target_modules=list(modules),
            use_gradient_checkpointing="unsloth" if checkpointing else False,
        )
    return model


def _save_tokenizer(folder: str) -> None:
    """Unsloth asks for one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(tokens.values()))
    tokenizer.train_from_iterator(["some text"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
