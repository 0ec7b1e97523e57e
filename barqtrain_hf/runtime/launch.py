"""Typed kernel launch on torch's current stream.

The hot path packs the arguments into one preallocated buffer and calls the driver's launch through
CuPy with torch's raw stream handle: no Stream object, NumPy scalar or pointer wrapper is made per
launch. `python -m barqtrain_hf.benchmarks launch` measures it beside `cupy.cuda.Function`.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Mapping
from typing import Any

import torch

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from barqtrain_hf.runtime.compiler import cubin_for, instantiations
from barqtrain_hf.runtime.device import architecture, cuda_unavailable_reason

# Each parameter has an 8-byte slot of the buffer, so slot i is at 8 * i whatever its type.
_SHARED_BYTES = 48 * 1024  # that a block gets without asking
_SCALARS = {"int32": "i4x", "int64": "q", "float32": "f4x", "struct": "Q"}


class _Arguments(threading.local):
    """The argument buffer of one kernel in one thread: autograd launches from its own threads."""

    def __init__(self, count: int) -> None:
        self.values = ctypes.create_string_buffer(8 * count)
        start = ctypes.addressof(self.values)
        self.pointers = (ctypes.c_void_p * count)(*(start + 8 * i for i in range(count)))
        self.address = ctypes.addressof(self.pointers)


class Launch:
    """A kernel with its grid and numbers, made by `Kernel.prepare`: a call writes the pointers only."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        pointers: int,
        numbers: bytes,
    ) -> None:
        self._kernel, self._numbers = kernel, numbers
        self._shape = (*grid, *block)
        self._pack_into = struct.Struct(f"<{pointers}Q{len(numbers)}s").pack_into

    def __call__(self, device: int, *pointers: int) -> None:
        """As `Kernel.launch`, with the values before the numbers."""
        kernel = self._kernel
        arguments = kernel._arguments
        self._pack_into(arguments.values, 0, *pointers, self._numbers)
        kernel._launch(device, self._shape, arguments.address)


