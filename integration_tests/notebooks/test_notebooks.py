"""The notebooks, executed from their first cell to their last on a CPU, and committed without outputs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "notebooks"
NAMES = ("benchmark", "lora_sft_t4", "quickstart")

Run = Callable[[str, str], dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Executes a notebook in ``tmp_path`` and returns what each cell printed and drew."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # Here, and nowhere in the user's home: the kernel's files, its history, and this tree's package.
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    paths = [str(REPOSITORY), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))

    def execute(name: str, settings: str) -> dict[str, Any]:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        (at,) = [i for i, cell in enumerate(notebook.cells) if _is_parameters(cell)]
        # As papermill does: what is given comes after the defaults.
        notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(settings))
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
        return {cell.id: _shown(cell) for cell in notebook.cells if cell.cell_type == "code"}

    return execute


def _is_parameters(cell: Any) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def _shown(cell: Any) -> Any:
    """What a cell printed, or its picture."""
    for output in cell.outputs:
        if "image/png" in output.get("data", {}):
            return output.data["image/png"]
    return "".join(
        output.text
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )


def _numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, text
    return [float(number.replace(",", "")) for number in found.groups()]


def _is_picture(shown: str) -> bool:
    return len(shown) > 10_000  # base64 of a figure with axes; an empty one is far smaller


def test_quickstart(run: Run, tmp_path: Path) -> None:
    shown = run("quickstart", "examples, epochs, max_length, hidden_size = 400, 1, 256, 64")
    assert re.match(r"Packed 400 documents \(.*\) into \d+ rows of 256", shown["pack"])
    before, after = _numbers(r"held-out loss (\S+) → (\S+)", shown["train"])
    assert after < before - 1
    assert "rms_norm: installed in 5 modules" in shown["report"]
    assert "linear_cross_entropy: installed" in shown["report"]
    assert _is_picture(shown["plot"])
    assert shown["ask"].count("Q: ") == 6
    (right,) = _numbers(r"(\d+) of 128 held-out answers are right", shown["ask"])
    assert 0 <= right <= 128
    assert shown["save"].startswith("LlamaForCausalLM [")
    output = tmp_path / "quickstart-output"
    assert (output / "model" / "tokenizer.json").is_file()
    assert list(output.glob("checkpoint-*/trainer_state.json"))


def test_lora(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    shown = run(
        "lora_sft_t4",
        "examples_per_family, base_epochs, epochs, max_length, hidden_size = 60, 1, 4, 256, 64",
    )
    assert "trainable params" in shown["lora"]
    for op in ("lora: installed in 14", "packing: installed in 2", "fused_lm_head: installed"):
        assert op in shown["report"]
    row = r"{}\s+(\d\.\d+)\s+(\d\.\d+)"
    before, after = _numbers(row.format("held-out loss"), shown["result"])
    assert after < before - 0.5
    before, after = _numbers(row.format("held-out token accuracy"), shown["result"])
    assert after > before
    _, right = _numbers(row.format("right answers"), shown["result"])
    assert _numbers(r"merged model: (\S+) of the answers", shown["save"]) == [right]
    assert _is_picture(shown["plot"])
    output = tmp_path / "lora-output"
    with safe_open(output / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        assert len(adapter.keys()) == 28
    with safe_open(output / "merged" / "model.safetensors", "pt") as weights:
        merged = weights.keys()
        assert len(merged) > 10 and not any("lora" in key for key in merged)


def test_benchmark(run: Run) -> None:
    shown = run("benchmark", "examples, max_length, hidden_size, vocab_size = 400, 256, 64, 1024")
    number, name = r"([\d,.]+)", r"{}\s+"
    row = (
        name + number + r"\s+" + number + r"×\s+" + number + r" GiB\s+" + number + r"%\s+" + number
    )
    stock, same, packed = (
        _numbers(row.format(each), shown["table"])
        for each in ("Trainer", "BarqTrainer, same batches", "BarqTrainer, packed")
    )
    assert stock[1] == 1 and min(stock[0], same[0], packed[0]) > 0
    assert stock[3] == same[3] > 20 and packed[3] == 0
    assert same[4] == pytest.approx(stock[4], abs=2e-4)
    assert packed[4] == pytest.approx(stock[4], rel=0.1)  # the same documents in another order
    (difference,) = _numbers(r"the logged losses differ by (\S+) at most", shown["table"])
    assert difference < 1e-4
    assert _is_picture(shown["plot"])


def test_all_are_here() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_committed_without_outputs(name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        assert not cell.metadata or cell.metadata == {"tags": ["parameters"]}, cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id


@pytest.mark.parametrize("name", NAMES)
def test_conventions(name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert notebook.cells[0].source.startswith("# ")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    install, parameters = code[:2]
    assert 'find_spec("barqtrain_hf") is None' in install.source
    assert _is_parameters(parameters) and "gpu = torch.cuda.is_available()" in parameters.source
    whole = "\n".join(cell.source for cell in code)
    assert whole.count("%pip") == 1 and "%pip" in install.source
    assert whole.count("# <--") == 1, "one line is where the name of a model goes"
    # No setting that a reader does not see, and nothing that needs an account.
    assert "environ.get" not in whole and "getenv" not in whole and "login" not in whole
