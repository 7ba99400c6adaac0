"""What the command `stream` is told. Plain values, so that its --help waits for no model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StreamOptions:
    """How a stream is watched and asked.

    Raises:
        TypeError, ValueError: a value that cannot work, by name, with what it must be.
    """

    question: str = ""
    """What the choices answer."""
    choices: tuple[str, ...] = ()
    """Show after each chunk how likely each of these is."""
    memory: int = 64
    """Chunks that the stream keeps in those parts of the model whose windows the configuration leaves open."""
    sinks: int = 0
    """First chunks that these parts keep beside them."""
    grow: bool = False
    """Keep all chunks instead: memory grows with the stream."""
    real_time: bool = False
    """Watch a file, or a pipe, at the pace at which it happens; what comes while the model is busy for long is lost."""
    microphone: str | None = None
    """Sound for a camera: the name of an ALSA device, such as default, or pulse:NAME."""
    max_new_tokens: int = 32
    """Most tokens of an answer."""
    device: str | None = None
    """cpu or cuda; a GPU where there is one."""
    bf16: bool | None = None
    """Hold the model in bfloat16; default: on a GPU."""

    def __post_init__(self) -> None:
        from mirasol.kernels.core.checks import expect, expect_int

        for name in ("memory", "max_new_tokens"):
            expect_int(name, getattr(self, name))
        expect_int("sinks", self.sinks, minimum=0)
        expect(not (self.grow and self.sinks), "sinks", "be 0 with grow", self.sinks)
        expect(len(set(self.choices)) == len(self.choices), "choices", "differ from one another", self.choices)
        expect(len(self.choices) != 1, "choices", "be two or more", self.choices)
        expect(bool(self.choices) or not self.question, "question", "come with choices", self.question)
        expect(self.device is None or bool(self.device), "device", "be cpu or cuda", self.device)
