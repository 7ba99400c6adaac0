"""What models cost with every Combiner: counted as they run, equal to the cost model, and as it was reviewed."""

from __future__ import annotations

import pytest
import torch

from cases.footprint import EVERY_COMBINER
from core.counting import TEXT_TOKENS, count
from mirasol import Config, cost

PRESETS = ("small", "mirasol-3b")
CHUNKS = 16
COUNTED = 3
"""Chunks of what is counted as it runs: as good as any number, and soon done."""


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_costs_what_was_reviewed(preset: str, figures) -> None:
    found = {}
    for name, (_, changes) in EVERY_COMBINER.items():
        config = Config.preset(preset, **changes)
        forward = cost.model(config, CHUNKS, TEXT_TOKENS)
        grown, bounded = cost.stream(config, CHUNKS), cost.stream(config, CHUNKS, memory=CHUNKS)
        assert grown == bounded
        found |= {
            f"{name}: FLOPs of a forward pass": forward.total,
            f"{name}: of the Combiner": forward.combiner,
            f"{name}: of a training step": cost.training(config, CHUNKS, TEXT_TOKENS),
            f"{name}: parameters": cost.parameters(config).total,
            f"{name}: bytes of a training step": cost.peak(config, CHUNKS, TEXT_TOKENS, dtype=torch.bfloat16),
            f"{name}: bytes of a stream": bounded.total,
        }
    figures(f"preset {preset}, {CHUNKS} chunks", found)


@pytest.mark.parametrize("name", EVERY_COMBINER)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_runs_as_many_operations_as_the_cost_model_says(preset: str, name: str) -> None:
    config = Config.preset(preset, **EVERY_COMBINER[name][1])
    said = cost.model(config, COUNTED, TEXT_TOKENS, losses=True)
    assert count(config, COUNTED, training=True) == (said.total, said.combiner)
