"""A byte-level BPE tokenizer trained on the spot, and the way from text to labelled tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
IGNORE_INDEX = -100

# `generation` marks what the assistant says, end token included: that is where the loss is.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Tokens(TypedDict):
    """One document as `PackedDataset` and the stock collator read it."""

    input_ids: list[int]
    labels: list[int]


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, chat: bool) -> Any:
    """Trains a byte-level BPE on texts.

    Args:
        texts: what to learn merges from.
        vocab_size: at most this many tokens.
        chat: whether messages are what it will see. Then a space is put before each, so that a word
            is the same token at the start of an answer as within one.

    Returns:
        A ``PreTrainedTokenizerFast`` with a chat template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=chat),
            # Digit by digit, or arithmetic would be a table of merged numbers.
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    role_tokens = [f"<|{role}|>" for role in ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, *role_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=role_tokens,
        chat_template=CHAT_TEMPLATE,
    )


def encode_chats(tokenizer: Any, chats: Sequence[list[dict[str, str]]]) -> list[Tokens]:
    """Chats as tokens, labelled where the assistant speaks."""
    encoded = tokenizer.apply_chat_template(
        list(chats), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return [
        Tokens(
            input_ids=ids,
            labels=[token if said else IGNORE_INDEX for token, said in zip(ids, mask, strict=True)],
        )
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    ]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[Tokens]:
    """Texts as tokens, each ended by the end token and labelled throughout."""
    ids = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]
    return [Tokens(input_ids=each, labels=each) for each in ids]


def split_long(documents: Sequence[Tokens], max_length: int) -> list[Tokens]:
    """Cuts documents into pieces of at most ``max_length`` tokens, as `PackedDataset` does."""
    return [
        Tokens(
            input_ids=document["input_ids"][start : start + max_length],
            labels=document["labels"][start : start + max_length],
        )
        for document in documents
        for start in range(0, len(document["input_ids"]), max_length)
    ]
