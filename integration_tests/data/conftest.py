"""Settings of the property tests."""

from __future__ import annotations

from hypothesis import settings

# Hypothesis fails an example that takes 200 ms, which on a busy machine any may.
settings.register_profile("without_deadline", deadline=None)
settings.load_profile("without_deadline")
