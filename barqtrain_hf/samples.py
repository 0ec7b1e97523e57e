"""Text that a model generates from fixed prompts, while everything else stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError

# Text as it is, or a chat: messages with "role" and "content".
Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: length of a sample, unless it ends before.
        do_sample: whether to draw; False: always the most probable token.
        temperature: divides the logits before tokens are drawn; 0 is as ``do_sample=False``.
        top_k: draw from this many most probable tokens; None: from all.
        top_p: draw from the most probable tokens that have this probability together; None: from all.
        seed: of every round of samples, so that they differ only where the model does.

    Raises:
        ArgumentError: a value out of range, or one that is only for drawing with ``do_sample=False``.
        ArgumentTypeError: a value of another type.
    """

    max_new_tokens: int = 64
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise ArgumentTypeError(f"do_sample={self.do_sample!r} must be True or False.")
        for name, value in (("max_new_tokens", self.max_new_tokens), ("top_k", self.top_k)):
            if value is None and name == "top_k":
                continue
            if type(value) is not int:
                raise ArgumentTypeError(f"{name}={value!r} must be an integer.")
            if value < 1:
                none = " or None for all" if name == "top_k" else ""
                raise ArgumentError(f"{name}={value} must be at least 1: pass a larger one{none}.")
        for name, number in (("temperature", self.temperature), ("top_p", self.top_p)):
            if number is None and name == "top_p":
                continue
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise ArgumentTypeError(f"{name}={number!r} must be a number.")
        if not 0 <= self.temperature < float("inf"):
            raise ArgumentError(
                f"temperature={self.temperature} must be 0 or more: pass 1.0 for the model's own "
                "probabilities, less for more probable tokens, or do_sample=False."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ArgumentError(
                f"top_p={self.top_p} must be above 0 and at most 1: pass None for all tokens, or 0.9 for "
                "the most probable that have 90% together."
            )
        if not self.do_sample:
            for name, changed in (
                ("temperature", self.temperature not in (0, 1)),
                ("top_k", self.top_k is not None),
                ("top_p", self.top_p is not None),
            ):
                if changed:
                    raise ArgumentError(
                        f"do_sample=False takes the most probable token, so {name}="
                        f"{getattr(self, name)} has no effect: drop it, or pass do_sample=True."
                    )

    def options(self) -> dict[str, Any]:
        """Arguments of ``model.generate``, in place of what the model's own generation config says."""
        draw = self.do_sample and self.temperature > 0
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": draw,
            # Where nothing is drawn these have to be generate's defaults, or it warns of them.
            "temperature": self.temperature if draw else 1.0,
            "top_k": (self.top_k or 0) if draw else 50,
            "top_p": (self.top_p or 1.0) if draw else 1.0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "use_cache": True,  # which Trainer switches off in the model's config
            "disable_compile": True,
        }


def check_prompts(prompts: Any) -> list[Prompt]:
    """The prompts, if they are some.

    Raises:
        ArgumentError: there are none, or one has no text.
        ArgumentTypeError: they are something else than texts and lists of messages.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ArgumentTypeError(
            f"prompts={prompts!r} must be a list of texts or of chats: pass [{prompts!r}]."
            if isinstance(prompts, str)
            else f"prompts={prompts!r} must be a list of texts or of chats."
        )
    if not prompts:
        raise ArgumentError("prompts=[] is empty: pass at least one text or chat.")
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, list) and all(
            isinstance(message, dict) and {"role", "content"} <= message.keys()
            for message in prompt
        ):
            if not prompt:
                raise ArgumentError(f"prompts[{number}]=[] has no message: pass at least one.")
        elif not isinstance(prompt, str):
            raise ArgumentTypeError(
                f"prompts[{number}]={prompt!r} must be a text, or a list of messages like "
                '{"role": "user", "content": "..."}.'
            )
    return list(prompts)


def check_tokenizer(prompts: Sequence[Prompt], processing_class: Any) -> Any:
    """The tokenizer of a tokenizer or processor, if it can read the prompts.

    Raises:
        ArgumentError: there is none, or chats are to be read without a chat template.
        ArgumentTypeError: it is a name.
    """
    if isinstance(processing_class, str):
        raise ArgumentTypeError(
            f"processing_class is {processing_class!r}, a name: pass "
            f"AutoTokenizer.from_pretrained({processing_class!r})."
        )
    if processing_class is None:
        raise ArgumentError(
            "BarqSamplesCallback has no tokenizer to read prompts with: pass processing_class= to it or to "
            "the Trainer."
        )
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    chats = [number for number, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    if chats and not getattr(tokenizer, "chat_template", None):
        raise ArgumentError(
            f"prompts[{chats[0]}] is a chat, and processing_class={type(tokenizer).__name__} has no "
            "chat_template: set tokenizer.chat_template, or pass the prompt as text."
        )
    return tokenizer


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it.

    Attributes:
        text: with the chat template around it, if it is a chat.
        ids: its tokens.
    """

    text: str
    ids: list[int]


def encode(prompts: Sequence[Prompt], tokenizer: Any) -> list[EncodedPrompt]:
    """Texts with the tokenizer's own special tokens, chats by its template.

    Raises:
        ArgumentError: a prompt without any token.
    """
    encoded = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            text, ids = prompt, tokenizer(prompt)["input_ids"]
        else:
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ArgumentError(
                f"prompts[{number}]={prompt!r} has no tokens: pass some text, for this tokenizer puts no "
                "token in front by itself."
            )
        encoded.append(EncodedPrompt(text, ids))
    return encoded


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    sampling: Sampling,
    batch_size: int,
) -> list[str]:
    """A sample for every prompt, without special tokens.

    The model's modes and the states of random number generators are afterwards what they were.

    Args:
        model: with ``generate``; a PEFT model too.
        tokenizer: that has encoded the prompts.
        prompts: what to continue.
        sampling: how.
        batch_size: how many prompts at once; shorter ones are padded on the left.
    """
    ends = _ends(model, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0
    options = {**sampling.options(), "pad_token_id": pad, "eos_token_id": ends or None}
    samples: list[str] = []
    with _evaluating(model), _seeded(model, sampling.seed):
        for start in range(0, len(prompts), batch_size):
            rows = [prompt.ids for prompt in prompts[start : start + batch_size]]
            length = max(map(len, rows))
            ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
            made = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **options
            )
            texts = made[:, length:].tolist()
            samples += tokenizer.batch_decode(texts, skip_special_tokens=True)
    return samples


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a sample: those of the model's generation config and the tokenizer's."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    found = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    wanted = [end for end in (*found, tokenizer.eos_token_id) if end is not None]
    return list(dict.fromkeys(wanted))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Sets modes one by one: train() and eval() of some models do more than that."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    devices = {parameter.device for parameter in model.parameters()}
    mps = any(device.type == "mps" for device in devices)  # torch knows no fork_rng of it
    state = torch.mps.get_rng_state() if mps else None
    with ExitStack() as forks:
        forks.enter_context(torch.random.fork_rng(devices=[]))  # the CPU's
        for kind in {device.type for device in devices} - {"cpu", "meta", "mps"}:
            of_kind = [device.index or 0 for device in devices if device.type == kind]
            forks.enter_context(torch.random.fork_rng(devices=of_kind, device_type=kind))
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if state is not None:
                torch.mps.set_rng_state(state)
