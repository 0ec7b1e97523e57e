"""One op in one dtype: does it build and run, how far is it from fp64, does it repeat, how fast is it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from barqtrain_hf.cli.doctor.cases import Case, Draw, Tensors
from barqtrain_hf.errors import KernelBuildError
from barqtrain_hf.ops._backend import Backend
from barqtrain_hf.runtime.compiler import cache_dir

# The gate of the ops' own tests: error(ours) against error(stock), both measured against fp64.
GATE = 1.25
# One rounding error is luck: errors are compared once they are summed over several draws.
_DRAWS = 4
_BATCHES, _BATCH_MS = 5, 20.0
_ROOMY_BYTES = 16 * 2**30


@dataclass(frozen=True)
class Setting:
    """Where and how the ops are examined.

    Attributes:
        device: where.
        backend: what ``ours`` means there.
        dtypes: those which the device computes in.
        timed: whether to time them.
    """

    device: torch.device
    backend: Backend
    dtypes: tuple[torch.dtype, ...]
    timed: bool


@dataclass
class Error:
    """Relative errors of one output or gradient against fp64, over all draws."""

    tensor: str
    ours: float
    stock: float
    judged: bool  # a scalar is one number, whose error is luck

    @property
    def ratio(self) -> float:
        """How many times further away ours is; NaN if a number is."""
        if self.stock == 0:
            return 1.0 if self.ours == 0 else float("inf")
        return self.ours / self.stock

    @property
    def within(self) -> bool:
        """Whether ours passes the gate; NaN does not."""
        return not self.judged or self.ratio <= GATE


@dataclass
class Result:
    """What is known about one op in one dtype.

    Attributes:
        op, dtype: which.
        problem: what is wrong, or empty.
        first_call_seconds: forward and backward with what had to be compiled or loaded; None without kernels.
        kernels_built: how many of its kernels were not in the cache.
        outputs, gradients: their errors.
        repeatable: whether a second run gave the same bits.
        ours_ms, stock_ms: forward and backward; None if not timed.
        not_timed: why there is no time although one was asked for, or empty.
    """

    op: str
    dtype: str
    problem: str = ""
    first_call_seconds: float | None = None
    kernels_built: int | None = None
    outputs: list[Error] = field(default_factory=list)
    gradients: list[Error] = field(default_factory=list)
    repeatable: bool | None = None
    ours_ms: float | None = None
    stock_ms: float | None = None
    not_timed: str = ""

    @property
    def speedup(self) -> float | None:
        """How many times faster than stock."""
        return self.stock_ms / self.ours_ms if self.stock_ms and self.ours_ms else None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "speedup": self.speedup}


def worst(errors: list[Error]) -> Error | None:
    """The one that is furthest beyond stock's; one that is not judged only if there is no other."""
    # NaN compares as neither, so it is looked for first.
    return max(errors, key=lambda e: (e.judged, e.ratio != e.ratio, e.ratio, e.ours), default=None)


def examine(case: Case, dtype: torch.dtype, setting: Setting) -> Result:
    """Everything about one op in one dtype; whatever goes wrong is in ``problem``."""
    result = Result(case.name, str(dtype).removeprefix("torch."))
    stage = "it does not run"
    try:
        _first_call(result, case, dtype, setting)
        stage = "its errors cannot be measured"
        _compare(result, case, dtype, setting)
        if setting.timed and not result.problem:
            stage = "it does not run on large inputs"
            _time(result, case, dtype, setting)
    except KernelBuildError as error:
        lines = [line for line in error.log.splitlines() if "error" in line.lower()]
        first = str(error).partition("\n")[0]
        result.problem = f"it does not compile: {first} {lines[0].strip() if lines else ''}".strip()
    except Exception as error:  # CUDA, cuBLAS and NVRTC raise all kinds; each is a finding
        first = str(error).partition("\n")[0]
        result.problem = f"{stage}: {type(error).__name__}: {first}"
    return result


def _first_call(result: Result, case: Case, dtype: torch.dtype, setting: Setting) -> None:
    """Runs ours for the first time, then again from the same inputs."""
    inputs = case.make(Draw(dtype, setting.device, seed=0, large=False))
    ours = partial(case.ours, backend=setting.backend)
    cached = _cached_kernels()
    _wait(setting.device)  # CUDA's own start is no part of the first op's time
    start = time.perf_counter()
    first = _results(ours, inputs)
    _wait(setting.device)
    if setting.backend != "torch":
        result.first_call_seconds = time.perf_counter() - start
        result.kernels_built = len(_cached_kernels() - cached)
    second = _results(ours, inputs)
    result.repeatable = all(map(torch.equal, first, second))
    if not all(bool(torch.isfinite(tensor).all()) for tensor in first):
        result.problem = "it gives numbers that are not finite"
    elif not result.repeatable:
        result.problem = "two runs from the same inputs differ"


