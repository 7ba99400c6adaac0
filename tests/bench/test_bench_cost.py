"""The analytic cost model against the FLOP counter: equal to the last operation."""

from __future__ import annotations

import random
from typing import Any, get_args

import pytest

from core.counting import count
from mirasol import Config, cost
from mirasol.config import CombinerKind
from mirasol.past import Reach

COMBINERS = get_args(CombinerKind)
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
    dict(combiner="ttm", ttm_groups=2, ttm_positions=False),
    dict(combiner="ttm", ttm_groups=4, ttm_write="erase_add"),
    dict(combiner="ttm", ttm_groups=2, ttm_summary="latent_query", ttm_process="mixer"),
    dict(combiner="ttm", ttm_groups=2, ttm_summary="mean", ttm_process="mlp"),
    dict(tube_merge=((1, 2, 2), (1, 1, 1))),
    dict(tube_merge=((1, 1, 2), (4, 1, 1)), combiner="mean"),
    dict(tube_kernels="interpolated", tube_kernel_size=(4, 6, 6)),
    dict(cross_every=3, text_layers=5),
    dict(combiner_window=9, av_window=1, av_layers=3),
    dict(combiner_window=1, combiner_sinks=1, av_window=2, av_sinks=1, text_window=1, text_sinks=1),
    dict(reconstruction_target="features", combiner="none", av_causal=False),
    dict(combiner="ttm", ttm_memory=48, ttm_read=8, ttm_hidden=24, ttm_positions=False),
]


def assert_equal_to_the_counter(
    config: Config, chunks: int, text_tokens: int, modes: tuple[bool, ...] = (False, True)
) -> None:
    for training in modes:
        model = cost.model(config, chunks, text_tokens, losses=training)
        assert count(config, chunks, text_tokens, training=training) == (model.total, model.combiner)


@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("chunks", [1, 4])
def test_tiny(combiner, chunks):
    assert_equal_to_the_counter(Config.preset("tiny", combiner=combiner), chunks, 7)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_options(changes):
    assert_equal_to_the_counter(Config.preset("tiny", **changes), 3, 3, modes=(True,))


@pytest.mark.parametrize("preset", ["small", "mirasol-3b"])
@pytest.mark.parametrize("combiner", ["transformer", "ttm"])
def test_presets_at_128_frames(preset, combiner):
    assert_equal_to_the_counter(Config.preset(preset, combiner=combiner), 16, 64, modes=(True,))


def test_any_choices_together():
    draw = random.Random(0)
    choices: dict[str, list[Any]] = {
        "combiner": list(COMBINERS),
        "combiner_layers": [1, 3],
        "combiner_window": [None, 1, 2],
        "combined_tokens": [1, 4],
        "combiner_heads": [2, 16],
        "ttm_groups": [1, 2, 4],
        "ttm_summary": ["token_learner", "latent_query", "mean"],
        "ttm_write": ["summary", "erase_add"],
        "ttm_process": ["transformer", "mixer", "mlp"],
        "ttm_layers": [1, 2],
        "ttm_time_stamps": [True, False],
        "av_window": [None, 2],
        "av_causal": [True, False],
        "tube_merge": [(), ((1, 1, 1), (2, 1, 1))],
        "share_encoders": [True, False],
        "cross_every": [1, 2, 3],
        "text_layers": [2, 3],
        "reconstruction_target": ["pixels", "features"],
        "video_weight": [1.0, 0.0],
        "mlp_ratio": [2, 4],
        "av_dim": [32, 64],
    }
    for _ in range(16):
        config = Config.preset("tiny", **{name: draw.choice(values) for name, values in choices.items()})
        case: dict[str, Any] = {name: draw.choice([True, True, False]) for name in ("video", "audio")}
        if not any(case.values()):
            case["video"] = True
        case["texts"] = draw.choice([1, 3])
        chunks, training = draw.choice([1, 2, 5]), draw.choice([True, False])
        model = cost.model(config, chunks, 7, losses=training, **case)
        found = count(config, chunks, 7, training=training, **case)
        assert found == (model.total, model.combiner), (config, chunks, training, case)


def test_a_missing_modality_is_encoded_once():
    config = Config.preset("tiny")
    with_all, without = (cost.model(config, 16, 0, audio=audio) for audio in (True, False))
    assert with_all.audio == 16 * without.audio
    assert with_all.video == without.video


def test_a_training_step_is_three_forward_passes_with_their_losses():
    config = Config.preset("tiny", combiner="ttm")
    assert cost.training(config, 4, 9, texts=3) == 3 * count(config, 4, 9, texts=3, training=True)[0]
    one, two = (cost.training(config, 4, 9, clips=clips) for clips in (1, 2))
    assert two == 2 * one == 2 * cost.training(config, 4, 9, texts=1)


def test_no_text_no_decoder():
    assert_equal_to_the_counter(Config.preset("tiny"), 2, 0)


@pytest.mark.parametrize(
    ("window", "sinks"), [(None, 0), (1, 0), (2, 0), (3, 0), (9, 0), (1, 1), (2, 2), (3, 4), (1, 9)]
)
def test_chunk_pairs_by_enumeration(window, sinks):
    chunks, queries, keys = 5, 3, 4
    seen = [
        (c, key)
        for c in range(chunks)
        for _ in range(queries)
        for key in range(chunks * keys)
        if key // keys <= c and (window is None or key // keys > c - window or key // keys < sinks)
    ]
    assert cost.chunk_pairs(chunks, queries, keys, Reach(window, sinks)) == len(seen)


def test_pruning_saves_what_its_formula_says():
    config = Config.preset("tiny", combiner_layers=3)
    chunks, d, n, m = 4, config.combiner_dim, config.tokens_per_chunk, config.combined_tokens
    rows, pairs = chunks * (n - m), cost.chunk_pairs(chunks, n - m, n)
    expected = cost.linear(rows, d, 2 * d) + cost.linear(rows, d, 2 * config.mlp_ratio * d) + cost.attention(pairs, d)
    saved = cost.transformer_combiner(config, chunks, pruned=False) - cost.transformer_combiner(config, chunks)
    assert saved == expected
