"""The savings suite: what it refuses, how it keeps to its time, and what its tables say."""

from __future__ import annotations

import time
from typing import get_args

import pytest
import torch

from cases import footprint, sweep
from cases import savings as suite_savings
from cases.footprint import EVERY_COMBINER
from cases.sweep import Point
from core.counting import TEXT_TOKENS, count
from core.harness import Comparison, Verdict, compare
from core.rows import Row, Settings
from mirasol import Config, Model, cost
from mirasol.config import CombinerKind
from peers import everything
from report import savings as savings_tables
from report.savings import CHUNKED, CHUNKED_TTM, EVERYTHING, PRUNED, RESAMPLED, UNPRUNED

SETTINGS = Settings(device=torch.device("cpu"), effort="quick")
CONFIGS = {name: Config.preset("tiny", **changes) for name, changes in sweep.MODELS.items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("clips", [1, 2])
def test_a_short_clip_is_judged_against_the_reference_operators(name, clips):
    point = Point(8, clips)
    judge = sweep._judge(CONFIGS, SETTINGS, torch.float32, point)
    logits, latents = sweep._call(CONFIGS[name], SETTINGS, torch.float32, point)()
    assert logits.shape[0] == latents.shape[0] == clips
    assert judge(name, [logits, latents]).problem == ""
    assert "exceeds" in judge(name, [logits, latents * 1.001]).problem
    assert "not finite" in judge(name, [logits / 0, latents]).problem


@pytest.mark.parametrize("name", [CHUNKED, CHUNKED_TTM])
def test_a_long_clip_may_not_change_its_first_chunks(name):
    judge = sweep._judge(CONFIGS, SETTINGS, torch.float32, Point(32))
    logits, latents = sweep._call(CONFIGS[name], SETTINGS, torch.float32, Point(32))()
    assert judge(name, [logits, latents]).problem == ""
    latents = latents.clone()
    latents[:, 3] += 0.01
    assert "a later chunk changes" in judge(name, [logits, latents]).problem


def test_clips_differ_and_a_longer_clip_begins_as_a_shorter_one_does():
    short, long = (sweep._inputs(CONFIGS[CHUNKED], SETTINGS, Point(frames, 2)) for frames in (8, 16))
    assert torch.equal(long[0][:, :, :8], short[0])
    assert torch.equal(long[1][:, : short[1].shape[1]], short[1])
    assert all(not torch.equal(each[0], each[1]) for each in short)


def test_a_point_that_does_not_fit_is_skipped_and_none_is_timed_fewer_times(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    planned = sweep.Sweep("tiny", 100.0)
    point = Point(16)
    assert planned.once(point) == 0.0
    planned.deadline, planned.rate = 100.0, sum(point.flops(config) for config in CONFIGS.values()) / 10.0
    assert planned.once(point) == pytest.approx(10.0)
    assert planned.once(Point(16, 3)) == pytest.approx(30.0)
    assert planned.once(Point(16, 1, "step")) > 30.0
    taken = []
    monkeypatch.setattr(sweep, "compare", lambda comparison, settings: taken.append(comparison) or [])
    now[0] = 19.0  # one pass is judged, seven are timed, 10 seconds each
    assert planned.run(point, Settings(device=torch.device("cpu"))) == []
    assert taken[0].rounds[0] == 7
    assert not taken[0].warm_up
    now[0] = 21.0
    rows = planned.run(point, SETTINGS)
    assert [row.status for row in rows] == ["SKIP"] * len(CONFIGS)
    assert all("--full runs it" in row.reason for row in rows)


def test_nothing_is_timed_fewer_than_seven_times():
    comparison = Comparison("suite", "case", [], lambda name, found: Verdict(), "", rounds=(6, 9, 1.0))
    with pytest.raises(ValueError, match="7 times at least, was 6"):
        compare(comparison, Settings(device=torch.device("cpu")))
    assert compare(comparison, SETTINGS) == []


def test_training_steps_of_every_model_are_timed_and_hold_what_is_predicted():
    rows = sweep.Sweep("tiny", 100.0).run(Point(16, 2, "step"), SETTINGS)
    assert [row.status for row in rows] == ["ok"] * len(CONFIGS)
    for row in rows:
        config = CONFIGS[row.impl]
        assert row.flops == everything.step_flops(config, 4, TEXT_TOKENS, clips=2)
        assert row.peak_bytes == pytest.approx(row.detail["predicted_bytes"], rel=0.1)
    times, peaks = savings_tables.tables(rows)
    assert times.rows[0][0] == peaks.rows[0][0] == "16 x 2"
    assert len(times.rows[0]) == 1 + 5 + 4 + 1


def test_a_perceiver_over_the_whole_clip_sees_all_of_it_and_costs_what_is_said():
    config = CONFIGS[RESAMPLED]
    torch.manual_seed(0)
    model = everything.build(config).eval()
    assert type(model.combiner) is everything.ClipResampler
    x = torch.randn(1, 3, config.tokens_per_chunk, config.combiner_dim)
    changed = x.clone()
    changed[:, 2] += 1.0
    with torch.no_grad():
        first, other = model.combiner(x), model.combiner(changed)
    assert first.shape == (1, 3, config.latents_per_chunk, config.av_dim)
    assert not torch.allclose(first[:, 0], other[:, 0])  # the last chunk changes what is made of the first
    assert not torch.allclose(first[:, 0], first[:, 1])
    for chunks in (1, 5):
        assert count(config, chunks, 9, make=everything.build)[0] == everything.forward_flops(config, chunks, 9)
        trained = count(config, chunks, 9, training=True, make=everything.build)[0]
        assert everything.step_flops(config, chunks, 9, clips=2) == 2 * 3 * trained
    plain = Config.preset("tiny", combiner="perceiver")
    assert everything.forward_flops(plain, 5, 9) == count(plain, 5, 9)[0]


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
    (row,) = (row for row in suite_savings._work("tiny", 8, SETTINGS) if row.impl == EVERYTHING)
    row.flops_model += 1
    assert savings_tables.tables([row])[0].rows[0][-1] == "DIFFER"


def test_cheap_combiners_stand_beside_ttm_and_the_rest_of_the_model_is_the_same():
    rows = suite_savings._every_combiner("tiny", 16, SETTINGS)
    assert [row.status for row in rows] == ["ok"] * len(EVERY_COMBINER)
    for row, (_, changes) in zip(rows, EVERY_COMBINER.values(), strict=True):
        config = Config.preset("tiny", **changes)
        chunks = 16 // config.frames_per_chunk
        assert (row.flops, row.detail["combiner_flops"]) == count(config, chunks)
        assert row.detail["step_flops"] == 3 * count(config, chunks, training=True)[0]
        assert sum(row.detail["parameters"].values()) == Model(config).num_parameters()["total"]
    (table,) = savings_tables.tables(rows)
    by_name = {line[1]: line for line in table.rows}
    assert by_name["TTM"][-3:] == ["1.00x", "1.00x", "0.0 %"]
    assert float(by_name["mean pooling"][-3][:-1]) < 1 < float(by_name["Transformer, 6 layers"][-3][:-1])


def test_every_combiner_is_there_in_every_form():
    kinds = {(changes["combiner"], changes.get("ttm_official", False)) for _, changes in EVERY_COMBINER.values()}
    assert kinds == {(kind, False) for kind in get_args(CombinerKind)} | {("ttm", True)}
    depths = {
        (c["combiner_layers"], c["combiner_window"])
        for _, c in EVERY_COMBINER.values()
        if "combiner_window" in c and c["combiner"] == "transformer"
    }
    assert depths == {(layers, window) for layers in (1, 4, 6) for window in (None, 1)}


def test_memory_is_predicted_for_every_combiner_and_only_what_is_causal_streams():
    rows = footprint._predict("tiny", 16, SETTINGS)
    (table,) = savings_tables.tables(rows)
    lines = {line[0]: line for line in table.rows}
    assert set(lines) == {EVERYTHING, *EVERY_COMBINER}
    assert "cannot stream" in lines[EVERYTHING]
    found = {row.impl: row.detail for row in rows}
    for name, (_, changes) in EVERY_COMBINER.items():
        config, detail = Config.preset("tiny", **changes), found[name]
        assert detail["step_bytes"] == cost.peak(config, 4, TEXT_TOKENS, dtype=torch.bfloat16)
        assert detail["stream"]["combiner_a_chunk"] == 0 or "all earlier chunks" in detail["sees"]
        plain, checkpointed = detail["trained"]["24 GB"]
        assert 0 < plain < checkpointed
    assert found["TTM"]["stream"]["a_chunk"] > 0  # what comes behind the Combiner grows with TTM too


def test_memory_that_is_not_as_predicted_fails_its_row(monkeypatch):
    row = footprint._measure("TTM", True, SETTINGS)
    assert row.status == "ok"
    assert row.peak_bytes == pytest.approx(row.detail["predicted_bytes"], rel=0.1)
    assert footprint._measure("mean pooling", False, SETTINGS).status == "ok"
    right = cost.peak
    monkeypatch.setattr(cost, "peak", lambda *args, **options: 2 * right(*args, **options))
    row = footprint._measure("TTM", True, SETTINGS)
    assert (row.status, "the cost model says" in row.reason) == ("FAIL", True)
    monkeypatch.undo()
    monkeypatch.setattr(footprint, "STREAMED", 16)
    stream = cost.stream
    monkeypatch.setattr(cost, "stream", lambda config, chunks, **options: stream(config, 2 * chunks, **options))
    assert "a stream keeps" in footprint._measure("attention pooling", False, SETTINGS).reason


def test_a_case_that_raises_leaves_the_tables_standing():
    fine = suite_savings._work("tiny", 8, SETTINGS)
    failed = Row("savings", "work 16 frames", "", status="FAIL", reason="broken")
    tables = savings_tables.tables([*fine, failed])
    assert [line[0] for line in tables[0].rows] == ["8"]
    assert "broken" in tables[-1].rows[0][0]


def test_headline_names_the_longest_clip_of_each_kind():
    rows = [
        Row("savings", f"{kind} {frames} frames", name, flops=flops, median_ms=ms, speedup=4.0, peak_bytes=size,
            detail={"frames": frames, "preset": preset})
        for kind, frames, preset in (("work", 16, "big"), ("work", 512, "big"), ("time", 16, "small"))
        for name, flops, ms, size in ((EVERYTHING, 100, 4.0, 100), (CHUNKED_TTM, 20, 1.0, 50))
    ]  # fmt: skip
    text = savings_tables.headline(rows)
    assert "80.0 % fewer FLOPs at 512 frames (preset big, counted)" in text
    assert "4.00x the speed at 16 frames (preset small, measured)" in text
