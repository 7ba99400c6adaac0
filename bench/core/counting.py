"""FLOPs of a model as it runs, by `torch.utils.flop_counter` on meta tensors: no weights, no data, any size."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from mirasol import Config, Model
from mirasol.combiner import COMBINERS

TEXT_WORDS = 256
TEXT_TOKENS = 342
"""Of so many words, at 4 / 3 a word: what vocabularies of 32 to 128 thousand subwords need for English."""


@lru_cache(maxsize=8)
def _model(config: Config, make: Callable[[Config], Model]) -> Model:
    with torch.device("meta"):
        return make(config).requires_grad_(False)  # the counter stumbles over a parameter that is handed on


@lru_cache(maxsize=256)
def count(
    config: Config,
    chunks: int,
    text_tokens: int = TEXT_TOKENS,
    *,
    texts: int = 1,
    video: bool = True,
    audio: bool = True,
    training: bool = False,
    make: Callable[[Config], Model] = Model,
) -> tuple[int, int]:
    """FLOPs of one clip's forward pass, in eval or in training mode: of the whole model, and of its Combiner.

    Args:
        make: what makes the model.
    """
    frames, side = chunks * config.frames_per_chunk, config.image_size
    clip = torch.empty(1, 3, frames, side, side, dtype=torch.uint8, device="meta")
    sound = torch.empty(1, chunks * config.samples_per_chunk, device="meta")
    text = torch.empty(texts, text_tokens, dtype=torch.int64, device="meta") if text_tokens else None
    about = torch.zeros(texts, dtype=torch.int64, device="meta") if texts > 1 else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _model(config, make).train(training)(
            clip if video else None, sound if audio else None, text, clip_of_text=about
        )
    return counter.get_total_flops(), sum(counter.get_flop_counts()["Model.combiner"].values())


def count_combiner(config: Config, chunks: int) -> int:
    """FLOPs of the Combiner alone."""
    with torch.device("meta"):
        module = COMBINERS[config.combiner](config).requires_grad_(False)
        x = torch.empty(1, chunks, config.tokens_per_chunk, config.combiner_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops()
