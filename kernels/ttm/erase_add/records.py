"""The parameters of an erase-add write as a flat list, and their gradients as one flat tensor.

The kernels add gradients up by kind: of the selecting network (one record), of both networks over channels and their
norms (two records by split of the batch), of both networks over tokens (two records by program). All records lie one
after another in the flat gradient; a hidden layer of the narrower network is padded to that of the wider.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..params import EraseAddParams, MlpParams
from .configs import Widths


def flatten(params: EraseAddParams) -> list[torch.Tensor]:
    """All 26 tensors in the order of the fields."""
    found: list[torch.Tensor] = []
    for field in params[:-1]:
        found += field if isinstance(field, MlpParams) else [field]
    return found


def unflatten(flat: Sequence[torch.Tensor], official: bool) -> EraseAddParams:
    """The inverse of `flatten`."""
    taken = iter(flat)

    def norm() -> list[torch.Tensor]:
        return [next(taken), next(taken)]

    def mlp() -> MlpParams:
        return MlpParams(next(taken), next(taken), next(taken), next(taken))

    fields = [*norm(), mlp(), *norm(), mlp(), mlp(), *norm(), mlp(), mlp()]
    return EraseAddParams._make([*fields, official])


@dataclass(frozen=True)
class Records:
    """Sizes of the records in numbers, and what they hold in order."""

    widths: Widths

    @property
    def select(self) -> int:
        """w1 [J, d], b1 [J], w2 [S, J], b2 [S], norm weight and bias [d]."""
        w = self.widths
        return _mlp(w.d, w.select, w.slots) + 2 * w.d

    @property
    def channels(self) -> int:
        """w1 [H, d], b1 [H], w2 [d, H], b2 [d]: how a record by split begins."""
        return _mlp(self.widths.d, self.widths.channels, self.widths.d)

    @property
    def by_split(self) -> int:
        """The networks over channels, then norm weight and bias [d]."""
        return self.channels + 2 * self.widths.d

    @property
    def by_program(self) -> int:
        """w1 [J, r], b1 [J], w2 [S, J], b2 [S]."""
        return _mlp(self.widths.read, self.widths.tokens, self.widths.slots)

    @property
    def total(self) -> int:
        return self.select + 2 * self.by_split + 2 * self.by_program

    def gradients(self, flat: torch.Tensor, params: EraseAddParams) -> list[torch.Tensor]:
        """Views of the flat gradient in the order of `flatten`."""
        w = self.widths
        sizes = [self.select, self.by_split, self.by_split, self.by_program, self.by_program]
        select, *networks = flat.split(sizes)
        scores, select_norm = _take(select, w.d, w.select, w.slots, params.select)
        erase, add = (
            self._network(*given)
            for given in (
                (networks[0], networks[2], params.erase_tokens, params.erase_channels),
                (networks[1], networks[3], params.add_tokens, params.add_channels),
            )
        )
        return [*select_norm.split(w.d), *scores, *erase, *add]

    def _network(
        self, by_split: torch.Tensor, by_program: torch.Tensor, tokens: MlpParams, channels: MlpParams
    ) -> list[torch.Tensor]:
        w = self.widths
        over_channels, norm = _take(by_split, w.d, w.channels, w.d, channels)
        over_tokens, _ = _take(by_program, w.read, w.tokens, w.slots, tokens)
        return [*norm.split(w.d), *over_tokens, *over_channels]


def _mlp(inside: int, hidden: int, outside: int) -> int:
    return hidden * (inside + 1) + outside * (hidden + 1)


def _take(
    record: torch.Tensor, inside: int, hidden: int, outside: int, like: MlpParams
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The gradients of an MLP at the head of a record, cut to its own hidden units, and the rest of the record."""
    sizes = [hidden * inside, hidden, outside * hidden, outside]
    w1, b1, w2, b2, rest = record.split([*sizes, record.shape[0] - sum(sizes)])
    own = like.b1.shape[0]
    return [w1.view(hidden, inside)[:own], b1[:own], w2.view(outside, hidden)[:, :own], b2], rest
