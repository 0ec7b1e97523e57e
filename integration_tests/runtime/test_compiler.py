"""Compilation and its cache, which need NVRTC but no GPU."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from barqtrain_hf.errors import ArgumentError, KernelBuildError, UnsupportedError
from barqtrain_hf.runtime import Kernel, __main__, compiler, device
from barqtrain_hf.runtime.__main__ import main
from barqtrain_hf.runtime.compiler import Program, compile_program, cubin_for, instantiations

SOURCE, NAME = "rms_norm.cu", "column_sum<float,4>"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BARQ_KERNEL_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


# test.yml compiles every source for every architecture, which takes minutes. Here: each generation of
# instructions, and for sources with the same kernels everywhere one side each of their `#if __CUDA_ARCH__`.
GENERATIONS, BOTH_SIDES = ("75", "80", "90a", "120"), ("75", "90a")


def jobs() -> list[tuple[str, str]]:
    """The sources and architectures that are compiled here."""
    found = []
    for source in compiler.shipped_sources():
        kernels = {arch: instantiations(source, arch) for arch in device.SHIPPED_ARCHITECTURES}
        differ = len(set(kernels.values())) > 1
        found += [
            (source, arch) for arch in (GENERATIONS if differ else BOTH_SIDES) if kernels[arch]
        ]
    return found


# One test each, so that processes share the work.
@pytest.mark.parametrize(("source", "arch"), jobs())
def test_every_shipped_kernel_compiles_without_spills(source: str, arch: str) -> None:
    # On sm_75 this also proves that no bf16 instruction is used: ptxas refuses them there.
    program = compile_program(source, instantiations(source, arch), arch)
    assert program.cubin[:4] == b"\x7fELF"
    assert set(program.resources) == set(instantiations(source, arch))
    # Hopper's products run one after another where ptxas does not trust the code around them.
    assert "serialized" not in program.log, program.log
    for name, used in program.resources.items():
        assert used.spill_bytes == 0, f"{name} spills {used.spill_bytes} bytes on sm_{arch}"
        assert 0 < used.registers <= 255
        if name.startswith("flash_attention_backward_hopper"):
            # Its warpgroups share these anew; with fewer they would wait for the rest forever.
            assert used.registers == 168, name


def test_every_kernel_is_meant_for_a_shipped_architecture() -> None:
    assert len(compiler.shipped_sources()) > 5
    for source in compiler.shipped_sources():
        jobs = itertools.product([source], device.SHIPPED_ARCHITECTURES)
        compiled = {name for job in jobs for name in instantiations(*job)}
        assert compiled == set(instantiations(source)) != set(), source


def test_the_command_prints_resources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arch", "75", "80", "--source", "scale.cu", "targets.cu"]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"(\w+)<\w+> +│ (sm_\d+) │", printed)
    kernels = ["scale_in_place"] * 3 + ["scale_to"] * 2 + ["count_targets"]
    assert sorted(rows) == sorted(itertools.product(kernels, ["sm_75", "sm_80"])), printed
    assert "12 kernels compiled, 0 spill" in printed


def test_the_command_compiles_everything_unless_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Sequence[str], Sequence[str]]] = []

    def compile_nothing(*jobs: Sequence[str]) -> Iterator[tuple[str, str, Program]]:
        asked.append(jobs)
        return iter(())

    monkeypatch.setattr(__main__, "compile_all", compile_nothing)
    assert main([]) == 0
    assert asked == [(compiler.shipped_sources(), device.SHIPPED_ARCHITECTURES)]
    assert "0 kernels compiled, 0 spill" in capsys.readouterr().out


def test_a_spill_is_seen_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # 80 live floats in a thread that may have 32 registers.
    spilling = """
        // instantiate: hoard<80>
        template <int N> __global__ void __launch_bounds__(1024, 2) hoard(float* x, int n) {
          float held[N];
          for (int k = 0; k < N; ++k) held[k] = x[k * n + threadIdx.x];
          __syncthreads();
          for (int k = 0; k < N; ++k) x[k * n + threadIdx.x] = held[N - 1 - k] * held[k];
        }"""
    source = "\n".join(line.strip() for line in spilling.splitlines())
    monkeypatch.setattr(compiler, "read_source", lambda _: source)
    instantiations.cache_clear()
    try:
        assert (
            compile_program("rms_norm.cu", ("hoard<80>",), "80").resources["hoard<80>"].spill_bytes
            > 0
        )
        assert main(["--arch", "80", "--source", "rms_norm.cu"]) == 1
        assert "1 kernels compiled, 1 spill" in capsys.readouterr().out
    finally:
        instantiations.cache_clear()


def test_the_command_fails_on_an_unknown_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arch", "12"]) == 1
    assert "cannot compile for sm_12" in capsys.readouterr().err


def test_a_build_is_cached_and_reused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lowered = cubin_for(SOURCE, NAME, "80")
    assert path.parent == cache and "column_sum" in lowered
    # Compiling again would now fail, so this must come from the cache.
    monkeypatch.setattr(compiler, "compile_program", None)
    assert cubin_for(SOURCE, NAME, "80") == (path, lowered)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed", "entry"])
def test_a_damaged_entry_is_rebuilt(cache: Path, damage: str) -> None:
    path, lowered = cubin_for(SOURCE, NAME, "80")
    good = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "flipped":
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "removed":
        path.unlink()
    else:
        next(cache.glob("*.json")).write_text('{"sha256": "00')
    rebuilt, same_name = cubin_for(SOURCE, NAME, "80")
    assert same_name == lowered
    assert json.loads(next(cache.glob("*.json")).read_text())["sha256"] == rebuilt.stem
    assert rebuilt.read_bytes()[:4] == b"\x7fELF" and len(rebuilt.read_bytes()) == len(good)


def test_the_key_covers_everything_that_shapes_the_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {compiler._key(SOURCE, NAME, "80")}
    keys.add(compiler._key(SOURCE, NAME, "86"))
    keys.add(compiler._key(SOURCE, "column_sum<__half,4>", "80"))
    monkeypatch.setattr(compiler, "_OPTIONS", ("-std=c++20",))
    keys.add(compiler._key(SOURCE, NAME, "80"))
    monkeypatch.undo()
    parts = compiler._with_headers(SOURCE)
    headers = set(re.findall(r"\w+\.cuh", "".join(parts)))
    assert (
        len(parts) == 1 + len(headers) > 4
    )  # the source and all that it includes, directly or not
    monkeypatch.setattr(compiler, "_with_headers", lambda _: (*parts[:-1], parts[-1] + " "))
    keys.add(compiler._key(SOURCE, NAME, "80"))
    monkeypatch.undo()
    from cupy.cuda import nvrtc

    monkeypatch.setattr(nvrtc, "getVersion", lambda: (99, 0))
    keys.add(compiler._key(SOURCE, NAME, "80"))
    assert len(keys) == 6


def test_a_silent_ptxas_matters_only_to_who_asks() -> None:
    # NVRTC's own cache answers without a log when another process has just compiled the same.
    program = compiler.Program(b"", {NAME: "_Z10column_sum"}, log="")
    with pytest.raises(KernelBuildError, match="nothing about column_sum<float,4>"):
        _ = program.resources


def test_many_processes_build_at_once(cache: Path) -> None:
    # Forked after the imports, so that they really build at the same moment.
    code = (
        "import multiprocessing\n"
        "from cupy.cuda import nvrtc\n"
        "from barqtrain_hf.runtime.compiler import cubin_for\n"
        "context = multiprocessing.get_context('fork')\n"
        "together, names = context.Barrier(4), context.SimpleQueue()\n"
        "def build():\n"
        "    together.wait()\n"
        f"    names.put(cubin_for({SOURCE!r}, {NAME!r}, '80')[1])\n"
        "processes = [context.Process(target=build) for _ in range(4)]\n"
        "for process in processes: process.start()\n"
        "for process in processes: process.join()\n"
        "assert [process.exitcode for process in processes] == [0] * 4\n"
        "assert len({names.get() for _ in processes}) == 1\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert not [p for p in cache.iterdir() if p.name.startswith(".")], "temporary files left"
    assert cubin_for(SOURCE, NAME, "80")[0].is_file()


def test_a_write_that_is_cut_short_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compiler.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cubin_for(SOURCE, NAME, "80")
    assert list(cache.iterdir()) == []
    assert cubin_for(SOURCE, NAME, "80")[0].stat().st_mode & 0o044, "others cannot read the cache"


def test_an_unwritable_cache_falls_back_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("BARQ_KERNEL_CACHE", str(blocker / "below"))
    with pytest.warns(UserWarning, match="BARQ_KERNEL_CACHE"):
        path, _ = cubin_for(SOURCE, NAME, "80")
    assert path.read_bytes()[:4] == b"\x7fELF"


def test_a_source_that_does_not_compile_shows_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "read_source", lambda _: "__global__ void broken( {")
    with pytest.raises(KernelBuildError, match="error") as caught:
        compile_program("broken.cu", (), "80")
    assert "broken.cu" in caught.value.log


def test_names_must_be_instantiated() -> None:
    with pytest.raises(ArgumentError, match=r"not instantiated in cuda/rms_norm\.cu"):
        Kernel(SOURCE, "column_sum<double,4>", {})
    with pytest.raises(KernelBuildError, match=r"nowhere\.cu is not among"):
        Kernel("nowhere.cu", "x", {})


def test_missing_pieces_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = device.compiler_unavailable_reason
    assert reason("13.0") is None
    from cupy.cuda import nvrtc

    assert "cupy-cuda13x" in str(reason("12.8")) and "barqtrain_hf[cuda12]" in str(reason("12.8"))
    with monkeypatch.context() as patch:
        patch.setattr(device, "cuda_include_dir", lambda: None)
        assert "headers" in str(reason("13.0")) and "barqtrain_hf[cuda13]" in str(reason("13.0"))
    with monkeypatch.context() as patch:

        def missing() -> None:
            raise RuntimeError("libnvrtc.so.13 not found")

        patch.setattr(nvrtc, "getVersion", missing)
        assert "NVRTC" in str(reason("13.0")) and "barqtrain_hf[cuda13]" in str(reason("13.0"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cupy.cuda", None)
        message = str(reason("12.8"))
        assert "CuPy cannot be imported" in message and "barqtrain_hf[cuda12]" in message
        with pytest.raises(UnsupportedError, match=r"barqtrain_hf\[cuda13\]"):
            compile_program(SOURCE, (NAME,), "80")
