"""What the user can set: `BarqConfig`, and the two flags of `BarqTrainingArguments`."""

from __future__ import annotations

import difflib
import reprlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, UnsupportedError


@dataclass(frozen=True, kw_only=True)
class BarqConfig:
    """Which ops are put into a model, and how much memory they may use.

    Attributes:
        rms_norm: replace the forward of RMSNorm modules.
        layer_norm: replace the forward of LayerNorm modules.
        glu: replace the forward of gated MLPs, of the gate of experts and of GELU modules.
        rope: replace the rotary embedding of queries and keys in attention modules.
        attention: replace sdpa, or a model's own attention where it has no sdpa, and turn queries and keys
            inside with ``rope``. Models on a device without our kernels, or loaded with another
            ``attn_implementation``, keep theirs; ``attn_implementation="barq"`` asks for it anywhere.
        lora: replace the forward of PEFT's LoRA around linear layers. Its products are then in the layer's
            dtype (or autocast's), where PEFT computes in the adapter's, fp32 by default.
        linear_cross_entropy: compute the loss in the LM head, without holding all logits.
        packing: `BarqSFTTrainer` packs by `PackedDataset` where SFTTrainer would pack best-fit.
        max_extra_bytes: memory for logits and their gradient in the fused loss; None for the op's
            default, which depends on the shapes and the GPU's free memory (see `linear_cross_entropy`).
    """

    rms_norm: bool = True
    layer_norm: bool = True
    glu: bool = True
    rope: bool = True
    attention: bool = True
    lora: bool = True
    linear_cross_entropy: bool = True
    packing: bool = True
    max_extra_bytes: int | None = None

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(option.default, bool) and not isinstance(value, bool):
                raise ArgumentTypeError(
                    f"barq_config: {option.name}={value!r} must be true or false."
                )
        extra = self.max_extra_bytes
        if extra is not None and (type(extra) is not int or extra <= 0):
            raise ArgumentError(
                f"barq_config: max_extra_bytes={extra!r} must be a positive integer."
            )

    @classmethod
    def load(cls, value: BarqConfig | dict[str, Any] | str | None) -> BarqConfig:
        """From a config, a dict, a JSON or YAML text, the path of such a file, or None for defaults.

        Raises:
            ArgumentError: an unknown key, with the nearest valid name.
            ArgumentTypeError: not one of these, or a value of the wrong type.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            is_file = Path(value).suffix in (".json", ".yaml", ".yml")
            try:
                text = Path(value).read_text(encoding="utf-8") if is_file else value
                value = yaml.safe_load(text)
            except (OSError, yaml.YAMLError) as error:
                raise ArgumentError(f"barq_config={value!r} cannot be read: {error}") from None
        if value is None:
            return cls()
        if not isinstance(value, dict):
            raise ArgumentTypeError(
                f"barq_config={reprlib.repr(value)} must be a dict, a JSON object, or the path of a "
                "JSON or YAML file that holds one."
            )
        names = [f.name for f in fields(cls)]
        for key in value:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(names)}."
                raise ArgumentError(f"barq_config: unknown key {key!r}; {hint}")
        return cls(**value)


@dataclass
class BarqTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the two flags of barqtrain_hf; everything else is unchanged."""

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "barq_config"]  # noqa: RUF012

    use_barq_kernels: bool = field(
        default=True, metadata={"help": "Put barqtrain_hf's ops into the model while it trains."}
    )
    barq_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of BarqConfig: a JSON object, or the path of a JSON or YAML file."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        BarqConfig.load(self.barq_config)  # a mistake is an error now, not at the first step


def check_liger(args: TrainingArguments | None, config: BarqConfig) -> None:
    """Refuses two losses in the LM head, where arguments ask for both.

    Raises:
        UnsupportedError: Liger's fused cross-entropy and ours.
    """
    liger = getattr(args, "liger_kernel_config", None) or {}
    if (
        getattr(args, "use_liger_kernel", False)
        and config.linear_cross_entropy
        and liger.get("fused_linear_cross_entropy", True)
    ):
        raise UnsupportedError(
            "use_liger_kernel=True installs Liger's fused cross-entropy, which would replace ours.",
            'Drop it, or pass liger_kernel_config={"fused_linear_cross_entropy": False}.',
        )
