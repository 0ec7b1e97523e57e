"""Which ops `patch_model` puts into a model, found out without its weights.

The model is built from its config on the meta device: every layer, every size, no memory. For `patch_model`
it then gets weights that answer its questions and cost next to nothing: those of norms and of the LM head are
random numbers, every other is one number in the shape of the whole. Only the vocabulary is cut.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.patching import PatchReport, patch_model, unpatch_model

# Numbers in a head that is made whole. Of a larger one the vocabulary is cut, which is enough to tell a
# softcap or a scale; it can take gigabytes.
HEAD_NUMBERS = 2**26
VOCABULARY = 1024
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, and what is said about it."""

    path: str
    model: nn.Module
    dtype: torch.dtype
    vocabulary: int
    notes: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        config = self.model.config  # type: ignore[union-attr]
        return {
            "path": self.path,
            "model_type": config.model_type,
            "class": type(self.model).__name__,
            "layers": getattr(config.get_text_config(), "num_hidden_layers", None),  # type: ignore[operator, union-attr]
            "dtype": str(self.dtype).removeprefix("torch."),
            "vocabulary": self.vocabulary,
            "notes": list(self.notes),
        }


def load(path: str) -> Skeleton:
    """Reads the config and builds the model without weights.

    Args:
        path: a folder with a ``config.json``, such a file, or a name on the hub.

    Raises:
        ArgumentError: there is none, or transformers cannot build a model from it.
    """
    transformers.logging.set_verbosity_error()  # what matters is said here
    config = _config(path)
    notes = []
    if getattr(config, "quantization_config", None) is not None:
        notes.append(
            "The checkpoint is quantized; its linear layers are examined as plain ones, which "
            "changes nothing but the LM head, should that be quantized too."
        )
    try:
        text = config.get_text_config()
        vocabulary = _cut_vocabulary(text)
        dtype = _dtype(config, text)
        model = _build(config, dtype)
    except Exception as error:  # a config may be wrong in any way
        raise ArgumentError(
            f"--model {path}: transformers {transformers.__version__} cannot build a "
            f"{config.model_type} model from this config: {_first_line(error)}"
        ) from None
    return Skeleton(path, model, dtype, vocabulary, tuple(notes))


def examine(skeleton: Skeleton, device: torch.device) -> tuple[dict[str, Any], str]:
    """Patches the model on a device.

    Returns:
        What was installed and what was not as plain data, and what went wrong, or "".
    """
    model = skeleton.model
    found: dict[str, Any] = skeleton.describe()
    try:
        materialise(model, device)
        report = patch_model(model)
    except Exception as error:  # patch_model reports what does not fit: raising is its failure
        return {**found, "installed": [], "skipped": []}, (
            f"patch_model fails on {skeleton.path}: {type(error).__name__}: {_first_line(error)}"
        )
    unpatch_model(model)
    return {**found, **_plain(report)}, ""


def materialise(model: nn.Module, device: torch.device) -> None:
    """Gives a model on the meta device weights that can be probed; ties stay."""
    generator = torch.Generator(device).manual_seed(0)
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    whole = {id(p) for p in head.parameters()} if head is not None else set()
    made: dict[int, nn.Parameter] = {}

    def weight(stock: nn.Parameter) -> nn.Parameter:
        is_whole = stock.dim() < 2 or id(stock) in whole
        shape = stock.shape if is_whole else (1,) * stock.dim()
        numbers = torch.randn(shape, generator=generator, device=device) * 0.02
        return nn.Parameter(numbers.to(stock.dtype).expand(stock.shape), stock.requires_grad)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = weight(parameter)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                zero = torch.zeros((), dtype=buffer.dtype, device=device)
                module._buffers[name] = zero.expand(buffer.shape)


def patterns(names: Iterable[str]) -> list[str]:
    """Module names with the layers' numbers taken out, and how many each stands for."""
    counts = Counter(
        ".".join("*" if part.isdigit() else part for part in name.split(".")) or "the model"
        for name in names
    )
    return [f"{pattern} ×{count}" if count > 1 else pattern for pattern, count in counts.items()]


def _plain(report: PatchReport) -> dict[str, Any]:
    return {
        "installed": [
            {"op": op, "modules": len(names), "where": patterns(names)}
            for op, names in report.installed.items()
        ],
        "skipped": [
            {"op": op, "reason": reason, "modules": len(names), "where": patterns(names)}
            for (op, reason), names in report.skipped.items()
        ],
        "patch_notes": list(report.notes),
    }


def _config(path: str) -> Any:
    place = Path(path).expanduser()
    if place.is_dir():
        file = place / "config.json"
        if not file.is_file():
            raise ArgumentError(f"--model {path}: {_instead_of_config(place)}")
    elif place.is_file():
        file = place
    elif _HUB_NAME.fullmatch(path):
        return _read(
            path,
            path,
            "it is neither a file nor a folder here, and no config of that name came from the hub",
        )
    else:
        raise ArgumentError(f"--model {path}: there is no such file or folder.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--model {path}: {file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise ArgumentError(
            f"--model {path}: {file} names no model_type; pass the config.json of a transformers model."
        )
    problem = f"transformers {transformers.__version__} cannot read {file}"
    if content["model_type"] not in transformers.CONFIG_MAPPING:
        raise ArgumentError(
            f"--model {path}: transformers {transformers.__version__} has no model_type "
            f"{content['model_type']!r}; upgrade transformers if a later one has. A model's own code is "
            "not run."
        )
    return _read(path, str(file), problem)


def _read(path: str, source: str, problem: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the hub, the network and the config each have errors of their own
        raise ArgumentError(f"--model {path}: {problem}: {_first_line(error)}") from None


def _cut_vocabulary(text: Any) -> int:
    """Cuts it where the head would be large, and returns what it was."""
    vocabulary = int(getattr(text, "vocab_size", None) or 0)
    if vocabulary * int(getattr(text, "hidden_size", None) or 0) > HEAD_NUMBERS:
        text.vocab_size = VOCABULARY
        for name, value in vars(text).items():
            # An embedding refuses a padding token outside of it.
            if name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
                setattr(text, name, 0)
    return vocabulary


def _instead_of_config(folder: Path) -> str:
    """What to pass instead of a folder without config.json."""
    try:
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = adapter["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return "there is no config.json in this folder; pass the folder of a transformers model."
    return f"it is an adapter; pass its base model, --model {base}."


def _dtype(config: Any, text: Any) -> torch.dtype:
    """What `from_pretrained` loads it in."""
    for each in (config, text):
        dtype = getattr(each, "dtype", None)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
    return torch.float32


def _build(config: Any, dtype: torch.dtype) -> nn.Module:
    """The class that the checkpoint was saved from, else a causal language model."""
    names = getattr(config, "architectures", None) or []
    saved_as = getattr(transformers, str(names[0]), None) if names else None
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            if isinstance(saved_as, type) and issubclass(saved_as, transformers.PreTrainedModel):
                return saved_as(config)
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    finally:
        torch.set_default_dtype(default)


def _first_line(error: Exception) -> str:
    return f"{error}".strip().partition("\n")[0] or type(error).__name__
