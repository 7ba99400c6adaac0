"""A stream that is fed by a source in a thread of its own."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mirasol.kernels.core.checks import expect
from mirasol.media.live import Picture, Sound
from mirasol.streaming.answer import Answer
from mirasol.streaming.cutter import Chunk, Cutter
from mirasol.streaming.stream import Stream


@dataclass(frozen=True)
class Report:
    """Of one chunk that a stream has seen.

    chunk: how many the row had seen before; start: seconds from the stream's start to the chunk's.
    lag: seconds from the moment at which the chunk was over in the world until it was understood; 0 for a source that
        does not come in real time.
    seconds: that the chunk took, with the scores.
    memory: bytes that the stream's past takes; process_memory: bytes that the process holds.
    video, audio: whether there was any.
    scores: the probability of each choice among the choices.
    """

    chunk: int
    start: float
    lag: float
    seconds: float
    memory: int
    process_memory: int
    video: bool
    audio: bool
    scores: dict[str, float]


class Session:
    """A stream that is fed by a source in a thread of its own, and answers questions meanwhile.

    Args:
        stream: goes on from what its row has seen.
        source: what `mirasol.media.open_live` gives, or any pictures and sound in order; it is not closed here.
        row: of the stream.
        question, choices: after each chunk, how likely each choice is as the answer. Without choices nothing is scored.
        on_report: called in the session's thread after each chunk.

    Attributes:
        reports: how many chunks were seen.
        failure: what ended the session before the source did, or None.
    """

    def __init__(
        self,
        stream: Stream,
        source: Iterable[Picture | Sound],
        *,
        row: int = 0,
        question: str = "",
        choices: Sequence[str] = (),
        on_report: Callable[[Report], None] | None = None,
    ) -> None:
        expect(len(set(choices)) == len(choices), "choices", "differ from one another", choices)
        self._stream, self._source, self._row = stream, source, row
        self._question, self._choices, self._on_report = question, tuple(choices), on_report
        config = stream.config
        self._cutter = Cutter(
            frames_per_chunk=config.frames_per_chunk,
            image_size=config.image_size,
            samples_per_chunk=config.samples_per_chunk,
            sample_rate=config.sample_rate,
        )
        self._before = stream.chunks[row] * config.seconds_per_chunk
        self._begun: float | None = None
        self._real_time = bool(getattr(source, "real_time", False))
        self._stopped = threading.Event()
        self._seen = threading.Event()
        self._seeing = threading.RLock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.reports = 0
        self.failure: Exception | None = None

    def start(self) -> None:
        """Begin to watch and listen."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; returns when the chunk that is being seen is complete. The thread itself ends when the source gives
        something or is closed."""
        self._stopped.set()
        with self._seeing:
            pass

    def join(self, timeout: float | None = None) -> None:
        """Wait until the source has ended, or `stop` was called; for so many seconds at most."""
        self._thread.join(timeout)

    @property
    def running(self) -> bool:
        """Whether it still watches and listens."""
        return self._thread.is_alive()

    def wait_for_chunk(self, timeout: float | None = None) -> bool:
        """Wait until there is something to ask about; whether there is."""
        return self._seen.wait(timeout)

    def ask(self, question: str, **options: Any) -> Answer:
        """The answer about what was seen up to now, piece by piece, while the session goes on.

        Args:
            options: those of `Stream.answer`.
        Raises:
            ValueError: nothing was seen yet.
        """
        return self._stream.answer(question, row=self._row, **options)

    def _run(self) -> None:
        try:
            for item in self._source:
                if self._stopped.is_set():
                    return
                if self._begun is None:
                    self._begun = time.monotonic() - item.time
                if isinstance(item, Picture):
                    self._cutter.frames(item.frame[None], [item.time])
                else:
                    self._cutter.samples(item.samples, item.time)
                self._push(self._cutter.ready())
            self._push(self._cutter.finish())
        except Exception as failure:
            self.failure = failure

    def _push(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            with self._seeing:
                if self._stopped.is_set():
                    return
                self._see(chunk)

    def _see(self, chunk: Chunk) -> None:
        stream, row, begun = self._stream, self._row, time.perf_counter()
        number, start = stream.chunks[row], self._before + chunk.start
        video, audio = (
            None if part is None else part[None].to(stream.device, non_blocking=True)
            for part in (chunk.video, chunk.audio)
        )
        stream.push(video, audio, rows=[row], times=[start])
        scores = self._scores()
        if stream.device.type == "cuda":
            torch.cuda.synchronize(stream.device)
        self.reports += 1
        self._seen.set()
        if self._on_report is not None:
            report = Report(
                chunk=number,
                start=start,
                lag=self._lag(chunk.start + stream.config.seconds_per_chunk),
                seconds=time.perf_counter() - begun,
                memory=stream.nbytes,
                process_memory=process_memory(),
                video=video is not None,
                audio=audio is not None,
                scores=scores,
            )
            self._on_report(report)

    def _scores(self) -> dict[str, float]:
        if not self._choices:
            return {}
        nats = torch.tensor(self._stream.score(self._question, self._choices, row=self._row), dtype=torch.float64)
        return dict(zip(self._choices, nats.softmax(0).tolist(), strict=True))

    def _lag(self, end: float) -> float:
        """Seconds since a moment of the stream (seconds from the source's start)."""
        if not self._real_time or self._begun is None:
            return 0.0
        return max(0.0, time.monotonic() - self._begun - end - getattr(self._source, "skipped", 0.0))


def process_memory() -> int:
    """Bytes that this process holds; where the system does not say, the most that it held."""
    pages = Path("/proc/self/statm")
    if pages.is_file():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
