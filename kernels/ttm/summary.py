"""What all summaries share: how they are called, partial results, which merge exactly, and positions.

The tokens come in up to three parts: memory, inputs and, for a write, outputs. A score depends on its own token only,
so a summary of some parts, with the logarithm of its softmax denominator, can be merged exactly with that of the
others: this is what lets `ttm_scan` summarise the inputs of all chunks at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch

PUBLIC = "ttm_scan (ttm_read, ttm_write)"  # how errors call the operator

Parts: TypeAlias = Sequence[torch.Tensor | None]
"""Memory, inputs and, for a write, outputs, each [B, p_i, d]; None where a carried partial stands for them."""


class Partial(NamedTuple):
    """Summary of some of the tokens.

    out: [B, ..., rows, width], the weighted mean over these tokens; lse: logarithm of the softmax denominator over
    them, [B, ..., rows]; None where weights need no softmax, then `out` is a weighted sum and partials add up.
    """

    out: torch.Tensor
    lse: torch.Tensor | None


class Summary(Protocol):
    """A summary prepared for parts of known sizes."""

    def partial(self, parts: Parts) -> Partial | None:
        """Summarise some of the parts; None where nothing is to be known of them."""
        ...

    def finish(self, parts: Parts, carry: Partial | None = None) -> torch.Tensor:
        """Summarise parts, merged with a partial of those that are None: [B, k, d]."""
        ...


def given(parts: Parts) -> list[torch.Tensor]:
    """The parts that are there."""
    return [part for part in parts if part is not None]


class Positions:
    """Positions [p, d] of all tokens, or None, and those of some parts, put together once."""

    def __init__(self, positions: torch.Tensor | None, sizes: Sequence[int]) -> None:
        self.all, self.sizes = positions, list(sizes)
        self.found: dict[tuple[bool, ...], torch.Tensor] = {}

    def of(self, parts: Parts) -> torch.Tensor | None:
        """Those of the parts that are there, one behind the other."""
        if self.all is None:
            return None
        there = tuple([part is not None for part in parts])
        if all(there):
            return self.all
        if there not in self.found:
            split = self.all.split(self.sizes)
            self.found[there] = torch.cat([place for place, wanted in zip(split, there, strict=True) if wanted])
        return self.found[there]
