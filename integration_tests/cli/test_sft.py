"""``barqtrain sft``: the training of ``trl sft``, from any kind of file, and one sentence for a mistake."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from models import tiny_model
from small_tokenizers import small_tokenizer
from transformers import AutoModelForCausalLM, LlamaModel

datasets = pytest.importorskip("datasets")
pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from trl.scripts import sft as stock  # noqa: E402

from barqtrain_hf.cli import main  # noqa: E402
from barqtrain_hf.cli.sft import data, help, launch, summary  # noqa: E402
from barqtrain_hf.cli.sft.arguments import Left, option_names, parse  # noqa: E402
from barqtrain_hf.cli.sft.words import as_options  # noqa: E402
from barqtrain_hf.config import BarqConfig  # noqa: E402
from barqtrain_hf.errors import DataError  # noqa: E402
from barqtrain_hf.sft import BarqSFTConfig, BarqSFTTrainer  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
README = Path(__file__).resolve().parents[2] / "README.md"
ON_CPU = ("--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false")
QUIET = ("--report_to", "none", "--disable_tqdm", "true")


def _text(number: int) -> str:
    return f"number {number} and more of it " * (1 + number % 4)


ROWS: dict[str, list[Any]] = {
    "texts": [{"text": _text(number)} for number in range(24)],
    "prompts": [{"prompt": f"ask {n} ", "completion": _text(n)} for n in range(24)],
    "chats": [
        {
            "messages": [
                {"role": "user", "content": f"ask {number}"},
                {"role": "assistant", "content": _text(number)},
            ]
        }
        for number in range(24)
    ],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data of every kind, and what is wrong with others."""
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = small_tokenizer()
    tokenizer.model_max_length = 4096
    tokenizer.chat_template = TEMPLATE
    model = tiny_model("llama", vocab_size=len(tokenizer))
    for name in ("model", "headless"):
        tokenizer.save_pretrained(folder / name)
    model.save_pretrained(folder / "model")
    model.save_pretrained(folder / "no_tokenizer")
    LlamaModel(model.config).save_pretrained(folder / "headless")
    model.config.save_pretrained(folder / "no_weights")
    for name in ("empty", "adapter", "a_checkpoint", "split"):
        (folder / name).mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    for name, rows in ROWS.items():
        _write(folder / f"{name}.jsonl", rows)
    _write(folder / "split" / "train.jsonl", ROWS["texts"])
    _write(folder / "split" / "test.jsonl", ROWS["texts"][:5])
    _write(folder / "columns.jsonl", [{"body": "a", "n": 1}])
    _write(folder / "half.jsonl", [{"prompt": "a"}])
    _write(folder / "numbers.jsonl", [{"text": 1}])
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "nothing.jsonl").write_text("")
    (folder / "file.bin").write_text("x")
    (folder / "broken.yaml").write_text("a: [1")
    (folder / "list.yaml").write_text("- a")
    (folder / "mixture.yaml").write_text("datasets:\n  - pth: x\n")
    (folder / "unknown.yaml").write_text("learning_rat: 1.0\n")
    return folder


@pytest.fixture(autouse=True)
def _in_folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", made / "cache")


def _write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _options(output: Path, data_set: str, *options: str) -> list[str]:
    return [
        *("--model_name_or_path", "model", "--dataset_name", data_set, "--max_length", "64"),
        *("--output_dir", str(output), *ON_CPU, *QUIET, *options),
    ]


def _sft(output: Path, data_set: str, *options: str) -> int:
    return main(["sft", *_options(output, data_set, *options)])


def _history(checkpoint: Path) -> list[dict[str, float]]:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    history: list[dict[str, float]] = state["log_history"]
    return history


