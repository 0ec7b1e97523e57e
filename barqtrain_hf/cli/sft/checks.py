"""Mistakes in the options that are told before a model or data are loaded, in one sentence each."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from barqtrain_hf.cli.sft.arguments import Options, one_line
from barqtrain_hf.config import BarqConfig, check_liger
from barqtrain_hf.errors import ArgumentError, UnsupportedError

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Loggers that are no package, but the machine that the run is on.
_PLACES = ("flyte", "kubeflow")
# What pip calls a package, where that is another name or one of our extras.
_INSTALL = {
    "azure_ml": "azureml-sdk",
    "comet_ml": "comet-ml",
    "flash_attn": "flash-attn --no-build-isolation",
    "liger_kernel": "liger-kernel",
    "peft": "'barqtrain_hf[peft]'",
    "wandb": "'barqtrain_hf[wandb]'",
}


def check(options: Options) -> None:
    """Checks what can be known from the options and from the names of files.

    Raises:
        ArgumentError: a value that cannot be right here, or two that contradict each other.
        UnsupportedError: an option needs a package that is not installed, or replaces our loss.
    """
    _check_given(options)
    _check_packages(options)
    if options.training.use_barq_kernels:
        check_liger(options.training, BarqConfig.load(options.training.barq_config))
    model = options.model
    for bits in ("load_in_4bit", "load_in_8bit"):
        if getattr(model, bits) and not model.use_peft:
            raise ArgumentError(f"--{bits} keeps the weights frozen: add --use_peft to train LoRA.")
    _check_output(options.training.output_dir)
    _check_checkpoint(options.training)
    _check_template(options.training.chat_template_path)
    _check_attention(model.attn_implementation)
    _check_model(model.model_name_or_path, model.model_revision, options.training.trust_remote_code)


def _check_given(options: Options) -> None:
    if not options.model.model_name_or_path:
        raise ArgumentError("--model_name_or_path: name a folder, or a model on the hub.")
    if not options.script.dataset_name and not options.mixture.datasets:
        raise ArgumentError(
            "--dataset_name: name a file, a folder, or a data set on the hub; or put `datasets` into the "
            "file of --config."
        )


def _check_packages(options: Options) -> None:
    training, model = options.training, options.model
    needs = [("--use_peft", "peft", model.use_peft)]
    needs += [
        (f"--{bits}", "bitsandbytes", getattr(model, bits))
        for bits in ("load_in_4bit", "load_in_8bit")
    ]
    needs.append(("--use_liger_kernel", "liger_kernel", training.use_liger_kernel))
    attention = model.attn_implementation or ""
    needs.append((f"--attn_implementation {attention}", "kernels", "/" in attention))
    flash = attention == "flash_attention_2"
    needs.append((f"--attn_implementation {attention}", "flash_attn", flash))
    for option, package, is_needed in needs:
        if is_needed and importlib.util.find_spec(package) is None:
            raise _missing(option, package)
    for name in training.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise ArgumentError(f"--report_to {name}: pass none, all, or some of {known}.")
        if name not in (*_PLACES, *get_available_reporting_integrations()):
            raise _missing(f"--report_to {name}", name)


def _missing(option: str, package: str) -> UnsupportedError:
    return UnsupportedError(
        f"{option} needs {package}, which is not installed.",
        f"pip install {_INSTALL.get(package, package)}",
    )


def _check_attention(name: str | None) -> None:
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name is not None and "/" not in name and name not in known:
        names = ", ".join(each for each in known if not each.startswith("paged"))
        raise ArgumentError(f"--attn_implementation {name}: pass one of {names}.")


def _check_output(folder: str) -> None:
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ArgumentError(f"--output_dir {folder} is a file; pass a folder.")


def _check_checkpoint(training: Any) -> None:
    checkpoint = training.resume_from_checkpoint
    if checkpoint in (None, True, False) or checkpoint.lower() in ("true", "false"):
        return
    if not os.path.isdir(checkpoint):
        raise ArgumentError(
            f"--resume_from_checkpoint {checkpoint}: there is no such folder; pass one of "
            f"{training.output_dir}/checkpoint-*, or true for the last of them."
        )
    if not os.path.isfile(os.path.join(checkpoint, "trainer_state.json")):
        raise ArgumentError(
            f"--resume_from_checkpoint {checkpoint}: it is no checkpoint, or one that was not written to "
            "its end, for it has no trainer_state.json."
        )


def _check_template(path: str | None) -> None:
    if path is not None and path.endswith((".jinja", ".j2")) and not os.path.isfile(path):
        raise ArgumentError(f"--chat_template_path {path}: there is no such file.")


def _check_model(name: str, revision: str, trust_remote_code: bool) -> None:
    """Reads the config, from a folder or the hub."""
    option = f"--model_name_or_path {name}"
    if os.path.isfile(name):
        raise ArgumentError(f"{option}: it is a file; pass the folder of the model.")
    if os.path.isdir(name):
        _check_model_folder(Path(name), option)
        where = f"{Path(name) / 'config.json'} cannot be read"
    elif HUB_NAME.fullmatch(name):
        where = "it is no folder here, and no config of that name came from the hub"
    else:
        raise ArgumentError(f"{option}: there is no such folder.")
    try:
        AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:  # of the hub, of JSON and of the config itself
        raise ArgumentError(f"{option}: {where}: {one_line(error)}") from None


def _check_model_folder(folder: Path, option: str) -> None:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ArgumentError(
                f"{option}: it is an adapter; pass its base model, or merge the two with PEFT's "
                "merge_and_unload and pass what comes of it."
            )
        raise ArgumentError(f"{option}: there is no config.json in this folder.")
    if not any(any(folder.glob(f"*.{suffix}")) for suffix in ("safetensors", "bin")):
        raise ArgumentError(
            f"{option}: there are no weights in this folder (*.safetensors or *.bin)."
        )
