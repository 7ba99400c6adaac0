"""The decode's step beside plain PyTorch's: every variant right, and shown by token."""

from __future__ import annotations

import pytest
import torch

from cases import decode as suite_decode
from core.rows import Row, Settings
from mirasol import Config
from mirasol.layers import init_weights
from mirasol.text import TextDecoder
from peers.decode import PlainDecoder
from tolerance import assert_close

SETTINGS = Settings(device=torch.device("cpu"), effort="quick")


@pytest.mark.parametrize("functions", [False, True])
def test_the_peer_is_the_same_decoder(functions):
    torch.manual_seed(0)
    config = Config.preset("tiny", cross_every=2)
    decoder = TextDecoder(config).apply(init_weights).requires_grad_(False).double()
    text, latents = torch.randint(0, 256, (2, 5)), torch.randn(2, 8, config.av_dim, dtype=torch.float64)
    step = PlainDecoder(decoder, latents, 9, functions)
    assert_close(
        "logits", torch.cat([step(token) for token in text.split(1, 1)], 1), decoder(text, latents), rtol=1e-10
    )


def test_every_case_is_right_and_timed():
    for case in suite_decode.cases(SETTINGS):
        rows = case.run(SETTINGS)
        for row in rows:
            assert row.status == "ok", row.reason
            assert row.error is not None
            assert row.error <= row.allowed
        (table,) = suite_decode.tables(rows)
        assert len(table.rows) == len(rows)


def test_times_are_shown_by_token():
    row = Row("decode", "step, tiny", suite_decode.OURS, mode="step", role="ours", shape="1 row")
    row.n, row.median_ms, row.p20_ms, row.p80_ms = 3, 6.4, 3.2, 9.6
    row.speedup, row.speedup_p20, row.speedup_p80, row.detail = 0.8, 0.7, 0.9, {"calls": 32}
    (table,) = suite_decode.tables([row])
    assert table.rows[0][2] == "200 (100–300)"
    assert suite_decode.headline([row]) == "A step's time over plain PyTorch's: 1.25 (tiny)"
