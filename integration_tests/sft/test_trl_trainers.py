"""TRL's own trainers with our callback: the same logs, by our head, and a report of what is missing."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sft_cases import (
    Calls,
    arguments,
    assert_same_logs,
    datasets,
    model,
    text,
    tokenizer,
    train,
    trl,
)

from barqtrain_hf import (
    BarqKernelsCallback,
    BarqMetricsCallback,
    BarqSFTTrainer,
    metrics_callback,
    patch_model,
    unpatch_model,
)
from barqtrain_hf.errors import UnsupportedError


def stock_and_patched(
    make: Any, monkeypatch: pytest.MonkeyPatch, config: Any = None
) -> tuple[Any, Any, Calls, BarqKernelsCallback]:
    stock = make([])
    callback = BarqKernelsCallback(config)
    with monkeypatch.context() as patch:
        calls = Calls(patch)
        patched = make([callback])
    return stock, patched, calls, callback


@pytest.mark.parametrize(
    "options",
    [{"kind": "prompts"}, {"family": "qwen3_moe", "loss_type": "dft"}, {"bf16": True}],
    ids=["prompts", "experts_dft", "bf16"],
)
def test_sft_trainer_with_the_callback(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(callbacks: list[Any]) -> Any:
        return train(trl.SFTTrainer, tmp_path, given={"callbacks": callbacks}, **options)

    stock, patched, calls, callback = stock_and_patched(make, monkeypatch)
    tolerance = 5e-3 if "bf16" in options else 1e-5
    assert_same_logs(stock, patched, tolerance, but="_accuracy" if "bf16" in options else "none")
    assert calls.trls == 1 and calls.ours > 0
    report = str(callback.report)
    assert "fused_lm_head: installed in the LM head" in report
    assert "BarqSFTTrainer also takes the loss's gradient in the forward pass" in report


@pytest.mark.parametrize("trainer_class", [trl.SFTTrainer, BarqSFTTrainer])
@pytest.mark.parametrize(
    "options", [{}, {"padding_free": True, "max_length": None, "gradient_accumulation_steps": 2}]
)
def test_tokens_that_our_metrics_count(
    trainer_class: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[float] = []

    class Meter(metrics_callback.ThroughputMeter):
        def logs(self) -> dict[str, float]:
            counted.append(float(self._tokens))
            return super().logs()

    monkeypatch.setattr(metrics_callback, "ThroughputMeter", Meter)
    given = {"callbacks": [BarqMetricsCallback]}
    trainer = train(trainer_class, tmp_path, given=given, **options)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    # TRL counts since training began; evaluations in between are not among them.
    assert [sum(counted[:n]) for n in (1, 2)] == [entry["num_tokens"] for entry in entries]
    for entry in entries:
        assert entry["tokens_per_second"] > 0 and 0 <= entry["data_wait_share"] <= 1


def test_tokens_of_a_reference_are_not_counted(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    seen: list[int] = []

    class Metrics(BarqMetricsCallback):
        def add(self, inputs: dict[str, Any]) -> None:
            seen.append(inputs["input_ids"].shape[0])
            super().add(inputs)

    # With adapters the model itself, without them, is the reference.
    preference_trainer(tmp_path, [Metrics()], "dpo", lora=True, eval_strategy="no")
    assert seen == [4, 4]  # two pairs in each of two steps


def preferences(kind: str) -> Any:
    rows = [
        {"prompt": f"ask {n}", "chosen": f" {text(n)}", "rejected": f" bad {n}"} for n in range(12)
    ]
    if kind == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0}
            for n, row in enumerate(rows)
        ]
    return datasets.Dataset.from_list(rows)


def preference_trainer(
    path: Path,
    callbacks: list[Any],
    kind: str,
    family: str = "llama",
    lora: bool = False,
    **options: Any,
) -> Any:
    trainer_class, config_class = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
    }[kind]
    given: dict[str, Any] = {"ref_model": model(family)}
    if lora:
        peft = pytest.importorskip("peft")
        given = {"peft_config": peft.LoraConfig(r=4, target_modules="all-linear")}
    options = arguments(path, max_steps=2, logging_steps=1, learning_rate=1e-3, **options)
    trainer = trainer_class(
        model=model(family),
        args=config_class(**options),
        train_dataset=preferences(kind),
        eval_dataset=preferences(kind).select(range(4)),
        processing_class=tokenizer(),
        callbacks=callbacks,
        **given,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["dpo", "dpo_lora", "kto"])
def test_preference_trainers_with_the_callback(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(callbacks: list[Any]) -> Any:
        return preference_trainer(tmp_path, callbacks, kind[:3], lora="lora" in kind)

    stock, patched, calls, callback = stock_and_patched(make, monkeypatch)
    # Rewards are small differences of sums of log-probabilities of some hundreds; at first they are zero
    # but for rounding, and which is larger is chance.
    assert_same_logs(stock, patched, absolute=2e-5, but="rewards/accuracies")
    assert calls.ours >= 4
    # A reference model of its own keeps TRL's head.
    assert calls.trls == 1 if "lora" in kind else calls.trls > 1
    assert "fused_lm_head: installed in the LM head" in str(callback.report)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_weighting": True}, "the trainer wants log_sum_sq_probs, which ours does not give"),
        ({"family": "gemma2"}, "the mean of logits with a softcap, which needs the logits"),
    ],
    ids=["wpo", "softcap"],
)
def test_what_our_head_does_not_give_stays_trls(
    options: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, callback = Calls(monkeypatch), BarqKernelsCallback()
    preference_trainer(tmp_path, [callback], "dpo", **options)
    assert reason in str(callback.report)
    assert calls.trls > 8 and calls.ours == 1  # one for the probe of the loss


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"entropy_coef": 0.1}, "the loss has an entropy bonus"),
        ({"use_adaptive_entropy": True}, "the loss has an entropy bonus"),
        ({"cast_lm_head_to_fp32": True}, "wants its product in fp32"),
    ],
)
def test_options_of_grpo_that_ours_does_not_have(option: dict[str, Any], reason: str) -> None:
    callback, made = BarqKernelsCallback(), model()
    callback.install_head(made)
    trl.trainer.utils.add_fused_lm_head(made, outputs=("log_probs", "entropy"))
    callback.on_train_begin(SimpleNamespace(**option), None, None, model=made)  # type: ignore[arg-type]
    assert callback.report is not None and reason in str(callback.report)
    assert "fused_lm_head" not in callback.report.installed
    # The same without the option.
    callback.on_train_begin(SimpleNamespace(), None, None, model=made)  # type: ignore[arg-type]
    assert "fused_lm_head" in callback.report.installed


def headed(family: str = "llama", temperature: float = 1.0) -> Any:
    """A patched model with TRL's head over ours, and the patch that answers for it."""
    made = model(family)
    patch_model(made, leaves=False)
    trl.trainer.utils.add_fused_lm_head(made, temperature, outputs=("log_probs", "entropy"))
    return made, patch_model(made, leaves=False)


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([tokenizer()(text(1))["input_ids"]] * 2)
    labels = ids.clone()
    labels[1, :9] = -100
    return {"input_ids": ids, "labels": labels}


