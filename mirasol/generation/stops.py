"""Where rows have written a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirasol.pieces import Writing
from mirasol.tokenizer import Tokenizer


class Stops:
    """Reads what R rows write, on the host, whenever it is asked to look.

    Attributes:
        at: for each row, how many steps it had taken when a stop string was complete, or None.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer, rows: int, end: int) -> None:
        self.end = end
        self.at: list[int | None] = [None] * rows
        self._writings = [Writing(tokenizer, strings) for _ in range(rows)]
        self._over = [False] * rows
        self._steps = 0
        self._unread: list[Tensor] = []  # a step, [2, R]: tokens, and 1 where they are of the prompt

    def add(self, tokens: Tensor, forced: Tensor | None) -> None:
        """Take in the tokens [R] of a step, without looking at them."""
        prompt = torch.zeros_like(tokens) if forced is None else forced.to(tokens.dtype)
        self._unread.append(torch.stack([tokens, prompt]))

    def look(self, device: torch.device) -> Tensor:
        """bool [R]: which rows have written one."""
        unread = torch.stack(self._unread).tolist() if self._unread else []
        self._unread = []
        for tokens, prompt in unread:
            self._steps += 1
            for row, token in enumerate(tokens):
                if not prompt[row] and not self._over[row]:
                    self._read(row, token)
        return torch.tensor([at is not None for at in self.at], device=device)

    def _read(self, row: int, token: int) -> None:
        if token != self.end:
            self._writings[row].add(token)
            if self._writings[row].stopped:
                self.at[row] = self._steps
        self._over[row] = token == self.end or self.at[row] is not None

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on as a copy of row `rows[i]`; all was looked at."""
        parents = rows.tolist()
        self.at, self._over = [self.at[row] for row in parents], [self._over[row] for row in parents]
        self._writings = [self._writings[row].copy() for row in parents]
