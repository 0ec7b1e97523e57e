"""Training on a PackedStream: resumed at any checkpoint, it is bit for bit the run without a break."""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from streams import expected, parts, small_windows
from test_packed_training import documents
from test_parity import arguments
from transformers import TrainerCallback

from barqtrain_hf import BarqTrainer, BarqTrainingArguments
from barqtrain_hf.checkpoints import read_stream_state, write_stream_state
from barqtrain_hf.data import PackedDataset, PackedStream
from barqtrain_hf.errors import ArgumentError, DataError, StorageError, UnsupportedError

STEPS = 9


@pytest.fixture(autouse=True)
def _windows(monkeypatch: pytest.MonkeyPatch) -> None:
    small_windows(monkeypatch)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "barqtrain-prefetch"]


class Spy(BarqTrainer):
    """Keeps what it trains on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[dict[str, Any]] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(dict(inputs))
        return super().training_step(model, inputs, *args, **kwargs)


def make(path: Path, dataset: Any = None, cls: type[BarqTrainer] = Spy, **options: Any) -> Any:
    stream = dataset if isinstance(dataset, PackedStream) else PackedStream(dataset or DOCS, 64)
    extra = {key: options.pop(key) for key in ("eval_dataset", "callbacks") if key in options}
    args = {"max_steps": STEPS, "gradient_accumulation_steps": 2, **options}
    return cls(
        # Dropout draws other numbers if a resumed run draws one more or less.
        tiny_model("gpt2", resid_pdrop=0.1),
        BarqTrainingArguments(**arguments(path, **args)),
        train_dataset=stream,
        **extra,
    )


DOCS = documents(60)


def losses(trainer: Any) -> list[tuple[float, ...]]:
    return [
        (entry["loss"], entry["grad_norm"], entry["epoch"])
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def same_weights(one: Any, other: Any) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_batches_are_those_of_the_stream_epoch_after_epoch(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    assert len(trainer.seen) == 2 * STEPS and not threads()
    epochs = itertools.chain.from_iterable(itertools.repeat(PackedStream(DOCS, 64, batch_size=2)))
    for batch, given in zip(trainer.seen, epochs, strict=False):
        assert batch["input_ids"].equal(given["input_ids"])
        assert batch["cu_seq_lens_q"] is batch["cu_seq_lens_k"]
    batches = len(list(PackedStream(DOCS, 64, batch_size=2)))
    assert len(trainer.seen) > 2 * batches, "three epochs"
    for first in (0, batches):
        found = Counter(itertools.chain(*map(parts, trainer.seen[first : first + batches])))
        assert found == Counter(expected(DOCS))
    # Trained again without a checkpoint, it begins where it did.
    again = trainer.seen[:3]
    trainer.seen.clear()
    trainer.train()
    assert all(
        a["input_ids"].equal(b["input_ids"]) for a, b in zip(trainer.seen, again, strict=False)
    )


class Iterable:
    """Rows that can only be read from the first one on."""

    def __iter__(self) -> Any:
        return iter(DOCS)


@pytest.mark.parametrize("dataset", [DOCS, Iterable()], ids=["list", "iterable"])
def test_resume_is_exact(dataset: Any, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": PackedDataset(DOCS, 64)}
    whole = make(tmp_path, dataset, save_strategy="steps", save_steps=1, **options)
    whole.train()
    for step in (1, 4, 7):
        resumed = make(tmp_path / "resumed", dataset, **options)
        assert resumed.args.ignore_data_skip is False
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.args.ignore_data_skip is False
        assert losses(resumed) == losses(whole)
        assert same_weights(resumed, whole)
        assert len(resumed.seen) == 2 * (STEPS - step)
        for mine, theirs in zip(resumed.seen, whole.seen[2 * step :], strict=True):
            assert mine["input_ids"].equal(theirs["input_ids"])
    finished = make(tmp_path, dataset)
    finished.train(resume_from_checkpoint=True)
    assert finished.seen == [] and finished.state.global_step == STEPS
    assert same_weights(finished, whole)
    assert not threads()


def test_resuming_reads_nothing_again(tmp_path: Path) -> None:
    class Counting(list[Any]):
        read = 0

        def __getitem__(self, index: Any) -> Any:
            self.read += 1
            return super().__getitem__(index)

    docs = documents(1000)
    make(tmp_path, docs, max_steps=40, save_strategy="steps", save_steps=40).train()
    counting = Counting(docs)
    make(tmp_path, counting, max_steps=41).train(resume_from_checkpoint=True)
    before = read_stream_state(tmp_path / "checkpoint-40")["window"]["place"]["rows"]
    assert before > 200 and counting.read <= 3 * 32, "of the windows that are read ahead"


def test_what_was_trained_on_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line at the end of each epoch, and one about the part of an epoch that training ended in."""
    batches = len(list(PackedStream(DOCS, 64, batch_size=2)))
    steps, rest = 2 * batches + 3, 3
    options = {"gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": steps}
    with caplog.at_level(logging.INFO, logger="barqtrain_hf.data.stream"):
        caplog.clear()
        trainer = make(tmp_path, max_steps=steps, **options)
        trainer.train()
        seen = [parts(batch) for batch in trainer.seen[-rest:]]
        pattern = r"Epoch (\d): Packed (\d+) documents \(([\d,]+) tokens\) into (\d+) rows of 64, "
        lines = [
            tuple(int(number.replace(",", "")) for number in line)
            for line in re.findall(pattern, caplog.text)
        ]
        every = sum(len(document["input_ids"]) for document in DOCS)
        assert [line[:3] for line in lines[:2]] == [(epoch, len(DOCS), every) for epoch in (0, 1)]
        documents, tokens = (
            sum(map(len, seen)),
            sum(len(ids) for batch in seen for ids, *_ in batch),
        )
        assert lines[2:] == [(2, documents, tokens, 2 * rest)]
        # An epoch that ends with the training has one line, and one that was not gone on with none.
        for max_steps, resume, count in ((steps, True, 0), (batches, None, 1)):
            caplog.clear()
            make(tmp_path, max_steps=max_steps, **options).train(resume_from_checkpoint=resume)
            assert caplog.text.count("Packed") == count, caplog.text


