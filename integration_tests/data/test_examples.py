"""Texts, chats and prompts with completions: the tokens and the loss that TRL gives them."""

import json

import numpy as np
import pytest
from prepared import ours, trls
from small_tokenizers import TEXTS, small_tokenizer

from barqtrain_hf.data import PackedDataset, PackedStream, tokenize
from barqtrain_hf.errors import ArgumentError, DataError

TEMPLATE = (
    "{% for tool in tools or [] %}<tool>{{ tool.name }}{% endfor %}"
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>{{ opening or 'assistant' }}\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def message(role, content):
    return {"role": role, "content": content}


def chat(number):
    return [message("user", f"question {number}"), message("assistant", TEXTS[number % 8] + "!")]


ROWS = {
    "text": [{"text": text} for text in TEXTS],
    "prompt and completion": [
        {"prompt": f"{text} qui", "completion": f"ck {number}{'</s>' * (number % 2)}"}
        for number, text in enumerate(TEXTS)
    ],
    "messages": [{"messages": chat(number)} for number in range(9)],
    "prompt and completion messages": [
        {"prompt": chat(number)[:1], "completion": chat(number)[1:]} for number in range(9)
    ],
    # TRL takes the prompt first, too.
    "messages beside prompt and completion": [
        {"messages": chat(number), "prompt": chat(number)[:1], "completion": chat(number)[1:]}
        for number in range(9)
    ],
}
TOOLS = {
    "messages": chat(1),
    "tools": json.dumps([{"name": "search"}]),
    "chat_template_kwargs": {"opening": "model"},
}


@pytest.mark.parametrize("kind", ROWS)
def test_tokens_and_loss_are_those_of_trl(kind, tokenizer, tmp_path):
    found = ours(ROWS[kind], tokenizer, tmp_path)
    assert found == trls(ROWS[kind], tokenizer, tmp_path)
    masked = [labels.count(-100) for _, labels in found]
    assert any(masked) == ("completion" in kind)


def test_a_text_column_that_was_asked_for_comes_first(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"body": text, "text": "no", "messages": chat(1), "prompt": "p", "completion": "c"}
        for text in TEXTS[:3]
    ]
    expected = ours([{"text": text} for text in TEXTS[:3]], tokenizer, tmp_path)
    for dataset in (rows, datasets.Dataset.from_list(rows)):
        assert ours(dataset, tokenizer, tmp_path, text_column="body") == expected
    with pytest.raises(DataError, match=r"dataset\[0\] has no 'bodies', only body, text, mess"):
        ours(rows, tokenizer, tmp_path, text_column="bodies")
    # Its default name was not asked for.
    for column in (None, "text"):
        assert ours(rows, tokenizer, tmp_path, text_column=column) == ours(
            [{"prompt": "p", "completion": "c"}] * 3, tokenizer, tmp_path
        )


def test_strings_of_numpy_are_text(tokenizer, tmp_path):
    rows = [{"prompt": "a qui", "completion": "ck b"}]
    of_numpy = [{key: np.str_(value) for key, value in row.items()} for row in rows]
    assert ours(of_numpy, tokenizer, tmp_path / "n") == ours(rows, tokenizer, tmp_path / "s")


def test_prompts_bear_no_loss(tokenizer, tmp_path):
    rows = ROWS["prompt and completion messages"]
    rows = [row for row in rows if "<tool>" not in str(row)]  # it takes spaces along
    for row, (ids, labels) in zip(rows, ours(rows, tokenizer, tmp_path), strict=True):
        kept = [token for token, label in zip(ids[1:], labels, strict=True) if label != -100]
        assert tokenizer.decode(kept) == row["completion"][0]["content"] + "</s>\n"


def test_tools_and_template_arguments_reach_the_template(tokenizer, tmp_path):
    ((ids, _),) = ours([TOOLS], tokenizer, tmp_path)
    assert tokenizer.decode(ids).startswith("<tool>search<s>user\n")
    row = {"prompt": TOOLS["messages"][:1], "completion": TOOLS["messages"][1:]}
    row["chat_template_kwargs"] = {"opening": "model"}
    ((_, labels),) = ours([row], tokenizer, tmp_path)
    # The prompt alone goes on with "model", so the loss begins at the role.
    assert tokenizer.decode([label for label in labels if label != -100]).startswith("assistant\n")


@pytest.mark.parametrize("kind", ROWS)
def test_stream_and_columns_have_the_same_loss(kind, tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    expected = {
        (tuple(ids), (-100, *labels)) for ids, labels in ours(ROWS[kind], tokenizer, tmp_path)
    }
    columns = datasets.Dataset.from_list(ROWS[kind])
    store = tokenize(columns, tokenizer, tmp_path / "columns")
    packed = PackedDataset(store, 4096)
    for rows in (packed, PackedStream(columns, 4096, tokenizer=tokenizer)):
        found = set()
        for row in rows:
            sizes = np.diff(row["cu_seq_lens_q"]) if "cu_seq_lens_q" in row else row["seq_lengths"]
            parts = (
                row[key].flatten().split(list(map(int, sizes))) for key in ("input_ids", "labels")
            )
            found |= {(tuple(i.tolist()), tuple(n.tolist())) for i, n in zip(*parts, strict=True)}
        assert found == expected


def test_long_chats_are_refused_and_long_texts_split(tokenizer):
    texts = PackedStream(["a b c " * 200], 64, tokenizer=tokenizer)
    assert sum(batch["input_ids"].shape[1] for batch in texts) > 64
    with pytest.raises(DataError, match=r"longer than max_length=64.* pass overflow='split'"):
        list(PackedStream([{"messages": chat(1) * 20}], 64, tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [*ROWS["text"][:2], ROWS["messages"][0]],
            r"dataset\[2\] has messages and the rows before",
        ),
        (
            [{"prompt": "a", "completion": chat(1)}],
            r"dataset\[0\] has a prompt and a completion of",
        ),
        (
            [{"prompt": "a"}],
            r"dataset\[0\] has no 'text', no messages and no prompt with completion",
        ),
        ([{"prompt": "a", "completion": "b"}, {"text": "c"}], "must be alike"),
        (
            [{"prompt": 1, "completion": 2}],
            r"dataset\[0\]\['prompt'\] is 1 \(int\): pass text or a list of messages",
        ),
        ([{"messages": "hi"}], r"dataset\[0\]\['messages'\] is text: pass a list of messages"),
        (
            [{"messages": {"role": ["user"]}}],
            r"dataset\[0\]\['messages'\] is {'role': \['user'\]} \(dict\): pass a list of",
        ),
        ([{"text": None}], r"dataset\[0\] is None"),
    ],
)
def test_rows_that_do_not_fit_are_named(rows, message, tokenizer, tmp_path):
    for read in (
        lambda: tokenize(rows, tokenizer, tmp_path / "tokens"),
        lambda: list(PackedStream(rows, 64, tokenizer=tokenizer)),
    ):
        with pytest.raises(DataError, match=message):
            read()


def test_a_chat_needs_a_template(tmp_path):
    with pytest.raises(
        ArgumentError, match="dataset holds chats, and the tokenizer has no chat_tem"
    ):
        tokenize(ROWS["messages"], small_tokenizer(), tmp_path / "tokens")
