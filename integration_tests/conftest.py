"""Shared by all tests: no hub, two threads, and what a GPU test needs."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from barqtrain_hf.runtime import cuda_unavailable_reason


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = cuda_unavailable_reason()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skipif(True, reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
