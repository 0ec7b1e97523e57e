"""Typed launch: every mistake is an error that names the argument, and never a launch."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError
from barqtrain_hf.runtime import Kernel

PARAMETERS: dict[str, torch.dtype | str] = {
    "partial": torch.float32,
    "dw": torch.float32,
    "db": torch.float32,
    "parts": "int32",
    "dim": "int32",
}
GRID, BLOCK = (1, 1, 1), (1024, 1, 1)


def kernel() -> Kernel:
    return Kernel("rms_norm.cu", "column_sum<float,4>", PARAMETERS)


@pytest.mark.parametrize("count", [2, 6])
def test_wrong_count(count: int) -> None:
    tensors = [_FakeCuda(torch.ones(1, 4)), *(_FakeCuda(torch.ones(4)) for _ in range(2))]
    values = [*tensors, 1, 4, 5][:count]
    message = rf"takes 5 arguments \(partial, dw, db, parts, dim\), got {count}"
    with pytest.raises(ArgumentError, match=message):
        kernel()(GRID, BLOCK, *values)


@pytest.mark.parametrize(
    "position,value,error,message",
    [
        (0, torch.ones(1, 4).half(), ArgumentTypeError, r"partial must be torch\.float32"),
        (0, 3, ArgumentTypeError, "partial must be a tensor, got int"),
        (0, torch.ones(4, 4)[:, :2], ArgumentError, r"partial of shape \(4, 2\) .* not contiguous"),
        (1, torch.ones(4).double(), ArgumentTypeError, r"dw must be torch\.float32"),
        (1, torch.ones(8)[::2], ArgumentError, "dw of shape .* is not contiguous"),
        (1, "cpu", ArgumentError, "dw is on cpu"),
        (1, "other", ArgumentError, "dw is on .*, the arguments before it on cuda:0"),
        (3, 1.0, ArgumentTypeError, r"parts=1\.0 does not fit int32"),
        (4, 2**31, ArgumentTypeError, "dim=2147483648 does not fit int32"),
    ],
)
def test_wrong_arguments(position: int, value: Any, error: type[Exception], message: str) -> None:
    tensors = [_FakeCuda(torch.ones(1, 4)), *(_FakeCuda(torch.ones(4)) for _ in range(2))]
    values: list[Any] = [*tensors, 1, 4]
    if isinstance(value, str):
        on_cpu = value == "cpu"
        value = torch.ones(4) if on_cpu else _FakeCuda(torch.ones(4))
        value.index = -1 if on_cpu else 1
    elif isinstance(value, torch.Tensor):
        value = _FakeCuda(value)
    values[position] = value
    with pytest.raises(error, match=message):
        kernel()(GRID, BLOCK, *values)


def test_a_prepared_launch_passes_what_a_launch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = []

    def record(self: Kernel, *launch: Any) -> None:
        passed.append((*launch, self._arguments.values.raw))

    monkeypatch.setattr(Kernel, "_launch", record)
    parameters = {"partial": torch.float32, "tokens": "int64", "scale": "float32", "dim": "int32"}
    column_sum = Kernel("rms_norm.cu", "column_sum<float,4>", parameters)
    column_sum.launch(0, GRID, BLOCK, 2**40, -(2**40), 0.125, 7)
    column_sum.launch(0, GRID, BLOCK, 0, 0, 0.0, 0)  # so that nothing is left from before
    column_sum.prepare(GRID, BLOCK, -(2**40), 0.125, 7)(0, 2**40)
    assert passed[0] == passed[2] != passed[1]


def test_a_struct_is_for_launch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = []
    monkeypatch.setattr(
        Kernel, "_launch", lambda self, *_: passed.append(self._arguments.pointers[0])
    )
    parameters = {"of": "struct", "scale": "float32"}
    takes_struct = Kernel("rms_norm.cu", "column_sum<float,4>", parameters)
    takes_struct.launch(0, GRID, BLOCK, 2**40, 0.5)
    assert passed == [2**40]
    for call in (takes_struct, takes_struct.prepare):
        with pytest.raises(ArgumentError, match=r"use Kernel\.launch"):
            call(GRID, BLOCK, 2**40, 0.5)


class _FakeCuda(torch.Tensor):
    """A tensor that says it is on a GPU, so that a laptop gets to the checks behind that one."""

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> _FakeCuda:
        return torch.Tensor._make_subclass(cls, tensor)

    index = 0

    def get_device(self) -> int:
        return self.index

    def data_ptr(self) -> int:
        return 0


@pytest.mark.gpu
def test_launch_computes_on_the_current_stream() -> None:
    column_sum = kernel()
    partial = torch.randn(37, 100, device="cuda")
    out = torch.empty(100, device="cuda")
    # CUDA loads a kernel on its first launch, and waits for the device to do so.
    partial.mul_(1.0)
    column_sum((4, 1, 1), BLOCK, partial, out, out, 37, 100)
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        partial.mul_(2.0)
        column_sum((4, 1, 1), BLOCK, partial, out, out, 37, 100)
    assert not stream.query(), "the launch waited, or went to another stream"
    stream.synchronize()
    torch.testing.assert_close(out, partial.sum(0))


@pytest.mark.gpu
def test_threads_do_not_share_argument_buffers() -> None:
    column_sum = kernel()
    partials = [torch.full((5, 32), float(i), device="cuda") for i in range(4)]
    outs = [torch.zeros(32, device="cuda") for _ in range(4)]

    def launch(i: int) -> None:
        for _ in range(500):
            column_sum(GRID, BLOCK, partials[i], outs[i], outs[i], 5, 32)

    threads = [threading.Thread(target=launch, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for i, out in enumerate(outs):
        assert torch.equal(out, torch.full_like(out, 5.0 * i))


@pytest.mark.gpu
def test_a_thread_without_a_context_can_launch() -> None:
    column_sum = kernel()
    partial, out = torch.ones(3, 32, device="cuda"), torch.zeros(32, device="cuda")
    column_sum(GRID, BLOCK, partial, out, out, 3, 32)
    torch.cuda.synchronize()
    partial.fill_(2.0)
    thread = threading.Thread(target=column_sum, args=(GRID, BLOCK, partial, out, out, 3, 32))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(out, torch.full_like(out, 6.0))


@pytest.mark.gpu
def test_launch_is_captured_in_a_graph() -> None:
    column_sum = kernel()
    partial, out = torch.ones(3, 32, device="cuda"), torch.zeros(32, device="cuda")
    column_sum(GRID, BLOCK, partial, out, out, 3, 32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        column_sum(GRID, BLOCK, partial, out, out, 3, 32)
    partial.fill_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, torch.full_like(out, 6.0))


@pytest.mark.gpu
def test_launch_without_checks_takes_addresses() -> None:
    column_sum = kernel()
    partial, out = torch.ones(3, 32, device="cuda"), torch.zeros(32, device="cuda")
    column_sum.launch(0, GRID, BLOCK, partial.data_ptr(), out.data_ptr(), 0, 3, 32)
    torch.cuda.synchronize()
    assert torch.equal(out, torch.full_like(out, 3.0))
