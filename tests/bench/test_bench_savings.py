"""The savings suite: what it refuses, how it keeps to its time, and what its tables say."""

from __future__ import annotations

import time

import pytest
import torch

from cases import savings as suite_savings
from cases import sweep
from core.counting import count
from core.rows import Row, Settings
from mirasol import Config
from report import savings as savings_tables
from report.savings import CHUNKED, CHUNKED_TTM, EVERYTHING, PRUNED, UNPRUNED

SETTINGS = Settings(device=torch.device("cpu"), effort="quick")
CONFIGS = {name: Config.preset("tiny", **changes) for name, changes in sweep.MODELS.items()}


@pytest.mark.parametrize("name", [EVERYTHING, CHUNKED, CHUNKED_TTM])
def test_a_short_clip_is_judged_against_the_reference_operators(name):
    judge = sweep._judge(CONFIGS, SETTINGS, torch.float32, 8)
    logits, latents = sweep._call(CONFIGS[name], SETTINGS, torch.float32, 8)()
    assert judge(name, [logits, latents]).problem == ""
    assert "exceeds" in judge(name, [logits, latents * 1.001]).problem
    assert "not finite" in judge(name, [logits / 0, latents]).problem


@pytest.mark.parametrize("name", [CHUNKED, CHUNKED_TTM])
def test_a_long_clip_may_not_change_its_first_chunks(name):
    judge = sweep._judge(CONFIGS, SETTINGS, torch.float32, 32)
    logits, latents = sweep._call(CONFIGS[name], SETTINGS, torch.float32, 32)()
    assert judge(name, [logits, latents]).problem == ""
    latents = latents.clone()
    latents[:, 3] += 0.01
    assert "a later chunk changes" in judge(name, [logits, latents]).problem


def test_a_longer_clip_begins_as_a_shorter_one_does():
    short, long = (sweep._inputs(CONFIGS[CHUNKED], SETTINGS, frames) for frames in (8, 16))
    assert torch.equal(long[0][:, :, :8], short[0])
    assert torch.equal(long[1][:, : short[1].shape[1]], short[1])


def test_rounds_fit_what_is_left_and_leave_time_for_longer_clips(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    lengths = (8, 16, 32)
    planned = sweep.Sweep("tiny", lengths, 100.0)
    assert planned.rounds(8) == (sweep.MOST, 0.0)
    planned.deadline = 100.0
    work = {frames: sum(planned.flops(frames).values()) for frames in lengths}
    planned.rate = work[16] / 10.0  # 16 frames take 10 seconds a pass
    rounds, once = planned.rounds(16)
    longer = work[32] / planned.rate
    assert once == pytest.approx(10.0)
    assert rounds == int((100 - 2 * longer) / 10 - 1)
    now[0] = 79.0
    assert planned.rounds(16)[0] == 1
    now[0] = 81.0
    assert planned.rounds(16)[0] == 0
    rows = planned.run(16, SETTINGS)
    assert [row.status for row in rows] == ["SKIP"] * 3
    assert all("--full runs it" in row.reason for row in rows)


def test_pruned_and_unpruned_combiner_agree_in_result_and_in_counted_work():
    rows = suite_savings._pruning("tiny", "tiny", 3, SETTINGS)
    assert {row.status for row in rows} == {"ok"}
    timed = {row.impl: row for row in rows if row.mode == "fwd"}
    assert timed[PRUNED].flops < timed[UNPRUNED].flops
    assert timed[PRUNED].error <= timed[PRUNED].allowed
    counted = [row for row in rows if row.mode == "count"]
    assert len(counted) == 4
    assert all(row.flops == row.flops_model for row in counted)


def share(layers: int | None, flops: int, part: str = "whole model") -> Row:
    name = f"Transformer, {layers} layers" if layers else "TTM"
    name += "" if part == "whole model" else ", Combiner alone"
    detail = {"frames": 128, "layers": layers, "part": part}
    return Row("savings", "TTM share 128 frames", name, mode="count", flops=flops, flops_model=flops, detail=detail)


def test_the_published_figure_stands_beside_the_depths_that_bracket_it():
    rows = [share(4, 100), share(4, 20, "Combiner"), share(6, 120), share(6, 40, "Combiner")]
    rows += [share(None, 90), share(None, 10, "Combiner")]
    (table,) = savings_tables.tables(rows)
    assert [line[4:] for line in table.rows] == [["10.0 %", "50.0 %", "18 %"], ["25.0 %", "75.0 %", "18 %"]]
    assert "between 4 layers (10.0 %) and 6 layers (25.0 %)" in table.notes[-1]


def test_a_cost_model_that_differs_fails_the_row():
    row = suite_savings._count_row("work 8 frames", EVERYTHING, "tiny", 10, 11, frames=8)
    assert row.status == "FAIL"
    assert "counted 10, the cost model says 11" in row.reason
    assert savings_tables.tables([row])[0].rows[0][-1] == "DIFFER"


def test_cheap_combiners_stand_beside_ttm_and_the_rest_of_the_model_is_the_same():
    rows = suite_savings._every_combiner("tiny", 16, SETTINGS)
    assert [row.status for row in rows] == ["ok"] * len(suite_savings.EVERY_COMBINER)
    for row, (_, changes) in zip(rows, suite_savings.EVERY_COMBINER.values(), strict=True):
        config = Config.preset("tiny", **changes)
        assert (row.flops, row.detail["combiner_flops"]) == count(config, 16 // config.frames_per_chunk)
    (table,) = savings_tables.tables(rows)
    by_name = {line[1]: line for line in table.rows}
    assert by_name["TTM"][-2:] == ["1.00x", "1.00x"]
    assert float(by_name["mean pooling"][-1][:-1]) < 1 < float(by_name["Transformer"][-1][:-1])


def test_headline_names_the_longest_clip_of_each_kind():
    rows = [
        Row("savings", f"{kind} {frames} frames", name, flops=flops, median_ms=ms, speedup=4.0, peak_bytes=size,
            detail={"frames": frames, "preset": preset})
        for kind, frames, preset in (("work", 16, "big"), ("work", 512, "big"), ("time", 16, "small"))
        for name, flops, ms, size in ((EVERYTHING, 100, 4.0, 100), (CHUNKED_TTM, 20, 1.0, 50))
    ]  # fmt: skip
    text = savings_tables.headline(rows)
    assert "80.0 % fewer FLOPs at 512 frames (preset big, counted)" in text
    assert "4.00x the speed with 50.0 % less memory at 16 frames (preset small, measured)" in text
