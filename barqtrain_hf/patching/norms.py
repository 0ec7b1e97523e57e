"""RMSNorm and LayerNorm modules, found by structure and told apart by what they compute, never by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from barqtrain_hf.errors import BarqError
from barqtrain_hf.ops import layer_norm, rms_norm
from barqtrain_hf.patching import probe, recompute, sharding
from barqtrain_hf.patching.candidate import Answer, Candidate, because
from barqtrain_hf.patching.report import PatchReport
from barqtrain_hf.runtime import cuda_unavailable_reason

OPS = ("rms_norm", "layer_norm")
_EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")
_PLAIN_WEIGHTS = (nn.Parameter, torch.Tensor)
_Options = tuple[tuple[str, Any], ...]
_Norm = tuple[str, _Options]
# What a norm may be, in the order in which it is tried.
_NORMS: tuple[_Norm, ...] = (
    ("rms_norm", ()),  # Llama
    ("rms_norm", (("zero_centered", True),)),  # Gemma
    ("rms_norm", (("round_once", True),)),  # OLMo 2
    ("layer_norm", ()),
    ("layer_norm", (("out_dtype", torch.float32),)),  # F.layer_norm under CUDA's autocast
)
_FUNCTIONS: dict[str, Callable[..., Any]] = {"rms_norm": rms_norm, "layer_norm": layer_norm}
# By the dtypes of input and weight.
_Modes = dict[tuple[torch.dtype, torch.dtype], _Options]
_Calls = Mapping[tuple[torch.dtype, torch.dtype], Callable[..., Any]]
_probed: dict[tuple[Any, ...], _Norm | str] = {}


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """A weight of one dimension, perhaps a bias, an epsilon, no children: a norm that the probe will tell.

    What is only called a norm comes too, with what it lacks.
    """
    for name, module in model.named_modules():
        lack = _lack(module)
        # Which of the two it is, the probe tells; this is for the report, should it be neither.
        called = type(module).__name__.lower()
        op = "layer_norm" if "layernorm" in called or _has_bias(module) else "rms_norm"
        if lack is None:
            yield Candidate(op, name, module, partial(_build, module))
        elif "norm" in called and next(module.children(), None) is None:
            yield Candidate(op, name, module, because(lack))


def _lack(module: nn.Module) -> str | None:
    """What a module would need to be a norm that the ops could take."""
    parameters = dict(module.named_parameters(recurse=False))
    if not parameters:
        return "it has no weight"
    if list(parameters) not in (["weight"], ["weight", "bias"]):
        return f"its parameters are {', '.join(parameters)}, not a weight and perhaps a bias"
    # A weight that ZeRO-3 has partitioned is 1-D whatever it was.
    if any(len(getattr(p, "ds_shape", p.shape)) != 1 for p in parameters.values()):
        return "its weight has more than one dimension"
    if len({p.dtype for p in parameters.values()}) > 1:
        return "its weight and bias differ in dtype"
    if next(module.buffers(), None) is not None:
        return "it has buffers, which a probe might change"
    if next(module.children(), None) is not None or _epsilon_name(module) is None:
        return "it has no epsilon of a known name"
    return None


def _has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


def _build(module: nn.Module, report: PatchReport) -> Answer:
    with sharding.gathered(module.parameters()):
        reason = sharding.missing(module.weight)
        if reason is not None:
            return reason
        found = _matches(module, autocast=False)
        if isinstance(found, str):
            return found
        under_autocast = _matches(module, autocast=True)
        device = module.weight.device.type  # type: ignore[union-attr]
    op, modes = found
    autocast_modes: _Modes = {}
    if not isinstance(under_autocast, str) and under_autocast[0] == op:
        autocast_modes = under_autocast[1]
    # On a GPU, where the model may be moved yet, autocast makes a difference to F.layer_norm and F.rms_norm.
    sensitive = op == "layer_norm" or modes != autocast_modes or device != "cuda"
    calls, autocast_calls = (
        {dtypes: partial(_FUNCTIONS[op], **dict(options)) for dtypes, options in found.items()}
        for found in (modes, autocast_modes)
    )
    forward = _new_forward(op, module, calls, autocast_calls if sensitive else None, device, report)
    return op, forward


def _new_forward(
    op: str,
    module: nn.Module,
    calls: _Calls,
    autocast_calls: _Calls | None,
    device: str,
    report: PatchReport,
) -> Callable[..., Any]:
    epsilon, has_bias = str(_epsilon_name(module)), _has_bias(module)

    # It runs for every norm of every layer: a few attributes are read, and no more.
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        weight = self.weight
        if len(args) == 1 and not kwargs and type(weight) in _PLAIN_WEIGHTS:
            x = args[0]
            if type(x) is torch.Tensor and x.device == weight.device:
                mode = calls
                if autocast_calls is not None:
                    kind = x.device.type
                    if torch.is_autocast_enabled(kind):
                        mode = autocast_calls if kind == device else {}
                call = mode.get((x.dtype, weight.dtype)) if x.shape[-1:] == weight.shape else None
                if call is not None:
                    inputs = (x, weight, self.bias) if has_bias else (x, weight)
                    y = call(*inputs, eps=getattr(self, epsilon))
                    # A hook may write to the output in ways that leave no trace.
                    if recompute.Noted.wanted and y.requires_grad and not self._forward_hooks:
                        recompute.note(y, partial(call, eps=getattr(self, epsilon)), inputs)
                    return y
        report.fall_back(op, _unusual_call(args, kwargs, weight))
        return type(self).forward(self, *args, **kwargs)

    return forward


def _unusual_call(args: tuple[Any, ...], kwargs: dict[str, Any], weight: Any) -> str:
    if kwargs:
        return "called with keyword arguments"
    if len(args) != 1:
        return "called with more than the hidden states"
    x = args[0]
    if type(x) is not torch.Tensor or type(weight) not in _PLAIN_WEIGHTS:
        return f"called with {type(x).__name__} and a weight that is a {type(weight).__name__}"
    if x.device != weight.device:
        return "input and weight are on different devices"
    if x.shape[-1:] != weight.shape:
        return "input and weight differ in size"
    return f"not probed, or not equal, for {x.dtype} and a weight in {weight.dtype}"


def _epsilon_name(module: nn.Module) -> str | None:
    for name in _EPSILON_NAMES:
        if isinstance(module.__dict__.get(name), float):
            return name
    return None


def _matches(module: nn.Module, autocast: bool) -> tuple[str, _Modes] | str:
    """The op, and its options for each pair of dtypes; or why it is not used."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    pairs = [(weight.dtype, weight.dtype)]
    # Under autocast the residual stream may be fp32 while weights are 16-bit, and the other way round.
    pairs += [(dtype, weight.dtype) for dtype in probe.DTYPES]
    if isinstance(weight, DTensor):  # FSDP2 may gather the weight in another dtype
        pairs += [(dtype, dtype) for dtype in probe.DTYPES]
    modes: _Modes = {}
    found = ""
    for dtypes in dict.fromkeys(pairs):
        answer = _cached_probe(module, *dtypes, autocast)
        if isinstance(answer, str):
            if not modes:
                return answer  # not even in its own dtype
            continue
        op, options = answer
        found = found or op
        if op == found:
            modes[dtypes] = options
    return found, modes


