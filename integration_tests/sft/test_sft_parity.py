"""BarqSFTTrainer logs what SFTTrainer logs, in training and evaluation, to 1e-5 in fp32.

Each case trains both for a few steps on the same batches, with evaluations in between.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sft_cases import STEPS, Calls, assert_same_logs, train, trl
from torch._subclasses.fake_tensor import FakeTensorMode

from barqtrain_hf import BarqSFTTrainer, BarqTrainer
from barqtrain_hf.patching import TokenOutput
from barqtrain_hf.sft.metrics import TokenMetrics


def lora(**options: Any) -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    return {"peft_config": peft.LoraConfig(r=4, target_modules="all-linear", **options)}


def saved_head() -> dict[str, Any]:
    return lora(modules_to_save=["lm_head"])


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    # By TRL: other rows than its own have other losses. `test_sft_packing` has ours.
    "packing": {"packing": True, "max_length": 64, "barq_config": {"packing": False}},
    "padding_free": {"padding_free": True, "max_length": None},
    "assistant_only": {"kind": "chats", "assistant_only_loss": True},
    "completion_only": {"kind": "prompts", "family": "llama_tied"},
    "dft": {"loss_type": "dft", "family": "gemma2"},
    "lora": {"given": lora},
    # Beyond the seven of the bar.
    "lora_and_head": {"given": saved_head, "kind": "chats"},
    "experts": {"family": "qwen3_moe", "gradient_accumulation_steps": 2},
    "experts_dft": {"family": "mixtral", "loss_type": "dft", "router_aux_loss_coef": 0.5},
    "accumulation": {"gradient_accumulation_steps": 3, "gradient_checkpointing": True},
    "no_targets": {"kind": "tokens", "max_length": None},
    "no_targets_dft": {"kind": "tokens", "max_length": None, "loss_type": "dft"},
}


def both(
    path: Path, monkeypatch: pytest.MonkeyPatch, given: Any = dict, **case: Any
) -> tuple[Any, Any, Calls]:
    """Stock and ours, and how often which head computed while ours trained."""
    stock = train(trl.SFTTrainer, path, given=given(), **case)
    with monkeypatch.context() as patch:
        calls = Calls(patch)
        ours = train(BarqSFTTrainer, path, given=given(), **case)
    return stock, ours, calls


@pytest.mark.parametrize("name", CASES)
def test_every_logged_number_is_that_of_trl(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    stock, ours, calls = both(tmp_path, monkeypatch, **case)
    assert_same_logs(stock, ours)
    logged = {key for entry in stock.state.log_history for key in entry}
    expected = {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"}
    expected |= {f"eval_{key}" for key in expected - {"grad_norm"}}
    expected |= {"aux_loss", "eval_aux_loss"} if "experts" in name else set()
    assert logged >= expected
    # TRL's head computes for its probe, and never again.
    assert calls.trls == 1
    assert calls.ours >= STEPS * case.get("gradient_accumulation_steps", 1) + 3
    assert not ours.barq_report.fallbacks
    assert {"linear_cross_entropy", "fused_lm_head", "rms_norm"} <= set(ours.barq_report.installed)
    assert "BarqSFTTrainer" not in str(ours.barq_report)  # of what only this trainer gives


def test_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, ours, calls = both(tmp_path, monkeypatch, bf16=True)
    assert_same_logs(stock, ours, 5e-3, but="_accuracy")  # ties go either way
    assert calls.trls == 1


def test_saved_tensors_may_be_moved_around(tmp_path: Path) -> None:
    """As activation offloading does, which runs on accelerators only."""

    trainers = []
    for trainer_class in (trl.SFTTrainer, BarqSFTTrainer):

        class Trainer(trainer_class):  # type: ignore[misc, valid-type]
            def train(self, *args: Any, **kwargs: Any) -> Any:
                self.maybe_activation_offload_context = torch.autograd.graph.save_on_cpu()
                return super().train(*args, **kwargs)

        trainers.append(train(Trainer, tmp_path, given=lora()))
    assert_same_logs(*trainers)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"given": lambda: {"compute_metrics": accuracy}}, "the logits are needed"),
        ({"label_smoothing_factor": 0.1}, "label smoothing needs the logits"),
        ({"given": lambda: {"compute_loss_func": half}}, "compute_loss_func needs the logits"),
    ],
    ids=["compute_metrics", "label_smoothing", "compute_loss_func"],
)
def test_what_needs_logits_is_computed_by_trl(
    options: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, ours, calls = both(tmp_path, monkeypatch, **options)
    assert_same_logs(stock, ours)
    assert reason in str(ours.barq_report)
    # Its metrics come from our head all the same.
    assert calls.trls == 1 and calls.ours > STEPS


def accuracy(prediction: Any) -> dict[str, float]:
    hits = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
    return {"hits": float(np.mean(hits))}


def half(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return 0.5 * torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "packing": True, "max_length": 64}
    whole = train(BarqSFTTrainer, tmp_path / "whole", **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = train(BarqSFTTrainer, tmp_path / "resumed", resume=checkpoint, **options)
    losses = [
        [e["loss"] for e in trainer.state.log_history if "loss" in e]
        for trainer in (whole, resumed)
    ]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-6)
    for own, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(own, theirs)
    card = (tmp_path / "whole" / "README.md").read_text(encoding="utf-8")
    assert "- sft\n" in card and "- barq\n" in card and "TRL" in card


def test_the_flag_turns_everything_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    trainer = train(BarqSFTTrainer, tmp_path, use_barq_kernels=False, max_steps=1)
    assert calls.ours == 0 and calls.trls > 0
    assert str(trainer.barq_report).endswith("nothing to install")


def test_metrics_are_not_read_when_they_are_counted() -> None:
    """A fake tensor has no numbers to read: it raises where the host would wait for a device."""

    class Alone:
        @staticmethod
        def gather_for_metrics(x: torch.Tensor) -> torch.Tensor:
            return x

    with FakeTensorMode():
        metrics = TokenMetrics()
        mask = torch.ones(2, 5, dtype=torch.bool)
        outputs = TokenOutput(
            entropy=torch.rand(2, 5), is_top1=mask, label_mask=mask, aux_loss=torch.rand(())
        )
        for inputs in ({"attention_mask": mask.long()}, {"position_ids": torch.zeros(1, 10)}):
            metrics.add("train", outputs, inputs, Alone())
        with pytest.raises(Exception, match="_local_scalar_dense"):
            metrics.read()


def test_metrics_of_all_ranks_are_taken_together() -> None:
    class Two:
        """Gathers what another rank has, too, but for a last batch that it does not take part in."""

        other = torch.tensor([[3.0, 9.0, 2.0, 7.0]], dtype=torch.float64)

        def gather_for_metrics(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat((x, self.other))

    metrics, ranks = TokenMetrics(), Two()
    mask = torch.tensor([[True, True, False]])
    outputs = TokenOutput(entropy=4.0 * mask, is_top1=mask, label_mask=mask)
    metrics.add("eval", outputs, {"position_ids": torch.zeros(1, 5)}, ranks)
    ranks.other = ranks.other[:0]
    metrics.add("eval", outputs, {"position_ids": torch.zeros(1, 5)}, ranks)
    ((count, means, tokens),) = metrics.read().values()
    assert (count, tokens) == (2, 5 + 7 + 5) and not metrics.read()
    assert means == pytest.approx(
        {"entropy": (17 / 5 + 8 / 2) / 2, "mean_token_accuracy": (4 / 5 + 2 / 2) / 2}
    )


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_the_loss_of_a_rank_is_scaled_as_trls(
    loss_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for trainer_class in (trl.SFTTrainer, BarqSFTTrainer):
        trainer = train(
            trainer_class, tmp_path, max_steps=1, loss_type=loss_type, learning_rate=0.0
        )
        batch = next(iter(trainer.get_train_dataloader()))
        with monkeypatch.context() as patch:
            patch.setattr(type(trainer.accelerator), "num_processes", 4)
            for count in (None, 17, torch.tensor(17)):
                losses.append(trainer.compute_loss(trainer.model, dict(batch), False, count).item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-5)


def test_metrics_of_both_modes_are_told_apart(tmp_path: Path) -> None:
    trainer = train(BarqSFTTrainer, tmp_path, max_steps=3, logging_steps=3, eval_steps=2)
    assert isinstance(trainer, BarqTrainer) and isinstance(trainer, trl.SFTTrainer)
    evaluated, logged = (
        next(e for e in trainer.state.log_history if name in e) for name in ("eval_loss", "loss")
    )
    first = sum(len(row["input_ids"]) for row in trainer.train_dataset.select(range(4)))
    assert evaluated["eval_num_tokens"] == first
    rest = sum(len(row["input_ids"]) for row in trainer.train_dataset.select(range(4, 6)))
    assert logged["num_tokens"] == first + rest
    assert logged["tokens_per_second"] > 0 and logged["peak_memory_gib"] > 0
    norms = [m for m in trainer.model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    assert norms and not any("forward" in norm.__dict__ for norm in norms)
