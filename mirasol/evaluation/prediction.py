"""What a model answered to one example."""

from __future__ import annotations

from dataclasses import dataclass

from mirasol.data.table import Example


@dataclass(frozen=True)
class Prediction:
    """What a model answered to an example.

    Attributes:
        answer: the text that was generated, or the likeliest of `choices`; "" where the clip could not be read.
        choices: what was chosen from: the example's choices or the classes; empty for a free answer.
        scores: log-probability of each of `choices`, nats; empty for a free answer and for a clip that was not read.
        error: why the clip could not be read; such a prediction is wrong whatever it says.
    """

    example: Example
    answer: str = ""
    choices: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    error: str = ""

    @property
    def truths(self) -> tuple[str, ...]:
        """The answers that are right; none where the truth is not known."""
        return () if self.example.answer is None else (self.example.answer, *self.example.references)
