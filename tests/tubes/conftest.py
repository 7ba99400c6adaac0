"""What could not be tested on this machine is said at the end of the run."""

from __future__ import annotations

import os
import shutil

import pytest

NOT_TESTED = pytest.StashKey[dict[str, str]]()


@pytest.fixture
def skip_loudly(request: pytest.FixtureRequest):
    """Skip a test and repeat the reason below the results."""

    def skip(what: str, why: str) -> None:
        request.config.stash.setdefault(NOT_TESTED, {})[what] = why
        pytest.skip(f"{what}: {why}")

    return skip


@pytest.fixture(scope="session")
def cxx() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for what, why in config.stash.get(NOT_TESTED, {}).items():
        terminalreporter.write_line(f"NOT TESTED: {what}: {why}", red=True, bold=True)
