"""Runs a script on two gloo ranks of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

# The tests' own modules can be imported; two ranks share two cores.
_PROLOGUE = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/trainer", {tests!r} + "/data"]
import torch
torch.set_num_threads(1)
"""
# A thread of gloo may give back the last tensor while the interpreter ends, which aborts the process.
_EPILOGUE = """
import os
sys.stdout.flush()
os._exit(0)
"""


def run_on_two_ranks(script: str, folder: Path) -> str:
    """Runs ``script`` with ``folder`` as its argument; returns what it printed."""
    path = folder / "script.py"
    path.write_text(_PROLOGUE.format(tests=str(TESTS)) + script + _EPILOGUE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [*launch, str(path), str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=TESTS.parent,
        # fully_shard would put its shards on a GPU that it sees, out of gloo's reach.
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout
