"""`bench` is no package: its folder goes on the path, as `python bench/run.py` puts it there."""

import gc
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """As `run.py` does: a measurement collects garbage, and need not look at what the imports left."""
    gc.freeze()
    yield
    gc.unfreeze()
