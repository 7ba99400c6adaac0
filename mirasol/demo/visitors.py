"""All open pages that watch something, up to a number."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mirasol.demo.visitor import Visitor


class Visitors:
    """A `Visitor` for each page, by the name of its connection.

    Args:
        new_visitor: makes one.
        most: pages that may watch something at once.
    """

    def __init__(self, new_visitor: Callable[[], Visitor], most: int) -> None:
        self._new_visitor, self._most = new_visitor, most
        self._lock = threading.Lock()
        self._visitors: dict[str, Visitor] = {}

    def __len__(self) -> int:
        return len(self._visitors)

    def enter(self, name: str) -> Visitor:
        """That of a page, a new one where it has none.

        Raises:
            RuntimeError: too many others have one.
        """
        with self._lock:
            if name not in self._visitors:
                if len(self._visitors) >= self._most:
                    places = "The only place is" if self._most == 1 else f"All {self._most} places are"
                    raise RuntimeError(f"{places} taken. Come again when somebody has closed the page.")
                self._visitors[name] = self._new_visitor()
            return self._visitors[name]

    def find(self, name: str) -> Visitor | None:
        """That of a page, if it has one."""
        return self._visitors.get(name)

    def by_key(self, key: str) -> Visitor | None:
        """The one whose camera sends a key."""
        with self._lock:
            return next((visitor for visitor in self._visitors.values() if visitor.key == key), None)

    def leave(self, name: str) -> None:
        """The page was closed."""
        with self._lock:
            visitor = self._visitors.pop(name, None)
        if visitor is not None:
            visitor.stop()
