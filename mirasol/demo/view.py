"""What the page says of a visitor: the strip of chunks, figures, a sentence, the conversation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from mirasol.demo.visitor import Visitor


@dataclass(frozen=True)
class Cell:
    """A chunk in the strip.

    Attributes:
        after_gap: whether chunks before it are forgotten, and the one before them is not.
        share: of the current answer's attention, 0..1; height: the same, as a share of the largest one.
    """

    chunk: int
    start: float
    end: float
    video: bool
    audio: bool
    after_gap: bool
    share: float
    height: float


def cells(visitor: Visitor) -> list[Cell]:
    """The chunks that are still in memory, with the attention of the newest answer."""
    attention = visitor.exchanges[-1].attention if visitor.exchanges else {}
    length, found = visitor.stream.config.seconds_per_chunk, list[Cell]()
    most = max(attention.values(), default=1.0)
    for report in visitor.reports:
        share = attention.get(report.chunk, 0.0)
        gap = bool(found) and report.chunk > found[-1].chunk + 1
        span = (report.start, report.start + length)
        found.append(Cell(report.chunk, *span, report.video, report.audio, gap, share, share / most))
    return found


def strip(visitor: Visitor | None) -> str:
    """The chunks over time, as HTML."""
    exchange = visitor.exchanges[-1] if visitor is not None and visitor.exchanges else None
    found = cells(visitor) if visitor is not None else []
    shares = exchange.attention if exchange is not None else {}
    return _template("strip").render(cells=found, exchange=exchange, most=max(shares.values(), default=0.0))


def figures(visitor: Visitor | None) -> str:
    """Memory and times, as HTML."""
    report = visitor.reports[-1] if visitor is not None and visitor.reports else None
    exchange = visitor.exchanges[-1] if visitor is not None and visitor.exchanges else None
    return _template("figures").render(
        report=report,
        seconds=visitor.seconds if visitor is not None else 0.0,
        chunk_seconds=visitor.stream.config.seconds_per_chunk if visitor is not None else None,
        past=visitor.stream.nbytes if visitor is not None else None,
        first_token=exchange.first_token if exchange is not None else None,
    )


def status(visitor: Visitor | None) -> str:
    """What is going on, in a sentence, as HTML."""
    if visitor is None or not (visitor.source or visitor.failure):
        state, sentence = "idle", "Nothing is being watched. Play a clip, or start the camera."
    elif visitor.failure:
        state, sentence = "failed", f"Watching ended: {visitor.failure}"
    elif visitor.running and not visitor.reports:
        state, sentence = "live", f"Waiting for the first chunk of {visitor.source}."
    elif visitor.running:
        state, sentence = "live", f"Watching and listening to {visitor.source}: {clock(visitor.seconds)}."
    else:
        state, sentence = "over", f"Saw {clock(visitor.seconds)} of {visitor.source}. Ask on, or start over."
    return _template("status").render(state=state, sentence=sentence)


def messages(visitor: Visitor | None) -> list[dict[str, Any]]:
    """Questions and answers as a chat."""
    found = []
    for exchange in visitor.exchanges if visitor is not None else []:
        found.append({"role": "user", "content": f"{clock(exchange.time)}  {exchange.question}"})
        found.append({"role": "assistant", "content": exchange.text or "…"})
    return found


def clock(seconds: float) -> str:
    """Minutes and seconds, hours where there are any: 0:07.4, 12:31, 1:02:03."""
    if seconds < 60:
        return f"0:{int(seconds * 10) / 10:04.1f}"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: int) -> str:
    """Bytes, in three digits: 912 B, 1.27 MB."""
    value, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    for larger in units:
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def span(seconds: float) -> str:
    """Seconds, or milliseconds below one, in three digits."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


@cache
def _template(name: str) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("mirasol.demo", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pages.filters |= {"clock": clock, "size": size, "span": span, "percent": lambda share: f"{100 * share:.3g} %"}
    return pages.get_template(f"{name}.html.jinja")
