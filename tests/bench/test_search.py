"""The search for block sizes ranks what runs and gives what the computed configuration gives, within its time."""

from __future__ import annotations

import itertools
import json
import time

import pytest
import torch

from devices import DEVICE, ON_GPU
from mirasol.kernels import chunked_attention
from mirasol.kernels.attention.triton import config
from mirasol.kernels.attention.triton.config import FORWARD, Config, pinned
from mirasol.kernels.combiner.triton.config import ForwardConfig
from mirasol.kernels.ttm.pool.triton.config import Block
from tune import search
from tune.search import Task


def attention(*candidates: Config) -> Task:
    q, k, v = torch.randn(3, 1, 1, 64, 16, device=DEVICE)

    def call():
        return chunked_attention(q, k, v, q_chunk=32, backend="triton")

    return Task("attention", call, candidates, lambda found: pinned(**{FORWARD: found}))


def test_the_search_ranks_what_runs():
    """A timer that counts rows stands in for a GPU's."""

    def timer(call):
        call()
        found = config._pinned.get(FORWARD)
        return 1.0 / found.block_m if found else 2.0

    tried = Config(16, 16, 4), Config(32, 32, 4), Config(24, 16, 4)  # the last is no power of two: it fails
    result = search.search(attention(*tried), timer, time.monotonic() + 100)
    assert [row["config"]["block_m"] for row in result["best"]] == [32, 16]
    assert (result["computed_ms"], result["tried"], result["of"]) == (2.0, 3, 3)
    assert len(result["refused"]) == 1
    assert "block_m=24" in result["refused"][0]


def test_other_results_are_refused():
    calls = itertools.count()
    task = Task(
        "drifting", lambda: torch.full((2,), float(next(calls))), [Block(64, 64, 4, 1)], search._ttm_pin("pool")
    )
    result = search.search(task, lambda call: 1.0, time.monotonic() + 100)
    assert result["best"] == []
    assert "other results" in result["refused"][0]


def test_time_is_shared_and_results_are_written(tmp_path):
    blocks = [Block(64, 64, 4, stages) for stages in range(100)]
    tasks = [Task(name, lambda: torch.ones(1), blocks, search._ttm_pin("pool")) for name in ("one", "two")]

    def timer(call):
        time.sleep(0.01)
        return 1.0

    results = search.run(tasks, timer, 0.3, tmp_path / "out" / "found.json")
    assert all(2 <= result["tried"] < 40 for result in results)
    written = json.loads((tmp_path / "out" / "found.json").read_text())
    assert [task["task"] for task in written["tasks"]] == ["one", "two"]
    assert "cpu" in written["machine"]
    assert search.run(tasks, timer, 0.0, None) == []


def test_pins_reach_the_kernels():
    with search._ttm_pin("pool")(Block(32, 64, 4, 1)):
        assert search.ttm.config(32, 64, 768, 2, config_target()).pool == Block(32, 64, 4, 1)
    with search._combiner_pin(ForwardConfig(64, 64, 32, 4, 2)):
        assert search.combiner.forward_config(1, 1, 2, True, config_target()) == ForwardConfig(64, 64, 32, 4, 2)
    assert search.ttm.config(32, 64, 768, 2, config_target()).pool != Block(32, 64, 4, 1)


def config_target():
    from mirasol.kernels.core.device import target

    return target(torch.device(DEVICE))


def test_every_kernel_and_block_has_a_task():
    names = [task.name for task in search.attention_tasks("meta")]
    assert len(names) == len(set(names)) == 12
    blocks = [task.name for task in search.block_tasks("meta")]
    assert {"ttm read pool", "ttm write weights", "combiner forward"} <= set(blocks)
    assert all(task.candidates for task in search.block_tasks("meta"))
    pooling = [name for name in blocks if name.startswith("ttm")]
    assert len(pooling) == 10, "five blocks, of a read and of a write; the step is no block"


@pytest.mark.skipif(ON_GPU, reason="says what happens without a GPU")
def test_the_search_needs_a_gpu(capsys):
    assert search.main(["attention"]) == 1
    assert "needs a GPU" in capsys.readouterr().err