def test_the_same_as_trl_sft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        *("--max_steps", "3", "--logging_steps", "1", "--eval_strategy", "steps"),
        *("--eval_steps", "2", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2"),
    )
    argv = _options(tmp_path / "stock", "split", *options)
    stock.main(*stock.make_parser(prog="trl sft").parse_args_and_config(argv))
    assert _sft(tmp_path / "ours", "split", *options) == 0
    theirs, ours = (_history(tmp_path / name / "checkpoint-3") for name in ("stock", "ours"))
    assert len(theirs) == len(ours) == 5
    for expected, found in zip(theirs, ours, strict=True):
        for name, value in expected.items():
            if not name.endswith(("_runtime", "_per_second")):
                assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    printed = capsys.readouterr().out
    assert "linear_cross_entropy: installed in the LM head" in printed
    assert f"evaluation loss  {ours[-1]['eval_loss']:.4f}" in printed
    assert f"final loss       {ours[-2]['loss']:.4f}" in printed
    assert f"Model saved to {tmp_path / 'ours'}." in printed
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours")


def test_packed_lora_from_a_config_file_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(
        "packing: true\nuse_peft: true\nlora_r: 4\nlora_dropout: 0.0\nlora_target_modules: all-linear\n"
        "learning_rate: 1e-2\nmax_steps: 2\nbarq_config:\n  rope: false\n"
        "per_device_train_batch_size: 2\nlogging_steps: 1\n"
    )
    config = ("--config", str(tmp_path / "run.yaml"))
    assert _sft(tmp_path / "out", "chats.jsonl", *config, "--lora_r", "2") == 0
    printed = capsys.readouterr().out
    assert "packing: installed in the train data set" in printed
    assert "lora: installed in 14 modules" in printed and "rope:" not in printed
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    again = ("--lora_r", "2", "--max_steps", "4", "--resume_from_checkpoint", "true")
    assert _sft(tmp_path / "out", "chats.jsonl", *config, *again) == 0
    history = _history(tmp_path / "out" / "checkpoint-4")
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    assert all(entry["packing_fill"] > 0.8 for entry in history if "loss" in entry)
    peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    capsys.readouterr()
    assert _sft(tmp_path / "out", "chats.jsonl", *config, *again) == 0
    printed = capsys.readouterr().out
    assert "nothing left to train: the checkpoint is of step 4 of 4. Raise --num_train" in printed
    assert "mean loss" not in printed and "tokens/s" not in printed and "train_loss" not in printed


@pytest.mark.parametrize("kind", ["texts", "prompts"])
def test_other_kinds_of_data(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _sft(tmp_path, f"{kind}.jsonl", "--packing", "--max_steps", "1") == 0
    printed = capsys.readouterr().out
    assert "tokenizing: installed in the train data set" in printed
    assert "tokens/s" in printed and "mean loss" in printed  # although nothing was logged


def test_models_are_pushed_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed: list[Any] = []

    def push(self: Any, *, dataset_name: str | None = None, **_: Any) -> None:
        pushed.append(dataset_name)

    monkeypatch.setattr(BarqSFTTrainer, "push_to_hub", push)
    monkeypatch.setattr(
        BarqSFTTrainer, "init_hf_repo", lambda self: setattr(self, "hub_model_id", "me/mine")
    )
    options = ("--push_to_hub", "--max_steps", "1", "--save_strategy", "no")
    assert _sft(tmp_path, "texts.jsonl", *options) == 0
    assert pushed[-1] == "texts.jsonl"
    assert "Model pushed to https://huggingface.co/me/mine." in capsys.readouterr().out


def _load(tmp_path: Path, name: str, *options: str) -> tuple[Any, Any]:
    return data.load(parse(_options(tmp_path, name, *options))[0])


def test_files_of_every_format(tmp_path: Path) -> None:
    texts = [row["text"] for row in ROWS["texts"]]
    table = datasets.Dataset.from_dict({"text": texts})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text(json.dumps(ROWS["texts"]))
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in ROWS["texts"]))
    for name in ("a.parquet", "a.csv", "a.json", "a.txt", "b.jsonl.gz", "*.jsonl.gz"):
        train, evaluation = _load(tmp_path, str(tmp_path / name))
        assert train["text"][:] == texts and evaluation is None, name


