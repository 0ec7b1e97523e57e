"""Every code block of README, CONTRIBUTING and docs is executed; `code_blocks` says how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from code_blocks import (
    CHECKS,
    Block,
    add_sources,
    all_blocks,
    blocks_of,
    command_problem,
    first_missing,
    run_python,
)

BLOCKS = all_blocks()
SECTIONS = dict.fromkeys((b.page, b.section) for b in BLOCKS if b.language == "python")


@pytest.mark.parametrize("place", SECTIONS, ids=": ".join)
def test_python(place: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _enter(tmp_path, place[0], monkeypatch)
    scope: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCKS:
        if (block.page, block.section) == place and block.language == "python":
            run_python(block, scope)


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language != "python"], ids=lambda b: f"{b} {b.language}"
)
def test_other_blocks(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _enter(tmp_path, block.page, monkeypatch)
    assert block.language in CHECKS, f"{block}: nobody executes blocks tagged {block.language!r}"
    if block.language == "console" and torch.cuda.is_available():
        pytest.skip("transcripts are of a machine without a GPU")
    CHECKS[block.language](block)


def _enter(folder: Path, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to work in, and what the blocks of a page may see."""
    monkeypatch.chdir(folder)
    # Copies: a page may show how a family is added.
    monkeypatch.setattr(models, "FAMILIES", dict(models.FAMILIES))
    monkeypatch.setattr(models, "LEAF_OPS", dict(models.LEAF_OPS))
    cuda = [block for block in BLOCKS if (block.page, block.language) == (page, "cuda")]
    add_sources(cuda, folder / "sources", monkeypatch)


def test_there_are_blocks() -> None:
    """Should a change of the parser find none, nothing else would fail."""
    assert {"README.md", "CONTRIBUTING.md"} <= {block.page for block in BLOCKS}
    assert {"python", "sh", "console"} <= {block.language for block in BLOCKS}


def test_what_is_a_block() -> None:
    page = "\n".join(
        [
            "## One",
            "- item",
            "  ```python",
            "  x = 1",
            "    y",
            "  ```",
            "## Two",
            "````text",
            "```",
            "````",
            "~~~",
            "~~~",
        ]
    )
    assert blocks_of(page, "p") == [
        Block("p", "One", 4, "python", "x = 1\n  y\n"),
        Block("p", "Two", 9, "text", "```\n"),
        Block("p", "Two", 12, "", "\n"),
    ]
    with pytest.raises(AssertionError, match="not closed"):
        blocks_of("```python\nx\n", "p")
    with pytest.raises(AssertionError, match="p:3: put code between fences"):
        blocks_of("Words.\n\n    import this\n", "p")


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("make demo DATA=path", None),
        ("make dinner", "no target dinner"),
        ("make demo DATUM=path", "no variable DATUM"),
        ("pip install .[sft,peft]", None),
        ("pip install .[stf]", "no extra stf"),
        ("pip install torch", "torch is not this package"),
        ("barqtrain demo --max_steps 3", None),
        ("barqtrain demo --max_stops 3", "no option --max_stops"),
        ("barqtrain demo --max_steps three", "invalid int value"),
        ("barqtrain dem", "unknown command"),
        ("python -m barqtrain_hf.benchmarks norms --output norms.json", None),
        ("python -m barqtrain_hf.benchmarks norm", "invalid choice"),
        ("python integration_tests/no_such.py", "no integration_tests/no_such.py"),
        ("rm -r out", "nobody executes it"),
    ],
)
def test_what_is_wrong_with_a_command(command: str, problem: str | None) -> None:
    found = command_problem(command.split())
    assert found is None if problem is None else found is not None and problem in found


def test_what_is_not_in_a_transcript() -> None:
    printed = "a 1\nb  2.5e-3\n\nc\nd 4\n"
    assert first_missing("a 7\nb 1.0e+01\n…\nd 5\n", printed) is None
    assert first_missing("a 1\nc\n", printed) == "c"
    assert first_missing("…\nd 1\n…\na 1\n", printed) == "a 1"


def test_text_and_excerpts_are_looked_at() -> None:
    for language, text in (("text", "pip install this\n"), ("cuda", "int no_such_line;\n")):
        with pytest.raises(AssertionError, match="p:1"):
            CHECKS[language](Block("p", "", 1, language, text))
    CHECKS["cuda"](Block("p", "", 1, "cuda", "constexpr int kThreads = 256;\n"))
