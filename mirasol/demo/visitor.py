"""One open page: what it watches and what was asked of it."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mirasol.demo.source import Recording, Watched
from mirasol.streaming import Stream
from mirasol.streaming.session import Report, Session

CAMERA = "the camera"
NOTHING_SEEN = "There is nothing to ask about yet: play a clip or start the camera first."

LONGEST = 5.0
"""Seconds that one waits for a session which was stopped: its source may be in the middle of a pause."""


@dataclass
class Exchange:
    """A question, asked `time` seconds after the stream began, and what is written of its answer.

    first_token: seconds from the question to the first token, None before it.
    """

    question: str
    time: float
    text: str = ""
    attention: dict[int, float] = field(default_factory=dict)
    first_token: float | None = None


class Visitor:
    """A stream of one's own, with a session that feeds it.

    Attributes:
        stream: what watches and listens; a new one for each source.
        exchanges: questions and answers, the oldest first.
        source: name of what is watched; empty before anything is.
        key: what the page's camera sends along with what it records; None while it is closed.
    """

    def __init__(self, new_stream: Callable[[], Stream], window: int, sinks: int, max_new_tokens: int) -> None:
        """Args: window, sinks: chunks that the text decoder sees of such a stream, the last ones and the first ones."""
        self._new_stream, self._window, self._sinks = new_stream, window, sinks
        self._max_new_tokens = max_new_tokens
        self._lock = threading.RLock()
        self._session: Session | None = None
        self._recording: Recording | None = None
        self.key: str | None = None
        self.start_over()

    def start_over(self) -> None:
        """Stop, and forget everything."""
        with self._lock:
            self.stop()
            self.stream, self.source, self._session = self._new_stream(), "", None
            self.exchanges: list[Exchange] = []
            self._first: list[Report] = []
            self._last: deque[Report] = deque(maxlen=self._window)
            self._mistake = ""

    def play(self, path: str | Path) -> None:
        """Start over with a clip, at its own pace."""
        self._watch(path, Path(path).name)

    def open_camera(self) -> str:
        """Start over with what the page records; -> the key to send it with."""
        with self._lock:
            recording = Recording()
            self._watch(recording, CAMERA)
            self._recording, self.key = recording, secrets.token_urlsafe(16)
            return self.key

    def receive(self, data: bytes, mistake: str = "") -> bool:
        """The next piece of what the page records, or why it does not; -> whether more is wanted."""
        with self._lock:
            recording = self._recording
            if recording is None or not self.running:
                return False
            if not mistake and not recording.write(data):
                mistake = "the model takes longer for the camera than the camera for its pictures"
            if mistake:
                self.stop()
                self._mistake = mistake
            return not mistake

    def stop(self) -> None:
        """Watch no longer; what was seen may still be asked about."""
        with self._lock:
            if self._recording is not None:
                self._recording.close()
            self._recording = self.key = None
            if self._session is not None:
                self._session.stop()
                self._session.join(LONGEST)

    def ask(self, question: str) -> Iterator[Exchange]:
        """The exchange that a question begins, as often as something was added to it.

        Raises:
            ValueError: nothing was seen yet.
        """
        with self._lock:
            session, exchanges = self._session, self.exchanges
            if session is None or not self.reports:
                raise ValueError(NOTHING_SEEN)
            answer = session.ask(question, attention=True, max_new_tokens=self._max_new_tokens)
            exchange = Exchange(question, self.seconds)
            exchanges.append(exchange)
        yield exchange
        for _ in answer:
            exchange.text, exchange.first_token = answer.text, answer.first_token
            exchange.attention = dict(answer.attention)
            yield exchange
        exchange.first_token, exchange.attention = answer.first_token, dict(answer.attention)
        yield exchange

    @property
    def running(self) -> bool:
        """Whether something is being watched."""
        return self._session is not None and self._session.running

    @property
    def failure(self) -> str:
        """Why watching ended too early, in a sentence; empty if it did not."""
        failed = self._session.failure if self._session is not None else None
        return self._mistake or (str(failed) or type(failed).__name__ if failed is not None else "")

    @property
    def reports(self) -> list[Report]:
        """Of the chunks that the text decoder still sees, in order."""
        last = list(self._last)
        return [report for report in self._first if not last or report.chunk < last[0].chunk] + last

    @property
    def seconds(self) -> float:
        """How long the stream is so far."""
        last = self._last[-1] if self._last else None
        return 0.0 if last is None else last.start + self.stream.config.seconds_per_chunk

    def _watch(self, source: str | Path | Recording, name: str) -> None:
        with self._lock:
            self.start_over()
            self.source = name
            self._session = Session(self.stream, Watched(source, self.stream.config), on_report=self._note)
            self._session.start()

    def _note(self, report: Report) -> None:
        if len(self._first) < self._sinks:
            self._first.append(report)
        self._last.append(report)
