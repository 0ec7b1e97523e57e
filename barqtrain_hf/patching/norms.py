"""RMSNorm modules, found by structure and told apart by what they compute, never by class name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from barqtrain_hf.errors import BarqError
from barqtrain_hf.ops.rms_norm import rms_norm
from barqtrain_hf.patching import probe, sharding
from barqtrain_hf.patching.report import PatchReport

OP = "rms_norm"
_EPSILON_NAMES = ("variance_epsilon", "eps")
_probed: dict[tuple[Any, ...], bool | str] = {}


def is_candidate(module: nn.Module) -> bool:
    """One 1-D weight and an epsilon, no children: a norm of some kind, which the probe will tell."""
    parameters = dict(module.named_parameters(recurse=False))
    return (
        list(parameters) == ["weight"]
        # A weight that ZeRO-3 has partitioned is 1-D whatever it was.
        and len(getattr(parameters["weight"], "ds_shape", parameters["weight"].shape)) == 1
        and next(module.children(), None) is None
        and _epsilon_name(module) is not None
    )


def new_forward(module: nn.Module, report: PatchReport) -> Callable[..., Any] | str:
    """The forward to bind, or the reason why there is none."""
    weight = module.weight
    reason = sharding.missing(weight)
    if reason is not None or not isinstance(weight, torch.Tensor):
        return str(reason)
    epsilon = _epsilon_name(module)
    assert epsilon is not None
    # Under autocast the residual stream may be fp32 while weights are 16-bit, and the other way round.
    dtypes = dict.fromkeys((weight.dtype, torch.float32, torch.bfloat16, torch.float16))
    modes: dict[torch.dtype, bool] = {}
    reason = ""
    for dtype in dtypes:
        result = _mode(module, dtype)
        if isinstance(result, str):
            reason = reason or result
        else:
            modes[dtype] = result
    if weight.dtype not in modes:
        return reason

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        unusual = _unusual_call(self, args, kwargs, modes)
        if unusual is not None:
            report.fall_back(OP, unusual)
            return type(self).forward(self, *args, **kwargs)
        x = args[0]
        return rms_norm(x, self.weight, getattr(self, epsilon), zero_centered=modes[x.dtype])

    return forward


def _unusual_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], modes: dict[torch.dtype, bool]
) -> str | None:
    if kwargs or len(args) != 1:
        return "called with more than the hidden states"
    x, weight = args[0], module.weight
    if type(x) is not torch.Tensor or type(weight) not in (nn.Parameter, torch.Tensor):
        return f"called with {type(x).__name__} and a weight that is a {type(weight).__name__}"
    if x.dtype not in modes:
        return f"not probed, or not equal, for {x.dtype}"
    if x.device != weight.device:
        return "input and weight are on different devices"
    return None


def _epsilon_name(module: nn.Module) -> str | None:
    for name in _EPSILON_NAMES:
        if isinstance(getattr(module, name, None), float):
            return name
    return None


def _mode(module: nn.Module, dtype: torch.dtype) -> bool | str:
    """The probe's answer, found once per class and dtypes: a model has one kind of norm many times."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    # Instances of one class may differ by a flag: every plain attribute is part of the question.
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
    plain.pop("training", None)
    flags = tuple(sorted(plain.items()))
    key = (type(module), flags, weight.shape, weight.dtype, weight.device, dtype)
    if key not in _probed:
        _probed[key] = _probe(module, dtype)
    return _probed[key]


@torch.enable_grad()
def _probe(module: nn.Module, dtype: torch.dtype) -> bool | str:
    """Whether the module is zero-centred, or why it is no RMSNorm of ours, for inputs of ``dtype``."""
    stock_weight = module.weight
    device = stock_weight.device
    # A generator of its own: the user's random state must not depend on us.
    generator = torch.Generator(device).manual_seed(0)
    # Enough elements that the few on a rounding boundary stay few.
    shape = (max(3, 4096 // len(stock_weight)), len(stock_weight))
    x = torch.randn(shape, generator=generator, device=device)
    epsilon = getattr(module, str(_epsilon_name(module)))
    if epsilon > 0:
        x[::2] *= epsilon**0.5  # rows so small that epsilon, and where it is added, shows
    x = x.to(dtype).requires_grad_()
    weight = torch.randn(shape[1:], generator=generator, device=device).to(stock_weight.dtype)
    weight = nn.Parameter(weight)
    module._parameters["weight"] = weight
    try:
        stock = type(module).forward(module, x)
        if not isinstance(stock, torch.Tensor) or stock.shape != x.shape:
            return "its forward does not return one tensor of the input's shape"
        upstream = torch.randn(shape, generator=generator, device=device).to(stock.dtype)
        stock_grads = torch.autograd.grad(stock, (x, weight), upstream)
    except Exception as error:  # whatever a foreign forward raises, the op is not for it
        return f"its stock forward fails on the probe: {type(error).__name__}: {error}"
    finally:
        module._parameters["weight"] = stock_weight  # type: ignore[assignment]
    coarsest = dtype if dtype is not torch.float32 else stock_weight.dtype
    reason: str | None = None
    for zero_centered in (False, True):
        try:
            ours = rms_norm(x, weight, epsilon, zero_centered=zero_centered)
            grads = torch.autograd.grad(ours, (x, weight), upstream.to(ours.dtype))
        except (BarqError, RuntimeError) as error:  # a dtype without kernel, a failed compilation
            return f"the op fails on the probe: {error}"
        reason = probe.same_rounding(ours, stock, coarsest)
        if reason is None:
            names = ("gradient of x", "gradient of weight")
            reason = probe.first_difference(names, grads, stock_grads, coarsest)
            if reason is None:
                return zero_centered
    return f"{type(module).__name__} is another kind of norm: {reason}"
