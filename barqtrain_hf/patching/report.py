"""What was put into a model, what was not, and why."""

from __future__ import annotations

from collections import Counter


class PatchReport:
    """Result of `patch_model`; print it to read it.

    Attributes:
        installed: op to the names of the modules that use it.
        skipped: (op, reason) to the names of the modules that keep their stock forward.
        fallbacks: (op, reason) to how many calls took the stock forward although installed.
        unused: op to the reason why nobody asks for it, although installed.
        notes: what holds for all ops, such as why no CUDA kernel can run.
    """

    def __init__(self) -> None:
        self.installed: dict[str, list[str]] = {}
        self.skipped: dict[tuple[str, str], list[str]] = {}
        self.fallbacks: Counter[tuple[str, str]] = Counter()
        self.unused: dict[str, str] = {}
        self.notes: list[str] = []

    def add(self, op: str, module: str) -> None:
        """Records that ``module`` now uses ``op``."""
        self.installed.setdefault(op, []).append(module)

    def skip(self, op: str, module: str, reason: str) -> None:
        """Records that ``module`` keeps its stock forward."""
        self.skipped.setdefault((op, reason), []).append(module)

    def forget(self, op: str) -> None:
        """Drops what was installed and skipped of ``op``, which is being installed again."""
        self.installed.pop(op, None)
        self.skipped = {key: modules for key, modules in self.skipped.items() if key[0] != op}

    def fall_back(self, op: str, reason: str) -> None:
        """Records one call that took the stock forward."""
        self.fallbacks[op, reason] += 1

    def __repr__(self) -> str:
        parts = [f"{op} ×{len(modules)}" for op, modules in self.installed.items()]
        text = f"installed: {', '.join(parts) or 'nothing'}"
        if self.skipped:
            text += f"; not everywhere: {', '.join(dict.fromkeys(op for op, _ in self.skipped))}"
        if self.fallbacks:
            text += f"; {self.fallbacks.total():,} calls took the stock forward"
        return f"<PatchReport {text}; print it for the reasons>"

    def __str__(self) -> str:
        lines = ["barqtrain_hf:", *(f"  {note}" for note in self.notes)]
        for op, modules in self.installed.items():
            reason = self.unused.get(op)
            how = f", but not used: {reason}" if reason else ""
            lines.append(f"  {op}: installed in {_count(modules)}{how}")
        for (op, reason), modules in self.skipped.items():
            lines.append(f"  {op}: not in {_count(modules)}: {reason}")
        for (op, reason), calls in self.fallbacks.items():
            lines.append(f"  {op}: {calls} calls took the stock forward: {reason}")
        if not (self.installed or self.skipped or self.fallbacks):
            lines.append("  nothing to install")
        return "\n".join(lines)


def _count(modules: list[str]) -> str:
    if len(modules) == 1:
        return modules[0] or "the model"
    return f"{len(modules)} modules ({modules[0]}, …, {modules[-1]})"
