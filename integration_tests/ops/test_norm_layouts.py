"""How rows are spread over threads, for every row length: what the kernels take for granted."""

from __future__ import annotations

import pytest

from barqtrain_hf.ops._norm_kernels import _forward_layout, _layout

# vector length, vectors a thread may hold, threads a block should have: as the kernels are asked for.
LAYOUTS = [
    (8, 4, 128),
    (8, 2, 128),
    (4, 4, 128),
    (8, 2, 640),
    (8, 2, 512),
    (4, 4, 640),
    (4, 4, 512),
]
# kForwardThreads of norm_forward.cuh by vectors a thread holds, and what is instantiated with and without a
# residual; 0 reads the row twice.
FORWARD_THREADS = {0: 512, 1: 1024, 2: 256, 4: 512}
FORWARD_ITEMS = {False: (0, 1, 2, 4), True: (0, 1, 4)}


@pytest.mark.parametrize(("vec", "most", "threads"), LAYOUTS)
def test_every_length_fits(vec: int, most: int, threads: int) -> None:
    for dim in range(1, 20000):
        layout = _layout(dim, vec, most, threads)
        assert 0 < layout.width * layout.groups <= max(threads, 512)
        assert layout.width % 32 == 0 or 32 % layout.width == 0
        if layout.items:
            assert dim % layout.vec == 0 and layout.items in (1, 2, 4) and layout.items <= most
            assert layout.width * layout.items * layout.vec >= dim, "part of the row has no thread"
            assert layout.width <= 32 or layout.groups <= 15, "a block has 15 barriers for groups"
            # What norm_backward keeps in shared memory to add its groups.
            sums = layout.groups if layout.width >= 32 else layout.groups * layout.width // 32
            assert layout.items > 2 or sums * dim <= max(threads, 512) * layout.items * layout.vec
        else:
            assert layout.groups == 1 and layout.width >= 32


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("vec", [4, 8])
def test_every_length_fits_forward(vec: int, residual: bool) -> None:
    for dim in range(1, 20001):
        layout = _forward_layout(dim, vec, residual)
        assert layout.items in FORWARD_ITEMS[residual]
        threads = layout.width * layout.groups
        assert 0 < threads <= FORWARD_THREADS[layout.items]
        assert threads % 32 == 0, "shuffles name all lanes of a warp"
        # The block has one barrier, and warps without one sum by shuffles of a power of two.
        assert layout.groups == 1 or layout.width in (1, 2, 4, 8, 16, 32)
        assert layout.width % 32 == 0 or layout.groups > 1
        assert dim % layout.vec == 0
        if layout.items:
            # A thread has vectors lane, lane + width, ...: no two threads one, so enough are all.
            assert layout.vec == vec
            assert layout.width * layout.items * vec >= dim, "part of the row has no thread"
            assert layout.width < dim // vec + 32, "a warp has nothing to do"
        else:
            assert layout.vec == (vec if dim % vec == 0 else 1)
