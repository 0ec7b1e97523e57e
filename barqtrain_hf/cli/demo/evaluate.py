"""Held-out loss, exact match and samples; the same code judges every model of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from barqtrain_hf.cli.demo.tokenizer import IGNORE_INDEX, Tokens
from barqtrain_hf.cli.demo.workload import CONTINUED, Question, Workload

BATCH_TOKENS = 8_192


@dataclass
class Scores:
    """How good a model is on held-out data.

    Attributes:
        loss: mean negative log-likelihood per labelled token.
        exact_match: share of answers that are right to the character, or None for free text.
        by_family: exact match of each task family.
        samples: prompt, expected answer and what the model said.
    """

    loss: float
    exact_match: float | None
    by_family: dict[str, float]
    samples: list[dict[str, str]]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def evaluate(model: Any, workload: Workload) -> Scores:
    """Scores a model; greedy decoding, and nothing random."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        loss = held_out_loss(model, workload.held_out)
        said = generate(model, workload.tokenizer, workload.questions)
    model.train(was_training)
    right: dict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(workload.questions, said, strict=True):
        right[question.family].append(answer == question.answer)
    flat = [each for family in right.values() for each in family]
    shown: dict[str, int] = {}  # the first question of each family, then of any
    for at, question in enumerate(workload.questions):
        shown.setdefault(question.family if workload.is_exact else str(at), at)
    samples = [
        {
            "prompt": workload.questions[at].prompt,
            "expected": workload.questions[at].answer,
            "said": said[at],
        }
        for at in shown.values()
    ]
    return Scores(
        loss=loss,
        exact_match=sum(flat) / len(flat) if workload.is_exact else None,
        by_family=(
            {family: sum(each) / len(each) for family, each in sorted(right.items())}
            if workload.is_exact
            else {}
        ),
        samples=samples,
    )


def held_out_loss(model: Any, documents: Sequence[Tokens]) -> float:
    """Mean loss per labelled token, whatever batch the token is in."""
    total = count = 0.0
    ordered = sorted(documents, key=lambda document: len(document["input_ids"]))
    for batch in _batches(ordered, [len(document["input_ids"]) for document in ordered]):
        longest = max(len(document["input_ids"]) for document in batch)
        # Padding on the right: causal attention keeps it out of sight of every labelled token.
        ids = [d["input_ids"] + [0] * (longest - len(d["input_ids"])) for d in batch]
        labels = [d["labels"] + [IGNORE_INDEX] * (longest - len(d["labels"])) for d in batch]
        targets = torch.tensor(labels, device=model.device)[:, 1:]
        if not (targets != IGNORE_INDEX).any():
            continue
        logits = model(input_ids=torch.tensor(ids, device=model.device), use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        total += float(losses)
        count += float((targets != IGNORE_INDEX).sum())
    return total / max(count, 1.0)


def generate(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[str]:
    """Greedy answers, in the order of the questions."""
    answers = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda at: len(questions[at].input_ids))
    lengths = [len(questions[at].input_ids) for at in order]
    limit = max(len(tokenizer(question.answer)["input_ids"]) for question in questions) + 1
    for batch in _batches(order, lengths):
        padded = tokenizer.pad(
            {"input_ids": [list(questions[at].input_ids) for at in batch]},
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(
            **padded,
            max_new_tokens=min(limit, CONTINUED),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = output[:, padded["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        for at, text in zip(batch, texts, strict=True):
            # A space goes before each answer, see train_tokenizer.
            answers[at] = text.strip() if questions[at].is_chat else text
    return answers


def _batches(items: Sequence[Any], lengths: Sequence[int]) -> Iterator[list[Any]]:
    """Neighbours together, up to ``BATCH_TOKENS`` with padding; ``lengths`` must not decrease."""
    batch: list[Any] = []
    for item, length in zip(items, lengths, strict=True):
        if batch and (len(batch) + 1) * length > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
