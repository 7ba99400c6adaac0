"""An answer that is written piece by piece."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mirasol.generation import Step
from mirasol.pieces import pieces
from mirasol.tokenizer import Tokenizer


class Shown(NamedTuple):
    """How ids become text: the id that ends it, and strings before which it ends."""

    tokenizer: Tokenizer
    end: int
    stop_strings: Sequence[str] = ()


class Answer(Iterator[str]):
    """Pieces of text as they come; about the moment at which it was asked, whatever the stream sees meanwhile.

    Args:
        chunks: which chunk lies in each slot of the latents that are looked at; slots behind these are empty.
        per_chunk: latents of a chunk.
        asked: when the question was, by `time.perf_counter`.
    Attributes:
        question: what was asked.
        text: all pieces so far.
        tokens: ids so far, the end included.
        attention: {chunk: share} of what the answer so far looked at, shares sum to 1; empty before the first token and
            where it was not asked for.
        first_token: seconds from the question to the first token, None before it.
    """

    def __init__(
        self,
        question: str,
        steps: Iterator[Step],
        shown: Shown,
        chunks: Sequence[int],
        per_chunk: int,
        asked: float,
    ):
        self.question, self.text, self.tokens = question, "", list[int]()
        self.attention: dict[int, float] = {}
        self.first_token: float | None = None
        self._asked, self._chunks, self._per_chunk = asked, chunks, per_chunk
        self._pieces = pieces(self._ids(steps, shown.end), shown.tokenizer, shown.stop_strings)

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def read(self) -> str:
        """The whole answer, when it is written."""
        for _ in self:
            pass
        return self.text

    def _ids(self, steps: Iterator[Step], end: int) -> Iterator[int]:
        """Ids without the end, noted as they come."""
        for step in steps:
            token = int(step.tokens[0])
            if self.first_token is None:
                self.first_token = time.perf_counter() - self._asked
            self.tokens.append(token)
            if step.attention is not None:
                slots = step.attention[0].unflatten(0, (-1, self._per_chunk)).sum(1).tolist()
                past = len(self.tokens) - 1
                for chunk, share in zip(self._chunks, slots, strict=False):  # slots behind these are empty
                    self.attention[chunk] = (self.attention.get(chunk, 0.0) * past + share) / (past + 1)
            if token == end:
                return
            yield token
