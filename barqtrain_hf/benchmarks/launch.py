"""Host microseconds of one kernel launch: ours beside CuPy's own ways and torch's."""

from __future__ import annotations

from typing import Any

import torch

from barqtrain_hf.benchmarks.harness import Report, time_host
from barqtrain_hf.runtime import Kernel


def run() -> Report:
    """Launches the same tiny kernel (5 arguments) in every way."""
    import cupy
    import numpy as np
    from cupy_backends.cuda.api import driver

    report = Report("launch")
    kernel = Kernel(
        "rms_norm.cu",
        "column_sum<float,4>",
        {
            **dict.fromkeys(("partial", "dw", "db"), torch.float32),
            "parts": "int32",
            "dim": "int32",
        },
    )
    partial = torch.ones(1, 32, device="cuda")
    out = torch.empty(32, device="cuda")
    grid, block = (1, 1, 1), (1024, 1, 1)

    def ours() -> None:
        kernel(grid, block, partial, out, out, 1, 32)

    ours()
    torch.cuda.synchronize()
    assert torch.equal(out, torch.ones_like(out))
    function = kernel._modules[0].get_function(_lowered(kernel)).kernel
    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream())
    pointer, raw_stream = function.ptr, torch.cuda.current_stream().cuda_stream
    pointers = (partial.data_ptr(), out.data_ptr(), out.data_ptr())
    address = kernel._arguments.address
    arguments = (*pointers, np.int32(1), np.int32(32))

    def cupy_function() -> None:
        function(grid, block, arguments, 0, stream)

    def ours_unchecked() -> None:
        kernel.launch(0, grid, block, *pointers, 1, 32)

    def driver_only() -> None:
        driver.launchKernel(pointer, 1, 1, 1, 1024, 1, 1, 0, raw_stream, address, 0)

    def cupy_stream_context() -> None:
        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
            function(grid, block, arguments)

    def torch_elementwise() -> None:
        torch.mul(partial, 2.0, out=partial)

    calls: dict[str, Any] = {
        "barqtrain_hf Kernel, 5 arguments checked": ours,
        "barqtrain_hf Kernel, 5 arguments, unchecked (as ops launch)": ours_unchecked,
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
