"""The `torch` backend of the erase-add write: PyTorch's own operators and their gradients."""

from __future__ import annotations

import torch

from ..params import EraseAddParams, MlpParams
from ..reference import NORM_EPS, mlp


def erase_add(memory: torch.Tensor, outputs: torch.Tensor, params: EraseAddParams) -> torch.Tensor:
    """As `reference.erase_add`, one slot after another, so that no [B, S, s, d] tensor is made."""
    d = memory.shape[-1:]
    normed = torch.nn.functional.layer_norm(memory, d, params.select_norm_weight, params.select_norm_bias, NORM_EPS)
    weights = mlp(normed, params.select).softmax(dim=1)  # [B, s, S]
    erase = _slots(
        outputs, params.erase_norm_weight, params.erase_norm_bias, params.erase_tokens, params.erase_channels
    )
    add = _slots(outputs, params.add_norm_weight, params.add_norm_bias, params.add_tokens, params.add_channels)
    erase = erase if params.official else erase.sigmoid()
    kept = memory
    for w, e in zip(weights.unbind(2), erase.unbind(1), strict=True):
        kept = torch.addcmul(kept, kept * w[..., None], e[:, None], value=-1)
    added = torch.bmm(weights, add)
    return kept + (1 - added / weights.shape[2] if params.official else added)


def _slots(
    outputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tokens: MlpParams, channels: MlpParams
) -> torch.Tensor:
    """One vector a slot [B, S, d] from the outputs [B, r, d]: an MLP over tokens, then one over channels."""
    normed = torch.nn.functional.layer_norm(outputs, outputs.shape[-1:], weight, bias, NORM_EPS)
    return mlp(mlp(normed.transpose(1, 2), tokens).transpose(1, 2), channels)
