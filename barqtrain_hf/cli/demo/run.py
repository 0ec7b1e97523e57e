"""The demo from start to end."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from barqtrain_hf.cli.demo import plot, record, report
from barqtrain_hf.cli.demo.arguments import DemoArguments
from barqtrain_hf.cli.demo.evaluate import evaluate
from barqtrain_hf.cli.demo.scale import CPU, GPU, Scale, build_model, uses_gpu
from barqtrain_hf.cli.demo.training import TrainerName, train
from barqtrain_hf.cli.demo.workload import Workload, from_own_data, from_tasks
from barqtrain_hf.errors import ArgumentError, DataError

INTERRUPTED = 130


def run(arguments: DemoArguments, argv: Sequence[str]) -> int:
    """Runs or resumes the demo; returns the exit code.

    Args:
        arguments: the options.
        argv: how they were written, for the record.
    """
    plot.figure_class()  # if it is missing, say so now and not after the training
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(highlight=False)
    folder = Path(arguments.output_dir)
    if arguments.resume:
        arguments, state = record.resumed(arguments)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ArgumentError(f"--output_dir {folder} is a file; pass a folder.") from None
    scale = GPU if uses_gpu(arguments.device) else CPU
    if not arguments.resume:
        if (folder / record.NAME).exists():
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        state = record.new(arguments, argv, scale)
    try:
        return _run(arguments, state, scale, folder, console)
    except KeyboardInterrupt:
        if not (folder / record.NAME).is_file():
            raise
        state["status"] = "interrupted"
        record.write(state, folder)
        command = record.resume_command(arguments)
        console.print(f"\nInterrupted. To continue: {command}", soft_wrap=True)
        return INTERRUPTED


def _run(
    arguments: DemoArguments, state: dict[str, Any], scale: Scale, folder: Path, console: Console
) -> int:
    console.print(f"{state['device']}, torch {state['versions']['torch']}")
    console.print("Preparing the data and training a tokenizer on it …")
    workload = _workload(arguments, scale)
    _check_data(state, workload, arguments)
    state["status"] = "running"
    record.write(state, folder)
    for note in workload.notes:
        console.print(note)

    if "before" not in state:
        model = build_model(scale, workload.tokenizer, arguments.seed)
        state["settings"]["parameters"] = model.num_parameters()
        console.print("Scoring the untrained model on what is held out …")
        state["before"] = evaluate(_place(model, arguments), workload).to_json()
        record.write(state, folder)
        del model
    console.print(
        f"A Llama with {state['settings']['parameters'] / 1e6:.1f} M random weights and a byte-level "
        f"BPE of {len(workload.tokenizer):,} tokens.\n"
    )
    names: tuple[TrainerName, ...] = ("barq",) if arguments.no_baseline else ("barq", "stock")
    for name in names:
        if name not in state["runs"] and not _train(
            name, arguments, state, workload, scale, folder, console
        ):
            raise KeyboardInterrupt  # Ctrl-C was heard; the checkpoint is written
    state["status"] = "done"
    record.write(state, folder)
    plot.draw(state["runs"], state["data"]["name"], folder / "demo.png")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    console.print(state["runs"]["barq"]["packing"])
    console.print()
    console.print(report.table(state))
    console.print()
    console.print(report.samples(state))
    console.print(
        f"\nWritten to {folder}: model/, demo.png and {record.NAME}. To load the model: "
        f'AutoModelForCausalLM.from_pretrained("{folder / "model"}")',
        soft_wrap=True,
    )
    return 0


def _train(
    name: TrainerName,
    arguments: DemoArguments,
    state: dict[str, Any],
    workload: Workload,
    scale: Scale,
    folder: Path,
    console: Console,
) -> bool:
    """One training run and its scores, put into ``state``; False if Ctrl-C ended it."""
    model = build_model(scale, workload.tokenizer, arguments.seed)
    result = train(
        name,
        model,
        workload,
        folder / "checkpoints" / name,
        seed=arguments.seed,
        device=arguments.device,
        max_steps=arguments.max_steps,
        resume=arguments.resume,
    )
    if result is None:
        return False
    console.print("Scoring it on what is held out …")
    scores = evaluate(model, workload)
    if name == "barq":
        model.save_pretrained(folder / "model")
        workload.tokenizer.save_pretrained(folder / "model")
    state["runs"][name] = {**result.to_json(), "scores": scores.to_json()}
    record.write(state, folder)
    return True


def _workload(arguments: DemoArguments, scale: Scale) -> Workload:
    if arguments.data is None:
        return from_tasks(arguments.seed, scale)
    return from_own_data(arguments.data, arguments.seed, scale)


def _check_data(state: dict[str, Any], workload: Workload, arguments: DemoArguments) -> None:
    """Puts what describes the data into ``state``, or compares it with what is there."""
    description = {
        "name": workload.name,
        "documents": len(workload.train),
        "tokens": workload.num_train_tokens,
        "held_out": len(workload.held_out),
        "vocab_size": len(workload.tokenizer),
        "fingerprint": workload.fingerprint(),
        "notes": workload.notes,
    }
    if state.setdefault("data", description)["fingerprint"] != description["fingerprint"]:
        raise DataError(
            f"--resume: the data has changed since the run began ({arguments.data or workload.name}); "
            "start over without --resume."
        )


def _place(model: Any, arguments: DemoArguments) -> Any:
    return model.to("cuda" if uses_gpu(arguments.device) else "cpu")
