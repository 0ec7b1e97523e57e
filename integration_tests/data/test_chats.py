"""Loss on what the assistant says only: the labels that TRL gives, whatever is in a chat."""

import logging
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import ours, trls
from small_tokenizers import KINDS, TEXTS, small_tokenizer
from streams import parts

from barqtrain_hf.data import PackedDataset, PackedStream, tokenize
from barqtrain_hf.data.chats import ChatTemplate
from barqtrain_hf.errors import ArgumentError, DataError

# A block before the first message, whitespace that is trimmed on either side, and a name of a special token.
TEMPLATE = (
    "  {% for tool in tools or [] %}<tool>{{ tool.name }}{% endfor %}"
    "{%- for m in messages -%}{{ bos_token }}{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{%- generation -%}{{ m['content'] }}{{ eos_token }}{%- endgeneration -%}"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}"
)


def with_template(template=TEMPLATE, kind="byte_level"):
    tokenizer = small_tokenizer(kind)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: with_template(kind=kind) for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["byte_level"]


def chat(*contents):
    roles = ("user", "assistant")
    return [
        {"role": roles[place % 2], "content": content} for place, content in enumerate(contents)
    ]


CHATS = [chat(f"question {n}", TEXTS[n % 8], TEXTS[(n + 3) % 8], f"answer {n}") for n in range(9)]
ROWS = {
    "messages": [{"messages": messages} for messages in CHATS],
    "messages with tools": [
        {"messages": messages, "tools": [{"name": "search"}]} for messages in CHATS
    ],
    # What the assistant says in the prompt bears no loss either.
    "prompt and completion messages": [
        {"prompt": messages[:3], "completion": messages[3:]} for messages in CHATS
    ],
}


@pytest.mark.parametrize("kind", ROWS)
def test_labels_are_those_of_trl(kind, tokenizer, tmp_path):
    found = ours(ROWS[kind], tokenizer, tmp_path, assistant_only_loss=True)
    assert found == trls(ROWS[kind], tokenizer, tmp_path, assistant_only_loss=True)
    for (ids, labels), messages in zip(found, CHATS, strict=True):
        kept = [token for token, label in zip(ids[1:], labels, strict=True) if label != -100]
        said = messages[1::2] if "completion" not in kind else messages[3:]
        if "<tool>" not in str(messages):  # it takes spaces along
            assert tokenizer.decode(kept) == "".join(m["content"] + "</s>" for m in said)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_chat_has_the_mask_of_transformers(kind, tokenizers, tmp_path_factory, data):
    pieces = st.sampled_from([*TEXTS[:7], "", " ", "\n", "<tool>", "</s>", "\u0301", "🙂", "quick"])
    content = st.lists(pieces | st.text(max_size=5), max_size=3).map("".join)
    contents = data.draw(st.lists(content, min_size=2, max_size=5))
    tokenizer, messages = tokenizers[kind], chat(*contents)
    theirs = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    rows, folder = [{"messages": messages}], tmp_path_factory.mktemp("chats")
    if 1 not in theirs["assistant_masks"]:
        with pytest.raises(DataError, match="has no tokens of the assistant"):
            ours(rows, tokenizer, folder, assistant_only_loss=True)
        return
    ((ids, labels),) = ours(rows, tokenizer, folder, assistant_only_loss=True)
    assert ids == theirs["input_ids"]
    mask = theirs["assistant_masks"][1:]
    assert labels == [i if kept else -100 for i, kept in zip(ids[1:], mask, strict=True)]


def documents(dataset):
    return sorted(
        (list(ids), list(labels[1:]))
        for row in dataset
        for ids, labels in zip(
            row["input_ids"].split(row["seq_lengths"].tolist()),
            row["labels"].split(row["seq_lengths"].tolist()),
            strict=True,
        )
    )


LONG = [
    *ROWS["messages"],
    {"messages": chat("a", "b")},
    {"messages": chat("a b c " * 20, "too late for 60 tokens")},
    {"messages": chat("a", "b c " * 60, "d e " * 80, "f")},
]


def test_long_chats_become_what_trl_makes_of_them(tokenizer, tmp_path):
    store = tokenize(LONG, tokenizer, tmp_path / "tokens", assistant_only_loss=True)
    whole = trls(LONG, tokenizer, tmp_path, assistant_only_loss=True)
    assert max(len(ids) for ids, _ in whole) > 240

    def with_loss(rows):
        return sorted((ids, labels) for ids, labels in rows if set(labels) - {-100})

    options = {"assistant_only_loss": True, "max_length": 60}
    truncated = trls(LONG, tokenizer, tmp_path, **options)
    assert documents(PackedDataset(store, 60, overflow="truncate")) == sorted(truncated)
    assert len(truncated) == len(LONG) - 1, "nothing is left of one that bears a loss"
    packed = trls(LONG, tokenizer, tmp_path, packing=True, **options)
    assert sorted(truncated) == with_loss(packed)

    packed = trls(LONG, tokenizer, tmp_path, packing=True, packing_strategy="bfd_split", **options)
    split = PackedDataset(store, 60, overflow="split")
    assert documents(split) == with_loss(packed)
    assert len(packed) > len(with_loss(packed)) > len(LONG)

    short = [(ids, labels) for ids, labels in whole if len(ids) <= 60]
    assert short and documents(PackedDataset(store, 60, overflow="drop")) == sorted(short)
    with pytest.raises(DataError, match=r"longer than max_length=60"):
        PackedDataset(store, 60)


