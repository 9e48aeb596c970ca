"""Where the recorded numbers and the real data lie, and the marks of tests that need them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("ALBEF_GOLDEN", REPOSITORY.parent / "shared" / "golden" / "A"))
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


def _needs(folder: Path, meaning: str) -> Callable:
    """A mark: the test is a `reference` test and is skipped where `folder` is absent."""
    skip = pytest.mark.skipif(not folder.is_dir(), reason=f"{meaning} are not at {folder}")
    return lambda test: pytest.mark.reference(skip(test))


needs_golden = _needs(GOLDEN, "the recorded reference numbers (ALBEF_GOLDEN)")
needs_data = _needs(SHARED_DATA, "the real data sets")
