"""The compiler of the C++ that tests build."""

from __future__ import annotations

import os
import shutil

import pytest


@pytest.fixture(scope="session")
def cxx() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
