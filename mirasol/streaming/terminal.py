"""A stream in a terminal: a line a chunk, and questions that are typed."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch

from mirasol.media.live import Live, open_live
from mirasol.model import Model
from mirasol.streaming.options import StreamOptions
from mirasol.streaming.session import Report, Session
from mirasol.tokenizer import load_tokenizer

SHOWN_CHOICES = 3

POLL = 0.05
"""Seconds after which it is looked whether something was typed, or the source has ended."""


def watch(run: str | Path, source: str, options: StreamOptions) -> None:
    """Watch a source with a model, and answer what is typed, until the source ends.

    Args:
        run: a folder that `Model.save_pretrained` wrote with its tokenizer.
        source: as `mirasol.media.live.open_live` takes it.
    Raises:
        KeyboardInterrupt: it was interrupted; the summary is printed all the same.
        FileNotFoundError, ConnectionError, TimeoutError, ValueError: as `Model.from_pretrained` and `open_live`, also
            when a source fails later on.
    """
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bf16 = options.bf16 if options.bf16 is not None else device.type == "cuda"
    tokenizer = load_tokenizer(run)
    model = Model.from_pretrained(run, dtype=torch.bfloat16 if bf16 else None, device=device).eval()
    kept = dict(grow=True) if options.grow else dict(memory=options.memory, sinks=options.sinks)
    stream = model.stream(tokenizer=tokenizer, **kept)
    config, screen = model.config, Screen(sys.stdout)
    opened = open_live(
        source,
        size=config.image_size,
        sample_rate=config.sample_rate,
        real_time=options.real_time,
        microphone=options.microphone,
    )
    with contextlib.ExitStack() as at_end:
        live = at_end.enter_context(opened)
        session = Session(
            stream, live, question=options.question, choices=options.choices, on_report=screen.show_report
        )
        typed = None if source == "-" else Typed(sys.stdin.fileno())
        screen.line("type a question at any time" if typed else "questions are not read: standard input is the source")
        begun = time.monotonic()
        session.start()
        try:
            _answer_until_the_end(session, typed, screen, options.max_new_tokens)
        finally:
            session.stop()
            at_end.close()  # what the session may be waiting for
            session.join(1.0)
            screen.line(_summary(session, live, config.seconds_per_chunk, time.monotonic() - begun))
    if session.failure is not None:
        raise session.failure


def _answer_until_the_end(session: Session, typed: Typed | None, screen: Screen, max_new_tokens: int) -> None:
    """Answer each question in turn, those too that were typed before there was anything to ask about."""
    waiting: list[str] = []
    while True:
        running = session.running  # asked first: what was typed before the end is answered
        if typed is None:
            session.join(POLL)
        else:
            waiting += typed.lines(POLL)
        if waiting and session.reports:
            question = waiting.pop(0)
            screen.show_answer(question, session.ask(question, max_new_tokens=max_new_tokens))
        elif not running:
            break
    for question in waiting:
        screen.line(f"> {question}\n  there was nothing to ask about")


class Typed:
    """Lines of an open file, as far as they are there: no thread that waits for a key when all else has ended."""

    def __init__(self, file: int) -> None:
        self._file, self._begun, self._ended = file, b"", False

    def lines(self, timeout: float) -> list[str]:
        """Those that have come and are not empty; waits for the first for so many seconds."""
        if self._ended:
            time.sleep(timeout)
            return []
        if not select.select([self._file], [], [], timeout)[0]:
            return []
        data = os.read(self._file, 2**16)
        self._ended = not data
        *complete, self._begun = (self._begun + (data or b"\n")).split(b"\n")
        return [text for line in complete if (text := line.decode("utf-8", "replace").strip())]


class Screen:
    """Lines of chunks and answers, one after the other: while an answer is written, the chunks' lines wait."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._waiting: list[str] | None = None  # lines, while an answer is written
        try:
            "▮▯".encode(out.encoding or "ascii")
            self._present, self._missing = "▮", "▯"
        except UnicodeEncodeError:
            self._present, self._missing = "#", "-"

    def line(self, text: str) -> None:
        """Print a line, or keep it until the answer that is being written is complete."""
        with self._lock:
            if self._waiting is None:
                self._write(text + "\n")
            else:
                self._waiting.append(text)

    def show_report(self, report: Report) -> None:
        signs = [self._present if here else self._missing for here in (report.video, report.audio)]
        likeliest = sorted(report.scores.items(), key=lambda score: -score[1])[:SHOWN_CHOICES]
        self.line(
            f"chunk {report.chunk:5}  {report.start:9.2f} s  lag {report.lag:6.2f} s  {report.seconds * 1e3:6.0f} ms  "
            f"{report.memory / 2**20:7.1f} of {report.process_memory / 2**20:.0f} MiB  "
            f"video {signs[0]} audio {signs[1]}  " + "  ".join(f"{choice} {share:.2f}" for choice, share in likeliest)
        )

    def show_answer(self, question: str, pieces: Iterator[str]) -> None:
        """Print an answer as its pieces come."""
        with self._lock:
            self._waiting = []
            self._write(f"> {question}\n  ")
        try:
            for piece in pieces:
                self._write(piece)
        finally:
            with self._lock:
                waiting, self._waiting = self._waiting, None
                self._write("".join(f"{line}\n" for line in ["", *waiting]))

    def _write(self, text: str) -> None:
        encoding = self._out.encoding or "utf-8"
        self._out.write(text.encode(encoding, "replace").decode(encoding))
        self._out.flush()


def _summary(session: Session, live: Live, seconds_per_chunk: float, took: float) -> str:
    """What was seen, how fast, and what was lost."""
    seen = session.reports * seconds_per_chunk
    lost = f"; {live.dropped} pictures and sounds dropped, {live.skipped:.1f} s skipped" if live.dropped else ""
    pace = seen / max(took, 1e-9)
    return f"{session.reports} chunks, {seen:.1f} s of the stream in {took:.1f} s: {pace:.2f} of real time{lost}"
