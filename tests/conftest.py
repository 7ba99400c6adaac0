"""Settings that must hold before anything else is imported, and what could not be tested said at the end of a run."""

import os

import torch

# Triton decides at import whether a kernel is interpreted; without a GPU the interpreter is the only way to run one.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import pytest

from figures import check, renew

NOT_TESTED = pytest.StashKey[dict[str, str]]()


@pytest.fixture
def skip_loudly(request: pytest.FixtureRequest):
    """Skip a test and repeat the reason below the results."""

    def skip(what: str, why: str) -> None:
        request.config.stash.setdefault(NOT_TESTED, {})[what] = why
        pytest.skip(f"{what}: {why}")

    return skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-figures", action="store_true", help="write tests/figures.json anew (`make figures`)")


@pytest.fixture
def figures(request: pytest.FixtureRequest):
    """Hold counted figures against those that were reviewed: see `figures.py`."""
    return renew if request.config.getoption("--renew-figures") else check


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for what, why in config.stash.get(NOT_TESTED, {}).items():
        terminalreporter.write_line(f"NOT TESTED: {what}: {why}", red=True, bold=True)
