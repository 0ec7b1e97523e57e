"""What this machine's GPU is and can do, and whether our kernels can run on it."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import torch

# Every architecture the shipped kernels are compiled for in CI. 90a, not 90: wgmma and setmaxnreg
# exist only there, and an "a" cubin runs on every Hopper.
SHIPPED_ARCHITECTURES = ("75", "80", "86", "89", "90a", "100", "120")

# Dense 16-bit tensor-core peak in FLOP/s (bf16, or fp16 where there is no bf16), by whole words of the
# device name, first match wins; from the vendor's datasheets. The denominator of MFU, nothing else.
_PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 5090", 209e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("T4", 65e12),
)


@functools.cache
def architecture(device_index: int) -> str:
    """NVRTC's name of a device's architecture, such as ``"75"`` or ``"90a"``."""
    major, minor = torch.cuda.get_device_capability(device_index)
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


@functools.cache
def sm_count(device_index: int) -> int:
    """Number of streaming multiprocessors, which sizes persistent grids."""
    return int(torch.cuda.get_device_properties(device_index).multi_processor_count)


@functools.cache
def peak_flops(device_index: int) -> float | None:
    """Dense 16-bit peak of the device in FLOP/s, or None for a device not in the table."""
    name = torch.cuda.get_device_name(device_index)
    return next((f for part, f in _PEAK_FLOPS if re.search(rf"\b{part}\b", name)), None)


@torch.compiler.assume_constant_result
def cuda_unavailable_reason() -> str | None:
    """Why no kernel can run in this process, in one sentence with the fix; None if they can."""
    return _cuda_unavailable_reason()


@functools.cache
def _cuda_unavailable_reason() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device, so the PyTorch path is used."
    return compiler_unavailable_reason(torch.version.cuda)


def compiler_unavailable_reason(cuda_version: str | None) -> str | None:
    """Why kernels cannot be compiled for torch's CUDA ``cuda_version`` ("13.0"; None: any)."""
    wanted = int(cuda_version.split(".")[0]) if cuda_version else 13
    fix = f"pip install 'barqtrain_hf[cuda{wanted}]'; until then the PyTorch path is used."
    try:
        from cupy.cuda import nvrtc
        from cupy_backends.cuda.api import driver
    except ImportError as error:
        return f"CuPy cannot be imported ({error}): {fix}"
    built_for = driver.get_build_version() // 1000
    if cuda_version and built_for != wanted:
        return (
            f"CuPy was built for CUDA {built_for} but torch for CUDA {wanted}: "
            f"pip uninstall cupy-cuda{built_for}x, then {fix}"
        )
    try:
        nvrtc.getVersion()
    except (RuntimeError, ImportError, OSError) as error:
        return f"CuPy finds no NVRTC library ({error}): {fix}"
    if cuda_include_dir() is None:
        return f"The CUDA headers (cuda_bf16.h) that NVRTC includes are not installed: {fix}"
    return None


@functools.cache
def cuda_include_dir() -> Path | None:
    """The folder with ``cuda_bf16.h``: pip's CUDA packages, conda, or a CUDA toolkit."""
    from cuda import pathfinder

    folders = [pathfinder.find_nvidia_header_directory("cudart")]
    # pathfinder looks into site-packages only; PYTHONPATH and .pth files may add other folders.
    nvidia = importlib.util.find_spec("nvidia")
    if nvidia is not None:
        for location in nvidia.submodule_search_locations or ():
            folders += sorted(Path(location).glob("*/include"), reverse=True)
    found = (Path(f) for f in folders if f and (Path(f) / "cuda_bf16.h").is_file())
    return next(found, None)
