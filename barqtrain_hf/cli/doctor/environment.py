"""The machine and what is installed on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from barqtrain_hf.runtime import architecture, cuda_unavailable_reason, peak_flops
from barqtrain_hf.runtime.compiler import cache_dir
from barqtrain_hf.runtime.device import SHIPPED_ARCHITECTURES

PACKAGES = (
    *("barqtrain_hf", "torch", "transformers", "accelerate", "tokenizers", "peft", "trl", "triton"),
    *("cupy-cuda13x", "cupy-cuda12x", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
    *("kernels", "liger-kernel", "flash-attn", "bitsandbytes", "deepspeed"),
)
# What changes which code runs, where it is kept, or how fast it is.
VARIABLES = (
    *("BARQ_KERNEL_CACHE", "USE_HUB_KERNELS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    *("TORCHDYNAMO_DISABLE", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"),
)


def describe() -> dict[str, Any]:
    """Everything about the machine, as plain data."""
    smi = _nvidia_smi()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "driver": smi[0][1] if smi else None,
        "gpus_of_nvidia_smi": [name for name, _ in smi],
        "gpus": [_gpu(index) for index in range(count)],
        "cpu_threads": torch.get_num_threads(),
        "rust_extension_error": _rust_error(),
        "kernels_unavailable": cuda_unavailable_reason(),
        "cache": _cache(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def problems(environment: dict[str, Any]) -> list[str]:
    """What should run on this machine and cannot, each with its fix."""
    found = []
    if environment["rust_extension_error"]:
        found.append(
            f"The Rust extension cannot be used ({environment['rust_extension_error']}): "
            "pip install --force-reinstall --no-deps barqtrain_hf"
        )
    reason = environment["kernels_unavailable"]
    if environment["gpus"] and reason:
        found.append(f"The kernels cannot run on this GPU. {reason}")
    hidden = "CUDA_VISIBLE_DEVICES" in environment["variables"]
    if environment["gpus_of_nvidia_smi"] and not environment["gpus"] and not hidden:
        built = environment["torch_cuda"]
        found.append(
            f"nvidia-smi lists {environment['gpus_of_nvidia_smi'][0]}, but torch, built "
            f"{f'for CUDA {built}' if built else 'without CUDA'}, sees no GPU: install a torch for a CUDA "
            f"version that driver {environment['driver']} supports."
        )
    return found


def is_bf16_native(index: int) -> bool:
    """Whether the GPU computes in bf16 itself: sm_80 and later; older ones emulate it."""
    return torch.cuda.get_device_capability(index) >= (8, 0)


def _gpu(index: int) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability(index)
    arch = architecture(index)
    return {
        "name": torch.cuda.get_device_name(index),
        "capability": f"{major}.{minor}",
        "tested_architecture": arch in SHIPPED_ARCHITECTURES,
        "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
        "bf16": is_bf16_native(index),
        "peak_flops": peak_flops(index),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> list[tuple[str, str]]:
    """Name and driver of each GPU the driver knows, which may be more than torch sees."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.rpartition(", ") for line in answer.stdout.splitlines()]
    return (
        [(name, driver) for name, comma, driver in rows if comma] if not answer.returncode else []
    )


def _rust_error() -> str | None:
    """What goes wrong when the extension packs two documents, or None."""
    try:
        from barqtrain_hf.data import pack_sequences

        rows = pack_sequences([3, 5], 8)
    except Exception as error:  # whatever a broken binary raises is what the user must see
        return f"{type(error).__name__}: {error}"
    return None if len(rows) == 1 else "it packs wrongly"


def _cache() -> dict[str, Any]:
    folder = cache_dir()
    # Looked at, not made: a machine without a GPU never needs it.
    nearest = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
    kernels = list(folder.glob("*.json")) if folder.is_dir() else []
    return {
        "folder": str(folder),
        "writable": nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
        "kernels": len(kernels),
    }
