"""Everything barqtrain_hf raises on purpose.

Each error is also a ``ValueError``, ``TypeError`` or ``RuntimeError``, so code that already guards a
stock ``Trainer`` keeps working. Messages name the argument, the value and the fix.
"""

from __future__ import annotations


class BarqError(Exception):
    """Base of all errors raised by barqtrain_hf."""


class UnsupportedError(BarqError, RuntimeError):
    """Something that cannot be done here: a missing package, an unsupported model or setting.

    Args:
        reason: what cannot be done, and why.
        hint: what to change so that it can.
    """

    def __init__(self, reason: str, hint: str = "") -> None:
        self.reason = reason
        self.hint = hint
        super().__init__(f"{reason} {hint}".strip())


class KernelBuildError(BarqError, RuntimeError):
    """NVRTC refused a kernel; ``log`` holds the compiler's output."""

    def __init__(self, message: str, log: str = "") -> None:
        self.log = log
        super().__init__(f"{message}\n{log}".strip())


class ArgumentError(BarqError, ValueError):
    """An argument with a value that cannot be right."""


class ArgumentTypeError(BarqError, TypeError):
    """An argument of the wrong type or dtype."""


class DataError(BarqError, ValueError):
    """Data that cannot be trained on as it is: empty, unlabelled, too long, out of range."""


class StorageError(BarqError, RuntimeError):
    """A file that cannot be read or written: no space, no permission, a broken disk."""
