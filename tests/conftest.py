"""Settings that must hold before anything else is imported."""

import os

import torch

# Triton decides at import whether a kernel is interpreted; without a GPU the interpreter is the only way to run one.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import hypothesis
import pytest

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one is slow, not wrong
hypothesis.settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
