"""The erase-add write of Neural Turing Machines, in PyTorch's own operators and their gradients; for every backend."""

from __future__ import annotations

import torch
from torch.nn.functional import layer_norm, linear

from mirasol.kernels.ttm.params import EraseAddParams, MlpParams
from mirasol.kernels.ttm.pool.eager import gelu, products, recorded
from mirasol.kernels.ttm.reference import NORM_EPS
from mirasol.kernels.ttm.summary import Partial, Parts


class EraseAdd:
    """See `summary.Summary`: a write that does not look at the inputs."""

    def __init__(self, params: EraseAddParams) -> None:
        self.params = params

    def partial(self, parts: Parts) -> None:
        return None

    def finish(self, parts: Parts, carry: Partial | None = None) -> torch.Tensor:
        memory, _, outputs = parts
        assert memory is not None
        assert outputs is not None
        return erase_add(memory, outputs, self.params)


def erase_add(memory: torch.Tensor, outputs: torch.Tensor, params: EraseAddParams) -> torch.Tensor:
    """As `reference.erase_add`, one slot after another, so that no [B, S, s, d] tensor is made."""
    d = memory.shape[-1:]
    normed = layer_norm(memory, d, params.select_norm_weight, params.select_norm_bias, NORM_EPS)
    weights = mlp(normed, params.select).softmax(dim=1)  # [B, s, S]
    erase = _slots(
        outputs, params.erase_norm_weight, params.erase_norm_bias, params.erase_tokens, params.erase_channels
    )
    add = _slots(outputs, params.add_norm_weight, params.add_norm_bias, params.add_tokens, params.add_channels)
    erase = erase if params.official else erase.sigmoid()
    kept = _erased(memory, weights, erase)
    if params.official:
        return 1 + torch.baddbmm(kept, weights, add, alpha=-1 / weights.shape[2])
    return torch.baddbmm(kept, weights, add)


def _erased(memory: torch.Tensor, weights: torch.Tensor, erase: torch.Tensor) -> torch.Tensor:
    """memory [B, s, d] times 1 - w_i e_i for every slot: weights [B, s, S], erase [B, S, d]."""
    slots = zip(weights.split(1, dim=2), erase.split(1, dim=1), strict=True)
    if recorded():
        for w, e in slots:
            memory = torch.addcmul(memory, memory * w, e, value=-1)
        return memory
    kept, part = memory.clone(memory_format=torch.contiguous_format), memory.new_empty(memory.shape)
    for w, e in slots:
        kept.addcmul_(torch.mul(kept, w, out=part), e, value=-1)
    return kept


def mlp(x: torch.Tensor, params: MlpParams) -> torch.Tensor:
    """W2 gelu_tanh(W1 x + b1) + b2 over the last dimension."""
    return linear(gelu(linear(x, params.w1, params.b1)), params.w2, params.b2)


def _slots(
    outputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tokens: MlpParams, channels: MlpParams
) -> torch.Tensor:
    """One vector a slot [B, S, d] from the outputs [B, r, d]: an MLP over tokens, then one over channels."""
    normed = layer_norm(outputs, outputs.shape[-1:], weight, bias, NORM_EPS)
    hidden = gelu(products(tokens.w1, normed.mT, tokens.b1))  # [B, hidden, d]: rows of tokens, nothing is transposed
    return mlp(products(tokens.w2, hidden.mT, tokens.b2), channels)
