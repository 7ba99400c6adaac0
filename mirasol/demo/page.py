"""What the page does when something is pressed."""

from __future__ import annotations

import base64
import binascii
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from mirasol.demo import view
from mirasol.demo.examples import Offered
from mirasol.demo.layout import lay_out
from mirasol.demo.playable import playable
from mirasol.demo.visitor import NOTHING_SEEN, Visitor
from mirasol.demo.visitors import Visitors

BLINK = 0.04
"""Least seconds between two states of an answer that is being written."""

SWEPT = (3600, 24 * 3600)
"""Seconds after which Gradio looks for old uploads, and at which they are old."""

ROLL = "() => { const clip = document.querySelector('#clip video'); clip.currentTime = 0; clip.play(); }"
HALT = "() => document.querySelector('#clip video')?.pause()"

Item = TypeVar("Item")


def build(visitors: Visitors, examples: Mapping[str, Offered], note: str = "") -> gr.Blocks:
    """The page.

    Args:
        examples: clips to offer, by name.
        note: what is to be known about the model.
    """
    with gr.Blocks(title="mirasol", analytics_enabled=False, fill_width=True, delete_cache=SWEPT) as page:
        parts = lay_out(list(examples), _receiver(visitors), note)
        originals: dict[str, str | Path] = {}  # what is watched, by what is played

        def look(visitor: Visitor | None) -> list[Any]:
            """What `shown` shows; the timer runs while there is something to see."""
            going = gr.Timer(active=visitor is not None and visitor.running)
            return [view.status(visitor), view.strip(visitor), view.figures(visitor), going]

        def find(request: gr.Request) -> Visitor | None:
            return visitors.find(str(request.session_hash))

        def enter(request: gr.Request) -> Visitor:
            try:
                return visitors.enter(str(request.session_hash))
            except RuntimeError as error:
                raise _told(error) from error

        def take(path: str | Path) -> str | None:
            """A clip as the page can play it; None, and a sentence on the page, for what cannot be read."""
            try:
                with tempfile.TemporaryDirectory() as folder:
                    found = playable(path, Path(folder) / f"{Path(path).stem}.mp4")
                    played = save_file_to_cache(found, parts.clip.GRADIO_CACHE)
            except ValueError as error:
                gr.Warning(f"{error}. Take another file.", duration=60)
                return None
            originals[played] = path
            return played

        def take_upload(path: str) -> list[Any]:
            return [take(path), _suggested(())]

        def take_example(name: str) -> list[Any]:
            return [take(examples[name].path), _suggested(examples[name].questions)]

        def on_tick(request: gr.Request) -> list[Any]:
            return look(find(request))

        def on_play(path: str | None, request: gr.Request) -> list[Any]:
            if path is None:
                raise _told("There is no clip to play: upload one or take an example.")
            visitor = enter(request)
            visitor.play(originals.get(path, path))
            return ["", [], *look(visitor)]

        def on_record(request: gr.Request) -> list[Any]:
            visitor = enter(request)
            return [visitor.open_camera(), [], *look(visitor)]

        def on_stop(request: gr.Request) -> list[Any]:
            visitor = find(request)
            if visitor is not None:
                visitor.stop()
            return ["", view.messages(visitor), *look(visitor)]

        def on_start_over(request: gr.Request) -> list[Any]:
            visitor = find(request)
            if visitor is not None:
                visitor.start_over()
            return ["", [], *look(visitor)]

        def on_ask(text: str, request: gr.Request) -> Iterator[list[Any]]:
            visitor = find(request)
            if not text.strip():
                return
            try:
                if visitor is None:
                    raise ValueError(NOTHING_SEEN)
                for count, _ in enumerate(_seldom(visitor.ask(text.strip()), BLINK)):
                    yield ["" if count == 0 else gr.skip(), view.messages(visitor), *look(visitor)[:3]]
            except ValueError as error:
                raise _told(error) from error

        def on_leave(request: gr.Request) -> None:
            visitors.leave(str(request.session_hash))

        shown = [parts.status, parts.strip, parts.figures, parts.timer]
        begun = [parts.camera, parts.chat, *shown]
        quiet: Any = dict(show_progress="hidden", api_visibility="private", concurrency_limit=None)
        slow: Any = {**quiet, "show_progress": "full"}
        parts.timer.tick(on_tick, outputs=shown, **quiet)
        taken = [parts.clip, parts.suggestion]
        parts.clip.upload(take_upload, parts.clip, taken, **slow)
        parts.example.input(take_example, parts.example, taken, **slow)
        parts.suggestion.input(None, parts.suggestion, parts.question, js="(question) => question", **quiet)
        parts.play.click(on_play, parts.clip, begun, **quiet).success(None, js=ROLL)
        parts.record.click(on_record, outputs=begun, **quiet).success(None, js=HALT)
        parts.stop.click(on_stop, outputs=begun, js=HALT, **quiet)
        parts.start_over.click(on_start_over, outputs=begun, js=HALT, **quiet)
        written = [parts.question, parts.chat, *shown[:3]]
        asked: Any = [parts.ask.click, parts.question.submit]
        gr.on(asked, on_ask, parts.question, written, trigger_mode="multiple", **quiet)
        page.unload(on_leave)
    return page


def _suggested(questions: Sequence[tuple[str, str]]) -> gr.Dropdown:
    choices = [(f"{question} ({answer})", question) for question, answer in questions]
    return gr.Dropdown(choices, value=None, visible=bool(choices))


def _told(mistake: object) -> gr.Error:
    """A sentence on the page, and nothing in the server's log."""
    return gr.Error(str(mistake), print_exception=False)


def _seldom(items: Iterable[Item], seconds: float) -> Iterator[Item]:
    """The first and the last of items that come fast, and between them one every so many seconds."""
    last, told = None, -math.inf
    for item in items:
        last = item
        if time.monotonic() - told >= seconds:
            yield item
            last, told = None, time.monotonic()
    if last is not None:
        yield last


def _receiver(visitors: Visitors) -> Callable[[dict[str, str]], bool]:
    def receive(piece: dict[str, str]) -> bool:
        """What a page's camera sends: its key and a piece of the recording in base64, or why there is none; -> whether
        more is wanted."""
        visitor = visitors.by_key(piece.get("key", ""))
        try:
            data = base64.b64decode(piece.get("data", ""), validate=True)
        except binascii.Error:
            return False
        return visitor is not None and visitor.receive(data, piece.get("mistake", ""))

    return receive
