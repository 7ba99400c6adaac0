"""The search for block sizes ranks what runs."""

from collections.abc import Callable

import pytest
import torch

import search_attention
from devices import DEVICE, ON_GPU
from mirasol.kernels.attention.triton import config
from mirasol.kernels.attention.triton.config import FORWARD, Config


def test_the_search_ranks_what_runs():
    """A timer that counts rows stands in for a GPU's."""
    problem = search_attention.Problem(1, 1, 2, 32, 16, torch.float32)
    tried = [None, Config(16, 16, 4), Config(32, 32, 4), Config(24, 16, 4)]  # the last is no power of two: it fails

    def timer(call: Callable[[], object]) -> float:
        call()
        pinned = config._pinned.get(FORWARD)
        return 1.0 / pinned.block_m if pinned else 2.0

    found = search_attention.search(problem, FORWARD, tried, timer, str(DEVICE))
    assert [row.block_m if row else None for _, row in found] == [32, 16, None]


@pytest.mark.skipif(ON_GPU, reason="says what happens without a GPU")
def test_the_search_needs_a_gpu(capsys):
    assert search_attention.main([]) == 1
    assert "needs a GPU" in capsys.readouterr().err
