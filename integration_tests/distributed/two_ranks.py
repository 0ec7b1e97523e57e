"""Runs a script on two gloo ranks of this machine."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from torch.distributed import TCPStore

TESTS = Path(__file__).resolve().parents[1]

# Imports once, then forks two ranks for every script: importing takes longer than most of them. No thread may
# run before a fork, so it computes nothing itself.
_NURSERY = """
import gc, json, os, runpy, signal, sys, traceback
sys.path[:0] = json.loads(sys.argv[1])
import torch, torch.distributed.fsdp
import models, test_parity
from barqtrain_hf import BarqTrainer

def be_rank(rank, path, folder, environment):
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/rank{rank}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    signal.alarm(400)
    torch.set_num_threads(1)  # two ranks share two cores
    sys.argv = [path, folder]
    runpy.run_path(path, run_name="__main__")
    sys.stdout.flush()

gc.collect()
gc.freeze()  # a child would copy what its collector looks at
for line in sys.stdin:
    ranks, codes = [], []
    for rank in range(2):
        ranks.append(os.fork())
        if not ranks[-1]:
            code = 1
            try:
                be_rank(rank, *json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                # A thread of gloo may give back the last tensor while the interpreter ends, which aborts.
                os._exit(code)
    while ranks:
        ended, status = os.wait()
        ranks.remove(ended)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1]:  # the other would wait for this one
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
    print(json.dumps(codes), flush=True)
gc.unfreeze()  # extensions complain at exit of what was never collected
"""


@functools.cache
def _nursery() -> subprocess.Popen[str]:
    """The process that forks ranks; it ends with this one, which closes its input."""
    paths = [str(TESTS / name) for name in ("", "trainer", "data", "distributed")]
    return subprocess.Popen(
        [sys.executable, "-c", _NURSERY, json.dumps(paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=TESTS.parent,
        # fully_shard would put its shards on a GPU that it sees, out of gloo's reach.
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def run_on_two_ranks(script: str, folder: Path) -> str:
    """Runs ``script`` with ``folder`` as its argument; returns what it printed."""
    path = folder / "script.py"
    path.write_text("import sys\nimport torch\n" + script)
    # The ranks meet where torchrun lets its own meet: on a free port that is taken before they start.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    nursery = _nursery()
    assert nursery.stdin is not None and nursery.stdout is not None
    print(json.dumps([str(path), str(folder), environment]), file=nursery.stdin, flush=True)
    codes = json.loads(nursery.stdout.readline())
    assert codes == [0, 0], "".join(
        f"rank {rank}: " + (folder / f"rank{rank}.err").read_text()[-4000:] for rank in range(2)
    )
    return "".join((folder / f"rank{rank}.out").read_text() for rank in range(2))
