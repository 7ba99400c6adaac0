"""Settings that must hold before anything else is imported."""

import os

import torch

# Triton decides at import whether a kernel is interpreted; without a GPU the interpreter is the only way to run one.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import pytest


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