def test_batches_that_were_only_fetched_are_not_trained_on(tmp_path: Path) -> None:
    """Whoever takes batches ahead of training does not move the checkpoint."""

    class Ahead(Spy):
        fetched: Any = None

        def get_batch_samples(self, *args: Any) -> Any:
            now, self.fetched = self.fetched, super().get_batch_samples(*args)
            return now or self.get_batch_samples(*args)

    whole = make(tmp_path, cls=Ahead, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert losses(resumed) == losses(whole)


def test_another_number_of_rows_a_batch_goes_on_from_there(tmp_path: Path) -> None:
    first = make(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    second = make(tmp_path, max_steps=4, per_device_train_batch_size=1)
    second.train(resume_from_checkpoint=True)
    rest = itertools.islice(PackedStream(DOCS, 64), 8, 12)
    assert all(a["input_ids"].equal(b["input_ids"]) for a, b in zip(second.seen, rest, strict=True))


def test_the_batch_size_is_that_of_the_trainer_or_both_agree(tmp_path: Path) -> None:
    make(tmp_path, PackedStream(DOCS, 64, batch_size=2), max_steps=1).train()
    for options, message in (
        (
            {"batch_size": 3},
            "batch_size is 3 here and per_device_train_batch_size is 2: leave batch",
        ),
        ({"rank": 1, "world_size": 2}, r"rank and world_size are \(1, 2\) here and \(0, 1\) in"),
    ):
        with pytest.raises(ArgumentError, match=message):
            make(tmp_path, PackedStream(DOCS, 64, **options)).train()


def test_what_happens_once_an_epoch_happens_in_those_of_the_stream(tmp_path: Path) -> None:
    strategies = {f"{name}_strategy": "epoch" for name in ("eval", "save", "logging")}
    trainer = make(
        tmp_path,
        eval_dataset=PackedDataset(DOCS[:9], 64),
        gradient_accumulation_steps=1,
        max_steps=20,
        **strategies,
    )
    trainer.train()
    batches = len(list(PackedStream(DOCS, 64, batch_size=2)))
    ends = [*range(batches, 20, batches), 20]
    assert len(ends) > 2
    for name in ("loss", "eval_loss"):
        assert [e["step"] for e in trainer.state.log_history if name in e] == ends
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        f"checkpoint-{s}" for s in ends
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"max_steps": -1},
            ArgumentError,
            "max_steps is -1: pass how many steps .* are read, so num",
        ),
        (
            {"dataloader_num_workers": 2},
            UnsupportedError,
            "dataloader_num_workers is 2: PackedStream runs threads of its own.*Pass dataloader_num",
        ),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            UnsupportedError,
            "dispatch_batches=True: PackedStream deals its rows to the ranks itself",
        ),
    ],
)
def test_arguments_that_no_stream_can_have(
    options: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        make(tmp_path, **options)


def test_a_stream_for_evaluation_is_refused(tmp_path: Path) -> None:
    for datasets in (PackedStream(DOCS, 64), {"one": PackedStream(DOCS, 64)}):
        with pytest.raises(
            UnsupportedError, match=r"eval_dataset is a PackedStream.*PackedDataset"
        ):
            make(tmp_path, eval_dataset=datasets)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    make(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(ArgumentError, match="seed is 7 here and 0 in the state"):
        make(tmp_path, PackedStream(DOCS, 64, seed=7)).train(resume_from_checkpoint=str(checkpoint))
    file = checkpoint / "packed_stream.bin"
    good = file.read_bytes()
    for bad in (good[:-1], b"", bytes([*good[:900], good[900] ^ 1, *good[901:]])):
        file.write_bytes(bad)
        with pytest.raises(DataError, match=r"packed_stream.bin is damaged: resume from an older"):
            make(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    file.unlink()
    trainer = make(tmp_path)
    with pytest.raises(DataError, match=r"has no packed_stream.bin, .* or ignore_data_skip=True"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    trainer = make(tmp_path, max_steps=2, ignore_data_skip=True)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.args.ignore_data_skip is True
    first = next(iter(PackedStream(DOCS, 64, batch_size=2)))
    assert trainer.seen[0]["input_ids"].equal(first["input_ids"])


def test_the_last_whole_checkpoint_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match=r"No valid checkpoint found in output directory .* anew"):
        make(tmp_path / "none").train(resume_from_checkpoint=True)
    whole = make(tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    # As if killed in four of its checkpoints, each at another moment.
    (tmp_path / "checkpoint-9" / "packed_stream.bin").write_bytes(b"half")
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"global_step": 6, "lo')
    (tmp_path / "checkpoint-12").mkdir()
    resumed = make(tmp_path)
    with caplog.at_level(logging.WARNING, logger="barqtrain_hf.checkpoints"):
        resumed.train(resume_from_checkpoint=True)
    assert len(resumed.seen) == 2 * (STEPS - 4)
    assert losses(resumed) == losses(whole)
    for step, reason in ((12, "has no tr"), (9, "damaged"), (8, "has no tr"), (6, "ends too")):
        (line,) = [m for m in caplog.messages if f"checkpoint-{step}" in m.split(": ")[0]]
        assert reason in line and line.endswith("checkpoint-4.")
    for path in tmp_path.glob("checkpoint-*/trainer_state.json"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"No valid .*checkpoint-2 is not whole, it has no trainer_st"
    ):
        make(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_is_not_whole_while_it_is_written_again(tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make(tmp_path, **options).train()

    class Killed(Spy):
        def _save(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, cls=Killed, **options).train()
    assert not (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
    assert not threads()


def test_only_models_are_saved_without_the_stream(tmp_path: Path) -> None:
    options = {"max_steps": 1, "save_strategy": "steps", "save_only_model": True}
    make(tmp_path, **options).train()
    assert not list(tmp_path.glob("*/packed_stream.bin"))


def test_states_that_cannot_be_loaded_again_are_refused_when_saved(tmp_path: Path) -> None:
    class Odd:
        pass

    with pytest.raises(
        UnsupportedError, match=r"The state_dict\(\) of the data set holds more than"
    ):
        write_stream_state(tmp_path, {"place": Odd()})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        StorageError, match=r"writing .*packed_stream.bin failed: No such file or dir"
    ):
        write_stream_state(tmp_path / "nowhere", {})


class _Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_an_interrupt_and_an_error_of_the_data_stop_the_thread(tmp_path: Path) -> None:
    trainer = make(tmp_path, documents(2000), callbacks=[_Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not threads()

    def broken() -> Any:
        yield from documents(300)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        make(tmp_path, broken(), max_steps=10**6).train()
    assert not threads()
    once = make(tmp_path, iter(DOCS), max_steps=10**6)
    with pytest.raises(DataError, match="is an iterator that was read before"):
        once.train()
    assert once.state.global_step > 0 and not threads()


@pytest.mark.gpu
def test_batches_come_to_the_gpu_through_pinned_memory(tmp_path: Path) -> None:
    docs = documents(3000)
    trainer = make(tmp_path, docs, max_steps=60, use_cpu=False)
    trainer.train()
    given = itertools.chain.from_iterable(itertools.repeat(PackedStream(docs, 64, batch_size=2)))
    for batch, expected_batch in zip(trainer.seen, given, strict=False):
        assert batch["input_ids"].is_cuda
        for key, value in expected_batch.items():
            if isinstance(value, torch.Tensor):
                assert batch[key].cpu().equal(value), key
