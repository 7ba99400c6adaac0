"""Where the tests run: compiled kernels on a GPU, elsewhere the same kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
EXACT = torch.float32 if ON_GPU else torch.float64  # the widest that Triton kernels serve here
LOW_PRECISION = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16,)  # the interpreter has no bfloat16

only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="only a GPU can show it")
