"""CUDA streams on which the past and answers go on side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

_Item = TypeVar("_Item")


class Lane:
    """A CUDA stream of its own; on other devices nothing."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after_caller(self) -> Iterator[None]:
        """Work that begins when what the caller has queued is done, and that the caller's later work waits for."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def iterate(self, items: Iterator[_Item], used: list[Tensor]) -> Iterator[_Item]:
        """The items, each of them made on this lane.

        Args:
            used: tensors of other lanes, which are kept until this one has done with them.
        """
        if self.stream is None:
            yield from items
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        for tensor in used:
            tensor.record_stream(self.stream)
        while True:
            with torch.cuda.stream(self.stream):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
