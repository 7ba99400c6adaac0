"""What comes whether it is taken or not: threads that read, and a bounded queue that forgets."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

LEAP = 60.0
"""Seconds between two timestamps that are no pause but a clock that was set anew."""

PICTURE_BYTES, FEWEST = 2**26, 8
"""Of pictures that wait, and how many may wait however large they are."""


@dataclass(frozen=True, eq=False)
class Picture:
    """frame: uint8 [3, H, W], on screen from `time` (seconds) on."""

    time: float
    frame: Tensor


@dataclass(frozen=True, eq=False)
class Sound:
    """samples: float32 [N], mono, of which the first is heard at `time` (seconds)."""

    time: float
    samples: Tensor


Items = Generator[Picture | Sound, None, None]


class Live(Iterator[Picture | Sound]):
    """Pictures and sound in the order in which they come, to be iterated over once.

    real_time: whether they come at the pace at which they happen.
    dropped: pictures and pieces of sound that were never given, for the one who takes them was too slow.
    skipped: seconds that were left out before what was given last; times count on as if they had never been.
    """

    real_time = False
    dropped = 0
    skipped = 0.0

    def __init__(self, items: Items, release: Callable[[], None]) -> None:
        self._items, self._release = items, release
        self._reading, self._closed = threading.Lock(), False

    def __next__(self) -> Picture | Sound:
        with self._reading:
            item = None if self._closed else next(self._items, None)
            if self._closed:
                self._close()
            if item is None:
                raise StopIteration
            return item

    def close(self, timeout: float) -> None:
        """Stop, and close what is read. Where another thread waits for something to read, and so many seconds do not
        bring it, that thread closes it when it comes."""
        self._closed = True
        if self._reading.acquire(timeout=timeout):
            self._close()
            self._reading.release()

    def _close(self) -> None:
        self._items.close()
        self._release()  # for what was never begun


class Backlog(Live):
    """Takes in what threads read, at their pace. Too many pictures: the oldest are dropped. What has waited for
    `seconds` is dropped, pictures and sound, and times close the gap, so that the one who takes it is late by that
    much at most.

    Args:
        feeds: what each thread reads, until `stop` is set.
    """

    real_time = True

    def __init__(self, feeds: Sequence[Items], stop: threading.Event, seconds: float) -> None:
        self._stop, self._seconds = stop, seconds
        self._queue: deque[tuple[float, Picture | Sound]] = deque()  # with the time at which it came
        self._pictures, self._left_out = 0, 0.0
        self._changed = threading.Condition()
        self._failure: Exception | None = None
        self._running = len(feeds)
        self._threads = [threading.Thread(target=self._read, args=(feed,), daemon=True) for feed in feeds]
        for thread in self._threads:
            thread.start()

    def __next__(self) -> Picture | Sound:
        with self._changed:
            while not self._queue and self._running and not self._stop.is_set():
                self._changed.wait()
            if not self._queue or self._stop.is_set():
                if self._failure is not None:
                    failure, self._failure = self._failure, None
                    raise failure
                raise StopIteration
            _, item = self._queue.popleft()
            self._pictures -= isinstance(item, Picture)
            self.skipped = self._left_out
        return replace(item, time=item.time - self.skipped)

    def close(self, timeout: float) -> None:
        """Stop reading. A thread that waits for what it reads is left behind after so many seconds."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout)

    def _read(self, feed: Items) -> None:
        try:
            for item in feed:
                if self._stop.is_set():
                    break
                self._put(item)
        except Exception as failure:
            self._failure = self._failure or failure
        finally:
            feed.close()
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _put(self, item: Picture | Sound) -> None:
        now = time.monotonic()
        with self._changed:
            self._queue.append((now, item))
            if isinstance(item, Picture):
                self._pictures += 1
                if self._pictures > max(FEWEST, PICTURE_BYTES // item.frame.nbytes):
                    oldest = next(i for i, (_, other) in enumerate(self._queue) if isinstance(other, Picture))
                    del self._queue[oldest]
                    self._pictures -= 1
                    self.dropped += 1
            while self._queue[0][0] < now - self._seconds:
                _, gone = self._queue.popleft()
                self._pictures -= isinstance(gone, Picture)
                self.dropped += 1
                gap = self._queue[0][1].time - gone.time
                self._left_out += gap if abs(gap) < LEAP else 0.0
            self._changed.notify()


def paced(items: Items, stop: threading.Event) -> Items:
    """Each not before its time, from the first one on."""
    begun = last = None
    for item in items:
        now = time.monotonic()
        if begun is None or last is None or abs(item.time - last) > LEAP:
            begun = now - item.time
        last = item.time
        if stop.wait(max(0.0, begun + item.time - now)):
            return
        yield item
