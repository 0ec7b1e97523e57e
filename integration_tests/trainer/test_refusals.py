"""What cannot be trained rightly is refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, tiny_model
from small_tokenizers import small_tokenizer
from test_parity import Rows, arguments
from transformers import LlamaConfig

from barqtrain_hf import BarqConfig, BarqTrainer, BarqTrainingArguments
from barqtrain_hf.data import tokenize
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, DataError, UnsupportedError
from barqtrain_hf.ops._targets import valid_rows


def make(path: Path, dataset: Any, **options: Any) -> BarqTrainer:
    args = BarqTrainingArguments(**arguments(path, **options))
    return BarqTrainer(tiny_model("llama"), args, train_dataset=dataset)


@pytest.mark.parametrize("config", [None, {"rope": True}, {"fused_linear_cross_entropy": True}])
def test_liger_with_fused_cross_entropy(config: Any, tmp_path: Path) -> None:
    args = BarqTrainingArguments(**arguments(tmp_path))
    args.use_liger_kernel, args.liger_kernel_config = True, config
    with pytest.raises(UnsupportedError, match=r"use_liger_kernel.*fused_linear_cross_entropy"):
        BarqTrainer(tiny_model("llama"), args, train_dataset=Rows(4, seed=0))


def test_data_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = BarqTrainingArguments(**arguments(tmp_path))
    monkeypatch.setattr(type(args), "n_gpu", 2)
    with pytest.raises(UnsupportedError, match=r"nn\.DataParallel \(2 GPUs.*accelerate launch"):
        BarqTrainer(tiny_model("llama"), args, train_dataset=Rows(4, seed=0))


def test_empty_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train_dataset is empty"):
        make(tmp_path, [])


def test_label_out_of_range(tmp_path: Path) -> None:
    rows = Rows(8, seed=0)
    rows.rows[0]["labels"][-1] = VOCABULARY
    with pytest.raises(ArgumentError, match=f"= {VOCABULARY} is outside the vocabulary"):
        make(tmp_path, rows).train()


def test_no_labels(tmp_path: Path) -> None:
    rows = [{"input_ids": torch.arange(5)} for _ in range(8)]
    trainer = make(tmp_path, rows)
    # Stock Trainer's own error: the model returned no loss.
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer.train()
    assert "no labels" in str(trainer.barq_report)


def test_barq_config(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="unknown key 'rmsnorm'; did you mean 'rms_norm'"):
        BarqTrainingArguments(**arguments(tmp_path, barq_config={"rmsnorm": False}))
    for name in ("rms_norm", "layer_norm", "glu", "rope", "linear_cross_entropy"):
        with pytest.raises(ArgumentTypeError, match=f"{name}='yes' must be true or false"):
            BarqConfig.load({name: "yes"})
    with pytest.raises(ArgumentError, match="max_extra_bytes=0 must be a positive integer"):
        BarqConfig(max_extra_bytes=0)
    with pytest.raises(ArgumentTypeError, match="must be a dict"):
        BarqConfig.load("[1, 2]")
    off = BarqConfig(rms_norm=False)
    (tmp_path / "barq.yaml").write_text("rms_norm: false\n")
    for value in (off, {"rms_norm": False}, '{"rms_norm": false}', str(tmp_path / "barq.yaml")):
        assert BarqConfig.load(value) == off
    assert BarqConfig.load(None) == BarqConfig()


def test_flags_parse_from_the_command_line(tmp_path: Path) -> None:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(BarqTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--barq_config", '{"rms_norm": false}']
    )
    assert args.use_barq_kernels is True
    assert BarqConfig.load(args.barq_config) == BarqConfig(rms_norm=False)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--use_barq_kernels", "false"]
    )
    assert args.use_barq_kernels is False
    assert args.to_dict()["use_barq_kernels"] is False


def test_a_label_outside_the_vocabulary(tmp_path: Path) -> None:
    data = Rows(4, seed=0)
    data.rows[1]["labels"][12] = VOCABULARY + 3
    with pytest.raises(ArgumentError, match=rf"= {VOCABULARY + 3} is outside the vocabulary of"):
        make(tmp_path, data).train()


def test_a_label_that_no_step_could_look_at_stops_at_the_next_log(tmp_path: Path) -> None:
    trainer = make(tmp_path, Rows(4, seed=0))
    assert valid_rows(torch.tensor([1, -5]), None, -100, VOCABULARY) is None
    with pytest.raises(ArgumentError, match=r"target\[1\] = -5 is outside"):
        trainer.log({"loss": 1.0})
    trainer.log({"loss": 1.0})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"model": "gpt2"},
            r"model is 'gpt2', a name: .*AutoModelForCausalLM.from_pretrained\('gpt2",
        ),
        ({"model": LlamaConfig}, "model is LlamaConfig: pass a model, an instance of"),
        ({"args": "out"}, r"args is of type str: pass BarqTrainingArguments\(output_dir"),
        ({"train_dataset": "a.jsonl"}, "train_dataset is 'a.jsonl', a name: .* PackedDataset"),
        ({"eval_dataset": Path("a.jsonl")}, "eval_dataset is .*, a name"),
    ],
)
def test_arguments_of_the_wrong_type(wrong: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = {
        "model": tiny_model("llama"),
        "args": BarqTrainingArguments(**arguments(tmp_path)),
        "train_dataset": Rows(4, seed=0),
    }
    with pytest.raises(ArgumentTypeError, match=words):
        BarqTrainer(**{**given, **wrong})


def test_a_store_is_no_data_set(tmp_path: Path) -> None:
    store = tokenize(["a text"], small_tokenizer(), tmp_path / "store")
    with pytest.raises(ArgumentTypeError, match=r"PackedDataset\(train_dataset, max_length\)"):
        make(tmp_path, store)
