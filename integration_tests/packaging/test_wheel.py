"""What a user installs: the wheel in a clean environment, outside the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock
from smoke import smoke

import barqtrain_hf

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    # A checkout on PYTHONPATH would hide what is installed.
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("dist")
    # Two workers of pytest-xdist may each need one; maturin stages both in the same folder.
    with FileLock(target.parents[1] / "maturin.lock"):
        run(sys.executable, "-m", "maturin", "build", "--release", "--out", target, cwd=REPOSITORY)
    (path,) = target.glob("*.whl")
    return path


def test_wheel_carries_the_sources_and_nothing_else(wheel: Path) -> None:
    assert re.search(r"-cp310-abi3-\w+\.whl$", wheel.name)
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    sources = {p.name: p.read_bytes() for p in (REPOSITORY / "cuda").iterdir()}
    folder = "barqtrain_hf/_cuda/"
    carried = {n.removeprefix(folder): archive.read(n) for n in names if n.startswith(folder)}
    assert carried == sources and "rms_norm.cu" in carried
    # A top-level cuda/ would land in the namespace of NVIDIA's own packages.
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"barqtrain_hf"}
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    smoke(wheel, tmp_path, only_extension=False, borrow=True)  # what wheels.yml does to every wheel
    python = tmp_path / "venv" / "bin" / "python"
    # The files are those that test_compiler.py compiles, byte for byte; here they find their headers.
    compiled = ("--arch", "80", "--source", "glu.cu", "targets.cu")
    printed = run(python, "-m", "barqtrain_hf.runtime", *compiled, cwd=tmp_path)
    assert "0 spill" in printed


def test_sdist_can_be_built_from(tmp_path: Path) -> None:
    run(sys.executable, "-m", "maturin", "sdist", "--out", tmp_path, cwd=REPOSITORY)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    for needed in (
        "pyproject.toml",
        "LICENSE",
        "barqtrain_hf/_cuda/rms_norm.cu",
        "barqtrain_hf/_cuda/vector.cuh",
        "rust/core/src/lib.rs",
        "rust/text/src/lib.rs",
        "rust/text/Cargo.toml",
        "rust/py/Cargo.toml",
        "rust/Cargo.toml",
        "rust/Cargo.lock",
    ):
        assert needed in names


def test_one_version_everywhere() -> None:
    crates = sorted(path.parent for path in (REPOSITORY / "rust").glob("*/Cargo.toml"))
    assert [crate.name for crate in crates] == ["core", "py", "text"]
    for file in (REPOSITORY / "pyproject.toml", *(crate / "Cargo.toml" for crate in crates)):
        text = file.read_text(encoding="utf-8")
        found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
        assert found is not None and found[1] == barqtrain_hf.__version__, file
    locked = (REPOSITORY / "rust" / "Cargo.lock").read_text(encoding="utf-8")
    versions = re.findall(r'^name = "barqtrain.*"\nversion = "(.+)"$', locked, re.MULTILINE)
    assert versions == [barqtrain_hf.__version__] * 3
