"""What a batch of streams keeps of the chunks it has seen: buffers of a fixed size, written in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GROWN_BY = 16
"""Chunks that a ring without a window has room for at first; it doubles when it is full."""


class Reach(NamedTuple):
    """How far back a chunk is seen: `window` chunks, the own one included (None: all), and the first `sinks`."""

    window: int | None = None
    sinks: int = 0

    @property
    def slots(self) -> int | None:
        """Chunks within reach, at most; None: all."""
        return None if self.window is None else self.window + self.sinks


EVERYTHING = Reach()


class Rows:
    """The B rows of a batch of streams: how many chunks each has seen, and which take the next one.

    Attributes:
        counts: B ints, chunks seen; `seen`: the same, int64 [B] on the device.
        chosen: R ints, the rows whose turn it is; `index`: the same, int64 [R] on the device; `all`: whether all B are.
        fixed: whether nothing may depend on the counts, as where a step is captured in a CUDA graph. All rings have a
            window then.
    """

    fixed = False

    def __init__(self, batch: int, device: torch.device):
        self.counts = [0] * batch
        self.seen = torch.zeros(batch, dtype=torch.int64, device=device)
        self._everyone = torch.arange(batch, device=device)
        self.choose(None)

    def choose(self, rows: Sequence[int] | None) -> None:
        """Whose turn it is, in which order; None: all rows'."""
        everyone = list(range(len(self.counts)))
        self.chosen = everyone if rows is None else list(rows)
        self.all = self.chosen == everyone
        self.index = self._everyone if self.all else torch.tensor(self.chosen, device=self.seen.device)

    def advance(self) -> None:
        """The chosen rows have seen one chunk more: on the device. `count` says so on the host."""
        self.seen.index_add_(0, self.index, torch.ones_like(self.index))

    def count(self) -> None:
        for row in self.chosen:
            self.counts[row] += 1

    def set(self, row: int, count: int) -> None:
        self.counts[row] = count
        self.seen[row] = count


class Memory:
    """A tensor a row, replaced by every chunk: state [B, ...], which starts as `initial` [...]."""

    def __init__(self, rows: Rows, initial: Tensor):
        self.rows, self.initial = rows, initial
        self.state = initial.expand(len(rows.counts), *initial.shape).clone()

    def read(self) -> Tensor:
        """[R, ...] of the rows whose turn it is."""
        return self.state if self.rows.all else self.state[self.rows.index]

    def write(self, value: Tensor) -> None:
        """value [R, ...]."""
        self.state.index_copy_(0, self.rows.index, value.to(self.state.dtype))

    def restart(self, row: int) -> None:
        self.state[row] = self.initial

    def tensors(self) -> dict[str, Tensor]:
        return {"state": self.state}


