"""FSDP2 on two gloo ranks: the fused loss and the norms give the gradients of one model on all data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from two_ranks import run_on_two_ranks

SCRIPT = """
import json, os
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from models import tiny_model
from test_parity import Rows
from barqtrain_hf import patch_model, unpatch_model
from barqtrain_hf.patching import FusedLoss

dist.init_process_group("gloo")
rank = dist.get_rank()
rows = Rows(8, seed=1).rows
keys = ("input_ids", "labels", "attention_mask")
everything = {k: torch.stack([row[k] for row in rows[:4]]) for k in keys}
mine = {k: v[2 * rank : 2 * rank + 2] for k, v in everything.items()}
# 4097 is not a bf16 number: a policy that casts inputs must not reach it.
count = torch.tensor(4097.0)

stock = tiny_model("llama")
stock(**everything, num_items_in_batch=count).loss.backward()
expected = {k: p.grad for k, p in stock.named_parameters()}

results = {}
for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
    model = tiny_model("llama")
    patch_model(model, leaves=False)  # as BarqTrainer does, before accelerate wraps the model
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard([model.model.norm, model.lm_head], mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mp_policy=policy)
    report = patch_model(model, fused_head=False)  # and as its callback does, after
    loss = model(**mine, fused_loss=FusedLoss(num_items=count)).loss * 2  # FSDP averages over ranks
    loss.backward()
    errors = {}
    for key, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor()
        errors[key] = float((gradient - expected[key]).norm() / expected[key].norm())
    unpatch_model(model)
    results[name] = {
        "errors": errors,
        "fallbacks": [list(key) for key in report.fallbacks],
        "installed": sorted(report.installed),
        "left": [k for k, m in model.named_modules() if "forward" in m.__dict__],
    }
if rank == 0:
    json.dump(results, open(sys.argv[1] + "/results.json", "w"))
dist.destroy_process_group()
"""


def test_gradients_are_those_of_one_model(tmp_path: Path) -> None:
    run_on_two_ranks(SCRIPT, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    for name, tolerance in (("fp32", 1e-5), ("bf16", 4e-2)):
        result = results[name]
        assert result["installed"] == ["glu", "linear_cross_entropy", "rms_norm", "rope"]
        assert result["fallbacks"] == [] and result["left"] == []
        assert len(result["errors"]) > 10
        for key, error in result["errors"].items():
            assert error == pytest.approx(0.0, abs=tolerance), key
