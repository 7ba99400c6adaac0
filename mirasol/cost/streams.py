"""What a live stream keeps, and grows by, by arithmetic over `mirasol.Config`."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from mirasol.config import Config
from mirasol.past import GROWN_BY, Reach


@dataclass(frozen=True)
class StreamState:
    """Bytes that one stream keeps of the chunks it has seen.

    Attributes:
        sound: samples that the next spectrogram reaches back to, float32.
        combiner: keys and values of tokens, or the memory of a Token Turing Machine; 0 where each chunk is alone.
        audio_video, text: keys and values of what the Combiner makes, in every layer.
        seen: the number of chunks, int64.
    """

    sound: int
    combiner: int
    audio_video: int
    text: int
    seen: int = 8

    @property
    def total(self) -> int:
        return sum(astuple(self))


def stream(
    config: Config,
    chunks: int,
    *,
    memory: int | None = None,
    sinks: int = 0,
    dtype: torch.dtype = torch.float32,
) -> StreamState:
    """What one row of `Model.stream` keeps when it has seen so many chunks.

    Parts without a window have room for 16 chunks, twice as many when these are full, and so on.

    Args:
        memory, sinks: as in `Model.stream`; without `memory`, parts without a window keep all chunks (`grow`).
        dtype: of the model.
    """
    m, e = config.latents_per_chunk, dtype.itemsize

    def ring(part: str, layers: int, tokens: int, dim: int) -> int:
        own = config.reach(part)
        reach = Reach(memory, sinks) if own.window is None else own
        return 2 * layers * slots(chunks, reach) * tokens * dim * e

    if config.combiner == "ttm":
        combiner = config.ttm_memory * config.combiner_dim * e
    else:
        layers = {"transformer": config.combiner_layers, "attention": 1}.get(config.combiner, 0)
        combiner = ring("combiner", layers, config.tokens_per_chunk, config.combiner_dim)
    return StreamState(
        sound=4 * (config.n_fft - config.hop),
        combiner=combiner,
        audio_video=ring("av", config.av_layers, m, config.av_dim),
        text=ring("text", config.text_layers // config.cross_every, m, config.text_dim),
    )


def slots(chunks: int, reach: Reach) -> int:
    """Chunks that a ring has room for when it has seen so many."""
    if reach.slots is not None:
        return reach.slots
    room = GROWN_BY
    while room < chunks:
        room *= 2
    return room