def _compare(result: Result, case: Case, dtype: torch.dtype, setting: Setting) -> None:
    """Errors of ours and of stock against fp64, in root mean squares over several draws."""
    squares: list[list[float]] = []
    for seed in range(_DRAWS):
        inputs = case.make(Draw(dtype, setting.device, seed, large=False))
        wide = tuple(_widened(tensor) for tensor in inputs)
        ours = _results(partial(case.ours, backend=setting.backend), inputs)
        stock, exact = _results(case.stock, inputs), _results(case.exact, wide, dtype)
        for i, (mine, theirs, truth) in enumerate(zip(ours, stock, exact, strict=True)):
            if mine.shape != theirs.shape or mine.dtype is not theirs.dtype:
                raise TypeError(
                    f"tensor {i} is {mine.dtype} {tuple(mine.shape)}, stock's {theirs.dtype} "
                    f"{tuple(theirs.shape)}"
                )
            if i == len(squares):
                squares.append([0.0, 0.0, 0.0])
            squares[i][0] += (mine.double() - truth).square().sum().item()
            squares[i][1] += (theirs.double() - truth).square().sum().item()
            squares[i][2] += truth.square().sum().item()
    outputs = len(squares) - len(case.inputs)
    names = [f"output {i}" for i in range(outputs)] + [f"gradient of {n}" for n in case.inputs]
    errors = [
        Error(name, (mine / truth) ** 0.5, (theirs / truth) ** 0.5, exact[i].dim() > 0)
        for i, (name, (mine, theirs, truth)) in enumerate(zip(names, squares, strict=True))
    ]
    result.outputs, result.gradients = errors[:outputs], errors[outputs:]
    beyond = [error for error in errors if not error.within]
    if beyond and not result.problem:
        result.problem = "; ".join(
            f"{error.tensor} is {error.ours:.1e} off, more than {GATE} times stock's {error.stock:.1e}"
            for error in beyond
        )


def _time(result: Result, case: Case, dtype: torch.dtype, setting: Setting) -> None:
    """Milliseconds of a forward and backward pass on inputs large enough that the GPU is what is timed."""
    total = torch.cuda.get_device_properties(setting.device).total_memory
    scale = 1 if total > _ROOMY_BYTES else 4
    try:
        inputs = case.make(Draw(dtype, setting.device, seed=0, large=True, scale=scale))
        ours = partial(case.ours, backend=setting.backend)
        result.ours_ms = milliseconds(_step(ours, inputs))
        result.stock_ms = milliseconds(_step(case.stock, inputs))
    except torch.OutOfMemoryError:
        result.ours_ms = None
        result.not_timed = "not enough free GPU memory"
    finally:
        inputs = ()
        torch.cuda.empty_cache()


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call on the GPU; several run between two events, so that it never waits."""
    for _ in range(3):
        call()
    calls = 1
    samples = []
    for batch in range(_BATCHES + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        each = start.elapsed_time(end) / calls
        if batch == 0:  # it only says how many calls make a batch
            calls = min(50, max(1, round(_BATCH_MS / max(each, 1e-3))))
        else:
            samples.append(each)
    return statistics.median(samples)


def _step(function: Callable[..., Any], inputs: Tensors) -> Callable[[], Any]:
    trained = [tensor for tensor in inputs if tensor.requires_grad]
    with torch.no_grad():
        upstream = [torch.ones_like(y) for y in _tuple(function(*inputs))]

    def step() -> Any:
        outputs = zip(_tuple(function(*inputs)), upstream, strict=True)
        ys, dys = zip(*((y, dy) for y, dy in outputs if y.requires_grad), strict=True)
        return torch.autograd.grad(ys, trained, dys)

    return step


def _results(
    function: Callable[..., Any], inputs: Tensors, upstream_dtype: torch.dtype | None = None
) -> Tensors:
    """Outputs and gradients, for upstream gradients that are the same at every call.

    Args:
        upstream_dtype: what they are rounded to first, where outputs are wider than the op's.
    """
    outputs = _tuple(function(*inputs))
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    differentiable, upstream = [], []
    for y in outputs:
        noise = torch.randn(y.shape, device=y.device, generator=generator)
        if y.requires_grad:
            differentiable.append(y)
            # Of a loss it is 1: with a small one, fp16 would lose stock's gradients altogether.
            dy = noise.to(upstream_dtype or y.dtype) if y.dim() else torch.ones_like(noise)
            upstream.append(dy.to(y.dtype))
    trained = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = torch.autograd.grad(differentiable, trained, upstream)
    return tuple(tensor.detach() for tensor in (*outputs, *gradients))


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def _tuple(outputs: Any) -> Tensors:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _cached_kernels() -> set[str]:
    folder = cache_dir()
    return {path.name for path in folder.glob("*.json")} if folder.is_dir() else set()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
