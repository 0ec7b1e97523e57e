"""Two gloo ranks on packed rows: every document once an epoch, equal work for both, and exact resume."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from streams import expected
from test_packed_training import documents
from two_ranks import run_on_two_ranks

SCRIPT = """
import json, os, sys
import torch
from models import tiny_model
from streams import parts
from test_packed_training import documents
from test_parity import arguments
from barqtrain_hf import BarqTrainer, BarqTrainingArguments
from barqtrain_hf.data import PackedDataset, PackedStream, window
window._FIRST_DOCUMENTS, window._DOCUMENTS = 8, 32

class Spy(BarqTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        self.seen.append(parts(inputs))
        return super().training_step(model, inputs, *args, **kwargs)

def train(dataset, folder, resume=None, **options):
    trainer = Spy(
        tiny_model("llama"),
        BarqTrainingArguments(**arguments(
            sys.argv[1] + folder, per_device_train_batch_size=1, gradient_accumulation_steps=4,
            train_sampling_strategy="random", **options)),
        train_dataset=dataset,
    )
    trainer.seen = []
    trainer.train(resume_from_checkpoint=resume and sys.argv[1] + resume)
    logs = [e for e in trainer.state.log_history if "loss" in e]
    everywhere = [None, None]
    torch.distributed.all_gather_object(everywhere, trainer.seen)
    return dict(losses=[[e["loss"], e["grad_norm"]] for e in logs], seen=everywhere)

docs = documents(120)
results = {}
for kind in ("dataset", "stream"):
    def make():
        return PackedDataset(docs, 64) if kind == "dataset" else PackedStream(docs, 64)
    options = dict(max_steps=-1, num_train_epochs=2) if kind == "dataset" else dict(max_steps=8)
    whole = train(make(), "/" + kind, save_strategy="steps", save_steps=1, **options)
    at = 5 if kind == "stream" else len(whole["losses"]) // 2 + 2  # in the second epoch
    resumed = train(make(), "/resumed", f"/{kind}/checkpoint-{at}", **options)
    results[kind] = dict(whole=whole, resumed=resumed, at=at)
if os.environ["RANK"] == "0":
    json.dump(results, open(sys.argv[1] + "/results.json", "w"))
"""


def test_two_ranks(tmp_path: Path) -> None:
    run_on_two_ranks(SCRIPT, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    docs = Counter(expected(documents(120)))
    for kind in ("dataset", "stream"):
        whole, resumed, at = (results[kind][key] for key in ("whole", "resumed", "at"))
        assert resumed["losses"] == whole["losses"], kind
        first, second = whole["seen"]
        assert len(first) == len(second)
        # The last step of an epoch may have fewer batches than four.
        steps, batches = len(whole["losses"]), len(first)
        into = 4 * at if kind == "stream" else batches // 2 + 4 * (at - steps // 2)
        for mine, theirs in zip(resumed["seen"], whole["seen"], strict=True):
            assert mine == theirs[into:], kind
    steps = len(results["dataset"]["whole"]["losses"]) // 2
    first, second = results["dataset"]["whole"]["seen"]
    batches = len(first) // 2
    assert -(-batches // 4) == steps
    for begin in (0, batches):
        rows = first[begin : begin + batches] + second[begin : begin + batches]
        found = Counter(tuple(tuple(part) for part in document) for row in rows for document in row)
        # accelerate fills the last batch up from the beginning if the rows are odd in number.
        assert not docs - found and (found - docs).total() <= 8
    # The four batches of a step take both equally long: attention is quadratic in a document.
    for begin in range(0, batches - 4, 4):
        costs = [
            sum(len(ids) * (len(ids) + 192) for row in seen[begin : begin + 4] for ids, _, _ in row)
            for seen in (first, second)
        ]
        assert abs(costs[0] - costs[1]) < 0.05 * max(costs)
