"""What an evaluation is told. Plain values, so that `python -m mirasol evaluate --help` waits for no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Benchmark = Literal["msrvtt-qa", "activitynet-qa", "nextqa-mc", "nextqa-oe", "vggsound", "epic-sounds"]


@dataclass(frozen=True)
class AnswerOptions:
    """How a model answers.

    Raises:
        TypeError, ValueError: a value that cannot work, by name, with what it must be.
    """

    max_chunks: int | None = None
    """Most chunks of a clip; a longer span is read as so many chunks spread over it. Default: as many as the model
    has learned with, 16 where its folder does not say."""
    max_new_tokens: int = 32
    """Most tokens of a free answer."""
    num_beams: int = 1
    """Width of the beam search for free answers; 1 takes the likeliest token each time."""
    mean_per_token: bool = False
    """Compare choices by the mean log-probability of their tokens, in place of the sum, which favours short ones."""
    texts_at_once: int = 256
    """Most questions, or pairs of a question and a choice, that the text decoder runs at once: bounds the memory."""
    device: str | None = None
    """cpu or cuda; a GPU where there is one."""
    bf16: bool | None = None
    """Hold the model in bfloat16; default: on a GPU."""

    def __post_init__(self) -> None:
        from mirasol.kernels.core.checks import expect, expect_int

        for name in ("max_new_tokens", "num_beams", "texts_at_once"):
            expect_int(name, getattr(self, name))
        if self.max_chunks is not None:
            expect_int("max_chunks", self.max_chunks)
        expect(self.device is None or bool(self.device), "device", "be cpu or cuda", self.device)


@dataclass(frozen=True)
class EvaluateOptions(AnswerOptions):
    """Let a model answer a table of questions about clips, and measure how well it does.

    An example with choices is answered by the likeliest of them, others freely, or by a class with --classes.
    """

    out: str = "evaluation"
    """Folder of the results: metrics.json, predictions.jsonl, report.html, and the set's own file of predictions."""
    benchmark: Benchmark | None = None
    """The published set that the table is of: its measures and groups, and predictions in its own format."""
    classes: str | None = None
    """Answer with one of a closed set of classes, by the log-probability of its name: a text file with a class a line,
    in the set's own order, or "table" for all answers that the table holds."""
    batch: int = 8
    """Clips that are encoded at once."""
    workers: int = 0
    """Processes that read clips; 0: this one."""
    shown: int = 60
    """Examples that the report shows with their frames, spread evenly over the table."""
    progress: bool = True
    """Show a bar of the clips that are done."""

    def __post_init__(self) -> None:
        from mirasol.kernels.core.checks import expect, expect_int

        super().__post_init__()
        expect_int("batch", self.batch)
        expect_int("workers", self.workers, minimum=0)
        expect_int("shown", self.shown, minimum=0)
        expect(self.classes != "", "classes", 'be a file of classes or "table"', self.classes)
