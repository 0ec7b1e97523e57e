"""``barqtrain doctor``: what it finds, what it calls a problem, and what it says about a model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import FAMILIES, tiny_model
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from barqtrain_hf.cli import main
from barqtrain_hf.cli.doctor import checks, environment, kernels, model, run
from barqtrain_hf.cli.doctor.cases import EPS, Case, Draw, cases
from barqtrain_hf.errors import KernelBuildError
from barqtrain_hf.patching import patch_model
from barqtrain_hf.runtime.device import compiler_unavailable_reason

CPU = torch.device("cpu")
# The PyTorch path in place of the kernels, reported as if they ran.
SETTING = checks.Setting(CPU, "auto", (torch.float32,), timed=True)
H200 = {
    "name": "NVIDIA H200",
    "capability": "9.0",
    "tested_architecture": True,
    "memory_bytes": 150_000_000_000,
    "bf16": True,
    "peak_flops": 989e12,
}


def _case(name: str) -> Case:
    return next(case for case in cases() if case.name == name)


def _broken(name: str, change: Callable[[Any], Any]) -> Case:
    """A case whose op gives something else."""
    case = _case(name)

    def ours(*inputs: torch.Tensor, backend: Any) -> Any:
        return change(case.ours(*inputs, backend=backend))

    return replace(case, ours=ours)


def _raise(error: Exception) -> Any:
    raise error


def _only(monkeypatch: pytest.MonkeyPatch, *chosen: Case) -> None:
    monkeypatch.setattr(run, "cases", lambda: list(chosen))


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = "torch sees no CUDA device, so the PyTorch path is used."
    monkeypatch.setattr(environment, "cuda_unavailable_reason", lambda: reason)
    monkeypatch.setattr(environment, "_nvidia_smi", lambda: [])


@pytest.mark.usefixtures("_no_gpu")
def test_a_machine_without_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BARQ_KERNEL_CACHE", str(tmp_path / "kernels"))
    transformers.GPT2Config(n_embd=64, n_layer=3, n_head=4).save_pretrained(tmp_path)
    file = tmp_path / "doctor.json"
    assert main(["doctor", "--model", str(tmp_path), "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert f"torch {torch.__version__.partition('+')[0]}" in printed
    assert "BARQ_KERNEL_CACHE" in printed
    assert "Torch sees no CUDA device, so the PyTorch path is used." in printed
    assert "transformer.h.*.ln_1 ×3" in printed
    assert "its forward does not call apply_rotary_pos_emb" in printed
    assert "All is well" in printed
    assert not (tmp_path / "kernels").exists()

    found = json.loads(file.read_text())
    assert found["problems"] == []
    ops = {(row["op"], row["dtype"]) for row in found["ops"]}
    dtypes = ("float32", "float16", "bfloat16")
    assert ops == set(itertools.product([case.name for case in cases()], dtypes))
    for row in found["ops"]:
        assert row["problem"] == "" and row["repeatable"]
        # Without kernels nothing is compiled, and on a CPU nothing is timed.
        assert row["first_call_seconds"] is row["ours_ms"] is None
        for error in row["outputs"] + row["gradients"]:
            assert 0 < error["stock"] < {"float32": 1e-6, "float16": 5e-3}.get(row["dtype"], 4e-2)
    installed = {row["op"]: row["modules"] for row in found["model"]["installed"]}
    assert installed == {"linear_cross_entropy": 1, "layer_norm": 7, "glu": 3}


def test_stock_is_what_transformers_computes() -> None:
    norms = {
        "rms_norm": LlamaRMSNorm,
        "rms_norm zero-centred": GemmaRMSNorm,
        "rms_norm rounded once": Olmo2RMSNorm,
    }
    for name, cls in norms.items():
        case = _case(name)
        x, weight = case.make(Draw(torch.bfloat16, CPU, 0, large=False))
        norm = cls(x.shape[-1], eps=EPS)
        norm.weight = torch.nn.Parameter(weight)
        torch.testing.assert_close(case.stock(x, weight), norm(x), rtol=0, atol=0)
    case = _case("rope partial")
    inputs = case.make(Draw(torch.bfloat16, CPU, 0, large=False))
    expected = modeling_gpt_neox.apply_rotary_pos_emb(*inputs)
    torch.testing.assert_close(case.stock(*inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda y: y * 1.0001, "output 0 is 1.0e-04 off, more than 1.25 times stock's"),
        (lambda y: y + 0.001 * (y - y.detach()), "gradient of gate is 1.0e-03 off"),
        (lambda y: y + 1e-6 * torch.rand_like(y), "two runs from the same inputs differ"),
        (lambda y: y / 0, "numbers that are not finite"),
        (lambda y: y.double(), "tensor 0 is torch.float64"),
        (lambda y: _raise(RuntimeError("CUDA error:\nmore")), "RuntimeError: CUDA error:"),
        (
            lambda y: _raise(
                KernelBuildError("NVRTC could not compile glu.cu.", "warning\nerror: 7")
            ),
            "it does not compile: NVRTC could not compile glu.cu. error: 7",
        ),
    ],
    ids=["output", "gradient", "not repeatable", "not finite", "dtype", "raises", "build"],
)
def test_what_is_a_problem(change: Callable[[Any], Any], problem: str) -> None:
    case = _broken("swiglu", change)
    result = checks.examine(case, torch.float32, replace(SETTING, timed=False))
    assert problem in result.problem


def test_a_loss_is_shown_but_not_judged() -> None:
    case = _broken("linear_cross_entropy", lambda loss: loss + 0.01 * loss.detach())
    result = checks.examine(case, torch.float32, replace(SETTING, timed=False))
    assert result.outputs[0].ours == pytest.approx(0.01, rel=1e-3)
    assert result.problem == ""
    tokens = _broken("… with statistics", lambda o: (o[0], o[1] * 1.01, o[2]))
    result = checks.examine(tokens, torch.float32, replace(SETTING, timed=False))
    assert result.problem.startswith("output 1 is 1.0e-02 off")


def test_a_machine_with_a_gpu_and_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Timing, first calls and the exit code, with clocks that are not."""
    describe = environment.describe
    monkeypatch.setattr(
        environment, "describe", lambda: {**describe(), "gpus": [H200], "kernels_unavailable": None}
    )
    monkeypatch.setattr(run, "choose_setting", lambda machine, quick: SETTING)
    memory = SimpleNamespace(total_memory=2**37)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    times = iter([2.0, 3.0])

    def milliseconds(step: Callable[[], Any]) -> float:
        step()
        return next(times, 0.0) or _raise(torch.OutOfMemoryError("7 GiB"))

    monkeypatch.setattr(checks, "milliseconds", milliseconds)
    small = [_on_small_inputs(_case(name)) for name in ("gelu tanh", "rope partial")]
    bad = _broken("swiglu", lambda y: y * 1.01)
    _only(monkeypatch, *small, bad)
    file = tmp_path / "doctor.json"
    code = main(["doctor", "--json", str(file)])
    printed = capsys.readouterr().out
    assert code == 1
    assert max(map(len, printed.splitlines())) <= 100
    cells = [line.split() for line in printed.splitlines()]
    for op, dtype, verdict in (("gelu tanh", "fp32", "ok"), ("swiglu", "fp32", "fails")):
        words = [*op.split(), dtype]
        assert [row[-2:] for row in cells if row[: len(words)] == words] == [["yes", verdict]]
    assert "The kernels, on NVIDIA H200." in printed
    assert "peak 989 TFLOP/s" in printed
    assert "1 problem:\n  1. swiglu, float32: output 0 is 1.0e-02 off" in printed
    found = {row["op"]: row for row in json.loads(file.read_text())["ops"]}
    assert found["gelu tanh"]["speedup"] == 1.5
    assert found["gelu tanh"]["first_call_seconds"] > 0
    assert found["rope partial"]["not_timed"] == "not enough free GPU memory"
    assert "Not timed: not enough free GPU memory." in " ".join(printed.split())
    assert found["swiglu"]["ours_ms"] is None


