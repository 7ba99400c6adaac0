"""The training step beside mirasol-pytorch: alike where it says so, judged before it is timed, missed loudly."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from cases import step as suite_step
from cases.step import DEFAULT, SMALL, TRANSFORMER, TTM, Step
from core.harness import Unavailable
from core.rows import Row, Settings
from mirasol import Model
from peers import mirasol_pytorch
from peers.mirasol_pytorch import QUICK, Setting

SETTINGS = Settings(device=torch.device("cpu"), effort="quick")


@pytest.mark.parametrize("combiner", ["transformer", "ttm"])
def test_ours_has_the_peers_tokens_and_depths(combiner):
    at = Setting()
    config = mirasol_pytorch.config(at, 8, combiner)
    patches = (at.size // mirasol_pytorch.PATCH) ** 2 * (mirasol_pytorch.FRAMES // mirasol_pytorch.DEPTH)
    bins, frames = mirasol_pytorch.MEL_PATCH
    assert config.video_tokens == patches == 128
    assert config.audio_tokens == mirasol_pytorch.MELS // bins * (at.chunks // frames) == 64
    assert config.samples_per_chunk // config.hop == at.chunks  # frames of the spectrogram
    assert (config.combiner_layers, config.combiner_window, config.latents_per_chunk) == (at.combiner, 1, 8)


def test_without_the_peer_its_rows_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mirasol_pytorch", None)
    case, several = suite_step.cases(SETTINGS)
    rows = {row.impl: row for row in case.run(SETTINGS)}
    for name in (SMALL, DEFAULT):
        assert rows[name].status == "SKIP"
        assert "pip install -c constraints.txt -e '.[peers]'" in rows[name].reason
    for name in (TRANSFORMER, TTM):
        row = rows[name]
        assert row.status == "ok", row.reason
        assert row.flops
        assert row.detail["held_bytes"] == 12 * row.detail["parameters"]
        assert row.peak_bytes is not None
        assert row.peak_bytes > 4 * row.detail["parameters"]  # the gradients at least
    more = {row.impl: row for row in several.run(SETTINGS)}
    assert more[TTM].flops == 2 * rows[TTM].flops
    assert [line[1] for line in suite_step.tables([rows[TTM], more[TTM]])[0].rows] == ["1", "2"]
    assert "SKIP 3 combined tokens" in "".join(suite_step.tables(list(rows.values()))[0].notes)


@pytest.mark.slow
def test_the_peer_itself(skip_loudly):
    try:
        model = mirasol_pytorch.peer(QUICK, 3, small=True)
    except Unavailable as why:
        skip_loudly("a training step of mirasol-pytorch", str(why))
    heads = sum(
        p.numel()
        for name in ("to_encoder_next_token_pred", "to_reconstructed_video", "to_reconstructed_audio")
        for p in getattr(model, name).parameters()
        if p.ndim == 2
    )
    assert heads == mirasol_pytorch.peer_heads(QUICK, 3, True)
    clip = mirasol_pytorch.peer_inputs(QUICK)
    step = Step(model, lambda: model(**clip))
    for _ in range(3):
        step()
    assert step.verdict().problem == ""


def test_a_step_that_learns_nothing_is_not_timed():
    model = Model(mirasol_pytorch.config(QUICK, 3, "transformer"))
    clip = mirasol_pytorch.inputs(QUICK, model.config)
    frozen = Step(model, lambda: model.text_decoder.embedding(clip["text"]).square().sum())
    frozen()
    assert "no gradient reaches" in frozen.verdict().problem
    layer = nn.Linear(1, 1)
    rising = Step(layer, lambda: sum(p.sum() for p in layer.parameters()))  # type: ignore[arg-type, return-value]
    rising.optimizer.param_groups[0]["lr"] = -1.0
    rising()
    assert "the loss went from" in rising.verdict().problem


def test_a_form_that_does_not_fit_is_not_tried():
    with pytest.raises(Unavailable, match="need 1000 GB"):
        suite_step._expect_room(10**12, SETTINGS)
    suite_step._expect_room(10**6, SETTINGS)


def test_the_headline_is_against_the_faster_form():
    rows = [Row("step", "8 combined tokens", TTM, mode="step", role="ours", best_peer=SMALL, against_best=1.6)]
    assert "1.60x (8 combined tokens, TTM)" in suite_step.headline(rows)
    assert suite_step.headline([]) == ""
