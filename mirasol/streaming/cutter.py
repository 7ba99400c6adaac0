"""Pictures and sound that come in pieces of any size, cut into the chunks that the model takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirasol.kernels.core.checks import expect, expect_int, expect_number, expect_shape, expect_tensor
from mirasol.media.timing import INSTANT, JUMP, SLACK, instant, nearest_sample

from .clock import Clock

PICTURES, SOUND = 0, 1

PATIENCE = 2.0
"""Least seconds of patience, where it is not said: networks and containers bring one kind so much later than the other
now and then."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Chunk `index`, which starts so many seconds after the stream.

    video: uint8 [3, F, H, W]; audio: float32 [S]. None for what is missing from all of the chunk; both may be, where
    all that there was has a hole.
    """

    index: int
    start: float
    video: Tensor | None
    audio: Tensor | None


class Cutter:
    """Cuts pictures and sound that come in pieces of any size into chunks, by their timestamps, as `mirasol.media.load`
    cuts a file: the same frames and samples, to the bit, in whatever pieces they come.

    Chunk t lasts S / sample_rate seconds from t S / sample_rate on. Time 0 is 0 of the timestamps where the first that
    comes is near it (less than a chunk after, or a minute before): so `load` and `mirasol.media.live` count, from the
    start of the video track, and sound before it is dropped. Else the first timestamp that comes, of either kind, is 0.

    - Frame f of a chunk is the picture on screen at the middle of its share, (f + 1/2) / F of the chunk. Where pictures
      were dropped, the one before stays; those too many are passed over, and so are those without a time and those that
      come after a later one. In the chunk of the first picture, that one stands in for what was before it.
    - Sound is put to the nearest sample of its time and then counted on. Where times leave the count by more than 5 ms
      (a hole, clocks that drift apart), it is placed anew, over what lies there; what no sound comes for is 0.
    - A chunk is ready when both kinds have come past its end. Where one lies more than `patience` behind the other, or
      never came, chunks go with what there is: `audio` is None where no sample of the chunk came, `video` where no
      picture of it did. What comes for a chunk that has gone is dropped, but the last such picture is the one that
      stays on screen.
    - Times that leap (`mirasol.streaming.clock`) follow what came last: after a camera restarts, the stream goes on.

    What it keeps is at most the material of `patience` and a chunk, and the pieces since `ready` was last asked.

    Args:
        frames_per_chunk: F.
        image_size: H = W.
        samples_per_chunk: S.
        patience: seconds; default: two chunks, at least 2 s.
    Raises:
        TypeError, ValueError: an argument, by name, with what it must be.
    """

    def __init__(
        self,
        *,
        frames_per_chunk: int,
        image_size: int,
        samples_per_chunk: int,
        sample_rate: int,
        patience: float | None = None,
    ) -> None:
        self._frames, self._size = (
            expect_int("frames_per_chunk", frames_per_chunk),
            expect_int("image_size", image_size),
        )
        self._samples = expect_int("samples_per_chunk", samples_per_chunk)
        self._rate = expect_int("sample_rate", sample_rate)
        self._seconds = self._samples / self._rate
        self._patience = expect_number("patience", max(2 * self._seconds, PATIENCE) if patience is None else patience)
        expect(self._patience >= 0, "patience", "be seconds, at least 0", patience)
        self._clock = Clock(self._seconds, self._patience)
        self._cut = 0
        self._shown: Tensor | None = None
        self._shown_from, self._stays = 0.0, self._seconds / self._frames
        self._next = 0  # instant whose picture is to be found next, counted from the stream's start
        self._runs: list[tuple[int, int, Tensor]] = []  # pictures of the instants from the first to before the second
        self._position: int | None = None  # sample of the stream that the next one follows
        self._sound: dict[int, Tensor] = {}  # by chunk, where some has come

    def frames(self, frames: Tensor, times: Sequence[float]) -> None:
        """Take in pictures.

        Args:
            frames: uint8 [N, 3, H, W].
            times: N seconds.
        Raises:
            TypeError, ValueError: an argument, by name.
        """
        expect_tensor("frames", frames, "N 3 H W", dtypes=(torch.uint8,))
        shape = (len(frames), 3, self._size, self._size)
        expect_shape("frames", frames, shape, "[N, 3, image_size, image_size]")
        stamps = [float(time) for time in times]
        expect(len(stamps) == len(frames), "times", f"hold a time for each of {len(frames)} frames", times)
        for picture, stamp in zip(frames, stamps, strict=True):
            if math.isfinite(stamp):
                self._picture(picture, self._clock.time(PICTURES, stamp, self._seen_until(), self._latest()))
        if self._shown is not None:
            self._shown = self._shown.clone()  # not to keep all of `frames`

    def samples(self, samples: Tensor, time: float | None = None) -> None:
        """Take in sound.

        Args:
            samples: float32 [N], mono.
            time: seconds, of the first; None, or one that is not finite: right after those before.
        Raises:
            TypeError, ValueError: an argument, by name.
        """
        expect_tensor("samples", samples, "N", dtypes=(torch.float32,))
        if not len(samples):
            return
        if time is not None and math.isfinite(time):
            begin = self._clock.time(SOUND, float(time), self._heard_until(), self._latest())
            if self._position is None or abs(begin - self._position / self._rate) > JUMP:
                self._position = nearest_sample(begin, self._rate)
        first = self._position or 0
        self._position = last = first + len(samples)
        size = self._samples
        for chunk in range(max(first // size, self._cut), -(-last // size)):
            if chunk not in self._sound:
                self._sound[chunk] = samples.new_zeros(size)
            begin, end = max(first, chunk * size), min(last, (chunk + 1) * size)
            self._sound[chunk][begin - chunk * size : end - chunk * size] = samples[begin - first : end - first]

    def ready(self) -> Iterator[Chunk]:
        """Chunks that are complete, or that wait for a kind no longer. To be asked after each piece."""
        while self._is_ready():
            yield self._take()

    def finish(self) -> Iterator[Chunk]:
        """All chunks that are left, up to the end of what came: in the last one the picture stays and the sound is 0.
        A remainder of less than a millisecond is no chunk."""
        seen = self._shown_from + self._stays if self._shown is not None else 0.0
        end = max(seen, self._heard_until() or 0.0)
        while self._cut < math.ceil((end - SLACK) / self._seconds):
            yield self._take()

    def state_dict(self) -> dict[str, Tensor]:
        """All that it keeps, as tensors that safetensors writes; a cutter of the same sizes that loads them goes on to
        the bit, in the middle of a chunk too. No tensor is shared with the cutter."""
        size, shown = (3, self._size, self._size), [] if self._shown is None else [self._shown]
        pictures = [picture for *_, picture in self._runs]
        return {
            "counts": torch.tensor([self._cut, self._next]),
            "position": torch.tensor([] if self._position is None else [self._position], dtype=torch.int64),
            "clock": torch.tensor([*self._clock.offsets, self._shown_from, self._stays], dtype=torch.float64),
            "shown": torch.stack(shown) if shown else torch.empty(0, *size, dtype=torch.uint8),
            "runs": torch.tensor([run[:2] for run in self._runs], dtype=torch.int64).view(-1, 2),
            "pictures": torch.stack(pictures) if pictures else torch.empty(0, *size, dtype=torch.uint8),
            "sound_chunks": torch.tensor(list(self._sound), dtype=torch.int64),
            "sound": torch.stack(list(self._sound.values())) if self._sound else torch.empty(0, self._samples),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was asked; later changes to `state` change nothing here.

        Raises:
            ValueError: not the state of a cutter of these sizes.
        """
        own = self.state_dict()
        expect(set(state) == set(own), "state", f"hold {', '.join(own)}", ", ".join(state))
        for name, tensor in state.items():
            fixed = tensor.shape == own[name].shape if name in ("counts", "clock") else True
            same = tensor.dtype == own[name].dtype and tensor.shape[1:] == own[name].shape[1:] and fixed
            expect(same, f"state[{name!r}]", "be of a cutter with these sizes", tensor)
        for one, other in (("runs", "pictures"), ("sound_chunks", "sound")):
            expect(len(state[one]) == len(state[other]), f"state[{one!r}]", f"match {other}", state[one])
        self._cut, self._next = state["counts"].tolist()
        self._position = next(iter(state["position"].tolist()), None)
        *self._clock.offsets, self._shown_from, self._stays = state["clock"].tolist()
        self._shown = next(iter(state["shown"].clone()), None)
        runs = zip(state["runs"].tolist(), state["pictures"].clone(), strict=True)
        self._runs = [(first, last, picture) for (first, last), picture in runs]
        self._sound = dict(zip(state["sound_chunks"].tolist(), state["sound"].clone(), strict=True))

    def _picture(self, picture: Tensor, time: float) -> None:
        """The next picture, at seconds from the stream's start."""
        if self._shown is None:
            first = self._instants_before(time) // self._frames * self._frames
            self._next = max(self._next, first)
        elif time < self._shown_from:
            return
        else:
            last = self._instants_before(time)
            if last > self._next:
                self._runs.append((self._next, last, self._shown.clone()))
                self._next = last
            self._stays = time - self._shown_from or self._stays
        self._shown, self._shown_from = picture, time

    def _instants_before(self, time: float) -> int:
        """How many instants pass before a picture comes on screen."""
        count = max(0, int(time / self._seconds * self._frames) - 1)
        while instant(count, self._seconds, self._frames) + INSTANT < time:
            count += 1
        return count

    def _is_ready(self) -> bool:
        seen = self._next >= (self._cut + 1) * self._frames
        heard = self._position is not None and self._position >= (self._cut + 1) * self._samples
        lead = (self._seen_until() or 0.0) - (self._heard_until() or 0.0)
        return (seen and heard) or (seen and lead > self._patience) or (heard and -lead > self._patience)

    def _seen_until(self) -> float | None:
        return None if self._shown is None else self._shown_from

    def _heard_until(self) -> float | None:
        return None if self._position is None else self._position / self._rate

    def _latest(self) -> float:
        return max(self._seen_until() or 0.0, self._heard_until() or 0.0)

    def _take(self) -> Chunk:
        chunk = self._cut
        video, audio = self._video(chunk), self._sound.pop(chunk, None)
        self._cut += 1
        return Chunk(chunk, chunk * self._samples / self._rate, video, audio)

    def _video(self, chunk: int) -> Tensor | None:
        first, last = chunk * self._frames, (chunk + 1) * self._frames
        pictures = []
        for begin, end, picture in self._runs:
            pictures += [picture] * (min(end, last) - max(begin, first))
        self._runs = [run for run in self._runs if run[1] > last]
        if self._shown is not None and len(pictures) < self._frames:
            opens, closes = (instant(frame, self._seconds, self._frames) for frame in (first, last - 1))
            if pictures or (self._shown_from <= closes + INSTANT and opens < self._shown_from + self._stays):
                pictures += [self._shown] * (self._frames - len(pictures))
        self._next = max(self._next, last)
        return torch.stack(pictures, 1) if pictures else None
