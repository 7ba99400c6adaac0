"""Two encoders at once: the same results, and the process's threads as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from mirasol.streaming.beside import SideBySide


@pytest.fixture
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_four_threads")
def test_both_at_once_with_half_of_the_threads_each():
    meet = threading.Barrier(2, timeout=10)

    def told() -> tuple[int, bool, bool, torch.dtype]:
        meet.wait()
        return (
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
        )

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert SideBySide()(told, told) == ((2, False, True, torch.bfloat16),) * 2
    assert torch.get_num_threads() == 4
    assert SideBySide()(told, told) == ((2, True, False, torch.bfloat16),) * 2
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [4]  # of threads that begin later, too


@pytest.mark.usefixtures("_four_threads")
@pytest.mark.parametrize("which", [0, 1])
def test_what_fails_is_raised_and_threads_are_given_back(which):
    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        SideBySide()(*((fail, int) if which == 0 else (int, fail)))
    assert torch.get_num_threads() == 4


def test_one_thread_does_one_after_the_other():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert SideBySide()(threading.get_ident, threading.get_ident) == (threading.get_ident(),) * 2
    finally:
        torch.set_num_threads(before)
