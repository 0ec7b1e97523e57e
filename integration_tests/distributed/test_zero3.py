"""ZeRO-3: weights that exist only while the module that owns them runs, acted out and with DeepSpeed."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import one_model
import pytest
import torch
from one_model import TRAIN, build, together

from barqtrain_hf import patch_model
from barqtrain_hf.errors import BarqError
from barqtrain_hf.patching import FusedLoss

CASES = ("llama", "llama_tied", "gemma2", "lora+head")
# The weights of a LoRA layer come and go with the modules inside it, so PEFT's forward calls them.
HOOKED = ("lora", "there are hooks inside (offloading, ZeRO-3, or the user's)")


class Partition:
    """Takes the trained weights of a model away, and gives each back as DeepSpeed's hooks do: from its
    module's forward to the end of it, and from its module's backward until its gradient is complete.
    """

    def __init__(self, model: Any, skip: Collection[Any] = ()) -> None:
        self.weights: dict[Any, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.weights[parameter] = parameter.data
                parameter.register_post_accumulate_grad_hook(self._reduce(name))
        for module in model.modules():
            if module not in skip and any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda module, _: self._gather(module))
                module.register_full_backward_pre_hook(lambda module, _: self._gather(module))
                module.register_forward_hook(lambda module, *_: self._release(module))
        self._release(*model.modules())

    def _gather(self, module: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in self.weights:
                parameter.data = self.weights[parameter]

    def _release(self, *modules: Any) -> None:
        for parameter in (p for module in modules for p in module.parameters(recurse=False)):
            if parameter in self.weights:
                parameter.data = parameter.data.new_empty(0)

    def _reduce(self, name: str) -> Any:
        def hook(parameter: Any) -> None:
            self.gradients[name], parameter.grad = parameter.grad, None
            parameter.data = parameter.data.new_empty(0)

        return hook


@pytest.mark.parametrize("case", CASES)
def test_weights_that_come_and_go(case: str) -> None:
    if "lora" in case:
        pytest.importorskip("peft")
    stock, model = build(case), build(case)
    expected = stock(**together(TRAIN.rows[:4]), num_items_in_batch=50).loss
    expected.backward()
    report = patch_model(model)
    adapters = ["lora"] if "lora" in case else []
    ops = ["glu", "linear_cross_entropy", *adapters, "rms_norm", "rope"]
    assert sorted(report.installed) == ops
    partition = Partition(model)
    loss = model(**together(TRAIN.rows[:4]), fused_loss=FusedLoss(num_items=50)).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert all(parameter.numel() == 0 for parameter in partition.weights)
    loss.backward()
    assert set(report.fallbacks) == ({HOOKED} if "lora" in case else set())
    assert all(parameter.numel() == 0 for parameter in partition.weights)
    wanted = {name: p.grad for name, p in stock.named_parameters() if p.requires_grad}
    assert partition.gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (partition.gradients[name] - gradient).norm() / gradient.norm()
        assert error.item() == pytest.approx(0.0, abs=1e-5), name


def test_without_the_hooks_there_is_no_weight() -> None:
    model = build("llama")
    patch_model(model)
    Partition(model, skip=[model.lm_head])
    with pytest.raises(BarqError, match=r"weight of shape \(0,\)"):
        model(**together(TRAIN.rows[:4]), fused_loss=FusedLoss(num_items=50))


@pytest.mark.parametrize("case", CASES)
def test_patching_a_model_without_weights_says_so(case: str) -> None:
    if "lora" in case:
        pytest.importorskip("peft")
    stock, model = build(case), build(case)
    Partition(model)
    report = patch_model(model)
    assert "linear_cross_entropy" not in report.installed
    (reason,) = (why for op, why in report.skipped if op == "linear_cross_entropy")
    assert "not on this device" in reason
    expected = stock(**together(TRAIN.rows[:4]), num_items_in_batch=50).loss
    loss = model(**together(TRAIN.rows[:4]), num_items_in_batch=50).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


SCRIPT = """
import os
from deepspeed.utils import safe_get_full_grad
from one_model import build, compare, expectation, options, save
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from barqtrain_hf import BarqTrainingArguments

folder = sys.argv[1] + "/rank" + os.environ["RANK"]
build("llama").save_pretrained(folder)
config = {
    # Without the threshold, weights as small as these would stay whole.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
results = {}
for case in ("llama", "llama_tied", "lora+head", "llama, partitioned as it is loaded"):
    expected = expectation(case.split(",")[0])
    model = None if "partitioned" in case else build(case)
    args = BarqTrainingArguments(**options(sys.argv[1], deepspeed=config))
    if model is None:  # the usual order: from_pretrained finds the arguments there
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.lm_head.weight.numel() == 0
    results[case] = compare(model, args, expected, safe_get_full_grad)
    unset_hf_deepspeed_config()
save(results, sys.argv[1])
"""


def test_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    pytest.importorskip("peft")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    # DeepSpeed compiles its communication between CPUs with the ninja beside this Python.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    results = one_model.run(SCRIPT, tmp_path)
    assert len(results) == 4
    for case, result in results.items():
        fallbacks = [list(HOOKED)] if "lora" in case else []
        one_model.check(case, result, fallbacks=fallbacks)
        assert "linear_cross_entropy" in result["installed"], case
