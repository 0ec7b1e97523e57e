"""What a demo run trains and tests on: tokens, and where the answers are known, the answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from barqtrain_hf.cli.demo import own_data, tasks
from barqtrain_hf.cli.demo.scale import Plan, Scale
from barqtrain_hf.cli.demo.tokenizer import (
    Tokens,
    encode_chats,
    encode_texts,
    split_long,
    train_tokenizer,
)
from barqtrain_hf.errors import DataError

HELD_OUT_EXAMPLES = 256
TASK_VOCAB_SIZE = 1024
SAMPLES = 4
# Of a held-out text, this many tokens are shown to the model and as many are asked from it.
CONTINUED = 48


@dataclass(frozen=True)
class Question:
    """Something to generate from.

    Attributes:
        prompt: what is shown in the report.
        input_ids: what the model is given.
        answer: what it should say, or, for a text, how the text goes on.
        is_chat: whether it is a chat rather than a text.
        family: the task family, or empty.
    """

    prompt: str
    input_ids: tuple[int, ...]
    answer: str
    is_chat: bool
    family: str = ""


@dataclass
class Workload:
    """Both splits of one data set.

    Attributes:
        name: what it is, in a few words.
        tokenizer: trained on the training split.
        train: training documents.
        held_out: held-out documents.
        questions: held-out questions.
        is_exact: whether the answers are the only right ones, so that exact match means something.
        plan: how to train on it.
        notes: what was read, split and skipped, in sentences.
    """

    name: str
    tokenizer: Any
    train: list[Tokens]
    held_out: list[Tokens]
    questions: list[Question]
    is_exact: bool
    plan: Plan
    notes: list[str]

    @property
    def num_train_tokens(self) -> int:
        """Tokens in one pass over the training split."""
        return sum(len(document["input_ids"]) for document in self.train)

    def fingerprint(self) -> str:
        """Changes with any training or held-out token."""
        digest = hashlib.blake2b(digest_size=16)
        for document in (*self.train, *self.held_out):
            digest.update(json.dumps(document["input_ids"]).encode())
        return digest.hexdigest()


def from_tasks(seed: int, scale: Scale) -> Workload:
    """The built-in instruction data."""
    train, held_out = tasks.generate(seed, scale.examples, HELD_OUT_EXAMPLES)
    shared = {e.prompt for e in train} & {e.prompt for e in held_out}
    assert not shared, f"the split is by prompt, yet both sides have {shared}"
    texts = (text for e in train for text in (e.prompt, e.answer))
    tokenizer = train_tokenizer(texts, TASK_VOCAB_SIZE, chat=True)
    return Workload(
        name=f"{len(tasks.FAMILIES)} task families",
        tokenizer=tokenizer,
        train=encode_chats(tokenizer, [e.messages for e in train]),
        held_out=encode_chats(tokenizer, [e.messages for e in held_out]),
        questions=[
            _chat_question(tokenizer, e.messages, family=e.family, prompt=e.prompt)
            for e in held_out
        ],
        is_exact=True,
        plan=scale.tasks,
        notes=[
            f"Held out are {len(held_out)} questions about combinations of words, and about numbers, "
            "that no training question asks about in any wording; each single word occurs in training."
        ],
    )


def from_own_data(path: str, seed: int, scale: Scale) -> Workload:
    """The user's own text."""
    data = own_data.load(path, seed, scale.own_bytes)
    sides = (data.train, data.held_out)
    if data.is_chat:
        texts = (message["content"] for d in data.train for message in d.chat)
        tokenizer = train_tokenizer(texts, scale.own_vocab_size, chat=True)
        train, held_out = (encode_chats(tokenizer, [d.chat for d in side]) for side in sides)
        questions = [_chat_question(tokenizer, d.chat) for d in data.held_out]
    else:
        texts = (d.text or "" for d in data.train)
        tokenizer = train_tokenizer(texts, scale.own_vocab_size, chat=False)
        train, held_out = (encode_texts(tokenizer, [d.text or "" for d in side]) for side in sides)
        questions = [_text_question(tokenizer, tokens) for tokens in held_out]
    supervised = sum(label >= 0 for d in train for label in d["labels"])
    if not supervised:
        raise DataError(f"--data {path}: there is nothing to learn in {len(train)} documents.")
    long = sum(len(d["input_ids"]) > scale.own.row_length for d in train)
    notes = [
        *data.notes,
        f"{len(train):,} documents to train on, {len(held_out):,} held out; none is in both.",
    ]
    if long:
        notes.append(
            f"{long:,} are longer than a row of {scale.own.row_length:,} tokens and are split."
        )
    return Workload(
        name=path,
        tokenizer=tokenizer,
        train=train,
        held_out=split_long(held_out, scale.own.row_length),
        questions=questions[:SAMPLES],
        is_exact=False,
        plan=scale.own,
        notes=notes,
    )


def _chat_question(
    tokenizer: Any, messages: list[dict[str, str]], *, family: str = "", prompt: str = ""
) -> Question:
    """The chat up to what the assistant says last."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    encoded = tokenizer.apply_chat_template(
        messages[:last], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return Question(
        prompt=prompt or " ".join(message["content"] for message in messages[:last]),
        input_ids=tuple(encoded["input_ids"]),
        answer=messages[last]["content"],
        is_chat=True,
        family=family,
    )


def _text_question(tokenizer: Any, tokens: Tokens) -> Question:
    """The start of a text, cut off in the middle if it is short."""
    ids = tokens["input_ids"]
    shown = min(CONTINUED, max(1, len(ids) // 2))
    return Question(
        prompt=tokenizer.decode(ids[:shown]),
        input_ids=tuple(ids[:shown]),
        answer=tokenizer.decode(ids[shown : shown + CONTINUED], skip_special_tokens=True),
        is_chat=False,
    )
