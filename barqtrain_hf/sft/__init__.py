"""TRL's SFTTrainer with our kernels, loss and packing; the only part that imports trl."""

from importlib.metadata import version

from packaging.version import Version

from barqtrain_hf.errors import UnsupportedError

_OLDEST = "1.16"  # the first whose trainers have the fused head that ours answers for

try:
    import trl  # noqa: F401
except ImportError as error:
    raise UnsupportedError(
        f"BarqSFTTrainer and BarqSFTConfig need TRL ({error}).",
        "pip install 'barqtrain_hf[sft]'",
    ) from None
if Version(version("trl")) < Version(_OLDEST):
    raise UnsupportedError(
        f"BarqSFTTrainer and BarqSFTConfig need TRL {_OLDEST} or later, and {version('trl')} is installed.",
        "pip install --upgrade 'barqtrain_hf[sft]'",
    )

from barqtrain_hf.sft.config import BarqSFTConfig  # noqa: E402
from barqtrain_hf.sft.trainer import BarqSFTTrainer  # noqa: E402

__all__ = ["BarqSFTConfig", "BarqSFTTrainer"]
