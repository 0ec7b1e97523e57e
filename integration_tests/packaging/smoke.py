"""Installs a wheel (or sdist) into a new environment and uses it there, outside the repository.

    python integration_tests/packaging/smoke.py dist

Every artefact of a release goes through this, on the system it is for. It needs nothing but Python.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

# What the package is, and that nothing of the repository is mistaken for it. `_rust` needs numpy only.
_EXTENSION = """
import pathlib, sys
import numpy as np
import barqtrain_hf
from barqtrain_hf import _rust
package = pathlib.Path(barqtrain_hf.__file__).parent
assert package.is_relative_to(sys.prefix), f"{package} is not what was installed"
sources = sorted(path.name for path in (package / "_cuda").iterdir())
assert "rms_norm.cu" in sources and "mma.cuh" in sources, f"no CUDA sources: {sources}"
order, offsets = _rust.pack_sequences(np.array([5, 3, 4], dtype=np.int64), 8)
assert sorted(order) == [0, 1, 2] and list(offsets) == [0, 2, 3], (order, offsets)
print("barqtrain_hf", barqtrain_hf.__version__, "at", package, "with", len(sources), "CUDA sources")
"""
_DOCUMENTS = "".join(
    f"Document {i} counts: {' '.join(map(str, range(i)))}.\n\n" for i in range(300)
)


def main() -> None:
    """Parses the arguments and does it all; what fails ends the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefact", type=Path, help="a wheel, an sdist, or a folder that holds one")
    parser.add_argument(
        "--only-extension",
        action="store_true",
        help="install numpy and no other dependency, and import the Rust extension: for systems that "
        "PyTorch has no wheels for",
    )
    parser.add_argument(
        "--borrow",
        action="store_true",
        help="take the dependencies from the environment that runs this instead of installing them",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="barqtrain-smoke-") as folder:
        smoke(_one(arguments.artefact), Path(folder), arguments.only_extension, arguments.borrow)


def _one(path: Path) -> Path:
    """The path of the only artefact in a folder, or of the one that was named."""
    found = [path]
    if path.is_dir():
        found = [p for p in path.iterdir() if p.name.endswith((".whl", ".tar.gz"))]
    if len(found) != 1 or not found[0].is_file():
        sys.exit(f"{path}: one wheel or sdist is needed, and there are {len(found)}: {found}")
    return found[0].resolve()


def smoke(artefact: Path, folder: Path, only_extension: bool, borrow: bool) -> None:
    """Installs ``artefact`` into ``folder / "venv"`` and uses it.

    Args:
        artefact: a wheel or an sdist.
        folder: an empty folder; commands run in it.
        only_extension: whether to leave out what needs PyTorch.
        borrow: whether dependencies come from this environment.
    """
    venv.create(folder / "venv", with_pip=True)
    binaries = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / ("python.exe" if os.name == "nt" else "python")
    install = (python, "-m", "pip", "install", "--disable-pip-version-check")
    if borrow:
        _run(*install, "--no-deps", "--no-index", artefact, folder=folder)
        purelib = _run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder
        )
        # An editable install of us does not come along: .pth files are read only in an environment's own
        # site-packages.
        dependencies = Path(purelib.strip()) / "dependencies.pth"
        dependencies.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    elif only_extension:
        _run(*install, "numpy", folder=folder)
        _run(*install, "--no-deps", artefact, folder=folder)
    else:
        _run(*install, f"barqtrain_hf[bench] @ {artefact.as_uri()}", folder=folder)
    _run(python, "-c", _EXTENSION, folder=folder)
    if only_extension:
        return
    barqtrain = binaries / ("barqtrain.exe" if os.name == "nt" else "barqtrain")
    (folder / "documents.txt").write_text(_DOCUMENTS, encoding="utf-8")
    sizes = ("--device", "cpu", "--max_steps", "3", "--no_baseline", "--output_dir", "demo")
    _run(barqtrain, "demo", "--data", "documents.txt", *sizes, folder=folder)
    if not (folder / "demo" / "model" / "model.safetensors").is_file():
        sys.exit("the demo has written no model")


def _run(*command: str | Path, folder: Path) -> str:
    """Runs a command in ``folder``, shows what it prints, and ends the process if it fails."""
    # A checkout on PYTHONPATH would hide what is installed.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    print("$", *command, flush=True)
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    print(result.stdout, flush=True)
    if result.returncode:
        sys.exit(f"exit code {result.returncode}: {command[0]}")
    return result.stdout


if __name__ == "__main__":
    main()
