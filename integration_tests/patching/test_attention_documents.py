"""Which documents attention finds in masks, position_ids and cu_seq_lens, and what is kept of them."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from packed import CU_SEQLENS, LENGTHS, ONLY_ATTENTION, POSITIONS, asked_for, eager
from side_by_side import batch
from transformers import masking_utils
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from barqtrain_hf import patch_model
from barqtrain_hf.errors import UnsupportedError
from barqtrain_hf.ops import flash_attention
from barqtrain_hf.patching import attention_interface, attention_mask, documents, register_attention


def test_masks_of_other_patterns_are_made() -> None:
    ours = asked_for("mistral_window", sliding_window=5, attention_chunk_size=4).config
    stock = copy.deepcopy(ours)
    stock._attn_implementation = "sdpa"
    x = torch.zeros(2, 9, 32)
    given: dict[str, Any] = {"inputs_embeds": x, "attention_mask": None, "past_key_values": None}
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1]] * 2)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])

    def other(b: Any, h: Any, q: Any, k: Any) -> Any:
        return k == 3

    for make, options in (
        (create_causal_mask, {"or_mask_function": other}),
        (create_causal_mask, {"and_mask_function": other}),
        (create_causal_mask, {"block_sequence_ids": blocks}),
        (create_causal_mask, {"block_sequence_ids": blocks, "position_ids": positions}),
        (create_causal_mask, {"allow_is_causal_skip": False}),
        (create_sliding_window_causal_mask, {"or_mask_function": other}),
        (create_sliding_window_causal_mask, {"allow_is_causal_skip": False}),
        (create_chunked_causal_mask, {}),
        (create_chunked_causal_mask, {"position_ids": positions}),
    ):
        found = make(ours, **given, **options)
        assert torch.equal(found, make(stock, **given, **options)), (make, options)
        assert found.dtype is torch.bool
    assert create_causal_mask(ours, **given) is None
    for make in (create_causal_mask, create_sliding_window_causal_mask):
        found = make(ours, **given, position_ids=positions)
        assert found.dtype is torch.int32 and found.untyped_storage().nbytes() <= 2 * 9 * 8
        assert documents.numbers_of(found).tolist() == [[0] * 4 + [1] * 5] * 2


def test_what_is_known_of_a_batch_goes_with_it() -> None:
    positions = POSITIONS.clone()
    first = documents.boundaries(positions, 1, 1)
    assert first is documents.boundaries(positions, 1, 1)
    assert first.tolist() == CU_SEQLENS.tolist()  # type: ignore[union-attr]
    positions[0, 1:13] = 0  # written to: known no more
    assert len(documents.boundaries(positions, 1, 1)) > 5  # type: ignore[arg-type]
    cu_q, cu_k = CU_SEQLENS.clone(), CU_SEQLENS.clone()
    assert documents.given(cu_q, cu_k, torch.device("cpu")) is cu_q
    cu_k[1] += 1
    assert isinstance(documents.given(cu_q, cu_k, torch.device("cpu")), str)
    view = cu_q[:]  # which keeps cu_q alive
    assert documents.given(cu_q, view, torch.device("cpu")) is cu_q
    alive = [weakref.ref(tensor) for tensor in (positions, cu_q, cu_k, view)]
    del positions, cu_q, cu_k, view
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def assert_apart(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> None:
    """Rows of `LENGTHS` are as their documents alone."""
    logits, alone = model(ids, position_ids=positions, use_cache=False).logits, eager("llama")
    for part in torch.arange(ids.shape[1]).split(LENGTHS):
        expected = alone(ids[:, part], position_ids=positions[:, part].long()).logits
        torch.testing.assert_close(logits[:, part], expected, rtol=1e-4, atol=1e-5)


def test_positions_in_every_form() -> None:
    model, ids = asked_for("llama"), batch(2, sum(LENGTHS))["input_ids"]
    patch_model(model, ONLY_ATTENTION)
    offset = torch.cat([torch.arange(n) + o for n, o in zip(LENGTHS, (5, 2, 9, 1), strict=True)])
    for positions in (
        POSITIONS,
        POSITIONS.expand(2, -1),
        POSITIONS.int(),
        offset[None],
        torch.stack((offset, POSITIONS[0])),
        torch.stack((offset, offset), dim=1)[:, 0][None],
    ):
        # The same object for other numbers of rows, and again.
        for rows in {len(positions), 2}:
            assert_apart(model, ids[:rows], positions)
            assert_apart(model, ids[:rows], positions)


def test_positions_of_inference_mode_are_read_again() -> None:
    model, ids = asked_for("llama"), batch(1, sum(LENGTHS))["input_ids"]
    with torch.inference_mode():
        positions = torch.arange(sum(LENGTHS))[None].clone()
        model(ids, position_ids=positions, use_cache=False)
        positions.copy_(POSITIONS)
        assert_apart(model, ids, positions)


def test_what_tells_documents() -> None:
    def told_by(*shape: int) -> Any:
        return documents.source(None, 2, 9, {"position_ids": torch.zeros(shape)})

    assert told_by(1, 9)[1] == told_by(2, 9)[1] == 1
    # Of several kinds of positions, of other rows, of the tokens of a cache too.
    assert told_by(3, 2, 9) is told_by(3, 9) is told_by(2, 12) is told_by(9) is None
    ours = attention_mask.mask(2, 9, 9, mask_function=masking_utils.causal_mask_function)
    assert ours is None and documents.source(ours, 2, 9, {}) is None


def test_attention_that_is_not_causal() -> None:
    """Positions do not cut rows there, as they do not in stock; a mask that tells documents is causal."""
    module = asked_for("llama").model.layers[0].self_attn
    module.is_causal = False
    q, k, v = (torch.randn(1, heads, 7, 8) for heads in (4, 2, 2))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    expected = flash_attention(*turned, causal=False)  # type: ignore[arg-type]
    for dropout in (0.0, 1e-9):  # and stock attention in its place
        options = {"position_ids": positions, "dropout": dropout}
        found, _ = attention_interface.attention(module, q, k, v, None, **options)
        torch.testing.assert_close(found, expected)
    function = masking_utils.sliding_window_causal_mask_function(3)
    ours = attention_mask.mask(1, 7, 7, mask_function=function)
    found, _ = attention_interface.attention(module, q, k, v, ours)
    torch.testing.assert_close(found, flash_attention(*turned, window=3))  # type: ignore[arg-type]


def test_the_fewest_documents_and_the_narrowest_windows() -> None:
    two = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    assert documents.boundaries(two, 1, 1).tolist() == [0, 3, 7]  # type: ignore[union-attr]
    one_of_two = torch.cat((two, torch.arange(7)[None]))
    assert documents.boundaries(one_of_two, 1, 2).tolist() == [0, 3, 7, 14]  # type: ignore[union-attr]
    assert documents.boundaries(torch.arange(7)[None] + 3, 1, 2) is None
    for window in (1, 6, 7, 8):
        function = masking_utils.sliding_window_causal_mask_function(window)
        found = attention_mask.mask(1, 7, 7, mask_function=function)
        assert attention_mask.window_of(found) == (window if window < 7 else None)


def test_masks_beside_a_cache_are_made() -> None:
    function = masking_utils.sliding_window_causal_mask_function(3)
    given: dict[str, Any] = {"batch_size": 1, "q_length": 7, "kv_length": 7}
    given.update(mask_function=function, local_size=3)
    assert attention_mask.is_ours(attention_mask.mask(**given))
    for options in (
        {"q_offset": 4},
        {"kv_offset": 2},
        {"q_offset": torch.tensor(0)},
        {"kv_length": 9},
        {"use_vmap": True},
    ):
        found = attention_mask.mask(**{**given, **options})
        assert found is not None and found.dtype is torch.bool
        assert torch.equal(found, masking_utils.sdpa_mask(**{**given, **options}))


def test_packed_masks_of_former_releases() -> None:
    """Before transformers 5.23 they were composed the other way round, without positions."""
    numbers = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    packed = masking_utils.packed_sequence_mask_function(numbers)
    for inner, window in (
        (masking_utils.causal_mask_function, None),
        (masking_utils.sliding_window_causal_mask_function(3), 3),
    ):
        found = attention_mask.mask(
            1,
            9,
            9,
            mask_function=masking_utils.and_masks(inner, packed),
            allow_is_causal_skip=False,
        )
        assert attention_mask.is_ours(found) and attention_mask.window_of(found) == window
        assert torch.equal(documents.numbers_of(found), numbers)
    for inner in (packed, masking_utils.chunked_causal_mask_function(4, torch.zeros(1))):
        other = attention_mask.mask(1, 9, 9, mask_function=masking_utils.and_masks(inner, packed))
        assert other is None or other.dtype is torch.bool


def test_masks_of_the_first_releases_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_interface, "sdpa_mask", lambda batch_size, cache_position: None)
    with pytest.raises(UnsupportedError, match=r"as transformers 5\.4 makes them"):
        register_attention()