def _cached_probe(
    module: nn.Module, dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool
) -> _Norm | str:
    """The probe's answer, found once per class and dtypes: a model has one kind of norm many times."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    dtypes = (dtype, weight_dtype, autocast)
    key = (probe.kind_of(module), _has_bias(module), weight.shape, weight.device, *dtypes)
    return probe.recall(
        _probed, key, lambda generator: _probe(module, generator, *dtypes), weight.device
    )


def _probe(
    module: nn.Module,
    generator: torch.Generator,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    autocast: bool,
) -> _Norm | str:
    """Which norm the module is in these dtypes, or why it is none of ours; raises what its forward raises."""
    stock_parameters = dict(module._parameters)
    device, size = generator.device, len(module.weight)  # type: ignore[arg-type]
    # Three dimensions, of which no other is as long as the last: GroupNorm(1, size) norms others too.
    rows = max(3, probe.ELEMENTS // (2 * size))
    shape = (2, rows + (rows == size), size)
    # A mean that is not zero tells the two kinds apart.
    x = 0.5 + torch.randn(shape, generator=generator, device=device)
    epsilon = getattr(module, str(_epsilon_name(module)))
    if epsilon > 0:
        x[:, ::2] *= epsilon**0.5  # rows so small that epsilon, and where it is added, shows
    x = x.to(dtype).requires_grad_()
    parameters = [
        nn.Parameter(torch.randn(size, generator=generator, device=device).to(weight_dtype))
        for parameter in stock_parameters.values()
        if parameter is not None
    ]
    names = [name for name, parameter in stock_parameters.items() if parameter is not None]
    module._parameters.update(zip(names, parameters, strict=True))
    inputs = (x, *parameters)
    try:
        with torch.autocast(device.type, enabled=autocast):
            stock = type(module).forward(module, x)
        if not isinstance(stock, torch.Tensor) or stock.shape != x.shape:
            return "its forward does not return one tensor of the input's shape"
        upstream = torch.randn(shape, generator=generator, device=device).to(stock.dtype)
        stock_grads = torch.autograd.grad(stock, inputs, upstream)
    finally:
        module._parameters.update(stock_parameters)
    coarsest = dtype if dtype is not torch.float32 else weight_dtype
    has_kernel = device.type == "cuda" and cuda_unavailable_reason() is None
    kernel = "cuda" if has_kernel else "torch"
    reasons: list[tuple[bool, float, str]] = []  # the nearest norm's is given
    for op, options in _NORMS:
        if op == "rms_norm" and len(parameters) > 1:
            continue
        run = partial(_FUNCTIONS[op], x, *parameters, eps=epsilon, **dict(options))
        try:
            # In PyTorch first: most norms tried are the wrong one, for which no kernel need be compiled.
            ours = run(backend="torch")
            reason = probe.same_rounding(ours, stock, coarsest)
            if reason is None:
                # The kernel itself, also where inputs as small as these would not take it.
                ours = run(backend=kernel)
                grads = torch.autograd.grad(ours, inputs, upstream)
                chosen = run()
                chosen_grads = torch.autograd.grad(chosen, inputs, upstream)
                reason = probe.same_rounding(ours, stock, coarsest)
                reason = reason or probe.close(chosen, stock, coarsest)
                if reason is None and chosen.dtype is not stock.dtype:
                    reason = f"gives {stock.dtype}, not {chosen.dtype}"
        except RuntimeError as error:
            raise BarqError(str(error)) from error
        if reason is None:
            gradients = [f"gradient of {name}" for name in ("x", *names)]
            for found in (grads, chosen_grads):
                reason = reason or probe.first_difference(gradients, found, stock_grads, coarsest)
            if reason is None or _no_less_accurate(
                module, names, inputs, upstream, grads, stock_grads
            ):
                return op, options
        distance = (ours.double() - stock.double()).norm().item()
        reasons.append((ours.dtype is not stock.dtype, distance, reason))
    return f"{type(module).__name__} is another kind of norm: {min(reasons)[2]}"


def _no_less_accurate(
    module: nn.Module,
    names: list[str],
    inputs: probe.Tensors,
    upstream: torch.Tensor,
    grads: probe.Tensors,
    stock_grads: probe.Tensors,
) -> bool:
    """Whether gradients that are not close are ours to the better: on a CPU PyTorch's layer_norm sums the
    gradient of a 16-bit weight in 16 bits.
    """
    stock_parameters = dict(module._parameters)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    module._parameters.update(zip(names, map(nn.Parameter, wide[1:]), strict=True))
    try:
        leaves = [wide[0], *(module._parameters[name] for name in names)]
        oracle = torch.autograd.grad(
            type(module).forward(module, wide[0]), leaves, upstream.double()
        )
    except Exception:  # it has no fp64, so nothing is known
        return False
    finally:
        module._parameters.update(stock_parameters)
    labels = ["x", *names]
    return probe.first_inaccuracy(labels, grads, stock_grads, oracle) is None