def test_evaluation_data(tmp_path: Path) -> None:
    evaluated = ("--eval_strategy", "epoch")
    train, evaluation = _load(tmp_path, "split", *evaluated)
    assert (len(train), len(evaluation)) == (24, 5)
    train, evaluation = _load(tmp_path, "texts.jsonl", *evaluated, "--test_split_size", "0.25")
    assert (len(train), len(evaluation)) == (18, 6)
    assert not {*train["text"]} & {*evaluation["text"]}
    again, _ = _load(tmp_path, "texts.jsonl", *evaluated, "--test_split_size", "0.25")
    assert again["text"][:] == train["text"][:]
    streamed, _ = _load(tmp_path, "texts.jsonl", "--dataset_streaming")
    assert next(iter(streamed)) == ROWS["texts"][0]


def test_a_mixture_of_files(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "datasets:\n  - path: texts.jsonl\n  - path: split\n    split: test\n"
        "test_split_size: 0.1\neval_strategy: epoch\n"
    )
    argv = ["--model_name_or_path", "model", "--output_dir", str(tmp_path), *ON_CPU, *QUIET]
    options, _ = parse([*argv, f"--config={tmp_path / 'run.yaml'}"])
    train, evaluation = data.load(options)
    assert len(train) + len(evaluation) == 29 and len(evaluation) == 3
    entry = options.mixture.datasets[0]
    entry.path = "nowhere.jsonl"
    with pytest.raises(DataError, match=r"datasets: nowhere\.jsonl: there is no such file"):
        data.load(options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ('--barq_config {"rop":0}', "barq_config: unknown key 'rop'; did you mean 'rope'?"),
        ("--barq_config no.yaml", "--barq_config 'no.yaml' cannot be read"),
        ("--learnin_rate 1", "unknown option --learnin_rate; did you mean --learning_rate?"),
        ("--num_proceses 2", "unknown option --num_proceses; did you mean --num_processes?"),
        ("--qqqq", "unknown option --qqqq; see barqtrain sft --help_all."),
        ("stray", "'stray' belongs to no option"),
        ("--num_processes 2 stray", "'stray' belongs to no option"),
        (
            "--learning_rate x",
            "argument --learning_rate/--learning-rate: invalid float value: 'x'.",
        ),
        ("--packing_strategy x", "invalid choice: 'x' (choose from"),
        ("--packing maybe", "argument --packing: Truthy value expected: got maybe"),
        (
            "--load_best_model_at_end",
            "--load_best_model_at_end requires the save and eval strategy",
        ),
        ("--bf16 true --use_cpu false", "Pass --bf16 false or, on a GPU, --fp16."),
        ("--config", "--config: name a YAML file."),
        ("--config no.yaml", "--config no.yaml: there is no such file."),
        ("--config broken.yaml", "--config broken.yaml: it is not YAML: "),
        ("--config list.yaml", "list.yaml must contain a YAML mapping"),
        ("--config mixture.yaml", "unexpected keyword argument 'pth'"),
        ("--config unknown.yaml", "unknown option --learning_rat; did you mean --learning_rate?"),
        ("--load_in_4bit", "--load_in_4bit keeps the weights frozen: add --use_peft"),
        ("--load_in_4bit --load_in_8bit", "can't use 8 bit and 4 bit precision at the same time"),
        ("--report_to x", "--report_to x: pass none, all, or some of"),
        ("--attn_implementation x", "--attn_implementation x: pass one of eager, "),
        ("--output_dir file.bin", "--output_dir file.bin is a file; pass a folder."),
        ("--resume_from_checkpoint x", "--resume_from_checkpoint x: there is no such folder"),
        ("--resume_from_checkpoint a_checkpoint", "it has no trainer_state.json"),
        ("--resume_from_checkpoint true", "No valid checkpoint found in output directory"),
        ("--chat_template_path x.jinja", "--chat_template_path x.jinja: there is no such file."),
        ("--model_name_or_path ./x", "--model_name_or_path ./x: there is no such folder."),
        ("--model_name_or_path x/y", "x/y: it is no folder here, and no config of that name came"),
        ("--model_name_or_path file.bin", "it is a file; pass the folder of the model."),
        ("--model_name_or_path empty", "there is no config.json in this folder."),
        ("--model_name_or_path adapter", "it is an adapter; pass its base model"),
        ("--model_name_or_path no_weights", "there are no weights in this folder"),
        ("--model_name_or_path no_tokenizer", "there is no tokenizer in this folder"),
        ("--model_name_or_path headless", "LlamaModel has no LM head to train."),
        ("--dataset_name x.jsonl", "--dataset_name x.jsonl: there is no such file."),
        ("--dataset_name ./x", "--dataset_name ./x: there is no such file or folder."),
        ("--dataset_name x/y", "--dataset_name x/y cannot be loaded: "),
        ("--dataset_name file.bin", "a file is one of *.csv, *.json, *.jsonl, *.parquet, *.txt."),
        ("--dataset_name empty", "--dataset_name empty cannot be loaded: "),
        ("--dataset_name broken.jsonl", "--dataset_name broken.jsonl cannot be loaded: JSON parse"),
        ("--dataset_name nothing.jsonl", "--dataset_name nothing.jsonl: the file is empty."),
        (
            "--dataset_name columns.jsonl",
            "no column 'text', 'messages', 'prompt' with 'completion' or 'input_ids', only body, n: "
            "pass --dataset_text_field, or rename a column.",
        ),
        ("--dataset_name numbers.jsonl", "data set's column 'text' holds int64, not strings"),
        ("--dataset_name half.jsonl", "has a column 'prompt' and none 'completion'"),
        (
            "--eval_strategy epoch",
            "the data set has no split 'test', only 'train': pass --dataset_t",
        ),
        ("--dataset_train_split x", "no split 'x', only 'train': pass --dataset_train_split."),
        ("--test_split_size 7", "--test_split_size cannot be loaded: test_size=7.0"),
        ("--padding_free", "When `--padding_free true` without packing, `--max_length` is"),
        ("--assistant_only_loss", "the dataset is not conversational"),
        ("--use_peft --lora_target_modules x", "Target modules x not found"),
        ("--accelerate_config x", "Accelerate config x is neither a file nor a valid config"),
    ],
)
def test_mistakes(
    options: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _sft(tmp_path, "texts.jsonl", "--max_steps", "1", *options.split()) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("barqtrain")]
    assert len(told) == 1 and told[0].startswith("barqtrain sft: ")
    assert words in told[0], told[0]


