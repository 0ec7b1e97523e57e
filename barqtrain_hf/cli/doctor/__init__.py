"""``barqtrain doctor``: what runs on this machine, how well, and what would be put into a model.

The parts, in the order in which a run meets them: `arguments`; `model` reads a config and builds the model
without its weights; `environment` describes the machine; `kernels` compiles without a GPU; `cases` lists the
ops, `checks` judges each beside stock PyTorch; `report` prints; `run` ties them together.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Parses the options and examines this machine; returns the exit code."""
    from barqtrain_hf.cli.doctor.arguments import parse
    from barqtrain_hf.cli.doctor.run import run

    return run(parse(argv), argv)
