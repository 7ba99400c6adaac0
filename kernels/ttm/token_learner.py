"""TokenLearner v1.1: tokens pooled under the scores of a small network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mirasol.kernels.ttm.params import TokenLearnerParams
from mirasol.kernels.ttm.pool import eager, op
from mirasol.kernels.ttm.summary import Partial, Parts, Positions, given


class TokenLearner:
    """See `summary.Summary`."""

    def __init__(self, params: TokenLearnerParams, sizes: Sequence[int], backend: str) -> None:
        self.positions = Positions(params.positions, sizes)
        self.by_kernels = backend == "triton"
        self.network: Any = op.fold(params) if self.by_kernels else eager.network(params)

    def partial(self, parts: Parts) -> Partial:
        return self._pool(parts, None, want_lse=True)

    def finish(self, parts: Parts, carry: Partial | None = None) -> torch.Tensor:
        return self._pool(parts, carry, want_lse=False).out

    def _pool(self, parts: Parts, carry: Partial | None, want_lse: bool) -> Partial:
        sources, positions = given(parts), self.positions.of(parts)
        if self.by_kernels:
            return op.pool(sources, positions, self.network, carry)
        return eager.pool(sources, positions, self.network, carry, want_lse)