def test_a_stream_has_the_same_loss(tokenizer, tmp_path):
    expected = ours(LONG, tokenizer, tmp_path, assistant_only_loss=True)
    stream = PackedStream(LONG, 4096, tokenizer=tokenizer, assistant_only_loss=True)
    found = [(list(ids), list(labels[1:])) for batch in stream for ids, labels, _ in parts(batch)]
    assert sorted(found) == sorted(expected)
    with pytest.raises(DataError, match=r"longer than max_length=64"):
        list(PackedStream(LONG, 64, tokenizer=tokenizer, assistant_only_loss=True))
    plain = PackedStream(LONG, 4096, tokenizer=tokenizer)
    with pytest.raises(ArgumentError, match="tokens is"):
        plain.load_state_dict(stream.state_dict())


def test_a_store_with_another_loss_is_another_store(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    for rows in (ROWS["messages"], datasets.Dataset.from_list(ROWS["messages"])):
        labels = [
            ours(rows, tokenizer, tmp_path, assistant_only_loss=only) for only in (False, True) * 2
        ]
        assert labels[0] == labels[2] != labels[1] == labels[3]


@pytest.mark.parametrize(
    ("rows", "template", "error", "message"),
    [
        (
            ROWS["messages"],
            TEMPLATE.replace("generation -%}", "if true -%}", 1).replace("endgeneration", "endif"),
            ArgumentError,
            r"no {% generation %} .* trl.chat_template_utils.get_training_chat_template\(tokenizer\)",
        ),
        (["a"], TEMPLATE, ArgumentError, r"dataset\[0\] is no chat but has text: pass messages"),
        (
            [{"prompt": "a", "completion": "b"}],
            TEMPLATE,
            ArgumentError,
            r"dataset\[0\] is no chat but has prompt and completion: pass messages",
        ),
        (
            [*ROWS["messages"], {"messages": chat("only a question")}],
            TEMPLATE,
            DataError,
            r"dataset\[9\] has no tokens of the assistant.*leave such chats out",
        ),
        (ROWS["messages"], None, ArgumentError, "the tokenizer has no chat_template"),
    ],
)
def test_what_cannot_be_masked_is_refused(rows, template, error, message, tmp_path):
    tokenizer = with_template(template)
    for read in (
        lambda: tokenize(rows, tokenizer, tmp_path / "tokens", assistant_only_loss=True),
        lambda: list(PackedStream(rows, 64, tokenizer=tokenizer, assistant_only_loss=True)),
    ):
        with pytest.raises(error, match=message):
            read()


def test_ready_tokens_have_their_loss_already():
    with pytest.raises(
        ArgumentError, match="assistant_only_loss is True and there is no tokenizer"
    ):
        PackedStream([{"input_ids": [1], "labels": [1]}], 64, assistant_only_loss=True)


def test_turns_that_do_not_end_are_warned_of_once(tokenizer, tmp_path, caplog):
    open_ended = TEMPLATE.replace(
        "{{ eos_token }}{%- endgeneration -%}", "{%- endgeneration -%}{{ eos_token }}"
    )
    with caplog.at_level(logging.WARNING, logger="barqtrain_hf.data.chats"):
        ours(ROWS["messages"], tokenizer, tmp_path / "a", assistant_only_loss=True)
        assert not caplog.messages
        ours(ROWS["messages"], with_template(open_ended), tmp_path / "b", assistant_only_loss=True)
    (message,) = caplog.messages
    assert "ends what the assistant says, 'dummy', before the token that ends its turn" in message


def test_a_template_that_takes_no_such_chat_is_not_warned_of(tmp_path, caplog):
    strict = "{% if messages|length % 2 %}{{ raise_exception('odd') }}{% endif %}" + TEMPLATE
    ours(ROWS["messages"], with_template(strict), tmp_path, assistant_only_loss=True)
    assert not caplog.messages


def test_others_who_render_the_same_template_do_not_change_the_mask(tokenizer):
    # transformers has one compiled template for all threads, and notes the assistant's places in it.
    template = ChatTemplate(tokenizer, True)
    expected = [template.render_and_find({}, messages) for messages in CHATS]
    done = threading.Event()

    def work():
        while not done.is_set():
            tokenizer.apply_chat_template(
                CHATS[0], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(30):
            assert [template.render_and_find({}, messages) for messages in CHATS] == expected
    finally:
        done.set()
        thread.join()
    assert all(spans for _, spans in expected)
