"""Curves of training loss and of the predictions' entropy: BarqTrainer beside the stock Trainer.

Both train the same weights on the same rows in the same order, once per seed; a seed draws the order and
what is trained at the start. Two settings: all weights, fp32 under bf16 autocast; and LoRA on a frozen bf16
base with a frozen head. Every few steps a stock copy of the model, in fp32 and with all its logits, judges
the current weights of either trainer on the same held-out rows.

`python -m barqtrain_hf.benchmarks.loss_curves REPORT.json OUTPUT.png` draws a report.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from barqtrain_hf import BarqTrainer, BarqTrainingArguments
from barqtrain_hf.benchmarks.harness import Report, draw_report, new_figure
from barqtrain_hf.cli.demo import own_data
from barqtrain_hf.cli.demo.tokenizer import encode_texts, train_tokenizer
from barqtrain_hf.errors import DataError, UnsupportedError

Json = dict[str, Any]
Weights = dict[str, torch.Tensor]

SETTINGS = {
    "full": "all weights, fp32 under bf16 autocast",
    "lora": "LoRA r=16, bf16 base and head frozen",
}
# Keys of a run's row, with what they are called.
CURVES = {"loss": "training loss", "entropy": "held-out entropy", "held_out_loss": "held-out loss"}
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Sizes:
    """The model, the data and the runs.

    Attributes:
        vocabulary: rows of the head; more than the tokenizer has tokens, as in padded heads.
        text_bytes: how much of the standard library's source is read.
        log_every: steps over which a value of the training loss is the mean.
        judge_every: steps between two judgements on held-out rows.
        skip_steps: steps at the start at which leaving the stock spread does not count.
        max_extra_bytes: of the fused loss. Less than its default: all rows of a step would fit, and
            chunks whose gradients are summed are what could drift.
    """

    layers: int = 4
    hidden: int = 768
    vocabulary: int = 32_000
    tokens: int = 8_192
    max_extra_bytes: int = 72 * 2**20
    text_bytes: int = 10_000_000
    row_length: int = 512
    rows_per_step: int = 8
    steps: int = 300
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    log_every: int = 5
    judge_every: int = 10
    skip_steps: int = 20


DEFAULT = Sizes()


class CurvesReport(Report):
    """A report whose curves are in the file only."""

    def print(self) -> None:
        """Prints the comparison."""
        rows = [row for row in self.rows if row["part"] == "summary"]
        Report(self.benchmark, rows, self.environment).print()


@dataclass(frozen=True)
class _Data:
    """Rows of tokens, each from a place of its own in the text."""

    train: torch.Tensor  # [steps * rows_per_step, row_length]
    base: torch.Tensor  # as many as half the steps take
    held_out: torch.Tensor  # [rows_per_step, row_length]

    @classmethod
    def read(cls, sizes: Sizes) -> _Data:
        """Cuts the source of Python's standard library into rows."""
        text = own_data.load(sysconfig.get_path("stdlib"), 0, sizes.text_bytes)
        tokenizer = train_tokenizer((d.text or "" for d in text.train), sizes.tokens, chat=False)

        def rows(documents: Sequence[own_data.Document]) -> torch.Tensor:
            encoded = encode_texts(tokenizer, [d.text or "" for d in documents])
            ids = torch.tensor([token for tokens in encoded for token in tokens["input_ids"]])
            count = len(ids) // sizes.row_length
            return ids[: count * sizes.row_length].view(count, sizes.row_length)

        found, held_out = rows(text.train), rows(text.held_out)
        train = sizes.steps * sizes.rows_per_step
        base = sizes.steps // 2 * sizes.rows_per_step
        if len(found) < train + base or len(held_out) < sizes.rows_per_step:
            raise DataError(
                f"the standard library gives {len(found)} rows to train on and {len(held_out)} held "
                f"out; {train + base} and {sizes.rows_per_step} are needed."
            )
        # One row from each of several files.
        held_out = held_out[:: len(held_out) // sizes.rows_per_step][: sizes.rows_per_step]
        return cls(found[:train], found[train : train + base], held_out)


class _Judge(TrainerCallback):
    """Entropy and loss of a model's predictions on held-out rows, from all its logits in fp32.

    A copy of its own computes them, made before any trainer touches the model: nothing of ours and no
    autocast is in it, and the model's mode and torch's generators stay as they are.
    """

    def __init__(self, model: Any, rows: torch.Tensor, every: int) -> None:
        self._copy = copy.deepcopy(model).float().eval().requires_grad_(False)
        self._rows, self._every = rows, every
        self.judged: list[tuple[int, float, float]] = []  # step, entropy, loss

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judges the weights after some steps."""
        if state.global_step % self._every:
            return
        model = kwargs["model"]
        rows = self._rows.to(model.device)
        self._copy.to(model.device).load_state_dict(model.state_dict())
        logits = self._copy(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1)
        log_p = F.log_softmax(logits, -1)
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        loss = F.nll_loss(log_p, rows[:, 1:].flatten())
        self.judged.append((state.global_step, float(entropy), float(loss)))


def run(sizes: Sizes = DEFAULT) -> Report:
    """Trains every setting and seed with both trainers.

    Raises:
        DataError: the standard library is too short for these sizes.
        ModuleNotFoundError: peft is not installed.
        UnsupportedError: BarqTrainer did not compute the loss in the head.
    """
    transformers.utils.logging.set_verbosity_error()
    report = CurvesReport("loss_curves")
    report.environment["versions"]["peft"] = importlib.metadata.version("peft")
    data = _Data.read(sizes)
    report.add(part="sizes", **asdict(sizes), learning_rate=_LEARNING_RATE)
    for setting in SETTINGS:
        base = _base(sizes, data) if setting == "lora" else None
        for seed in sizes.seeds:
            for trainer in ("stock", "ours"):
                begin = time.perf_counter()
                row = _train(trainer == "ours", sizes, data, seed, base)
                gc.collect()  # trainers are cycles, and hold weights
                report.add(part="run", setting=setting, trainer=trainer, seed=seed, **row)
                last = ", ".join(f"{name} {row[key][-1]:.4f}" for key, name in CURVES.items())
                last += f"; {time.perf_counter() - begin:.1f} s"
                print(f"{setting}, {trainer}, seed {seed}: {last}", file=sys.stderr, flush=True)
    for setting in SETTINGS:
        for curve in CURVES:
            report.add(**_compare(report.rows, setting, curve, sizes.skip_steps))
    return report


def _model(sizes: Sizes, seed: int, base: Weights | None) -> Any:
    """A Llama with random weights, or with LoRA on ``base``."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.hidden * 8 // 3,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.hidden // 64,
            num_key_value_heads=sizes.hidden // 64,
            max_position_embeddings=sizes.row_length,
            tie_word_embeddings=False,  # the head's gradient is then all that moves its weight
        )
    )
    if base is None:
        return model
    from peft import LoraConfig, get_peft_model

    for parameter in model.parameters():  # not the buffers: RoPE's frequencies stay fp32
        parameter.data = parameter.data.bfloat16()
    model.load_state_dict(base)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=_LORA_TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def _base(sizes: Sizes, data: _Data) -> Weights:
    """What LoRA starts from: half the steps of the stock Trainer, on rows of their own.

    Adapters alone learn little on random weights; after half the steps there is much left to learn.
    """
    model = _model(sizes, 0, None)
    _fit(False, model, sizes, data.base, sizes.steps // 2)
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def _train(ours: bool, sizes: Sizes, data: _Data, seed: int, base: Weights | None) -> Json:
    """One run's curves."""
    model = _model(sizes, seed, base)
    judge = _Judge(model, data.held_out, sizes.judge_every)
    # The order is put into the rows: a sampler's would also depend on what else draws random numbers.
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    trainer = _fit(ours, model, sizes, data.train[order], sizes.steps, judge)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    judged_steps, entropy, held_out_loss = zip(*judge.judged, strict=True)
    row: Json = {
        "steps": [entry["step"] for entry in logs],
        "loss": [float(entry["loss"]) for entry in logs],
        "judged_steps": judged_steps,
        "entropy": entropy,
        "held_out_loss": held_out_loss,
    }
    if isinstance(trainer, BarqTrainer):
        patches, op = trainer.barq_report, "linear_cross_entropy"
        if op not in patches.installed or any(op == name for name, _ in patches.fallbacks):
            # The stock Trainer would be compared with itself.
            raise UnsupportedError(f"BarqTrainer did not fuse the loss. {patches}")
        row["kernels"] = str(patches)
    return row


def _fit(
    ours: bool, model: Any, sizes: Sizes, rows: torch.Tensor, steps: int, *judges: TrainerCallback
) -> Trainer:
    """Trains a model in place on rows in their order."""
    with tempfile.TemporaryDirectory() as folder:
        barq: Json = {"barq_config": {"max_extra_bytes": sizes.max_extra_bytes}} if ours else {}
        arguments = (BarqTrainingArguments if ours else TrainingArguments)(
            **barq,
            output_dir=folder,
            per_device_train_batch_size=sizes.rows_per_step,
            max_steps=steps,
            train_sampling_strategy="sequential",
            learning_rate=_LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=sizes.log_every,
            logging_nan_inf_filter=False,  # it would show the last finite loss instead
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        trainer = (BarqTrainer if ours else Trainer)(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=list(judges),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return trainer


def _compare(rows: Sequence[Json], setting: str, curve: str, skip_steps: int) -> Json:
    """One curve of ours beside stock's, and beside what another seed does to stock's."""
    runs = [row for row in rows if row["part"] == "run" and row["setting"] == setting]
    stock, ours = (  # [seeds, steps]
        torch.tensor([run[curve] for run in runs if run["trainer"] == name], dtype=torch.float64)
        for name in ("stock", "ours")
    )
    mean, steps = ours.mean(0), torch.tensor(runs[0][_steps_of(curve)])
    difference = float((mean - stock.mean(0)).square().mean().sqrt())
    spread = float(stock.var(0).mean().sqrt())
    within = ((mean >= stock.amin(0)) & (mean <= stock.amax(0)))[steps > skip_steps]
    return {
        "part": "summary",
        "setting": setting,
        "curve": curve,
        "rms_difference_of_means": difference,
        "rms_seed_std_of_stock": spread,
        # Two sets of n unrelated seeds would differ by sqrt(2 / n) of the spread.
        "ratio": difference / spread,
        "same_seed_difference": float((ours - stock).abs().mean()),
        # With its sign: a bias, however small beside the spread, does not cancel out.
        "mean_difference": float((ours - stock).mean()),
        "within_spread": bool(within.all()) if len(within) else None,
        "share_within": float(within.double().mean()) if len(within) else None,
    }


def _steps_of(curve: str) -> str:
    return "steps" if curve == "loss" else "judged_steps"


def draw(report: Json, path: Path) -> None:
    """Writes a PNG: settings below each other, training loss and held-out entropy side by side."""
    figure = new_figure((11, 7.5))
    grid = figure.subplots(2, 2)
    for setting, line in zip(SETTINGS, grid, strict=True):
        for curve, axes in zip(("loss", "entropy"), line, strict=True):
            runs = (row for row in report["rows"] if row["part"] == "run")
            for row in (row for row in runs if row["setting"] == setting):
                # Stock on top, and thinner: where both coincide, both are to be seen.
                seed = row["seed"]
                label, style = f"Trainer, seed {seed}", {"color": "0.35", "lw": 0.7, "zorder": 3}
                if row["trainer"] == "ours":
                    label, style = f"BarqTrainer, seed {seed}", {"color": f"C{seed}", "lw": 2.2}
                axes.plot(row[_steps_of(curve)], row[curve], label=label, **style)
            axes.set(title=SETTINGS[setting], xlabel="step", ylabel=f"{CURVES[curve]}, nats")
            axes.grid(alpha=0.3)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    sizes = next(row for row in report["rows"] if row["part"] == "sizes")
    shape = f"{sizes['layers']}×{sizes['hidden']}, head {sizes['vocabulary']}"
    figure.suptitle(f"Llama {shape}, {report['environment']['device']}")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws one report; returns the exit code."""
    return draw_report("loss_curves", draw, argv)


if __name__ == "__main__":
    sys.exit(main())
