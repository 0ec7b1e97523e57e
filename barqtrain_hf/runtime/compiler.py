"""CUDA source to cubin, with NVRTC and a cache on disk.

A cubin is looked up under a key of everything that shaped it: source, included headers, options,
architecture, NVRTC version and the instantiated name. Two files make an entry: ``<key>.json``
(mangled name, SHA-256 of the cubin) and ``<sha256>.cubin``. Both are written to a temporary name and
renamed, the cubin first, so any number of processes may write at once: a reader sees a whole entry or
none, and one whose bytes do not hash to their name is rebuilt.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from barqtrain_hf.errors import KernelBuildError, UnsupportedError
from barqtrain_hf.runtime.device import compiler_unavailable_reason, cuda_include_dir

SOURCE_DIR = Path(__file__).resolve().parent.parent / "_cuda"
_OPTIONS = ("-std=c++17",)
_QUOTED_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_INSTANTIATE = re.compile(r"^// instantiate((?: sm_\w+)*): (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """What ptxas reports for one kernel."""

    registers: int
    shared_bytes: int
    spill_bytes: int


@dataclass(frozen=True)
class Program:
    """One compiled source: its cubin, the mangled name and the resources of each kernel in it."""

    cubin: bytes
    lowered: dict[str, str]
    log: str

    @functools.cached_property
    def resources(self) -> dict[str, Resources]:
        """What each kernel uses.

        Read only where it is asked for: when two processes compile the same kernel at once, NVRTC's own
        cache answers the second, and ptxas prints nothing.
        """
        return _parse_resources(self.log, self.lowered)


@functools.cache
def read_source(source: str) -> str:
    """Text of a shipped file of ``cuda/``."""
    path = SOURCE_DIR / source
    if not path.is_file():
        raise KernelBuildError(f"{source} is not among the shipped CUDA sources in {SOURCE_DIR}.")
    return path.read_text(encoding="utf-8")


def shipped_sources() -> list[str]:
    """Names of all ``.cu`` files in the package."""
    return sorted(path.name for path in SOURCE_DIR.glob("*.cu"))


@functools.cache
def instantiations(source: str, arch: str | None = None) -> tuple[str, ...]:
    """Kernels a source offers, from its ``// instantiate:`` lines with ``{a,b}`` expanded.

    Args:
        source: file in ``cuda/``.
        arch: only those meant for this architecture: a line may name some, as
            ``// instantiate sm_75 sm_86:``. None: all.
    """
    names: list[str] = []
    for architectures, line in _INSTANTIATE.findall(read_source(source)):
        if arch is not None and architectures and f"sm_{arch}" not in architectures.split():
            continue
        parts = [part.split(",") for part in re.split(r"[{}]", line.strip())]
        # Text outside braces is at even positions and is one choice whatever commas it has.
        choices = [p if i % 2 else [",".join(p)] for i, p in enumerate(parts)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return tuple(dict.fromkeys(re.sub(r"\s+", "", name) for name in names))


def compile_program(source: str, names: tuple[str, ...], arch: str) -> Program:
    """Compiles ``names`` of a shipped source for ``sm_<arch>``. Needs NVRTC but no GPU.

    Raises:
        UnsupportedError: NVRTC is missing or does not know the architecture.
        KernelBuildError: the compiler refused the source; ``log`` has its output.
    """
    reason = compiler_unavailable_reason(None)
    if reason is not None:
        raise UnsupportedError(reason)
    from cupy.cuda import nvrtc

    if int(arch.rstrip("a")) not in nvrtc.getSupportedArchs():
        version = ".".join(map(str, nvrtc.getVersion()))
        raise UnsupportedError(
            f"NVRTC {version} cannot compile for sm_{arch}.",
            "Install the extra that matches your driver: barqtrain_hf[cuda12] or [cuda13].",
        )
    options = (*_OPTIONS, f"-arch=sm_{arch}", f"-I{SOURCE_DIR}", f"-I{cuda_include_dir()}")
    program = nvrtc.createProgram(read_source(source), source, (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (*options, "--ptxas-options=-v"))
        except nvrtc.NVRTCError as error:
            log = _text(nvrtc.getProgramLog(program))
            message = f"NVRTC could not compile {source} for sm_{arch}."
            raise KernelBuildError(message, log) from error
        lowered = {name: _text(nvrtc.getLoweredName(program, name)) for name in names}
        log = _text(nvrtc.getProgramLog(program))
        return Program(nvrtc.getCUBIN(program), lowered, log)
    finally:
        nvrtc.destroyProgram(program)


def cubin_for(source: str, name: str, arch: str) -> tuple[Path, str]:
    """Path of the cubin of one kernel, and its mangled name; built if the cache has none."""
    key = _key(source, name, arch)
    directory = cache_dir()
    entry = _read_entry(directory, key)
    if entry is not None:
        return entry
    program = compile_program(source, (name,), arch)
    try:
        return _write_entry(directory, key, program.cubin, program.lowered[name])
    except OSError as error:
        fallback = _process_cache()
        warnings.warn(
            f"The kernel cache {directory} cannot be written ({error}); kernels are kept in "
            f"{fallback} for this process only. Set BARQ_KERNEL_CACHE to a writable folder.",
            stacklevel=2,
        )
        return _write_entry(fallback, key, program.cubin, program.lowered[name])


def cache_dir() -> Path:
    """``BARQ_KERNEL_CACHE`` if set, else a folder in the user's cache directory."""
    override = os.environ.get("BARQ_KERNEL_CACHE")
    return (
        Path(override).expanduser()
        if override
        else platformdirs.user_cache_path("barqtrain_hf") / "kernels"
    )


