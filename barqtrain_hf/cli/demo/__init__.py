"""``barqtrain demo``: see what the package does, on this machine, in a few minutes.

The parts, in the order in which a run meets them: `tasks` or `own_data` give text, `tokenizer` turns
it into tokens, `workload` holds the two splits, `scale` picks sizes for the device, `training` runs
`BarqTrainer` and `Trainer`, `evaluate` measures, `report` and `plot` show; `run` ties them together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Parses the options and runs the demo; returns the exit code."""
    # One GPU is what the demo is about; seeing more, Trainer would use nn.DataParallel. This has to
    # be said before torch counts them, hence also the late import.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

    from barqtrain_hf.cli.demo.arguments import parse
    from barqtrain_hf.cli.demo.run import run

    return run(parse(argv), argv)
