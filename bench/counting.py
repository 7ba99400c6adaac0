"""FLOPs of a model as it runs, by `torch.utils.flop_counter` on meta tensors: no weights, no data, any size."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from mirasol import Config, Model

TEXT_TOKENS = 64


@lru_cache(maxsize=8)
def _model(config: Config) -> Model:
    with torch.device("meta"):
        return Model(config).eval()


@lru_cache(maxsize=256)
def count(config: Config, chunks: int, text_tokens: int = TEXT_TOKENS) -> tuple[int, int]:
    """FLOPs of one clip's forward pass in eval mode: of the whole model, and of its Combiner."""
    video = torch.empty(
        1, 3, chunks * config.frames_per_chunk, config.image_size, config.image_size, dtype=torch.uint8, device="meta"
    )
    audio = torch.empty(1, chunks * config.samples_per_chunk, device="meta")
    text = torch.empty(1, text_tokens, dtype=torch.int64, device="meta") if text_tokens else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _model(config)(video, audio, text)
    return counter.get_total_flops(), sum(counter.get_flop_counts()["Model.combiner"].values())