def test_columns_are_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path / "no_weights")
    arguments = BarqSFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    for wrong in ({"train_dataset": "a"}, {"train_dataset": "text", "eval_dataset": "a"}):
        sets = {name: datasets.Dataset.from_dict({key: ["x"]}) for name, key in wrong.items()}
        with pytest.raises(DataError, match="has no column 'text'"):
            BarqSFTTrainer(str(tmp_path / "no_weights"), arguments, **sets)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("pass max_length=1024.", "pass --max_length 1024."),
        ('Pass barq_config={"rope": False}.', """Pass --barq_config '{"rope": false}'."""),
        ("max_length is 8, packing on", "--max_length is 8, packing on"),
        ("packing=True wants it", "--packing true wants it"),
        ("only a: pass text_column.", "only a: pass --dataset_text_field."),
        ("x/max_length and --max_length 3", "x/max_length and --max_length 3"),
        ("the column 'max_length'", "the column 'max_length'"),
    ],
)
def test_messages_name_options(message: str, words: str) -> None:
    assert as_options(message) == words


def test_nothing_to_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--output_dir", str(tmp_path), *ON_CPU]
    assert main(["sft", *rest, "--dataset_name", "texts.jsonl"]) == 2
    assert "--model_name_or_path: name a folder, or a model on the hub." in capsys.readouterr().err
    assert main(["sft", *rest, "--model_name_or_path", "model"]) == 2
    assert "--dataset_name: name a file, a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "package", "words"),
    [
        (
            "--use_peft",
            "peft",
            "--use_peft needs peft, which is not installed. pip install 'barqtrain_hf[peft]'",
        ),
        ("--report_to wandb", "wandb", "pip install 'barqtrain_hf[wandb]'"),
        ("--load_in_4bit --use_peft", "bitsandbytes", "--load_in_4bit needs bitsandbytes"),
        ("--use_liger_kernel", "liger_kernel", "pip install liger-kernel"),
        ("--attn_implementation flash_attention_2", "flash_attn", "pip install flash-attn"),
        ("--attn_implementation me/flash", "kernels", "pip install kernels"),
        ("--use_barq_kernels", "trl", "It needs TRL (import of trl halted"),
    ],
)
def test_packages_that_are_missing(
    options: str,
    package: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    assert _sft(tmp_path, "texts.jsonl", *options.split()) == 2
    assert words in capsys.readouterr().err


def test_two_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: name == "liger_kernel" or find_spec(name, *rest),
    )
    assert _sft(tmp_path, "texts.jsonl", "--use_liger_kernel") == 2
    assert "--use_liger_kernel true installs Liger's fused cross-entropy" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["train", "_prepare_dataset"])