class Kernel:
    """One instantiation of a shipped CUDA kernel, compiled on first use per device.

    Args:
        source: file in ``cuda/``.
        name: instantiated name as NVRTC knows it; must be among the source's ``// instantiate:``
            lines, so that CI has compiled it for every architecture.
        parameters: name to type, in the kernel's order. A ``torch.dtype`` is a pointer to a
            contiguous CUDA tensor of that dtype; ``"int32"``, ``"int64"`` and ``"float32"`` are
            Python numbers; ``"struct"`` is passed by value and given to `launch` as its address.
        shared_bytes: dynamic shared memory of a block.

    Raises:
        ArgumentError: the source does not offer ``name``.
    """

    def __init__(
        self,
        source: str,
        name: str,
        parameters: Mapping[str, torch.dtype | str],
        shared_bytes: int = 0,
    ) -> None:
        name = "".join(name.split())
        if name not in instantiations(source):
            raise ArgumentError(f"name={name!r} is not instantiated in cuda/{source}.")
        self.source, self.name = source, name
        self._shared_bytes = shared_bytes
        self._parameters = tuple(parameters.items())
        self._count = len(parameters)
        kinds = list(enumerate(parameters.values()))
        self._tensors = [(i, kind) for i, kind in kinds if isinstance(kind, torch.dtype)]
        self._structs = [i for i, kind in kinds if kind == "struct"]
        self._codes = [_SCALARS[t] if isinstance(t, str) else "Q" for t in parameters.values()]
        self._pack_into = struct.Struct("<" + "".join(self._codes)).pack_into
        self._arguments = _Arguments(self._count)
        self._functions: dict[int, tuple[int, int]] = {}
        self._driver: Any = None  # CuPy's module, imported on first use
        self._modules: list[Any] = []  # a CuPy module unloads its code when it is collected
        self._lock = threading.Lock()

    def __call__(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], *values: Any
    ) -> None:
        """Launches on the current stream of the tensors' device. ``grid`` must not be empty.

        Raises:
            ArgumentError: wrong number of arguments, a tensor on another device, not contiguous.
            ArgumentTypeError: an argument of the wrong type or dtype.
            UnsupportedError: kernels cannot run here; the message says why.
        """
        self._refuse_structs()
        packed = list(values)
        arguments = self._arguments
        try:
            device = values[self._tensors[0][0]].get_device()
            good = device >= 0 and len(values) == self._count
            for i, dtype in self._tensors:
                tensor = values[i]
                good = (
                    good
                    and tensor.dtype is dtype
                    and tensor.get_device() == device
                    and tensor.is_contiguous()
                )
                packed[i] = tensor.data_ptr()
            self._pack_into(arguments.values, 0, *packed)
        except (AttributeError, IndexError, struct.error):
            good = False
        if not good:
            raise self._mistake(values)
        self._launch(device, (*grid, *block), arguments.address)

    def launch(
        self, device: int, grid: tuple[int, int, int], block: tuple[int, int, int], *values: Any
    ) -> None:
        """Launches with values in the kernel's order, pointers as integers (0: null), and checks nothing.

        For ops that have checked their inputs and made their outputs themselves: half the host time.
        """
        arguments = self._arguments
        self._pack_into(arguments.values, 0, *values)
        for i in self._structs:
            arguments.pointers[i] = values[i]
        self._launch(device, (*grid, *block), arguments.address)

    def prepare(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], *numbers: float
    ) -> Launch:
        """`launch` for repeated use with the same numbers, which have to come after all pointers."""
        self._refuse_structs()
        pointers = len(self._tensors)
        packed = struct.pack("<" + "".join(self._codes[pointers:]), *numbers)
        return Launch(self, grid, block, pointers, packed)

    def _refuse_structs(self) -> None:
        if self._structs:
            raise ArgumentError(f"{self.name} takes a struct by value; use Kernel.launch.")

    def _launch(self, device: int, shape: tuple[int, ...], arguments: int) -> None:
        """``shape``: of the grid and of a block."""
        function, context = self._functions.get(device) or self._load(device)
        driver = self._driver
        if driver.ctxGetCurrent() != context:
            if device != torch._C._cuda_getDevice():
                with torch.cuda.device(device):
                    return self._launch(device, shape, arguments)
            # A thread that has made no CUDA call yet, such as autograd's: torch binds it lazily.
            driver.ctxSetCurrent(context)
        stream = torch._C._cuda_getCurrentRawStream(device)
        driver.launchKernel(function, *shape, self._shared_bytes, stream, arguments, 0)

    def _mistake(self, values: tuple[Any, ...]) -> ArgumentError | ArgumentTypeError:
        """The error for arguments that failed the check in `__call__`."""
        if len(values) != self._count:
            names = ", ".join(name for name, _ in self._parameters)
            return ArgumentError(
                f"{self.name} takes {self._count} arguments ({names}), got {len(values)}."
            )
        device = -1
        for (name, kind), value in zip(self._parameters, values, strict=True):
            where = f"{self.name}: {name}"
            if isinstance(kind, str):
                try:
                    struct.pack(_SCALARS[kind], value)
                except struct.error:
                    return ArgumentTypeError(f"{where}={value!r} does not fit {kind}.")
                continue
            if not isinstance(value, torch.Tensor):
                return ArgumentTypeError(f"{where} must be a tensor, got {type(value).__name__}.")
            if value.dtype is not kind:
                return ArgumentTypeError(f"{where} must be {kind}, got {value.dtype}.")
            if value.get_device() < 0:
                return ArgumentError(f"{where} is on {value.device}, move it to a CUDA device.")
            if device >= 0 and value.get_device() != device:
                return ArgumentError(
                    f"{where} is on {value.device}, the arguments before it on cuda:{device}; "
                    "move them to one device."
                )
            device = value.get_device()
            if not value.is_contiguous():
                return ArgumentError(
                    f"{where} of shape {tuple(value.shape)} and strides {value.stride()} is not "
                    f"contiguous; pass {name}.contiguous()."
                )
        return ArgumentError(f"{self.name} needs at least one tensor.")

    def _load(self, device: int) -> tuple[int, int]:
        """Compiles or finds the cubin and loads it; returns the function and its CUDA context."""
        reason = cuda_unavailable_reason()
        if reason is not None:
            raise UnsupportedError(reason)
        import cupy
        from cupy_backends.cuda.api import driver

        with self._lock, torch.cuda.device(device), cupy.cuda.Device(device):
            if device not in self._functions:
                path, lowered = cubin_for(self.source, self.name, architecture(device))
                module = cupy.RawModule(path=str(path))
                function = module.get_function(lowered).kernel.ptr
                own = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
                if self._shared_bytes + own > _SHARED_BYTES:
                    # All there is: another Kernel may share the function and need more.
                    most = (
                        torch.cuda.get_device_properties(device).shared_memory_per_block_optin - own
                    )
                    dynamic = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    driver.funcSetAttribute(function, dynamic, most)
                self._driver = driver
                self._modules.append(module)
                cupy.cuda.runtime.free(0)  # binds the device's context to this thread if none is
                self._functions[device] = (function, driver.ctxGetCurrent())
            return self._functions[device]
