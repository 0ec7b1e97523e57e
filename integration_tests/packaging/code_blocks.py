"""The fenced blocks of the docs, and what it means to execute each kind of them.

- ``python`` is run. Blocks of one ``##`` section share their names, and may read those of `FIXTURES`.
- ``sh``: each command is known here, and its targets, extras, options and files exist.
- ``console``: the command after ``$`` is run, and the lines below it are in its output, numbers apart; a
  line of ``…`` is a gap.
- ``cuda`` is an excerpt, line by line, of a file of ``cuda/``, all of which CI compiles; or, if it begins
  with ``// cuda/NAME.cu``, a whole file that would be there: it is compiled, and its page's blocks see it.
- ``text`` is a formula, a tree, a report: it may not look like something to run.

A block with any other tag, or none, is one that nobody executes, and an error.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from models import tiny_model
from small_tokenizers import small_tokenizer

from barqtrain_hf import cli
from barqtrain_hf.runtime import compiler

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
# What a GPU would do in another dtype, a CPU does in fp32.
SUBSTITUTIONS = {"bf16=True": "use_cpu=True", "fp16=True": "use_cpu=True"}
_FENCE = re.compile(r"^( *)(`{3,}|~{3,})\s*(.*?)\s*$")
_TO_RUN = re.compile(r"^(\$ |>>> |import |from \S+ import |pip |make |python |barqtrain |#include)")
_NEW_SOURCE = re.compile(r"// cuda/(\w+\.cu)\n")
_GAP = "…"


class Block(NamedTuple):
    """A fenced block; ``line`` is that of its first line of content, from 1."""

    page: str
    section: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> list[Block]:
    """All blocks of a page, in their order.

    Raises:
        AssertionError: a fence that is not closed, or a block of code by indentation alone, which has no tag.
    """
    found: list[Block] = []
    section, opened, before = "", None, ""
    for number, line in enumerate(text.splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened = (fence[1], fence[2], fence[3], number + 1)
            content: list[str] = []
        elif opened is not None and fence and fence[2].startswith(opened[1]) and not fence[3]:
            indent, _, language, first = opened
            lines = [inner.removeprefix(indent) for inner in content]
            found.append(Block(page, section, first, language, "\n".join(lines) + "\n"))
            opened = None
        elif opened is not None:
            content.append(line)
        elif line.startswith("## "):
            section = line[3:].strip()
        elif line.startswith("    ") and not before.startswith((" ", "-", "*", "|", *"0123456789")):
            raise AssertionError(f"{page}:{number}: put code between fences, with a tag")
        before = line or before
    assert opened is None, f"{page}: the fence before line {opened and opened[3]} is not closed"
    return found


def all_blocks() -> list[Block]:
    """Those of every page."""
    found = []
    for page in PAGES:
        name = page.relative_to(REPOSITORY).as_posix()
        found += blocks_of(page.read_text(encoding="utf-8"), name)
    return found


def _texts() -> list[str]:
    return ["one text", "and another"] * 9


def _dataset() -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict({"text": _texts()})


def _saved_model() -> str:
    _model().save_pretrained("model")
    small_tokenizer().save_pretrained("model")
    return "model"


def _model() -> Any:
    return tiny_model("llama", vocab_size=len(small_tokenizer()))


def _rows() -> torch.Tensor:
    return torch.randn(1, 12, 4, 8)


def _angles() -> torch.Tensor:
    return torch.randn(1, 12, 8)


# What a block may read without having made it: the name, and what makes one for a section.
FIXTURES: dict[str, Callable[[], Any]] = {
    "model": _model,  # a tiny Llama for `tokenizer`
    "name": _saved_model,  # the folder of such a model with its tokenizer
    "tokenizer": small_tokenizer,
    "texts": _texts,
    "documents": lambda: [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 9,
    "dataset": _dataset,  # of `texts`, in a column of that name
    "args": lambda: transformers.TrainingArguments("out", use_cpu=True, max_steps=2, report_to=[]),
    **dict.fromkeys(("q", "k", "v"), _rows),  # 12 tokens of 4 heads of 8
    **dict.fromkeys(("cos", "sin"), _angles),
    "cu_seqlens": lambda: torch.tensor([0, 5, 12], dtype=torch.int32),
}


def run_python(block: Block, scope: dict[str, Any]) -> None:
    """Runs a block in ``scope``, to which the fixtures that it reads are added."""
    text = block.text
    for shown, run in SUBSTITUTIONS.items():
        text = text.replace(shown, run)
    # Above it as many lines as in the page, so that a traceback points there.
    code = compile("\n" * (block.line - 1) + text, str(REPOSITORY / block.page), "exec")
    read = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    for name in FIXTURES:
        if name in read and name not in scope:
            scope[name] = FIXTURES[name]()
    exec(code, scope)
    if "trainer.train()" in text:
        assert scope["trainer"].state.global_step > 0, f"{block}: it has not trained"


def check_shell(block: Block) -> None:
    """Refuses commands that are not known here, or have what does not exist.

    Raises:
        AssertionError: with the line and what is wrong.
    """
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            problem = command_problem(words)
            assert problem is None, f"{block}: {line.strip()!r}: {problem}"


def command_problem(words: Sequence[str]) -> str | None:
    """What is wrong with a command, or None."""
    name, *arguments = words
    if name == "make":
        return _make_problem(arguments)
    if name == "pip":
        return _pip_problem(arguments)
    if name == "barqtrain":
        return _options_problem(cli.main, arguments)
    if name in ("python", "pytest", "compute-sanitizer"):
        if arguments[:1] == ["-m"] and arguments[1].startswith("barqtrain_hf"):
            module = importlib.import_module(arguments[1])
            if hasattr(module, "__path__"):
                module = importlib.import_module(f"{arguments[1]}.__main__")
            return _options_problem(module.main, arguments[2:])
        files = [word for word in arguments if "/" in word]
        return next((f"there is no {f}" for f in files if not (REPOSITORY / f).exists()), None)
    return "nobody executes it: teach code_blocks.command_problem how"


def _make_problem(arguments: Sequence[str]) -> str | None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for word in arguments:
        variable, is_one, _ = word.partition("=")
        if is_one and f"$({variable})" not in makefile:
            return f"the Makefile has no variable {variable}"
        if not is_one and not re.search(rf"^{re.escape(word)}:", makefile, re.M):
            return f"the Makefile has no target {word}"
    return None


def _pip_problem(arguments: Sequence[str]) -> str | None:
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    table = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = set(re.findall(r"^(\w+) = ", table, re.M))
    if arguments[0] != "install":
        return f"pip {arguments[0]} is not known here"
    for word in arguments[1:]:
        package = re.fullmatch(r"(\.|barqtrain_hf|\S+\.whl)(?:\[([\w,]+)\])?", word)
        if package is None and not word.startswith("-"):
            return f"{word} is not this package"
        extras = set((package[2] or "").split(",")) - {""} if package else set()
        if extras - known:
            return f"there is no extra {', '.join(sorted(extras - known))}"
    return None


def _options_problem(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> str | None:
    """What argparse says to the arguments: with --help behind them, they are read and nothing is run."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code: Any = main([*arguments, "--help"])
        except SystemExit as stop:
            code = stop.code
    if code:
        return printed.getvalue().strip()
    options = [word.partition("=")[0] for word in arguments if word.startswith("-")]
    known = set(re.findall(r"(?<!\S)-[\w-]+", printed.getvalue()))
    unknown = [option for option in options if option not in known]
    return f"there is no option {', '.join(unknown)}" if unknown else None


