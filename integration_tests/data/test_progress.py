"""Progress bars: there when it takes long and somebody looks, silent as Hugging Face users expect."""

import io
import multiprocessing
import sys
import threading
import time

import pytest
from small_tokenizers import TEXTS, small_tokenizer

from barqtrain_hf.data import DataFiles, PackedDataset, progress, tokenize


@pytest.fixture(autouse=True)
def _switched_on():
    """Bars are as they are where nobody has asked for none; other tests of this process may have."""
    changed = []
    for name in ("datasets", "huggingface_hub.utils"):
        module = pytest.importorskip(name)
        if module.are_progress_bars_disabled():
            module.enable_progress_bars()
            changed.append(module)
        if module.are_progress_bars_disabled():
            pytest.skip(f"{name} has them switched off by the environment")
    yield
    for module in changed:
        module.disable_progress_bars()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def look(monkeypatch, output=Terminal, seconds=0):
    """Where bars are shown from now on. No fixture: pytest captures anew after those."""
    for name in ("TQDM_POSITION", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(progress, "_SECONDS_BEFORE_SHOWN", seconds)
    shown = output()
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def work():
    with progress.progress("Working", "documents", 3, mininterval=0) as bar:
        for _ in range(3):
            bar.update()


def test_a_bar_appears_when_it_takes_long(monkeypatch):
    terminal = look(monkeypatch, seconds=0.05)
    work()
    assert terminal.getvalue() == ""
    with progress.progress("Working", "documents", 3, mininterval=0) as bar:
        bar.update()
        assert terminal.getvalue() == ""
        time.sleep(0.1)
        bar.update()
        assert "Working:  67%" in terminal.getvalue()


def test_every_long_part_has_one(monkeypatch, tmp_path):
    terminal = look(monkeypatch)
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    tokenize(DataFiles(path), small_tokenizer(), tmp_path / "tokens")
    tokenize(list(TEXTS), small_tokenizer(), tmp_path / "tokens")
    PackedDataset([{"input_ids": [1, 2], "labels": [1, 2]}], 8)
    shown = terminal.getvalue()
    assert all(
        f"{doing}:" in shown
        for doing in ("Hashing files", "Reading", "Tokenising", "Reading tokens")
    )


def test_there_is_none_in_a_log(monkeypatch):
    log = look(monkeypatch, io.StringIO)
    work()
    assert log.getvalue() == ""


def test_nor_where_they_are_switched_off(monkeypatch):
    terminal = look(monkeypatch)
    for name in ("datasets", "huggingface_hub.utils"):
        module = sys.modules[name]
        module.disable_progress_bars()
        try:
            work()
        finally:
            module.enable_progress_bars()
        assert terminal.getvalue() == ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    work()
    assert terminal.getvalue() == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    work()
    assert "Working: 100%" in terminal.getvalue()


def test_a_forked_process_that_is_killed_or_was_forked_at_a_bad_moment_stops_nobody(monkeypatch):
    look(monkeypatch)
    work()
    context = multiprocessing.get_context("fork")

    def hold(held):
        progress._bar().get_lock().acquire()
        held.set()
        time.sleep(60)

    held = context.Event()
    child = context.Process(target=hold, args=(held,))
    child.start()
    assert held.wait(30)
    child.kill()
    child.join(30)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()

    lock = progress._bar().get_lock()
    taken, release = threading.Event(), threading.Event()

    def take():
        with lock:
            taken.set()
            release.wait(60)

    holder = threading.Thread(target=take)
    holder.start()
    assert taken.wait(30)
    child = context.Process(target=work)
    child.start()
    child.join(30)
    release.set()
    holder.join(30)
    assert child.exitcode == 0
    assert progress._bar().monitor is None, "it has no thread"
