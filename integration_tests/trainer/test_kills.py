"""Training killed at any moment: the next run is the one that would have been, or begins anew.

``BARQ_KILLS=50`` kills so often instead of a few times, in each of the two ways to train.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("BARQ_KILLS", "2"))

# Imports once, then forks a process for every run: importing takes longer than training. No thread may run
# before a fork, so it computes nothing itself.
_NURSERY = """
import gc, json, os, signal, sys, time
sys.path[:0] = [os.path.join(sys.argv[1], name) for name in ("trainer", "data", "")]
sys.path[:0] = sys.argv[2:]
import torch
from models import tiny_model
from small_tokenizers import small_tokenizer
from test_parity import arguments
from barqtrain_hf import BarqTrainer, BarqTrainingArguments
from barqtrain_hf.data import PackedDataset, PackedStream, tokenize, window
from barqtrain_hf.data import store as stores
from barqtrain_hf.errors import DataError

window._FIRST_DOCUMENTS, window._DOCUMENTS = 8, 32
stores._BYTES_PER_CALL = 2000

def train(kind, folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    texts = [f"text number {number} of some " * (1 + number % 7) for number in range(90)]
    if kind == "stream":
        dataset = PackedStream(texts, 64, tokenizer=tokenizer)
    else:
        store = tokenize(texts, tokenizer, folder + "/tokens")
        dataset = PackedDataset(store, 64, overflow="split")
    model = tiny_model("gpt2", resid_pdrop=0.1)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    args = arguments(
        folder, max_steps=8, gradient_accumulation_steps=2, train_sampling_strategy="random",
        save_strategy="steps", save_steps=1, save_total_limit=4)
    trainer = BarqTrainer(model, BarqTrainingArguments(**args), train_dataset=dataset)
    try:
        trainer.train(resume_from_checkpoint=True)
    except DataError as error:
        assert "No valid checkpoint" in str(error), error
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = [float(p.detach().double().sum()) for p in trainer.model.parameters()]
    with open(folder + "/result", "w") as file:
        json.dump([[entry[key] for entry in logs for key in ("step", "loss", "grad_norm")], weights], file)

gc.collect()
gc.freeze()  # a child would copy what its collector looks at
for line in sys.stdin:
    kind, folder, delay = json.loads(line)
    started = time.monotonic()
    child = os.fork()
    if not child:
        try:
            os.dup2(2, 1)
            train(kind, folder)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - started]), flush=True)
"""


class Nursery:
    """A process that runs trainings in children, and kills them."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _NURSERY, str(TESTS), *filter(None, sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def run(self, kind: str, folder: Path, delay: float | None = None) -> tuple[int, float]:
        """Exit status and seconds of a training, which is killed after ``delay`` seconds."""
        folder.mkdir(exist_ok=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([kind, str(folder), delay]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, self.said
        code, seconds = json.loads(line)
        return code, seconds

    @property
    def said(self) -> str:
        """The end of what the trainings wrote."""
        return self.log.read_text(errors="replace")[-4000:]

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery") / "log")
    yield nursery
    nursery.close()


def whole_checkpoints(folder: Path) -> int:
    return len(list(folder.glob("checkpoint-*/trainer_state.json")))


@pytest.mark.parametrize("kind", ["stream", "store"])
def test_killed_at_any_moment_the_next_run_goes_on_exactly(
    nursery: Nursery, kind: str, tmp_path: Path
) -> None:
    code, seconds = nursery.run(kind, tmp_path / "whole")
    assert code == 0, nursery.said
    whole = json.loads((tmp_path / "whole" / "result").read_text())
    assert whole[0][::3] == list(range(1, 9))
    moments, kills, resumed, attempt = random.Random(0), 0, 0, 0
    while kills < KILLS or not resumed:
        attempt += 1
        assert attempt < 10 * KILLS, f"{kills} kills, {resumed} of them after a checkpoint"
        folder = tmp_path / f"run{attempt}"
        # Killed several times, or not at all if it was faster than that.
        code = -9
        for _ in range(moments.randint(1, min(KILLS, 4))):
            code, _ = nursery.run(kind, folder, moments.uniform(0, 1.1 * seconds))
            assert code in (0, -9), nursery.said
            if code == 0:
                break
            kills += 1
            resumed += whole_checkpoints(folder) > 0
        if code:
            code, _ = nursery.run(kind, folder)
        assert code == 0, nursery.said
        assert json.loads((folder / "result").read_text()) == whole, f"{kind}, {folder.name}"
    print(
        f"{kind}: {kills} kills in {attempt} runs of {seconds:.1f} s, {resumed} kills after a checkpoint"
    )
