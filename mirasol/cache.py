"""What a decode keeps: keys and values of its text in buffers that stay where they are, and of the latents it looks at.

Nothing here is counted by Python: the position lies on the device, so that a step is the same program at every token,
which `torch.compile` compiles once and a CUDA graph replays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from mirasol.kernels.core.checks import expect, expect_int, expect_shape, expect_tensor
from mirasol.layers import Attention, Rotary

KeysValues = tuple[Tensor, Tensor]


@dataclass
class Seen:
    """What the cross-attentions of a text decoder look at, of C clips: computed once, shared by questions and beams.

    Attributes:
        keys_values: one entry a block (`TextDecoder`: None in a block without cross-attention; `CausalLMDecoder`: one a
            cross-attention), two [C, H, N, D].
        lengths: int64 [C], how many of the N count, or None for all.
    """

    keys_values: list[KeysValues | None]
    lengths: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """[C, H, N, D] of the first cross-attention."""
        found = next((entry[0] for entry in self.keys_values if entry is not None), None)
        if found is None:
            raise ValueError("keys_values must hold those of a cross-attention, held none: cross_every is too large")
        return found

    @property
    def clips(self) -> int:
        """C."""
        return self.keys.shape[0]

    @property
    def device(self) -> torch.device:
        return self.keys.device


@dataclass
class Cross:
    """What the cross-attentions of a decode's rows look at; the rows about the same latents follow one another.

    Attributes:
        rows: R.
        keys_values: as in `Seen`, two [G, H, N, D] for G groups of R / G rows each.
        mask: [G, 1, 1, N], added to scores: 0 where a latent counts; None where all do.
        own: keys and values are copies, which `reset` overwrites.
        attention: float32 [R, N], see `watch`; None where nobody asked.
    """

    rows: int
    keys_values: list[KeysValues | None]
    mask: Tensor | None
    own: bool
    attention: Tensor | None = None

    @staticmethod
    def of(seen: Seen, copies: int, clip_of_text: Tensor | None, own: bool) -> Cross:
        """For `copies` rows each of the questions about clips `clip_of_text` [Q]; None: one question a clip.

        With one clip all rows are one group. Otherwise a question is one, and where `clip_of_text` is given, its keys
        and values are gathered, once.
        """
        expect_int("copies", copies)
        if clip_of_text is not None:
            expect_tensor("clip_of_text", clip_of_text, "Q", dtypes=(torch.int64,))
        questions = seen.clips if clip_of_text is None else clip_of_text.shape[0]
        keys_values, mask = _of_questions(seen, clip_of_text)
        if own:
            keys_values = [entry and (entry[0].clone(), entry[1].clone()) for entry in keys_values]
        return Cross(questions * copies, keys_values, mask, own)

    def reset(self, seen: Seen, clip_of_text: Tensor | None) -> None:
        """Look at others of the same shapes, in place where these are its own."""
        keys_values, mask = _of_questions(seen, clip_of_text)
        if not self.own:
            self.keys_values, self.mask = keys_values, mask
            return
        if self.mask is not None and mask is None:
            mask = torch.zeros_like(self.mask)
        expect(
            (self.mask is None) == (mask is None), "lengths", "be None, as in what the cache was made of", seen.lengths
        )
        pairs = zip(_tensors(self.keys_values, self.mask), _tensors(keys_values, mask), strict=True)
        for held, new in pairs:
            expect_shape("seen", new, held.shape, "of the shapes that the cache was made of, [G, H, N, D]")
            held.copy_(new)

    def watch(self) -> None:
        """From now on `attention` holds, after every call of the decoder, how the last token of each row shared its
        attention among the latents: the mean over layers and heads, which sums to 1.
        """
        keys = next(entry[0] for entry in self.keys_values if entry is not None)
        self.attention = keys.new_zeros((self.rows, keys.shape[2]), dtype=torch.float32)

    def begin(self) -> None:
        """Before the first cross-attention of a call."""
        if self.attention is not None:
            self.attention.zero_()

    def attend(self, attention: Attention, x: Tensor, layer: int) -> Tensor:
        """x [R, L, dim] -> the same, by the cross-attention that entry `layer` belongs to."""
        keys_values = cast(KeysValues, self.keys_values[layer])
        if self.attention is not None:
            count = sum(entry is not None for entry in self.keys_values)
            self.attention.add_(attention.shares(x, keys_values[0], self.mask), alpha=1 / count)
        return attention.look(x, keys_values, self.mask)


class Places(NamedTuple):
    """Where the tokens of one call stand; all layers share it."""

    positions: Tensor  # int64 [L]
    angles: Rotary  # each [3, 1, 1, L, D], of queries, keys and values
    mask: Tensor  # [L, longest], added to scores: 0 where a token sees a place of the buffers


@dataclass
class Cache:
    """Keys and values of a decode of R rows. All of its tensors change in place.

    Attributes:
        text: a layer, keys and values [2, R, H, longest, D].
        cross: what the rows look at.
        angles: of all places, float32, each [3, 1, 1, longest, D]: of queries, keys and values, see `Attention.extend`.
        position: int64 [1], tokens seen so far, on the device.
        places: int64 [longest], 0, 1, ...
        marks: 0 and -inf, scalars in the dtype of the buffers.
    """

    text: list[Tensor]
    cross: Cross
    angles: Rotary
    position: Tensor
    places: Tensor
    marks: tuple[Tensor, Tensor]

    @property
    def longest(self) -> int:
        return self.places.shape[0]

    def enter(self, length: int) -> Places:
        """Where the next `length` tokens stand.

        Raises:
            ValueError: too many for the buffers: by themselves or, on the CPU, after the others.
        """
        expect(length <= self.longest, "text", f"hold at most the {self.longest} tokens of its cache", length)
        positions = self.position if length == 1 else self.position + self.places.narrow(0, 0, length)
        cos, sin = self.angles
        try:
            angles = cos.index_select(3, positions), sin.index_select(3, positions)
        except IndexError as error:
            raise ValueError(f"text must end within the {self.longest} tokens of its cache, went on behind") from error
        return Places(positions, angles, torch.where(self.places <= positions.unsqueeze(1), *self.marks))

    def leave(self, length: int) -> None:
        """`length` tokens more are seen."""
        self.position.add_(length)

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on as a copy of row `rows[i]`, which is about the same clip."""
        for buffer in self.text:
            buffer.copy_(buffer.index_select(1, rows))

    def reset(self, seen: Seen, *, clip_of_text: Tensor | None = None) -> None:
        """Begin again, about other clips of the same shapes, as many questions of them.

        All tensors stay where they are, but for the latents' where the cache was made without `own`: it then looks at
        those of `seen`.

        Raises:
            ValueError: other shapes than the cache was made for.
        """
        self.cross.reset(seen, clip_of_text)
        self.position.zero_()


def _of_questions(seen: Seen, clip_of_text: Tensor | None) -> tuple[list[KeysValues | None], Tensor | None]:
    """Keys and values for each group, and the mask of what counts of them."""
    gather = None if seen.clips == 1 else clip_of_text
    keys_values, lengths = seen.keys_values, seen.lengths
    if gather is not None:
        keys_values = [entry and (entry[0][gather], entry[1][gather]) for entry in keys_values]
        lengths = lengths[gather] if lengths is not None else None
    if lengths is None:
        return keys_values, None
    counted = torch.arange(seen.keys.shape[2], device=seen.device) < lengths.unsqueeze(1)
    mask = torch.zeros(counted.shape, dtype=seen.keys.dtype, device=seen.device).masked_fill(
        counted.logical_not(), -torch.inf
    )
    return keys_values, mask.unsqueeze(1).unsqueeze(1)


def _tensors(keys_values: list[KeysValues | None], mask: Tensor | None) -> list[Tensor]:
    tensors = [tensor for entry in keys_values if entry is not None for tensor in entry]
    return tensors if mask is None else [*tensors, mask]
