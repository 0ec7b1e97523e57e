"""The flags parse, are serialised, and mistakes in them are one sentence."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sft_cases import arguments, data, datasets, model, tokenizer, trl
from transformers import HfArgumentParser, LlamaModel, TrainingArguments

import barqtrain_hf
from barqtrain_hf import (
    BarqConfig,
    BarqSFTConfig,
    BarqSFTTrainer,
    BarqTrainingArguments,
)
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, DataError, UnsupportedError

OFF = BarqConfig(rope=False)


@pytest.mark.parametrize("parser", [HfArgumentParser, trl.TrlParser])
def test_flags_parse_from_the_command_line(parser: Any, tmp_path: Path) -> None:
    def parse(*flags: str) -> BarqSFTConfig:
        base = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
        (args,) = parser(BarqSFTConfig).parse_args_into_dataclasses([*base, *flags])
        return args

    args = parse()
    assert args.use_barq_kernels is True and args.barq_config is None and args.packing is False
    assert parse("--use_barq_kernels", "false").use_barq_kernels is False
    assert parse("--no_use_barq_kernels").use_barq_kernels is False
    assert BarqConfig.load(parse("--barq_config", '{"rope": false}').barq_config) == OFF
    (tmp_path / "barq.yaml").write_text("rope: false\n", encoding="utf-8")
    for args in (parse("--barq_config", str(tmp_path / "barq.yaml")), parse("--packing")):
        assert BarqConfig.load(args.barq_config) in (OFF, BarqConfig())
    with pytest.raises(ArgumentError, match="unknown key 'rop'; did you mean 'rope'"):
        parse("--barq_config", '{"rop": false}')


def test_flags_parse_from_a_config_file_of_trl(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nbarq_config:\n  rope: false\n",
        encoding="utf-8",
    )
    parser = trl.TrlParser((trl.ScriptArguments, BarqSFTConfig, trl.ModelConfig))
    _, args, _ = parser.parse_args_and_config(
        ["--config", str(tmp_path / "run.yaml"), "--dataset_name", "x"]
    )
    assert BarqConfig.load(args.barq_config) == OFF and args.use_barq_kernels is True


def test_flags_are_serialised(tmp_path: Path) -> None:
    args = BarqSFTConfig(**arguments(tmp_path, barq_config={"rope": False}))
    for content in (args.to_dict(), json.loads(args.to_json_string())):
        assert content["barq_config"] == {"rope": False}
        assert content["use_barq_kernels"] is True
    assert args.to_sanitized_dict()["use_barq_kernels"] is True
    assert BarqConfig.load(BarqSFTConfig(**args.to_dict()).barq_config) == OFF
    assert isinstance(args, trl.SFTConfig)


def trainer(path: Path, kind: str = "texts", options: Any = None, **given: Any) -> BarqSFTTrainer:
    given = {
        "model": model(),
        "args": BarqSFTConfig(**arguments(path, eval_strategy="no", **(options or {}))),
        "train_dataset": data(kind),
        "processing_class": tokenizer(),
        **given,
    }
    return BarqSFTTrainer(**given)


def test_arguments_of_every_kind(tmp_path: Path) -> None:
    plain = {k: v for k, v in arguments(tmp_path, eval_strategy="no").items()}
    off = {"use_barq_kernels": False}
    for args, kernels in (
        (trl.SFTConfig(**plain), True),
        (TrainingArguments(**plain), True),
        (BarqTrainingArguments(**plain, barq_config={"rope": False}), True),
        (BarqTrainingArguments(**plain, **off), False),
        (BarqSFTConfig(**plain, **off), False),
    ):
        made = trainer(tmp_path, args=args)
        assert isinstance(made.args, trl.SFTConfig)
        assert ("linear_cross_entropy" in made.barq_report.installed) is kernels
    with pytest.raises(TypeError):
        BarqSFTTrainer(model(), no_such_argument=1)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"ropes": False}, ArgumentError, "unknown key 'ropes'; did you mean 'rope'"),
        ('{"glu": 3}', ArgumentTypeError, "glu=3 must be true or false"),
        ("no/such.yaml", ArgumentError, "barq_config='no/such.yaml' cannot be read"),
        ([1], ArgumentTypeError, "must be a dict, a JSON object, or the path"),
    ],
)
def test_mistakes_in_barq_config(value: Any, error: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        BarqSFTConfig(**arguments(tmp_path, barq_config=value))


def test_liger_beside_barq(tmp_path: Path) -> None:
    for config in (None, {"rope": True}):
        args = BarqSFTConfig(**arguments(tmp_path))
        args.use_liger_kernel, args.liger_kernel_config = True, config
        with pytest.raises(
            UnsupportedError, match=r"use_liger_kernel=True.*replace ours\. Drop it"
        ):
            trainer(tmp_path, args=args)


def test_models_without_a_head(tmp_path: Path) -> None:
    headless = LlamaModel(model().config)
    headless.save_pretrained(tmp_path / "model")
    for value in (headless, str(tmp_path / "model")):
        with pytest.raises(UnsupportedError, match=r"LlamaModel has no LM head.*AutoModelForCaus"):
            trainer(tmp_path, model=value)
    model().save_pretrained(tmp_path / "whole")
    assert trainer(tmp_path, model=str(tmp_path / "whole")).barq_report.installed


def test_data_without_the_columns(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list
    for dataset, message in (
        (
            rows([{"body": "a", "n": 1}]),
            r"train data set has no column 'text', 'messages', .* body, n",
        ),
        (rows([{"prompt": "a"}]), "a column 'prompt' and none 'completion'"),
        (rows([{"completion": "a"}]), "a column 'completion' and none 'prompt'"),
        (rows([]), "train_dataset is empty"),
    ):
        with pytest.raises(DataError, match=message):
            trainer(tmp_path, train_dataset=dataset)
    with pytest.raises(DataError, match="eval data set has no column"):
        trainer(tmp_path, eval_dataset=rows([{"body": "a"}]))
    made = trainer(
        tmp_path, options={"dataset_text_field": "body"}, train_dataset=rows([{"body": "a"}])
    )
    with pytest.raises(DataError, match="eval data set is empty"):
        made.evaluate(rows([]))
    made = trainer(
        tmp_path, train_dataset=rows([{"body": "a"}]), formatting_func=lambda row: row["body"]
    )
    assert len(made.train_dataset) == 1


def test_a_wrapper_that_swallows_the_request(tmp_path: Path) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            return self.inner(input_ids, attention_mask=attention_mask)

    made = trainer(tmp_path)
    batch = next(iter(made.get_train_dataloader()))
    made._fuses = lambda *args: True  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match="Wrapper did not pass fused_loss on"):
        made.compute_loss(Wrapper(made.model), batch)


@pytest.mark.parametrize("name", ["BarqSFTTrainer", "BarqSFTConfig"])
@pytest.mark.parametrize("problem", ["missing", "old"])
def test_without_trl_the_extra_is_named(
    name: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m.startswith("barqtrain_hf.sft")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(barqtrain_hf, "sft")
    if problem == "missing":
        monkeypatch.setitem(sys.modules, "trl", None)
        message = r"need TRL \(.*\)\. pip install 'barqtrain_hf\[sft\]'"
    else:
        stock = importlib.metadata.version
        version = {"trl": "1.2.0"}
        monkeypatch.setattr(importlib.metadata, "version", lambda n: version.get(n) or stock(n))
        message = r"1\.16 or later, and 1\.2\.0 is installed\. pip install --upgrade 'barqtrain_hf\[sft\]'"
    with pytest.raises(UnsupportedError, match=message):
        getattr(barqtrain_hf, name)
    # A star import must not need an extra.
    assert name in dir(barqtrain_hf) and name not in barqtrain_hf.__all__
