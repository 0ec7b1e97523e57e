"""BarqTrainer in accelerate's FSDP2 on two gloo ranks: the losses and gradients of one plain model.

Under PEFT accelerate shards the head as a group of its own, and a loss that gathers its weight instead
of calling it as a module gives it a gradient that was never reduced over the ranks.
"""

from __future__ import annotations

from pathlib import Path

import one_model
import pytest

SCRIPT = """
from accelerate import PartialState
from accelerate.utils import DistributedType
from one_model import build, compare, expectation, options, save
from barqtrain_hf import BarqTrainingArguments

results = {}
for case in ("lora+head", "llama", "llama_tied"):
    expected = expectation(case)
    for mode in ("fp32", "bf16", "recomputed"):
        config = {"version": 2, "activation_checkpointing": mode == "recomputed"}
        chosen = options(sys.argv[1], fsdp=True, fsdp_config=config, bf16=mode == "bf16")
        args = BarqTrainingArguments(**chosen)
        # accelerate turns FSDP on for accelerators only; the ranks' device stays the CPU all the same.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        gradient = lambda parameter: parameter.grad.full_tensor()
        results[f"{case} {mode}"] = compare(build(case), args, expected, gradient)
save(results, sys.argv[1])
"""


def test_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    results = one_model.run(SCRIPT, tmp_path)
    assert len(results) == 9
    for case, result in results.items():
        adapters = ["lora"] if "lora" in case else []
        ops = ["glu", "linear_cross_entropy", *adapters, "rms_norm", "rope"]
        assert result["installed"] == ops, case
        assert any(name.endswith("lm_head") for name in result["sharded"]), case
        # accelerate's policy rounds the loss itself to bf16, as it does stock Trainer's.
        rounding = {"losses": 4e-3, "gradients": 4e-2} if "bf16" in case else {}
        one_model.check(case, result, **rounding)
