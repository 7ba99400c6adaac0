"""What turns a chunk's pixels and sound into tokens."""

import torch
from torch import Tensor


def present_or_missing(tokens: Tensor, present: Tensor, missing: Tensor) -> Tensor:
    """tokens [B, T, n, d] of the chunks that are present [B, T], and a learned token [d] in place of all others."""
    return torch.where(present[:, :, None, None], tokens, missing)
