"""What several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the recordings and photos of real people; COPRESENCE_DATA, or ../shared/data beside the checkout. Skips without it."""
    root = Path(os.environ.get("COPRESENCE_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (root / "words").is_dir():
        pytest.skip(f"no recordings of real people in {root}; set COPRESENCE_DATA to their folder")
    return root