@functools.cache
def _process_cache() -> Path:
    return Path(tempfile.mkdtemp(prefix="barq-kernels-"))


def _key(source: str, name: str, arch: str) -> str:
    from cupy.cuda import nvrtc

    digest = hashlib.sha256()
    for part in (*_with_headers(source), *_OPTIONS, arch, repr(nvrtc.getVersion()), name):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:32]


@functools.cache
def _with_headers(source: str) -> tuple[str, ...]:
    """The source's text and that of every header of ours it includes, directly or not."""
    seen: dict[str, str] = {}
    waiting = [source]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen[current] = read_source(current)
            waiting += _QUOTED_INCLUDE.findall(seen[current])
    return tuple(seen[name] for name in sorted(seen))


def _read_entry(directory: Path, key: str) -> tuple[Path, str] | None:
    try:
        entry = json.loads((directory / f"{key}.json").read_text(encoding="utf-8"))
        cubin = directory / f"{entry['sha256']}.cubin"
        if hashlib.sha256(cubin.read_bytes()).hexdigest() == entry["sha256"]:
            return cubin, str(entry["lowered"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, or cut short by a crash or a full disk: rebuilt by the caller
    return None


def _write_entry(directory: Path, key: str, cubin: bytes, lowered: str) -> tuple[Path, str]:
    directory.mkdir(parents=True, exist_ok=True)
    sha256 = hashlib.sha256(cubin).hexdigest()
    path = directory / f"{sha256}.cubin"
    _write_atomically(path, cubin)
    entry = json.dumps({"sha256": sha256, "lowered": lowered})
    _write_atomically(directory / f"{key}.json", entry.encode())
    return path, lowered


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _parse_resources(log: str, lowered: dict[str, str]) -> dict[str, Resources]:
    """Reads ptxas -v: one "Compiling entry function" block per kernel."""
    blocks = re.split(r"Compiling entry function '", log)[1:]
    by_symbol: dict[str, Resources] = {}
    for block in blocks:
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", block)]
        registers = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        if registers is None or not spills:
            raise KernelBuildError("ptxas printed no register or spill counts.", log)
        by_symbol[block.split("'")[0]] = Resources(
            int(registers[1]), int(shared[1]) if shared else 0, sum(spills)
        )
    missing = [name for name, symbol in lowered.items() if symbol not in by_symbol]
    if missing:
        raise KernelBuildError(f"ptxas printed nothing about {', '.join(missing)}.", log)
    return {name: by_symbol[symbol] for name, symbol in lowered.items()}
