"""Two pieces of work on a CPU at the same time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_One = TypeVar("_One")
_Other = TypeVar("_Other")


class SideBySide:
    """Calls two functions at once, each with half of PyTorch's threads.

    Threads that share every product wait for one another after each, and for long where a core is busy with something
    else; two encoders that share nothing wait once.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mirasol")

    def __call__(self, one: Callable[[], _One], other: Callable[[], _Other]) -> tuple[_One, _Other]:
        threads = torch.get_num_threads()
        if threads == 1:
            return one(), other()
        grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu")

        def aside() -> _One:
            torch.set_num_threads(threads // 2)
            with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, enabled=autocast):
                return one()

        found = self._worker.submit(aside)
        torch.set_num_threads(threads - threads // 2)
        try:
            beside = other()
        finally:
            aside_is = found.exception()  # waits, whatever happened here
            torch.set_num_threads(threads)
        if aside_is is not None:
            raise aside_is
        return found.result(), beside