def test_what_is_nobodys_mistake_keeps_its_traceback(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(BarqSFTTrainer, where, fail)
    with pytest.raises(ValueError, match="a bug"):
        _sft(tmp_path, "texts.jsonl", "--max_steps", "1")


def test_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BarqSFTTrainer, "train", stop)
    assert _sft(tmp_path, "texts.jsonl") == 130
    said = capsys.readouterr().err
    assert "barqtrain sft: interrupted." in said and "--resume_from_checkpoint" not in said
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    assert _sft(tmp_path, "texts.jsonl") == 130
    assert "add --resume_from_checkpoint true." in capsys.readouterr().err


def test_help_names_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--help"]) == 0
    short = capsys.readouterr().out
    known = [*option_names(), "config"]
    for name, _, text in (*help.OURS, help.CONFIG, *help.MOST_USED):
        assert name in known and text in " ".join(short.split()), name
    assert main(["sft", "--help_all"]) == 0
    whole = capsys.readouterr().out
    for name in known:
        assert f"\n  --{name} " in whole, name
    for page in (short, whole):
        assert page.startswith("usage: barqtrain sft --model_name_or_path MODEL")
        assert max(map(len, page.splitlines())) <= 110
    assert len(short.splitlines()) < 160
    for field in fields(BarqConfig):
        assert field.name in help.OURS[1][2]


