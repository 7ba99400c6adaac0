"""What summaries share: names of the parts of the tokens, and partial results, which merge exactly.

The tokens come in up to three parts (memory, inputs, outputs). A score depends on its own token only, so a summary of
some parts, with the logarithm of its softmax denominator, can be merged exactly with that of the others: this is what
lets `ttm_scan` summarise the inputs of all chunks at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch

MEMORY, INPUTS, OUTPUTS = 0, 1, 2


class Partial(NamedTuple):
    """Summary of some of the tokens.

    out: [B, k, d], the weighted mean over these tokens; lse: logarithm of the softmax denominator over them, [B, k] or
    [B, H, k]; None where weights need no softmax, then `out` is a weighted sum and partials add up. A latent-query
    summary that projects its values after pooling has a row for each head and query: [B, H k, d] and [B, H k].
    """

    out: torch.Tensor
    lse: torch.Tensor | None


class Summary(Protocol):
    """A summary prepared for parts of known sizes."""

    def partial(self, parts: Mapping[int, torch.Tensor]) -> Partial:
        """Summarise some of the parts, each [B, p_i, d]."""
        ...

    def finish(self, parts: Mapping[int, torch.Tensor], carry: Partial | None = None) -> torch.Tensor:
        """Summarise parts merged with a partial of the others: [B, k, d]."""
        ...
