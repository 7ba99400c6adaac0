"""Text as its ids come: whole characters, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mirasol.kernels.core.checks import expect, refuse
from mirasol.tokenizer import Tokenizer

CUT = "\ufffd"
"""What tokenizers decode bytes to that are no character, or not yet."""


def pieces(ids: Iterable[int], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> Iterator[str]:
    """The text of ids, piece by piece, each as soon as no later id can change it.

    The pieces together are `tokenizer.decode` of all ids, up to the first stop string; of a character that the ids end
    within, nothing is said. No id is taken after those that completed a stop string.

    Args:
        ids: token ids, one after the other; special ones are left out.
        stop: strings that end the text, and are not part of it.
    Raises:
        TypeError, ValueError: `stop` is not a sequence of strings that are not empty.
    """
    check_stops("stop", stop)
    return _pieces(ids, Writing(tokenizer, stop))


def _pieces(ids: Iterable[int], writing: Writing) -> Iterator[str]:
    for token in ids:
        piece = writing.add(token)
        if piece:
            yield piece
        if writing.stopped:
            return
    rest = writing.end()
    if rest:
        yield rest


class Writing:
    """A text that grows by ids. Ids are decoded together each time, for what one says may depend on those before."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.stopped = False
        self._ids: list[int] = []
        self._decoded = ""  # of the ids, as far as it will stay
        self._held = ""  # the end of that, which may begin a stop string

    def add(self, token: int) -> str:
        """What one id more settles."""
        self._ids.append(token)
        whole = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        settled = whole.rstrip(CUT)
        # Some tokenizers take back characters before a cut one; what was told waits until they are there again.
        if len(settled) <= len(self._decoded) or (CUT in whole and not settled.startswith(self._decoded)):
            return ""
        new, self._decoded = settled[len(self._decoded) :], settled
        text = self._held + new
        found = min((place for place in map(text.find, self.stop) if place >= 0), default=None)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[:found]
        held = max((_overlap(text, string) for string in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back, when no id follows."""
        rest, self._held = self._held, ""
        return rest

    def copy(self) -> Writing:
        """One that goes on by itself."""
        other = Writing(self.tokenizer, self.stop)
        other.stopped, other._ids = self.stopped, list(self._ids)
        other._decoded, other._held = self._decoded, self._held
        return other


def check_stops(name: str, stop: Any) -> None:
    """Stop strings are a sequence of strings, none of them empty, which every text would hold."""
    if isinstance(stop, str) or not isinstance(stop, Sequence) or not all(isinstance(string, str) for string in stop):
        refuse(name, "be a sequence of strings", stop, TypeError)
    expect(all(stop), name, "hold no empty string", stop)


def _overlap(text: str, string: str) -> int:
    """Characters at the end of the text that the string, which it does not hold, begins with."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
