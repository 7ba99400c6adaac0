"""Work of the erase-add write: matrix products only, 2 operations per multiply-add."""

from __future__ import annotations

from ..params import EraseAddParams, MlpParams


def erase_add_flops(batch: int, tokens: int, params: EraseAddParams) -> int:
    """Forward: the networks, and the sum over slots of w_i a_i for `tokens` = s tokens of memory."""
    slots, d = params.select.w2.shape[0], params.select.w1.shape[1]
    return batch * (tokens * (_mlp(params.select) + 2 * slots * d) + _networks(params, d, slots))


def erase_add_backward_flops(batch: int, tokens: int, params: EraseAddParams) -> int:
    """Backward: two products for each of forward, and the first layers of both MLPs over tokens once more."""
    d = params.select.w1.shape[1]
    again = sum(2 * d * w1.numel() for w1 in (params.erase_tokens.w1, params.add_tokens.w1))
    return 2 * erase_add_flops(batch, tokens, params) + batch * again


def _networks(params: EraseAddParams, d: int, slots: int) -> int:
    """Both networks of one item: MLPs over tokens for d columns, MLPs over channels for the slots."""
    over_tokens = _mlp(params.erase_tokens) + _mlp(params.add_tokens)
    over_channels = _mlp(params.erase_channels) + _mlp(params.add_channels)
    return d * over_tokens + slots * over_channels


def _mlp(params: MlpParams) -> int:
    """One row through both layers."""
    return 2 * (params.w1.numel() + params.w2.numel())