def run_console(block: Block) -> None:
    """Runs the command of a transcript in the current folder and compares its output."""
    command, _, shown = block.text.partition("\n")
    name, *arguments = shlex.split(command.removeprefix("$ "))
    assert command.startswith("$ ") and name == "barqtrain", f"{block}: not a call of barqtrain"
    # What a transcript may name as if it were on the hub.
    transformers.GPT2Config().save_pretrained("gpt2")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(arguments)
    assert code == 0, f"{block}: exit code {code}"
    missing = first_missing(shown, printed.getvalue())
    assert missing is None, f"{block}: not in the output: {missing!r}\n{printed.getvalue()}"


def first_missing(shown: str, printed: str) -> str | None:
    """The first line of a transcript that is not in the output, numbers and spaces apart, or None.

    Lines follow each other as shown, but for gaps.
    """
    output = [_shape(line) for line in printed.splitlines() if line.strip()]
    at, gap = 0, True
    for line in shown.splitlines():
        if line.strip() == _GAP:
            gap = True
        elif line.strip():
            place = output.index(_shape(line), at) if _shape(line) in output[at:] else None
            if place is None or (place != at and not gap):
                return line
            at, gap = place + 1, False
    return None


def _shape(line: str) -> str:
    return re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "#", " ".join(line.split()))


def add_sources(blocks: Sequence[Block], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the compiler find the CUDA files of blocks beside those of the package, for one test."""
    new = [(match[1], block) for block in blocks if (match := _NEW_SOURCE.match(block.text))]
    if new:
        folder.mkdir()
        for path in compiler.SOURCE_DIR.iterdir():
            (folder / path.name).symlink_to(path)
        for name, block in new:
            assert not (folder / name).exists(), f"{block}: cuda/{name} is there already"
            (folder / name).write_text(block.text, encoding="utf-8")
        monkeypatch.setattr(compiler, "SOURCE_DIR", folder)


def check_cuda(block: Block) -> None:
    """Refuses an excerpt that is in no file of ``cuda/``, and a new file that spills."""
    new = _NEW_SOURCE.match(block.text)
    if new:
        pytest.importorskip("cupy")
        for arch in ("75", "90a"):
            program = compiler.compile_program(new[1], compiler.instantiations(new[1], arch), arch)
            assert not any(used.spill_bytes for used in program.resources.values()), block
        return
    lines = [line.strip() for line in block.text.strip().splitlines()]
    for path in (REPOSITORY / "cuda").glob("*.cu*"):
        source = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        if any(source[i : i + len(lines)] == lines for i in range(len(source))):
            return
    raise AssertionError(f"{block}: no file of cuda/ has these lines")


def check_text(block: Block) -> None:
    """Refuses what looks like something to run."""
    for line in block.text.splitlines():
        assert not _TO_RUN.match(line), f"{block}: {line!r} is to be run: use another tag than text"


def run_by_the_command_line(block: Block) -> None:
    """Nothing here: `cli/test_sft.py` runs the only such blocks, as they are written."""
    place = (block.page, block.section)
    assert place == ("README.md", "On the command line"), f"{block}: nobody executes it"


# What is done with blocks of a language, but for python, whose blocks build on each other.
CHECKS: dict[str, Callable[[Block], None]] = {
    "sh": check_shell,
    "console": run_console,
    "cuda": check_cuda,
    "text": check_text,
    **dict.fromkeys(("bash", "yaml"), run_by_the_command_line),
}