class Ring:
    """Keys and values of the chunks within reach, [B, slots, tokens, H, D] each.

    Chunk t lies in slot t while there is room; then it takes the place of the chunk that has just left the window, and
    the sinks stay. So what is filled is always a first part of the buffer, all of it is within reach of the newest
    chunk, and its order means nothing to attention, whose positions are in the keys. Without a window it grows.

    Args:
        tokens: of a chunk.
        heads, width: H and D.
        like: gives dtype and device.
    """

    def __init__(self, rows: Rows, reach: Reach, tokens: int, heads: int, width: int, like: Tensor):
        self.rows, self.reach = rows, reach
        slots = GROWN_BY if reach.slots is None else reach.slots
        self.keys = like.new_zeros(len(rows.counts), slots, tokens, heads, width)
        self.values = torch.zeros_like(self.keys)

    @property
    def slots(self) -> int:
        return self.keys.shape[1]

    def append(self, keys: Tensor, values: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Write the next chunk -> `read`, as it will be when `Rows.advance` has counted that chunk."""
        self.write(keys, values)
        return self.read(1)

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Keys and values [R, H, tokens, D] of the next chunk of the chosen rows."""
        rows = self.rows
        if not rows.fixed:
            self.reserve(1 + max(rows.counts[row] for row in rows.chosen))
        slot = rows.seen[rows.index]
        if self.reach.window is not None:
            sinks, window = self.reach.sinks, self.reach.window
            slot = torch.where(slot < sinks, slot, sinks + (slot - sinks) % window)
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer[rows.index, slot] = new.transpose(1, 2).to(buffer.dtype)

    def read(self, ahead: int = 0, whole: bool = False) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """What the chosen rows see: keys and values [R, H, N, D], and how many of the N count, int64 [R].

        None where all do. Of rows that have seen different numbers the whole buffer is given, so that shapes stay.
        Copies, but where all rows are chosen.

        Args:
            ahead: chunks that have been written and not been counted.
            whole: the whole buffer in any case, for who wants one shape.
        """
        rows, used, lengths = self.rows, self.slots, None
        filled = [] if rows.fixed or whole else [min(rows.counts[row] + ahead, used) for row in rows.chosen]
        if filled and min(filled) == max(filled):
            used = filled[0]
        else:
            lengths = (rows.seen[rows.index] + ahead).clamp(max=used) * self.keys.shape[2]
        found = []
        for buffer in (self.keys, self.values):
            part = buffer[:, :used] if rows.all else buffer[rows.index, :used]
            found.append(part.flatten(1, 2).transpose(1, 2))
        return (found[0], found[1]), lengths

    def chunks(self, count: int) -> list[int]:
        """Which chunk lies in each slot of a row that has seen `count`, as far as slots are filled."""
        if self.reach.window is None or count <= self.slots:
            return list(range(count))
        sinks, window = self.reach.sinks, self.reach.window
        newest = [count - 1 - (count - 1 - sinks - slot) % window for slot in range(window)]
        return [*range(sinks), *newest]

    def reserve(self, count: int) -> None:
        """Make room for `count` chunks where nothing bounds them."""
        if self.reach.window is None and count > self.slots:
            size = max(count, 2 * self.slots) - self.slots
            self.keys, self.values = (
                torch.cat([buffer, buffer.new_zeros(buffer.shape[0], size, *buffer.shape[2:])], dim=1)
                for buffer in (self.keys, self.values)
            )

    def restart(self, row: int) -> None:
        """Nothing to do: a row that has seen no chunk sees no slot."""

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "values": self.values}


@dataclass
class Past:
    """All that a batch of streams keeps of the chunks it has seen.

    Attributes:
        sound: samples that the next chunk's first spectrogram frames reach back to.
        combiner, audio_video: of the Combiner, of the audio-video Transformer.
        text: keys and values of the latents, one ring a cross-attention; None for a block without one.
    """

    rows: Rows
    sound: Memory
    combiner: Sequence[Ring | Memory]
    audio_video: Sequence[Ring | Memory]
    text: Sequence[Ring | None]

    def named(self) -> dict[str, Ring | Memory]:
        parts: dict[str, Ring | Memory] = {"sound": self.sound}
        for name in ("combiner", "audio_video", "text"):
            parts |= {f"{name}.{i}": part for i, part in enumerate(getattr(self, name)) if part is not None}
        return parts

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, as it lies in memory."""
        found = {f"{name}.{which}": t for name, part in self.named().items() for which, t in part.tensors().items()}
        return {**found, "seen": self.rows.seen}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; rings that grow take on its size."""
        for name, part in self.named().items():
            for which, tensor in part.tensors().items():
                given = state[f"{name}.{which}"]
                if given.shape == tensor.shape:
                    tensor.copy_(given)
                else:
                    setattr(part, which, given.clone())
        self.rows.seen.copy_(state["seen"])
        self.rows.counts = self.rows.seen.tolist()

    def restart(self, row: int) -> None:
        """A row that has seen nothing."""
        self.rows.set(row, 0)
        for part in self.named().values():
            part.restart(row)