def test_the_answer_is_trls_output() -> None:
    made, report = headed()
    assert "fused_lm_head" in report.installed
    ours = made(**inputs(), fused_lm_head=True)
    shifted = torch.nn.functional.pad(inputs()["labels"], (0, 1), value=-100)[:, 1:]
    whole = made(input_ids=inputs()["input_ids"], shift_labels=shifted, fused_lm_head=True)
    counted = made(**inputs(), fused_lm_head=True, num_items_in_batch=torch.tensor(7))
    unpatch_model(made)
    stock = made(**inputs(), fused_lm_head=True)
    assert type(ours) is type(stock) and ours.keys() == stock.keys()
    for name, value in stock.items():
        torch.testing.assert_close(ours[name], value, msg=name)
        if value.dim():
            torch.testing.assert_close(whole[name][:, :-1], value, msg=name)
    valid = int(stock.label_mask.sum())
    torch.testing.assert_close(counted.loss * 7, stock.loss * valid)
    # Without the request it is the model's own forward.
    torch.testing.assert_close(made(**inputs()).loss, stock.loss)


def test_another_temperature_stays_trls() -> None:
    made, report = headed(temperature=0.5)
    assert "fused_lm_head: not in the model:" in str(report)
    assert made(**inputs(), fused_lm_head=True).log_probs.shape[0] == 2


def test_the_entropy_cannot_be_trained_on() -> None:
    made, _ = headed()
    outputs = made(**inputs(), fused_lm_head=True)
    outputs.log_probs.sum().backward(retain_graph=True)
    with pytest.raises(UnsupportedError, match=r"depends on the entropy.*entropy_coef=0"):
        outputs.entropy.sum().backward()


def test_a_copy_computes_with_its_own_weights() -> None:
    made, report = headed()
    twin = copy.deepcopy(made)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    ours, theirs = (m(**inputs(), fused_lm_head=True).log_probs for m in (made, twin))
    assert (ours - theirs).abs().max() > 0.01
    unpatch_model(twin)
    torch.testing.assert_close(theirs, twin(**inputs(), fused_lm_head=True).log_probs)
    assert "the model is a copy" in str(report)


def test_it_comes_off_again() -> None:
    made = model()
    patch_model(made)
    trl.trainer.utils.add_fused_lm_head(made)
    theirs = made.__dict__["forward"]
    for _ in range(2):
        report = patch_model(made)
        assert "fused_lm_head" in report.installed and made.__dict__["forward"] is not theirs
        assert patch_model(made).installed["fused_lm_head"] == ["the LM head"]
        unpatch_model(made, leaves=False)
        assert made.__dict__["forward"] is theirs
        # Ours lies beneath TRL's by now, and a second one cannot go there.
        break
    report = patch_model(made)
    assert "its forward is already patched" in str(report)
    assert made(**inputs(), fused_lm_head=True).log_probs.shape[0] == 2


def test_a_head_that_was_replaced_is_trls() -> None:
    made, report = headed()
    made.resize_token_embeddings(len(tokenizer()) + 7)
    assert made(**inputs(), fused_lm_head=True).log_probs.isfinite().all()
    assert "changed since" in str(report)


def test_a_plain_trainer_is_told_what_it_lacks(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    callback = BarqKernelsCallback()
    options = arguments(tmp_path, eval_strategy="no", max_steps=1)
    trainer = Trainer(
        model(),
        TrainingArguments(**options),
        train_dataset=[{k: v[0] for k, v in inputs().items()}] * 4,
        callbacks=[callback],
    )
    for _ in range(2):
        trainer.train()
        lines = [
            line for line in str(callback.report).splitlines() if "linear_cross_entropy" in line
        ]
        assert len(lines) == 1, lines
        assert "in the LM head, but not used: a stock Trainer asks for logits; Barq" in lines[0]