def _on_small_inputs(case: Case) -> Case:
    def make(draw: Draw) -> Any:
        draw.large = False
        return case.make(draw)

    return replace(case, make=make)


def test_where_ops_are_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    every = (torch.float32, torch.float16, torch.bfloat16)
    machine: dict[str, Any] = {"gpus": [], "kernels_unavailable": "no GPU"}
    assert run.choose_setting(machine, False) == checks.Setting(CPU, "torch", every, False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    machine = {"gpus": [H200, H200], "kernels_unavailable": None}
    second = torch.device("cuda", 1)
    expected = checks.Setting(second, "cuda", every[:2], True)
    assert run.choose_setting(machine, False) == expected
    assert not run.choose_setting(machine, True).timed
    machine["kernels_unavailable"] = "no CuPy"
    assert run.choose_setting(machine, False) == checks.Setting(second, "torch", every[:2], False)


def test_problems_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    healthy: dict[str, Any] = {
        "rust_extension_error": None,
        "gpus": [],
        "kernels_unavailable": "no GPU",
        "gpus_of_nvidia_smi": [],
        "torch_cuda": None,
        "driver": "580.1",
        "variables": {},
    }

    def problems(**changes: Any) -> list[str]:
        return environment.problems({**healthy, **changes})

    assert problems() == []
    assert "CuPy is missing" in problems(gpus=[H200], kernels_unavailable="CuPy is missing")[0]
    assert "ImportError" in problems(rust_extension_error="ImportError: _rust")[0]
    hidden = problems(gpus_of_nvidia_smi=["NVIDIA L4"])
    assert "built without CUDA" in hidden[0] and "580.1" in hidden[0]
    on_purpose = {"CUDA_VISIBLE_DEVICES": ""}
    assert problems(gpus_of_nvidia_smi=["NVIDIA L4"], variables=on_purpose) == []
    monkeypatch.setattr("barqtrain_hf.data.pack_sequences", lambda *_: _raise(OSError("GLIBC")))
    assert environment.describe()["rust_extension_error"] == "OSError: GLIBC"


@pytest.mark.parametrize("family", ["llama_tied", *list(FAMILIES)[2:]])
def test_the_report_is_that_of_the_model_with_weights(family: str, tmp_path: Path) -> None:
    real = tiny_model(family)
    real.config.save_pretrained(tmp_path)
    expected = model._plain(patch_model(real))
    found, problem = model.examine(model.load(str(tmp_path)), CPU)
    assert problem == ""
    assert {key: found[key] for key in expected} == expected
    assert expected["installed"]


def test_a_huge_model_needs_no_memory(tmp_path: Path) -> None:
    transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        pad_token_id=128004,
        dtype="bfloat16",
        quantization_config={"quant_method": "fp8"},
    ).save_pretrained(tmp_path)
    skeleton = model.load(str(tmp_path / "config.json"))
    found, problem = model.examine(skeleton, CPU)
    assert problem == ""
    assert {row["op"]: row["modules"] for row in found["installed"]} == {
        **{"linear_cross_entropy": 1, "rms_norm": 161, "glu": 80, "rope": 80},
    }
    assert (found["vocabulary"], found["dtype"]) == (128256, "bfloat16")
    assert "quantized" in found["notes"][0]
    parameters = list(skeleton.model.parameters())
    assert sum(p.numel() for p in parameters) > 60e9
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    assert sum(p.untyped_storage().nbytes() for p in parameters) < 40e6


