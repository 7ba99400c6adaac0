"""The one loop of a decode: a token for every row, until all rows have ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mirasol.batch import may_look_at
from mirasol.cache import Cache
from mirasol.causal_lm import CausalLMDecoder, LMCache
from mirasol.generation.choice import Choice
from mirasol.generation.stops import Stops
from mirasol.graphs import Captured
from mirasol.text import TextDecoder

Decoder = TextDecoder | CausalLMDecoder

LOOK_EVERY = 8
"""Steps between two looks at whether all rows have ended, on a device that one has to wait for."""


class Move(NamedTuple):
    """One step of all R rows."""

    parents: Tensor | None  # [R], the row that each row continues; None: itself
    tokens: Tensor  # int64 [R]
    attention: Tensor | None  # float32 [R, N]


@dataclass
class Run:
    """A decode that has been set up.

    Attributes:
        prompt: int64 [R, L], right-padded.
        ends: int64 [R], tokens of each row's prompt; None: all L.
        first: tokens of the shortest prompt, those that all rows have.
        longest: tokens of a row at the most.
        graphs: capture the step of one token in a CUDA graph.
    """

    decoder: Decoder
    cache: Cache | LMCache
    prompt: Tensor
    ends: Tensor | None
    first: int
    longest: int
    end: int
    pad_id: int
    choose: Choice
    stops: Stops | None
    graphs: bool = False

    @torch.no_grad()
    def moves(self) -> Iterator[Move]:
        """Steps from position `first` on; a row that is within its prompt gets the token that stands there."""
        rows, length = self.prompt.shape
        cache, decoder, stops = self.cache, cast(Callable[..., Tensor], self.decoder), self.stops
        captured = Captured(self.graphs)
        finished = torch.zeros(rows, dtype=torch.bool, device=self.prompt.device)
        logits = _uncompiled(self.decoder)(self.prompt[:, : self.first], None, cache)[:, -1]
        for position in range(self.first, self.longest):
            forced = position < self.ends if self.ends is not None and position < length else None
            parents, tokens = self.choose(logits, finished, forced, self.pad_id)
            if parents is not None:
                cache.reorder(parents)
                finished = finished[parents]
                if stops is not None:
                    stops.reorder(parents)
            tokens = torch.where(finished, self.pad_id, tokens)
            ended = tokens == self.end
            if forced is not None:
                tokens, ended = torch.where(forced, self.prompt[:, position], tokens), ended & ~forced
            finished = finished | ended
            watched = cache.cross.attention
            # Beams are ranked by whether they have ended, so these are looked at in every step.
            look = may_look_at(finished) or (position + 1) % LOOK_EVERY == 0 or parents is not None
            if stops is not None:
                stops.add(tokens, forced)
                if look or position + 1 == self.longest:
                    finished = finished | stops.look(finished.device)
            yield Move(parents, tokens, watched.clone() if watched is not None else None)
            if position + 1 == self.longest or (look and bool(finished.all())):
                return
            logits = captured("step", lambda new: decoder(new, None, cache), tokens[:, None])[:, -1]


def _uncompiled(decoder: nn.Module) -> Callable[..., Tensor]:
    """Calls that are not compiled where the decoder is: of prompts, every length would be compiled by itself."""
    return cast(Callable[..., Tensor], getattr(decoder, "_orig_mod", decoder)._call_impl)
