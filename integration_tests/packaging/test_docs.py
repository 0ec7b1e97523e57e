"""Every number in the docs comes from a committed JSON that says where it was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from small_tokenizers import small_tokenizer
from transformers import TrainingArguments

from barqtrain_hf.benchmarks.render import render

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def test_tables_are_what_the_files_say() -> None:
    tables = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        tables += text.count("<!-- /")
        assert render(text, REPOSITORY) == text, f"run barqtrain_hf.benchmarks.render: {page.name}"
    assert tables >= 4


def test_every_measurement_names_its_origin() -> None:
    files = sorted((REPOSITORY / "docs" / "benchmarks").rglob("*.json"))
    assert len(files) >= 5
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        origin = content.get("environment", content)
        assert origin["device"] and origin["command"] and origin["versions"]["torch"], file
        assert any(file.name in page.read_text(encoding="utf-8") for page in PAGES), file


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    datasets, tokenizer = pytest.importorskip("datasets"), small_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained("model")
    texts = ["one text", "and another"] * 9
    tokens, heads, size = 12, 4, 8
    q, k, v, cos, sin = torch.randn(5, 1, tokens, heads, size)
    scope: dict[str, Any] = {
        **{"model": model, "name": "model", "q": q, "k": k, "v": v},
        "documents": [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 9,
        **{"texts": texts, "tokenizer": tokenizer},
        "args": TrainingArguments("out", use_cpu=True, bf16=True),
        "dataset": datasets.Dataset.from_dict({"text": texts}),
        **{"cos": cos[:, :, 0], "sin": sin[:, :, 0]},
        "cu_seqlens": torch.tensor([0, 5, tokens], dtype=torch.int32),
    }
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[0].read_text("utf-8"), re.DOTALL | re.M)
    assert len(blocks) >= 3
    for block in blocks:
        exec(block.replace("bf16=True", "use_cpu=True"), scope)
    assert scope["trainer"].state.global_step > 0 and scope["trainer"].barq_report.installed
    assert scope["model"].config._attn_implementation == "barq"
    assert scope["out"].shape == q.shape
