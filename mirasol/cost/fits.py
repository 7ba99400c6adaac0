"""The longest clip that a GPU holds, in a training step and as a stream, by arithmetic over `mirasol.Config`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import torch

from mirasol.config import Config
from mirasol.cost.memory import activations, memory, peak
from mirasol.cost.parameters import parameters
from mirasol.cost.streams import stream

USABLE = 0.92
"""Of a GPU's memory; the rest is left to the CUDA context, NCCL and the allocator's fragments."""
MOST = 1 << 20
"""Chunks beyond which nobody asks: at 2 s each, three weeks."""


def training_bytes(
    config: Config,
    chunks: int,
    text_tokens: int,
    *,
    clips: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
) -> int:
    """Bytes that a training step of `mirasol.train` takes at most on one GPU; arguments as in `mirasol.cost.memory`."""
    common = dict(clips=clips, dtype=dtype, checkpointing=checkpointing)
    held = memory(config, chunks, text_tokens, **common)  # type: ignore[arg-type]
    state = held.parameters + held.optimizer + held.inputs
    return state + peak(config, chunks, text_tokens, **common)  # type: ignore[arg-type]


def stream_bytes(config: Config, chunks: int, *, memory: int | None = None, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that a stream takes when it has seen so many chunks: weights in `dtype`, its state, and a chunk's work.

    The work of a chunk holds at most what backward would need of it. Not counted: one layer's keys and values twice,
    while they move to a place of twice the size. `memory` as in `Model.stream`.
    """
    state = stream(config, chunks, memory=memory, dtype=dtype).total
    return parameters(config).total * dtype.itemsize + state + activations(config, 1, 0, dtype=dtype)


def longest(held: Callable[[int], int], device: float) -> int:
    """The most chunks for which `held(chunks)` bytes, which never fall, fit a GPU of so many; 0: not even one.

    `MOST` where any number does.
    """
    return bisect_right(range(1, MOST + 1), USABLE * device, key=held)
