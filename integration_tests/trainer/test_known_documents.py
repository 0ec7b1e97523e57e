"""What is known of documents on the host is not asked of the device."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, tiny_model
from test_packed_training import documents
from test_parity import arguments
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    masking_utils,
)

from barqtrain_hf import BarqTrainer, BarqTrainingArguments
from barqtrain_hf.data import BarqDataCollator, PackedDataset
from barqtrain_hf.ops import _documents
from barqtrain_hf.patching import FusedLoss, head, known_documents, register_attention
from barqtrain_hf.patching import documents as found

STOCK = masking_utils.find_packed_sequence_indices
IDS = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}


class Plain(torch.utils.data.Dataset):
    """Rows of one document each, without a mask."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, VOCABULARY, (20,), generator=generator)
        return {"input_ids": ids, "labels": ids}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who read a tensor to find documents."""
    names: list[str] = []
    for place, name in (
        (known_documents, "_stock"),
        (_documents, "_to_host"),
        (found, "_rows"),
        (found, "_equal"),
    ):
        original = getattr(place, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            names.append(name)
            return original(*args)

        monkeypatch.setattr(place, name, counted)
    # Passes put back what is counted here; this puts back what was there.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", STOCK)
    return names


@pytest.mark.parametrize("data", ["packed", "plain"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nobody_asks(data: str, checkpointing: bool, tmp_path: Path, asked: list[str]) -> None:
    class Begin(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 0:
                asked.clear()  # by probes

    register_attention()
    runs: dict[type[Trainer], list[float]] = {}
    for kind, options in (
        (Trainer, TrainingArguments),
        (BarqTrainer, BarqTrainingArguments),
    ):
        model = tiny_model("llama")
        model.set_attn_implementation("sdpa" if kind is Trainer else "barq")
        trainer = kind(
            model,
            options(**arguments(tmp_path, gradient_checkpointing=checkpointing)),
            train_dataset=PackedDataset(documents(30), 64) if data == "packed" else Plain(),
            data_collator=BarqDataCollator() if data == "packed" else None,
            callbacks=[Begin()],
        )
        trainer.train()
        runs[kind] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert runs[BarqTrainer] == pytest.approx(runs[Trainer], rel=1e-5)
    assert asked == []


def test_positions_that_a_model_makes_otherwise_are_looked_into() -> None:
    model = tiny_model("llama")
    restarting = torch.tensor([[0, 1, 0, 1]])
    with known_documents.forward_pass(model, IDS):
        find = masking_utils.find_packed_sequence_indices
        for _ in range(2):
            assert torch.equal(find(restarting), STOCK(restarting))
            assert find(restarting.new_tensor([[1, 2, 3, 4]])) is None
            assert find(restarting.new_tensor([[0]])) is None
            assert not known_documents.are_single(restarting)
        assert model not in known_documents._counts_from_zero
        assert find(torch.arange(4)[None].expand(3, -1)) is None
        assert model in known_documents._counts_from_zero
    # Of another pass nothing follows, if there is more than ids.
    for given in (
        {**IDS, "position_ids": restarting},
        {**IDS, "pixel_values": torch.zeros(1)},
        {**IDS, "images": [torch.zeros(1)]},
        {**IDS, "lengths": [2, 2]},
    ):
        with known_documents.forward_pass(model, given):
            assert torch.equal(
                masking_utils.find_packed_sequence_indices(restarting), STOCK(restarting)
            )


def restarted(ids: torch.Tensor) -> torch.Tensor:
    """Positions that start anew behind every 2."""
    begins = torch.nn.functional.pad(ids == 2, (1, 0))[:, :-1].int()
    count = torch.arange(ids.shape[1]).expand_as(ids)
    return count - (count * begins).cummax(-1).values


class RestartingModel(LlamaModel):
    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, position_ids=restarted(input_ids), **kwargs)


class RestartingRoot(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, position_ids=restarted(input_ids), **kwargs)


@pytest.mark.parametrize("attention", ["sdpa", "barq"])
def test_other_code_that_makes_positions_is_asked_each_time(attention: str) -> None:
    register_attention()
    model, stock = tiny_model("llama"), tiny_model("llama")
    for each, name in ((model, attention), (stock, "sdpa")):
        each.set_attn_implementation(name)
        each.model.__class__ = RestartingModel
    assert isinstance(head.install(model), list)
    ids = torch.full((1, 12), 5)
    for _ in range(2):  # the first batch is one document
        loss = model(input_ids=ids, labels=ids, fused_loss=FusedLoss()).loss
        expected = stock(input_ids=ids, labels=ids, use_cache=False).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        ids = torch.arange(3, 15)[None].clone()
        ids[0, 5] = 2


def test_a_root_that_makes_positions_keeps_its_loss() -> None:
    model = tiny_model("llama")
    model.__class__ = RestartingRoot
    reason = head.install(model)
    assert isinstance(reason, str) and "gives the base model position_ids" in reason


@pytest.mark.parametrize("given", [{}, {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}])
def test_a_compiled_base_model_has_no_graph_break(given: dict[str, torch.Tensor]) -> None:
    torch._dynamo.reset()
    model, stock = tiny_model("llama"), tiny_model("llama")
    assert isinstance(head.install(model), list)
    model.model.compile(backend="eager", fullgraph=True)
    ids = torch.arange(3, 9)[None]
    expected = stock(input_ids=ids, labels=ids, use_cache=False, **given).loss.item()
    loss = model(input_ids=ids, labels=ids, fused_loss=FusedLoss(), **given).loss
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch._dynamo.reset()


def test_what_a_graph_records_is_not_taken_from_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    positions, ends = torch.tensor([[0, 1, 2, 3]]), torch.tensor([0, 4], dtype=torch.int32)
    known_documents.remember(positions, ends, [0, 4])
    stock_is_asked = []
    monkeypatch.setattr(known_documents, "_stock", stock_is_asked.append)
    monkeypatch.setattr(known_documents, "capturing", lambda device: True)
    known_documents._find(positions)
    assert stock_is_asked == [positions]


def test_transformers_is_as_before_after_any_pass() -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(KeyError), known_documents.forward_pass(model, IDS):
        with known_documents.forward_pass(model, IDS):
            pass
        assert masking_utils.find_packed_sequence_indices is not STOCK
        raise KeyError
    assert masking_utils.find_packed_sequence_indices is STOCK
    assert known_documents._making.get() is None


def test_positions_that_were_written_to_are_looked_into(asked: list[str]) -> None:
    positions, ends = torch.tensor([[0, 1, 2, 3]]), torch.tensor([0, 4], dtype=torch.int32)
    known_documents.remember(positions, ends, [0, 4])
    assert found.boundaries(positions, 1, 1) is None and asked == []
    positions[0, 2:] -= 2
    assert found.boundaries(positions, 1, 1).tolist() == [0, 2, 4]
    assert _documents.find(ends, 4).boundaries == [0, 4] and asked == ["_rows"]
    ends[1] = 3
    assert _documents.find(ends, 3).boundaries == [0, 3] and asked == ["_rows", "_to_host"]


@pytest.mark.parametrize(
    "copied", [copy.copy, lambda batch: pickle.loads(pickle.dumps(batch))], ids=["copy", "pickle"]
)
def test_a_batch_takes_its_boundaries_along(copied: Any) -> None:
    batch = BarqDataCollator()([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2)
    batch = copied(batch)
    batch["cu_seq_lens_k"] = batch["cu_seq_lens_q"].clone()  # as a DataLoader that pins does
    moved = batch.to("cpu", non_blocking=True)
    assert moved._told is not None and moved.to("cpu").boundaries is moved.boundaries
    assert moved.boundaries == [0, 3, 6] == moved["cu_seq_lens_q"].tolist()
    assert moved["cu_seq_lens_k"] is moved["cu_seq_lens_q"]
    assert moved.keys() == batch.keys() and moved["max_length_q"] == 3


def test_a_batch_that_was_changed_does_not_say_what_it_was(tmp_path: Path) -> None:
    def row() -> Any:
        return BarqDataCollator()([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}])

    options = BarqTrainingArguments(**arguments(tmp_path))
    trainer = BarqTrainer(tiny_model("llama"), options, train_dataset=Plain())
    halves = {
        "position_ids": torch.tensor([[0, 1, 0, 1]]),
        "cu_seq_lens_q": torch.tensor([0, 2, 4], dtype=torch.int32),
    }
    for moved in (False, True):
        for names, expected in (
            (["position_ids", "cu_seq_lens_q"], [0, 2, 4]),
            (["position_ids"], None),
            (["cu_seq_lens_q"], None),
        ):
            for in_place in (False, True):
                batch = row().to("cpu") if moved else row()
                for name in names:
                    if in_place and name == "position_ids":
                        batch[name].copy_(halves[name])
                    else:
                        batch[name] = halves[name].clone()
                assert batch.boundaries == expected
                prepared = trainer._prepare_inputs(batch)
                assert known_documents.are_single(prepared["position_ids"]) is False
                found = _documents.find(prepared["cu_seq_lens_q"], 4).boundaries
                assert found == prepared["cu_seq_lens_q"].tolist()
    batch = row()
    batch["cu_seq_lens_k"] = torch.tensor([0, 1, 4], dtype=torch.int32)
    assert batch.to("cpu")["cu_seq_lens_k"].tolist() == [0, 1, 4]
    for name in ("position_ids", "cu_seq_lens_q"):
        batch = row()
        del batch[name]
        assert batch.boundaries is None and name not in trainer._prepare_inputs(batch)


@pytest.mark.gpu
@pytest.mark.parametrize("data", ["packed", "plain"])
def test_a_step_does_not_wait_for_the_device(data: str, tmp_path: Path) -> None:
    class Strict(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            torch.cuda.set_sync_debug_mode("error" if state.global_step in (3, 4) else "default")

    trainer = BarqTrainer(
        tiny_model("llama", head_dim=32).bfloat16(),
        BarqTrainingArguments(
            **arguments(tmp_path, use_cpu=False, bf16=True, max_steps=6, logging_steps=6)
        ),
        train_dataset=PackedDataset(documents(60), 64) if data == "packed" else Plain(),
        callbacks=[Strict()],
    )
    assert trainer.accelerator.non_blocking
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert "attention" in trainer.barq_report.installed, str(trainer.barq_report)
