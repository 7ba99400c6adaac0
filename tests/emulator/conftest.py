"""Compiled kernels in the emulator, in a process of their own: `python -m pytest tests/emulator`."""

import os

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns unless it is told