def test_help_waits_for_nothing() -> None:
    code = (
        "import sys; from barqtrain_hf.cli import main; main(['sft', '-h'])\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of accelerate start this command again, without them, and its exit code counts."""
    launched: list[Any] = []
    outcome: list[BaseException | None] = [None]

    def launch_command(arguments: Any) -> None:
        launched.append(arguments)
        assert not launch.is_wanted(
            Left([], ["--num_processes", "2"]), False
        )  # in what is launched
        if outcome[0] is not None:
            raise outcome[0]

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch_command)
    (tmp_path / "run.yaml").write_text("num_machines: 1\nmax_steps: 3\n")
    rest = ("--max_steps", "2", "--config", str(tmp_path / "run.yaml"))
    options = ("--num_processes", "2", "--mixed_precision", "no", "--accelerate_config", "fsdp2")
    assert _sft(tmp_path, "texts.jsonl", *options, *rest) == 0
    (arguments,) = launched
    assert (arguments.num_processes, arguments.num_machines) == (2, 1)
    assert arguments.module and arguments.training_script == "barqtrain_hf.cli"
    assert arguments.config_file.endswith("fsdp2.yaml")
    expected = _options(tmp_path, "texts.jsonl", *rest)
    assert arguments.training_script_args == ["sft", *expected]

    outcome[0] = subprocess.CalledProcessError(2, "python")
    assert _sft(tmp_path, "texts.jsonl", "--num_processes", "2") == 2
    failure: Any = type("Failure", (), {"exitcode": 7, "timestamp": 0})()
    monkeypatch.setattr(ChildFailedError, "get_first_failure", lambda self: (0, failure))
    monkeypatch.setattr(ChildFailedError, "format_msg", lambda self: "")
    outcome[0] = ChildFailedError("python", {0: failure})
    assert _sft(tmp_path, "texts.jsonl", "--num_processes", "2") == 7
    # Several GPUs are all taken, as trl sft does.
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert launch.is_wanted(Left([], []), False) and not launch.is_wanted(Left([], []), True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not launch.is_wanted(Left([], []), False)


def test_commands_of_the_readme(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As they are written, with a model that is here, on a CPU and for a step more."""
    text = README.read_text(encoding="utf-8").replace("Qwen/Qwen3-0.6B", str(made / "model"))
    (config,) = re.findall(r"^```yaml\n(# run\.yaml\n.*?)^```", text, re.DOTALL | re.M)
    (block,) = re.findall(r"^```bash\n(barqtrain sft.*?)^```", text, re.DOTALL | re.M)
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert [command[:2] for command in commands] == [["barqtrain", "sft"]] * 2
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "split", "data")
    shutil.copy(made / "chats.jsonl", ".")
    # A checkpoint of that run must be there.
    (tmp_path / "run.yaml").write_text(config)
    rest = [*ON_CPU, "--disable_tqdm", "true", "--max_length", "64"]
    assert main(["sft", "--config", "run.yaml", *rest, "--max_steps", "1"]) == 0
    for command in commands:
        assert main([*command[1:], *rest, "--max_steps", "2"]) == 0
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert (tmp_path / "out-full" / "model.safetensors").exists()
    assert "evaluation loss" in capsys.readouterr().out


def test_the_summary() -> None:
    class Result:
        global_step, training_loss = 3, 2.0
        metrics = {"train_runtime": 10.0}  # noqa: RUF012

    def entry(tokens: int, speed: float) -> dict[str, float]:
        return {"loss": 1.5, "num_tokens": tokens, "tokens_per_second": speed, "peak_memory_gib": 2}

    history = [entry(100, 1.0), entry(300, 50.0), entry(400, 100.0), {"num_tokens": 450.0}]
    assert dict(summary.rows(history, Result(), 3)) == {
        "steps": "3",
        "tokens": "450",
        "training time": "10.0 s",
        "tokens/s": "60",  # 300 in 5 seconds: until the first log, kernels are compiled
        "peak memory": "2.00 GiB",
        "mean loss": "2.0000",
        "final loss": "1.5000",
    }
    assert dict(summary.rows(history[:1], Result(), 3))["tokens/s"] == "1"
    assert dict(summary.rows(history[3:], Result(), 3))["tokens/s"] == "45"
    assert dict(summary.rows([], Result(), 3)) == {
        **{"steps": "3", "training time": "10.0 s", "mean loss": "2.0000"}
    }
    nothing = dict(summary.rows(history, Result(), 0))
    assert nothing.keys() == {"steps", "tokens", "peak memory", "final loss"}


def test_attention_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--attn_implementation", "barq", "--packing", "--max_steps", "1")
    assert _sft(tmp_path, "texts.jsonl", *options) == 0
    assert "Model saved" in capsys.readouterr().out
