"""FastTokenizer: the very tokens of the tokenizer it was made from."""

import functools
import json
import multiprocessing
import os
import threading
import time
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS, TEXTS, small_tokenizer

from barqtrain_hf.data import FastTokenizer
from barqtrain_hf.data.packing import num_threads
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, DataError, UnsupportedError

tokenizer_of = functools.cache(small_tokenizer)


@functools.cache
def fast_of(kind, special):
    return FastTokenizer(tokenizer_of(kind), add_special_tokens=special, append_eos=False)


def documents(fast, texts):
    tokens, lengths = fast.encode(texts)
    assert tokens.dtype == np.int32 and lengths.dtype == np.int64
    assert lengths.sum() == len(tokens)
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def reference(kind, texts, special):
    return [
        list(tokenizer_of(kind)(text, add_special_tokens=special)["input_ids"]) for text in texts
    ]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_python(kind, special):
    ours = documents(fast_of(kind, special), TEXTS)
    assert ours == reference(kind, TEXTS, special)
    assert max(map(len, ours)) > 16, "nothing may be truncated"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_unicode_gives_the_tokens_of_python(kind, data):
    pieces = st.sampled_from([*TEXTS[:7], "<tool>", " quick", "</s>", "\u0301", "ﬁ", "\r"])
    text = st.lists(pieces | st.text(max_size=20), max_size=6).map("".join)
    texts = data.draw(st.lists(text, min_size=1, max_size=4))
    assert documents(fast_of(kind, True), texts) == reference(kind, texts, True)


def test_many_texts_come_back_in_order():
    texts = [f"text number {number} " * (number % 60) for number in range(3000)]
    assert sum(map(len, texts)) > 4 * 2**18  # several chunks of 256 KiB
    assert documents(fast_of("byte_level", True), texts) == reference("byte_level", texts, True)


def test_eos_goes_after_each_text_once():
    tokenizer = tokenizer_of("byte_level")
    fast = FastTokenizer(tokenizer)
    eos = tokenizer.eos_token_id
    texts = ["one", "two</s>", ""]
    one, two, empty = reference("byte_level", texts, True)
    assert documents(fast, texts) == [[*one, eos], two, [*empty, eos]]
    assert two[-1] == eos


def test_special_tokens_can_be_text():
    tokenizer = small_tokenizer()
    tokenizer.split_special_tokens = True
    fast = FastTokenizer(tokenizer, append_eos=False)
    (ours,) = documents(fast, ["</s>"])
    assert tokenizer.eos_token_id not in ours and len(ours) > 2


def test_identity_tells_settings_and_vocabularies_apart():
    tokenizer = tokenizer_of("byte_level")
    other = small_tokenizer()
    other.add_tokens(["one more"])
    identities = {
        FastTokenizer(tokenizer).identity,
        FastTokenizer(tokenizer, append_eos=False).identity,
        FastTokenizer(tokenizer, add_special_tokens=False).identity,
        FastTokenizer(other).identity,
    }
    assert len(identities) == 4
    assert FastTokenizer(tokenizer).identity in identities


def test_python_threads_may_share_one():
    fast, texts = fast_of("byte_level", True), list(TEXTS) * 20
    expected, found = documents(fast, texts), []
    threads = [
        threading.Thread(target=lambda: found.append(documents(fast, texts))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent():
    fast, context = fast_of("byte_level", True), multiprocessing.get_context("fork")
    (expected,), results, done = documents(fast, ["one two"]), context.Queue(), threading.Event()
    large = ["hello world foo bar " * 20_000] * 8

    def work():
        while not done.is_set():
            fast.encode(large)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)  # now it is in Rust and holds the lock
    child = context.Process(target=lambda: results.put(documents(fast, ["one two"])))
    child.start()
    done.set()
    try:
        assert results.get(timeout=30) == [expected]
    finally:
        child.kill()
        child.join()
        thread.join()


def test_identity_is_not_changed_by_use():
    tokenizer = small_tokenizer()
    plain = FastTokenizer(tokenizer).identity
    tokenizer.backend_tokenizer.enable_truncation(16)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    assert FastTokenizer(tokenizer).identity == plain  # making one switches both off
    assert FastTokenizer(tokenizer).identity == plain


def test_identity_has_the_special_tokens_that_a_template_may_write():
    tokenizer = small_tokenizer()
    before = FastTokenizer(tokenizer).identity
    tokenizer.pad_token = "</s>"
    assert FastTokenizer(tokenizer).identity == before, "there is no template"
    tokenizer.chat_template = "{{ pad_token }}"
    before = FastTokenizer(tokenizer).identity
    tokenizer.pad_token = "<s>"
    assert FastTokenizer(tokenizer).identity != before


@pytest.mark.parametrize(
    ("cpus", "ranks", "threads"),
    [(8, None, 8), (64, None, 16), (64, "8", 8), (4, "8", 1), (8, "", 8), (8, "0", 8), (8, "?", 8)],
)
def test_ranks_of_one_machine_share_its_cpus(monkeypatch, cpus, ranks, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert num_threads() == threads


class _Slow:
    is_fast = False


class _Meddling:
    """Does something in Python that its JSON does not know of."""

    is_fast = True
    eos_token = "</s>"

    def __init__(self):
        self.backend_tokenizer = tokenizer_of("byte_level").backend_tokenizer

    def __call__(self, text, **kwargs):
        return {"input_ids": tokenizer_of("byte_level")(text.lower(), **kwargs)["input_ids"]}


def test_tokenizers_that_cannot_be_run_are_refused():
    with pytest.raises(UnsupportedError, match=r"_Slow has no fast version.*use_fast=True"):
        FastTokenizer(_Slow())
    with pytest.raises(UnsupportedError, match="_Meddling gives other tokens than its own JSON"):
        FastTokenizer(_Meddling())
    # On this prefix, longer than a token that merges, the tokenizers crate panics.
    odd = json.loads(small_tokenizer().backend_tokenizer.to_str())
    odd["model"]["continuing_subword_prefix"] = "#" * 9
    panicking = _Meddling()
    panicking.backend_tokenizer = types.SimpleNamespace(to_str=lambda: json.dumps(odd))
    with pytest.raises(
        UnsupportedError, match=r"cannot be read: tokenizers panicked.*datasets\.map"
    ):
        FastTokenizer(panicking)
    without = small_tokenizer()
    without.eos_token = None
    with pytest.raises(ArgumentError, match="the tokenizer has no eos_token: set"):
        FastTokenizer(without)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], r"texts\[1\] is None \(NoneType\) instead of text: remove"),
        ([1], r"texts\[0\] is 1 \(int\) instead of text"),
        (["a", "b", "\ud800x"], r"texts\[2\] has no UTF-8: surrogates not allowed at character 0"),
    ],
)
def test_what_is_no_text_is_named(texts, message):
    with pytest.raises(DataError, match=message):
        fast_of("byte_level", True).encode(texts)


def test_a_name_is_no_tokenizer():
    with pytest.raises(ArgumentTypeError, match=r"'gpt2', a name: pass AutoTokenizer.from_pretr"):
        FastTokenizer("gpt2")
