"""Host microseconds of one kernel launch: ours beside CuPy's own ways and torch's."""

from __future__ import annotations

from typing import Any

import torch

from barqtrain_hf.benchmarks.harness import Report, time_host
from barqtrain_hf.ops.rms_norm import _forward_kernel
from barqtrain_hf.runtime import Kernel


def run() -> Report:
    """Launches the same tiny kernel (4 arguments) in every way."""
    import cupy
    import numpy as np
    from cupy_backends.cuda.api import driver

    report = Report("launch")
    kernel = Kernel(
        "rms_norm.cu",
        "column_sum<float>",
        {"partial": torch.float32, "out": torch.float32, "parts": "int32", "dim": "int32"},
    )
    partial = torch.ones(1, 32, device="cuda")
    out = torch.empty(32, device="cuda")
    grid, block = (1, 1, 1), (32, 32, 1)

    def ours() -> None:
        kernel(grid, block, partial, out, 1, 32)

    ours()
    torch.cuda.synchronize()
    assert torch.equal(out, torch.ones_like(out))
    function = kernel._modules[0].get_function(_lowered(kernel)).kernel
    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream())
    pointer, raw_stream = function.ptr, torch.cuda.current_stream().cuda_stream
    address = kernel._arguments.address
    arguments = (partial.data_ptr(), out.data_ptr(), np.int32(1), np.int32(32))

    def cupy_function() -> None:
        function(grid, block, arguments, 0, stream)

    rms_norm = _forward_kernel(torch.float32, torch.float32, torch.float32, 4, 1)
    x, weight, y, rstd = (torch.ones(s, device="cuda") for s in ((64, 64), 64, (64, 64), 64))

    def ours_nine() -> None:
        rms_norm((8, 1, 1), (128, 1, 1), x, weight, y, rstd, 64, 64, 16, 1e-6, 0)

    def driver_only() -> None:
        driver.launchKernel(pointer, 1, 1, 1, 32, 32, 1, 0, raw_stream, address, 0)

    def cupy_stream_context() -> None:
        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
            function(grid, block, arguments)

    def torch_elementwise() -> None:
        torch.mul(partial, 2.0, out=partial)

    calls: dict[str, Any] = {
        "barqtrain_hf Kernel, 4 arguments checked": ours,
        "barqtrain_hf Kernel, 9 arguments checked (rms_norm)": ours_nine,
        "cuLaunchKernel through CuPy, nothing checked or packed": driver_only,
        "cupy.cuda.Function, stream cached, arguments ready": cupy_function,
        "cupy.cuda.Function in a stream context": cupy_stream_context,
        "torch elementwise, out=": torch_elementwise,
    }
    for name, call in calls.items():
        report.add(launch=name, host_us=time_host(call))
    return report


def _lowered(kernel: Kernel) -> str:
    from barqtrain_hf.runtime.compiler import cubin_for
    from barqtrain_hf.runtime.device import architecture

    return cubin_for(kernel.source, kernel.name, architecture(torch.cuda.current_device()))[1]
