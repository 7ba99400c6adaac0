"""One question about one clip, and tables of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A question about a span of a clip; a label to be named is a question that asks nothing.

    Attributes:
        clip: path of the media file, or its key in a set of shards.
        question: text before the answer; "" where the answer is a class or a caption.
        answer: the text to be learned, the truth in an evaluation; None where it is not known.
        start, end: the span in seconds of the file; None: from its beginning, to its end.
        type: the group that the accuracy is also told for; "" for none.
        choices: answers to choose from; empty for a free answer.
        references: further answers that are as good.
        id: the set's own name of the question, as its prediction files want it.
    """

    clip: str
    question: str = ""
    answer: str | None = None
    start: float | None = None
    end: float | None = None
    type: str = ""
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    id: str = ""
