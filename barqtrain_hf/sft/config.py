"""`SFTConfig` with the two flags of barqtrain_hf."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig

from barqtrain_hf.config import BarqConfig


@dataclass
class BarqSFTConfig(SFTConfig):
    """`SFTConfig` with the two flags of barqtrain_hf; everything else is unchanged.

    Raises:
        ArgumentError: ``barq_config`` has an unknown key, cannot be read, or has an impossible value.
        ArgumentTypeError: it is no dict, JSON object or path, or a value has the wrong type.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "barq_config"]  # noqa: RUF012

    use_barq_kernels: bool = field(
        default=True,
        metadata={"help": "Train with barqtrain_hf's ops, loss and packing."},
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


def sft_arguments(args: Any) -> Any:
    """What SFTTrainer takes: plain `TrainingArguments` with our flags become a `BarqSFTConfig`.

    It turns others into an `SFTConfig` itself, which has no room for the flags.
    """
    if isinstance(args, TrainingArguments) and not isinstance(args, SFTConfig):
        options = {**args.to_dict(), "hub_token": args.hub_token}  # to_dict hides it
        return BarqSFTConfig(**options)
    return args
