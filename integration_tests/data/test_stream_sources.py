"""What a PackedStream reads from: every row once in every epoch, whatever the data set does."""

import itertools
from collections import Counter

import numpy as np
import pytest
from streams import document, documents, expected, parts, random_documents, same, small_windows

from barqtrain_hf.data import PackedDataset, PackedStream
from barqtrain_hf.data.source import Source
from barqtrain_hf.errors import ArgumentTypeError, DataError, UnsupportedError


def test_huggingface_streams_resume_from_their_own_state(monkeypatch):
    datasets = pytest.importorskip("datasets")
    small_windows(monkeypatch)
    docs = random_documents(200, 30)

    def make():
        return datasets.Dataset.from_list(docs).to_iterable_dataset(num_shards=4)

    stream = PackedStream(make(), 64)
    batches, states = [], []
    for batch in stream:
        batches.append(batch)
        states.append(stream.state_dict())
    assert Counter(itertools.chain(*map(parts, batches))) == Counter(expected(docs))
    for at in (0, 7, len(batches) // 2, len(batches) - 2):
        resumed = PackedStream(make(), 64)
        resumed.load_state_dict(states[at])
        assert all(map(same, itertools.islice(resumed, 5), batches[at + 1 :]))
    # The next epoch begins at the front, though the last iteration began in the middle.
    assert Counter(itertools.chain(*map(parts, resumed))) <= Counter(expected(docs))
    again = [part for batch in resumed for part in parts(batch)]
    assert Counter(again) == Counter(expected(docs))


@pytest.fixture
def datasets(monkeypatch):
    small_windows(monkeypatch)
    return pytest.importorskip("datasets")


def found_in(batches):
    return Counter(itertools.chain(*map(parts, batches)))


def in_order(dataset, epoch=0):
    source = Source(dataset)
    source.seek(None, epoch)
    return [row["input_ids"][0] for row in source.read(10**6)]


def resumed(dataset, state, **options):
    stream = PackedStream(dataset, 64, **options)
    stream.load_state_dict(state)
    return stream


@pytest.mark.parametrize("peeked", [1, 25])
def test_a_stream_that_was_peeked_at_loses_nothing(datasets, peeked):
    docs = random_documents(40, 30)
    dataset = datasets.Dataset.from_list(docs).to_iterable_dataset(num_shards=2)
    list(itertools.islice(dataset, peeked))
    stream = PackedStream(dataset, 64)
    for _ in range(2):  # epochs
        assert found_in(stream) == Counter(expected(docs))


def test_readers_of_one_huggingface_stream_do_not_move_each_other(datasets):
    docs = random_documents(400, 30)
    dataset = datasets.Dataset.from_list(docs).to_iterable_dataset(num_shards=2)
    alone = list(PackedStream(dataset, 64))
    stream = PackedStream(dataset, 64)
    first = iter(stream)
    batches = list(itertools.islice(first, 20))
    second = iter(stream)
    assert all(map(same, itertools.islice(second, 5), alone))
    next(iter(dataset))
    batches += itertools.islice(first, 20)
    state = stream.state_dict()
    assert all(map(same, batches, alone))
    assert all(map(same, resumed(dataset, state), alone[40:]))
    first.close()
    second.close()


def test_what_rows_are_made_from_is_not_copied(datasets):
    class Rows(list):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    def generate(rows):
        yield from rows

    docs = random_documents(60, 30)
    dataset = datasets.IterableDataset.from_generator(generate, gen_kwargs={"rows": Rows(docs)})
    assert found_in(PackedStream(dataset, 64)) == Counter(expected(docs))


class Reading:
    """Rows with a place, and something that cannot be copied beside them."""

    def __init__(self, docs):
        self.docs, self.at, self.lines = docs, 0, (line for line in ())

    def __iter__(self):
        while self.at < len(self.docs):
            self.at += 1
            yield self.docs[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_data_set_that_cannot_be_copied_is_read_again(caplog, monkeypatch):
    small_windows(monkeypatch)
    docs = random_documents(100, 30)
    stream = PackedStream(Reading(docs), 64)
    batches, states = [], []
    for batch in stream:
        batches.append(batch)
        states.append(stream.state_dict())
    assert "dataset (Reading) cannot be copied (cannot pickle 'generator' object)" in caplog.text
    assert found_in(batches) == Counter(expected(docs))
    assert all(map(same, resumed(Reading(docs), states[9]), batches[10:]))


def test_a_shuffled_stream_has_another_order_in_each_epoch_and_resumes_in_it(datasets):
    docs = random_documents(200, 30)

    def make():
        rows = datasets.Dataset.from_list(docs).to_iterable_dataset(num_shards=8)
        return rows.shuffle(seed=1, buffer_size=20)

    orders = [in_order(make(), epoch) for epoch in range(2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    stream = PackedStream(make(), 64)
    for epoch in range(3):
        batches, states = [], []
        for batch in stream:
            batches.append(batch)
            states.append(stream.state_dict())
        assert found_in(batches) == Counter(expected(docs))
        for at in (0, 11, len(batches) // 2):
            assert states[at]["epoch"] == epoch
            again = resumed(make(), states[at])
            assert all(map(same, itertools.islice(again, 9), batches[at + 1 :])), (epoch, at)


def test_an_epoch_of_the_data_set_itself_does_not_undo_a_state(datasets):
    docs = random_documents(200, 30)

    def make():
        return datasets.Dataset.from_list(docs).to_iterable_dataset(num_shards=4)

    dataset = make()
    dataset.set_epoch(1)
    stream = PackedStream(dataset, 64)
    batches = list(itertools.islice(stream, 20))
    rest = list(resumed(make(), stream.state_dict()))
    assert found_in([*batches, *rest]) == Counter(expected(docs))
    assert dataset.epoch == 1, "it is the user's"


@pytest.mark.parametrize("after", [lambda rows: rows, lambda rows: rows.map(dict).skip(0)])
def test_no_document_of_a_shuffle_buffer_is_lost(datasets, after):
    docs = random_documents(300, 30)

    def make(seed=5):
        rows = datasets.Dataset.from_list(docs).to_iterable_dataset()
        return after(rows.shuffle(seed=seed, buffer_size=100))

    stream = PackedStream(make(), 64)
    iterator = iter(stream)
    batches = list(itertools.islice(iterator, 30))
    state = stream.state_dict()
    rest = list(iterator)
    assert found_in([*batches, *rest]) == Counter(expected(docs))
    again = list(resumed(make(), state))
    assert len(again) == len(rest) and all(map(same, again, rest))
    with pytest.raises(ValueError, match="shuffled in another order; pass the same seed to its"):
        resumed(make(seed=6), state)


def test_a_map_style_data_set_is_told_the_epoch():
    class Rotated(list):
        def set_epoch(self, epoch):
            self[:] = docs[epoch:] + docs[:epoch]

    docs = random_documents(20, 30)
    assert in_order(Rotated(docs), 3) == [doc["input_ids"][0] for doc in docs[3:] + docs[:3]]


def test_rows_that_were_split_by_node_are_not_split_again(datasets):
    from datasets.distributed import split_dataset_by_node

    docs = random_documents(40, 30)
    rows = datasets.Dataset.from_list(docs).to_iterable_dataset(num_shards=2)
    half = split_dataset_by_node(rows, rank=0, world_size=2)
    with pytest.raises(UnsupportedError, match="Pass the data set as it was before the split"):
        PackedStream(half, 64, rank=0, world_size=2)
    assert 0 < found_in(PackedStream(half, 64, rank=0, world_size=1)).total() < 40


@pytest.mark.parametrize("make", [PackedStream, PackedDataset])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (b"corpus", r"dataset is b'corpus' \(bytes\): pass a path, or a list of texts"),
        (
            {"train": [document(3)]},
            r"a dict with 'train': choose a split, such as dataset\[\"train\"\]",
        ),
    ],
)
def test_what_is_no_data_set_is_refused(make, dataset, message):
    with pytest.raises(ArgumentTypeError, match=message):
        make(dataset, 64)


def test_a_dictionary_of_splits_is_refused(datasets):
    rows = datasets.Dataset.from_list([document(3)])
    for make in (PackedStream, PackedDataset):
        with pytest.raises(ArgumentTypeError, match="a DatasetDict with 'train', 'test': choose"):
            make(datasets.DatasetDict({"train": rows, "test": rows}), 64)


def test_an_item_that_raises_stop_iteration_does_not_end_the_data():
    class Broken(list):
        def __getitem__(self, index):
            if index == 30:
                raise StopIteration
            return super().__getitem__(index)

    with pytest.raises(
        DataError, match=r"dataset\[30\] raised StopIteration, 70 rows before the end"
    ):
        list(PackedStream(Broken(documents([3] * 100)), 64))


def test_arrays_are_data_sets_too():
    rows = np.array(random_documents(10, 30), dtype=object)
    assert found_in(PackedStream(rows, 64)) == Counter(expected(rows.tolist()))
