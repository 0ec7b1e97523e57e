"""Importing changes nothing and drags nothing in; modules import in one direction only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import barqtrain_hf

PACKAGE = Path(barqtrain_hf.__file__).parent

# Every part of the package, with the parts it may import. What is not listed imports none.
MAY_IMPORT = {
    "__init__": {
        "callbacks",
        "config",
        "metrics_callback",
        "patching",
        "samples_callback",
        "sft",
        "trainer",
    },
    "benchmarks": {"__init__", "cli", "data", "errors", "ops", "runtime"},
    "callbacks": {"config", "patching"},
    "checkpoints": {"errors"},
    "cli": {
        *("__init__", "benchmarks", "config", "data", "errors", "ops", "patching", "runtime"),
        *("sft", "trainer"),
    },
    "config": {"errors"},
    "data": {"_rust", "errors"},
    "metrics": {"runtime", "timeline"},
    "metrics_callback": {"metrics", "reporting", "timeline"},
    "ops": {"errors", "runtime"},
    "patching": {"config", "errors", "ops", "runtime"},
    "runtime": {"errors"},
    "samples": {"errors"},
    "samples_callback": {"errors", "reporting", "samples"},
    "sft": {"config", "data", "errors", "patching", "trainer"},
    "streaming": {"checkpoints", "data", "errors"},
    "trainer": {
        "callbacks",
        "checkpoints",
        "config",
        "data",
        "errors",
        "loss_filter",
        "metrics_callback",
        "patching",
        "streaming",
    },
}
# Packages that only some parts may know, even lazily.
ONLY_IN = {
    "cupy": {"runtime", "benchmarks"},
    "cupy_backends": {"runtime", "benchmarks"},
    "transformers": {
        "benchmarks",
        "callbacks",
        "checkpoints",
        "cli",
        "config",
        "data",
        "loss_filter",
        "metrics_callback",
        "patching",
        "reporting",
        "samples",
        "samples_callback",
        "sft",
        "streaming",
        "trainer",
    },
    "peft": {"benchmarks", "patching", "cli"},
    "bitsandbytes": {"benchmarks"},
    "trl": {"benchmarks", "cli", "sft"},
    "datasets": {"benchmarks", "cli", "sft"},
    "deepspeed": {"patching"},
    "wandb": {"samples_callback"},
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_go_one_way() -> None:
    files = [p for p in PACKAGE.rglob("*.py") if "_cuda" not in p.parts]
    assert len(files) > 20
    for path in files:
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports_of(path):
            top, *rest = name.split(".")
            if top == "barqtrain_hf":
                target = rest[0] if rest else "__init__"
                if target.startswith("__") or not _is_part(target):
                    target = "__init__"  # a name of the package itself, such as __version__
                allowed = {part, "__init__"} | MAY_IMPORT.get(part, set())
                if target == "__init__" and rest[:1] not in ([], ["__version__"]):
                    allowed -= {"__init__"} - MAY_IMPORT.get(part, set())
                assert target in allowed, f"{path.relative_to(PACKAGE)} imports {name}"
            elif top in ONLY_IN:
                assert part in ONLY_IN[top], f"{path.relative_to(PACKAGE)} imports {name}"


def _is_part(name: str) -> bool:
    return any((PACKAGE / f"{name}{suffix}").exists() for suffix in ("", ".py", ".pyi"))


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_brings_in_nothing() -> None:
    code = (
        "import sys, barqtrain_hf;"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'cupy', 'wandb', 'datasets'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run(code) == "[]"


def test_public_names_resolve_without_optional_packages() -> None:
    code = (
        "import sys\n"
        "for name in ('trl', 'cupy', 'wandb', 'datasets', 'matplotlib', 'peft'):\n"
        "    sys.modules[name] = None\n"  # importing them now fails
        "import barqtrain_hf\n"
        "print(sum(getattr(barqtrain_hf, name) is not None for name in barqtrain_hf.__all__))"
    )
    assert run(code) == str(len(barqtrain_hf.__all__))


def test_import_changes_nothing_in_transformers() -> None:
    code = (
        "import transformers, transformers.models.llama.modeling_llama as m, torch\n"
        "watched = [transformers.Trainer, m.LlamaRMSNorm, m.LlamaForCausalLM, m.LlamaAttention,\n"
        "           m.LlamaMLP, torch.nn.Linear]\n"
        "before = [dict(vars(c)) for c in watched] + [dict(vars(m))]\n"
        "import barqtrain_hf\n"
        "for name in barqtrain_hf.__all__: getattr(barqtrain_hf, name)\n"
        "import barqtrain_hf.ops, barqtrain_hf.data, barqtrain_hf.patching, barqtrain_hf.runtime\n"
        "after = [dict(vars(c)) for c in watched] + [dict(vars(m))]\n"
        "assert 'barq' not in transformers.AttentionInterface().valid_keys()\n"
        "assert 'barq' not in transformers.AttentionMaskInterface().valid_keys()\n"
        "print(all(a[k] is b[k] for a, b in zip(after, before) for k in {*a, *b}))"
    )
    assert run(code) == "True"
