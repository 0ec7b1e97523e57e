"""One training run of `steps`, in a process of its own; prints a line of JSON."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from torch.utils.data import Dataset

from barqtrain_hf.benchmarks.apart import read_settings
from barqtrain_hf.benchmarks.unsloth_model import unsloth_model

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WARM = 4  # steps until what is compiled and allocated on first use is there


class _Tokens(Dataset[dict[str, torch.Tensor]]):
    """Random tokens, the same for everyone."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(0, vocabulary, (rows, length), generator=generator)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}


def run(
    trainer: str,
    lora: bool,
    checkpointing: bool,
    config: dict[str, Any],
    batch: int,
    length: int,
    steps: int,
) -> dict[str, float]:
    """Median step, tokens per second, peak of allocated memory and mean loss.

    Args:
        trainer: "stock", "compile", "liger", "unsloth" or "ours".
        lora: r=16 on all linear layers of the decoder, in fp32 as PEFT makes them; else all is trained.
        checkpointing: of every decoder layer.
        config: of a Llama.
        batch, length: rows a step, tokens a row.
        steps: the first 4 are not timed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback
    from transformers import TrainingArguments as Arguments

    from barqtrain_hf import BarqTrainer

    on_gpu = torch.cuda.is_available()
    ends: list[Any] = []

    class Clock(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step < _WARM:
                return
            if on_gpu:  # in the device's own order: who does not wait for it is not made to
                ends.append(torch.cuda.Event(enable_timing=True))
                ends[-1].record()
            else:
                ends.append(time.perf_counter())

    model: Any
    if trainer == "unsloth":
        model = unsloth_model(config, length, lora, checkpointing, MODULES)
    else:
        torch.manual_seed(0)
        with torch.device("cuda" if on_gpu else "cpu"):
            sdpa = LlamaConfig(**config, attn_implementation="sdpa")
            model = LlamaForCausalLM(sdpa).bfloat16()
        if lora:
            from peft import LoraConfig, get_peft_model

            options: Any = {"r": 16, "lora_alpha": 32, "task_type": "CAUSAL_LM"}
            model = get_peft_model(model, LoraConfig(target_modules=list(MODULES), **options))
            if checkpointing:
                model.enable_input_require_grads()
    arguments = Arguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        max_steps=steps,
        bf16=True,
        use_cpu=not on_gpu,
        use_liger_kernel=trainer == "liger",
        torch_compile=trainer == "compile",
        gradient_checkpointing=checkpointing,
        optim="adamw_torch_fused",
        dataloader_num_workers=2 if on_gpu else 0,
        logging_steps=steps + 1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = _Tokens(batch * (steps + 1), length, config["vocab_size"])
    kind = BarqTrainer if trainer == "ours" else Trainer
    trained = kind(model=model, args=arguments, train_dataset=data, callbacks=[Clock()])
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    loss = trained.train().training_loss
    if on_gpu:
        torch.cuda.synchronize()
        seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(ends)]
    else:
        seconds = [b - a for a, b in itertools.pairwise(ends)]
    low, median, high = statistics.quantiles(seconds, n=4)
    return {
        "step_ms": median * 1e3,
        "step_ms_quartile_1": low * 1e3,
        "step_ms_quartile_3": high * 1e3,
        "tokens_per_second": batch * length / median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
        "loss": loss,
    }


def _import(trainer: str) -> None:
    if trainer == "unsloth":
        import unsloth  # noqa: F401  # before transformers, which it changes
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401

    from barqtrain_hf import BarqTrainer  # noqa: F401


if __name__ == "__main__":
    _import(sys.argv[1])
    print(json.dumps(run(**read_settings())))
