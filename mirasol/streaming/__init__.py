"""A live stream: chunk after chunk, questions at any time, in bounded memory. Names are loaded at first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirasol.streaming.answer import Answer as Answer
    from mirasol.streaming.cutter import Chunk as Chunk
    from mirasol.streaming.cutter import Cutter as Cutter
    from mirasol.streaming.session import Report as Report
    from mirasol.streaming.session import Session as Session
    from mirasol.streaming.stream import Stream as Stream

_HOMES = {
    "Answer": "answer",
    "Chunk": "cutter",
    "Cutter": "cutter",
    "Report": "session",
    "Session": "session",
    "Stream": "stream",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mirasol.streaming' has no attribute {name!r}")
    return getattr(import_module(f"mirasol.streaming.{_HOMES[name]}"), name)
