"""Rows of a step dealt to ranks: the same rows, in equal work."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from streams import documents
from torch.utils.data import BatchSampler, SequentialSampler

from barqtrain_hf.data import PackedDataset
from barqtrain_hf.data.ranks import BalancedBatches

RANKS, ACCUMULATION = 4, 3


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_has_the_rows_it_had_and_ranks_take_equally_long(size):
    lengths = np.random.default_rng(2).integers(1, 256, 700).tolist()
    packed = PackedDataset(documents(lengths), 256)
    costs = packed.costs(64)
    sizes = packed[5]["seq_lengths"]
    assert costs[5] == (sizes * (sizes + 64)).sum()

    def steps(balanced):
        """The rows of every rank in every step."""
        batches = BatchSampler(SequentialSampler(packed), size, drop_last=False)
        if balanced:
            batches = BalancedBatches(batches, packed, RANKS, ACCUMULATION, 64)
        assert batches.batch_size == size and len(batches) == -(-len(packed) // size)
        shards = [list(BatchSamplerShard(batches, RANKS, rank)) for rank in range(RANKS)]
        starts = range(0, len(shards[0]), ACCUMULATION)
        return [[list(chain(*s[at : at + ACCUMULATION])) for s in shards] for at in starts]

    before, after = steps(False), steps(True)
    assert after == steps(True)
    assert set(chain(*chain(*after))) == set(range(len(packed)))
    spread = {}
    for name, found in (("before", before), ("after", after)):
        work = [[costs[rows].sum() for rows in step] for step in found[:-1]]
        spread[name] = sum(max(step) - min(step) for step in work)
    for mine, theirs in zip(before[:-1], after[:-1], strict=True):
        assert Counter(chain(*mine)) == Counter(chain(*theirs))
        assert {len(rows) for rows in theirs} == {size * ACCUMULATION}
    assert spread["after"] < spread["before"] / 4
