"""The analytic cost model against the FLOP counter: equal to the last operation."""

from __future__ import annotations

import pytest

from counting import count
from mirasol import Config, cost

COMBINERS = ("transformer", "ttm", "mean", "none")
CHANGES = [
    dict(combiner_window=1),
    dict(combiner_window=2, av_window=2),
    dict(combiner_layers=1, combiner_dim=96, av_dim=32),
    dict(av_causal=False, mlp_ratio=2),
    dict(share_encoders=True, cross_every=2, text_dim=32),
    dict(combiner="ttm", ttm_summary="latent_query"),
    dict(combiner="ttm", ttm_summary="latent_query", combiner_heads=16),
    dict(combiner="ttm", ttm_summary="mean"),
    dict(combiner="ttm", ttm_write="erase_add"),
    dict(combiner="ttm", ttm_process="mixer", ttm_layers=2),
    dict(combiner="ttm", ttm_process="mlp"),
    dict(combiner="ttm", ttm_memory=48, ttm_read=8, ttm_hidden=24, ttm_positions=False),
]


def assert_equal_to_the_counter(config: Config, chunks: int, text_tokens: int) -> None:
    model = cost.model(config, chunks, text_tokens)
    assert count(config, chunks, text_tokens) == (model.total, model.combiner)


@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("chunks", [1, 2, 5, 16])
def test_tiny(combiner, chunks):
    assert_equal_to_the_counter(Config.preset("tiny", combiner=combiner), chunks, 7)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_options(changes):
    assert_equal_to_the_counter(Config.preset("tiny", **changes), 5, 3)


@pytest.mark.parametrize("preset", ["small", "mirasol-3b"])
@pytest.mark.parametrize("combiner", ["transformer", "ttm"])
def test_presets_at_128_frames(preset, combiner):
    assert_equal_to_the_counter(Config.preset(preset, combiner=combiner), 16, 64)


def test_no_text_no_decoder():
    assert_equal_to_the_counter(Config.preset("tiny"), 2, 0)


@pytest.mark.parametrize("window", [None, 1, 2, 3, 9])
def test_chunk_pairs_by_enumeration(window):
    chunks, queries, keys = 5, 3, 4
    seen = [
        (c, key)
        for c in range(chunks)
        for _ in range(queries)
        for key in range(chunks * keys)
        if key // keys <= c and (window is None or key // keys > c - window)
    ]
    assert cost.chunk_pairs(chunks, queries, keys, window) == len(seen)


def test_pruning_saves_what_its_formula_says():
    config = Config.preset("tiny", combiner_layers=3)
    chunks, d, n, m = 4, config.combiner_dim, config.tokens_per_chunk, config.combined_tokens
    rows, pairs = chunks * (n - m), cost.chunk_pairs(chunks, n - m, n)
    expected = cost.linear(rows, d, 2 * d) + cost.linear(rows, d, 2 * config.mlp_ratio * d) + cost.attention(pairs, d)
    saved = cost.transformer_combiner(config, chunks, pruned=False) - cost.transformer_combiner(config, chunks)
    assert saved == expected