def test_module_names_as_patterns() -> None:
    names = ["model.layers.0.norm", "model.layers.11.norm", "model.norm2", ""]
    assert model.patterns(names) == ["model.layers.*.norm ×2", "model.norm2", "the model"]


def test_a_patch_that_raises_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    monkeypatch.setattr(model, "patch_model", lambda _: _raise(AttributeError("'x'")))
    _, problem = model.examine(model.load(str(tmp_path)), CPU)
    assert problem == f"patch_model fails on {tmp_path}: AttributeError: 'x'"


def _write_config(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "./nowhere"], "--model ./nowhere: there is no such file or folder."),
        (["--model", "no-such/model"], "neither a file nor a folder here"),
        (["--model", "empty"], "there is no config.json in this folder"),
        (["--model", "adapter"], "it is an adapter; pass its base model, --model org/base."),
        (["--model", "broken.json"], "cannot be read as JSON"),
        (["--model", "untyped.json"], "names no model_type"),
        (["--model", "unknown.json"], "has no model_type 'barq_llama'"),
        (["--model", "remote.json"], "A model's own code is not run."),
        (["--model", "wrong.json"], "cannot"),
        (["--model", "vision.json"], "cannot build a vit model"),
        (["--json", "nowhere/doctor.json"], "there is no folder nowhere"),
        (["--json", "empty"], "it is a folder; name a file in it"),
        (["--compile", "90"], "--compile 90: pass one of 75, 80"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(
    argv: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "adapter"):
        Path(folder).mkdir()
    _write_config(Path("adapter/adapter_config.json"), base_model_name_or_path="org/base")
    Path("broken.json").write_text("{")
    _write_config(Path("untyped.json"), hidden_size=8)
    _write_config(Path("unknown.json"), model_type="barq_llama")
    auto_map = {"AutoConfig": "configuration.Config"}
    _write_config(Path("remote.json"), model_type="mine", auto_map=auto_map)
    _write_config(Path("wrong.json"), model_type="llama", hidden_size=-3)
    _write_config(Path("vision.json"), model_type="vit")
    assert main(["doctor", *argv]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""  # told before anything is examined


@pytest.mark.usefixtures("_no_gpu")
def test_compile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _only(monkeypatch)
    for module in (kernels, run):
        monkeypatch.setattr(module, "shipped_sources", lambda: ["targets.cu"])
    missing = compiler_unavailable_reason(torch.version.cuda)
    if missing is None:
        assert main(["doctor", "--compile"]) == 0
        assert "Kernels, compiled for sm_80" in capsys.readouterr().out
    monkeypatch.setattr(run, "compiler_unavailable_reason", lambda _: None)
    error = KernelBuildError("NVRTC could not compile targets.cu.", "error: 7")
    monkeypatch.setattr(kernels, "compile_program", lambda *_: _raise(error))
    assert main(["doctor", "--compile", "75"]) == 1
    assert "cuda/targets.cu does not compile for sm_75" in capsys.readouterr().out

    monkeypatch.setattr(run, "compiler_unavailable_reason", lambda _: "CuPy is missing.")
    assert main(["doctor"]) == 0
    assert "Kernels cannot be compiled here: CuPy is missing." in capsys.readouterr().out
    assert main(["doctor", "--compile"]) == 1


@pytest.mark.usefixtures("_no_gpu")
def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BARQ_KERNEL_CACHE", str(tmp_path / "file" / "kernels"))
    _only(monkeypatch)
    assert main(["doctor"]) == 0
    assert "cannot be written" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "doctor.json"
    tiny_model("qwen3").config.save_pretrained(tmp_path)
    code = main(["doctor", "--model", str(tmp_path), "--json", str(file)])
    found = json.loads(file.read_text())
    assert (code, found["problems"]) == (0, [])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    assert found["backend"] == "cuda"
    for row in found["ops"]:
        assert row["first_call_seconds"] > 0
        assert row["not_timed"] or row["speedup"] > 0
    assert [row["op"] for row in found["model"]["installed"]] == [
        *("linear_cross_entropy", "rms_norm", "glu", "rope", "attention")
    ]
