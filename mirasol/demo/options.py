"""What the web page is told. Plain values, so that `python -m mirasol demo --help` waits for no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoOptions:
    """How the page is served, and what a stream keeps.

    Raises:
        TypeError, ValueError: a value that cannot work, by name, with what it must be.
    """

    memory: int = 64
    """Chunks that a stream keeps, where the model's configuration leaves it open."""
    sinks: int = 0
    """First chunks that it keeps beside them."""
    max_new_tokens: int = 64
    """Most tokens of an answer."""
    visitors: int = 4
    """Most pages that watch something at once, each with a stream of its own."""
    examples: Path | None = None
    """Folder of clips that the page offers; default: clips made for the model, where its folder tells of its world."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of the machine's."""
    port: int = 7860
    """Port to listen at; 0 for the first that is free from 7860 on."""
    share: bool = False
    """Make the page reachable from everywhere by a tunnel of Gradio's."""
    device: str | None = None
    """cpu or cuda; a GPU where there is one."""

    def __post_init__(self) -> None:
        from mirasol.kernels.core.checks import expect, expect_int

        for name in ("memory", "max_new_tokens", "visitors"):
            expect_int(name, getattr(self, name))
        for name in ("sinks", "port"):
            expect_int(name, getattr(self, name), minimum=0)
        expect(self.port < 2**16, "port", f"be below {2**16}", self.port)
        expect(bool(self.host), "host", "be an address", self.host)
        folder = self.examples
        expect(folder is None or Path(folder).is_dir(), "examples", "be a folder of clips", str(folder))
