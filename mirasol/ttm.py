"""Weights of the Token Turing Machine: summaries, the erase-add write, and the network between read and write."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from mirasol.config import Config
from mirasol.kernels import EraseAddParams, LatentQueryParams, MeanPoolParams, MlpParams, TokenLearnerParams
from mirasol.layers import MLP, ViT


class TokenLearner(nn.Module):
    """Weights of a TokenLearner v1.1 summary of p tokens into k."""

    def __init__(self, config: Config, k: int, p: int):
        super().__init__()
        dim = config.combiner_dim
        self.norm = nn.LayerNorm(dim, config.norm_eps)
        self.mlp = MLP(dim, config.ttm_hidden, k)
        self.positions = _positions(config, p)

    def reset_parameters(self) -> None:
        _reset_positions(self.positions)

    def params(self) -> TokenLearnerParams:
        return TokenLearnerParams(self.norm.weight, self.norm.bias, *_params(self.mlp), self.positions)


class LatentQuery(nn.Module):
    """Weights of a summary by multi-head attention of k learned queries.

    The keys have no bias: one that is common to all keys shifts all scores alike and changes nothing.
    """

    def __init__(self, config: Config, k: int, p: int):
        super().__init__()
        dim, self.heads = config.combiner_dim, config.combiner_heads
        self.queries = nn.Parameter(torch.empty(k, dim))
        self.query, self.value, self.out = (nn.Linear(dim, dim) for _ in range(3))
        self.key = nn.Linear(dim, dim, bias=False)
        self.positions = _positions(config, p)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.queries, std=0.02)
        _reset_positions(self.positions)

    def params(self) -> LatentQueryParams:
        return LatentQueryParams(
            self.queries,
            self.query.weight, self.query.bias,
            self.key.weight, torch.zeros_like(self.query.bias),
            self.value.weight, self.value.bias,
            self.out.weight, self.out.bias,
            heads=self.heads,
            positions=self.positions,
        )  # fmt: skip


class MeanPool(nn.Module):
    """A summary by means over neighbouring tokens; only the positions are learned."""

    def __init__(self, config: Config, k: int, p: int):
        super().__init__()
        self.k = k
        self.positions = _positions(config, p)

    def reset_parameters(self) -> None:
        _reset_positions(self.positions)

    def params(self) -> MeanPoolParams:
        return MeanPoolParams(self.k, self.positions)


class EraseAdd(nn.Module):
    """Weights of a Neural-Turing-Machine write of r outputs through a few slots."""

    def __init__(self, config: Config):
        super().__init__()
        dim, hidden, slots, r = config.combiner_dim, config.ttm_hidden, config.ttm_slots, read_per_group(config)
        self.select_norm, self.erase_norm, self.add_norm = (nn.LayerNorm(dim, config.norm_eps) for _ in range(3))
        self.select = MLP(dim, hidden, slots)
        self.erase_tokens, self.add_tokens = (MLP(r, hidden, slots) for _ in range(2))
        self.erase_channels, self.add_channels = (MLP(dim, hidden, dim) for _ in range(2))

    def params(self) -> EraseAddParams:
        return EraseAddParams(
            self.select_norm.weight, self.select_norm.bias, _params(self.select),
            self.erase_norm.weight, self.erase_norm.bias, _params(self.erase_tokens), _params(self.erase_channels),
            self.add_norm.weight, self.add_norm.bias, _params(self.add_tokens), _params(self.add_channels),
        )  # fmt: skip


class TransformerProcess(nn.Module):
    """Pre-LayerNorm Transformer over the tokens that a group reads, with learned positions: [B, r, d] -> [B, r, d]."""

    def __init__(self, config: Config):
        super().__init__()
        dim = config.combiner_dim
        self.positions = nn.Parameter(torch.empty(read_per_group(config), dim))
        self.vit = ViT(dim, config.ttm_layers, config.combiner_heads, config.mlp_ratio, config.norm_eps)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x + self.positions)


class MixerLayer(nn.Module):
    """One MLP over the tokens, one over the channels, each after a LayerNorm and beside a residual."""

    def __init__(self, config: Config):
        super().__init__()
        dim = config.combiner_dim
        self.token_norm, self.channel_norm = nn.LayerNorm(dim, config.norm_eps), nn.LayerNorm(dim, config.norm_eps)
        self.tokens = MLP(read_per_group(config), config.ttm_mixer_hidden)
        self.channels = MLP(dim, config.mlp_ratio * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.token_norm(x).mT).mT
        return x + self.channels(self.channel_norm(x))


class MixerProcess(nn.Sequential):
    """MLP-Mixer over the r tokens read: [B, r, d] -> [B, r, d]."""

    def __init__(self, config: Config):
        layers = (MixerLayer(config) for _ in range(config.ttm_layers))
        super().__init__(*layers, nn.LayerNorm(config.combiner_dim, config.norm_eps))


class MLPProcess(nn.Sequential):
    """Token-wise MLPs without a residual, as the official code has them: [B, r, d] -> [B, r, d]."""

    def __init__(self, config: Config):
        dim, eps = config.combiner_dim, config.norm_eps
        layers = [
            nn.Sequential(nn.LayerNorm(dim, eps), MLP(dim, config.mlp_ratio * dim)) for _ in range(config.ttm_layers)
        ]
        super().__init__(*layers, nn.LayerNorm(dim, eps))


def read_per_group(config: Config) -> int:
    """Tokens that the process of one group runs over."""
    return config.ttm_read // config.ttm_groups


def _params(mlp: MLP) -> MlpParams:
    return MlpParams(mlp.enter.weight, mlp.enter.bias, mlp.leave.weight, mlp.leave.bias)


def _positions(config: Config, p: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(p, config.combiner_dim)) if config.ttm_positions else None


def _reset_positions(positions: nn.Parameter | None) -> None:
    if positions is not None:
        nn.init.normal_(positions, std=0.02)


Summary: TypeAlias = TokenLearner | LatentQuery | MeanPool
SUMMARIES: dict[str, Callable[..., Summary]] = {
    "token_learner": TokenLearner,
    "latent_query": LatentQuery,
    "mean": MeanPool,
}
PROCESSES: dict[str, Callable[[Config], nn.Module]] = {
    "transformer": TransformerProcess,
    "mixer": MixerProcess,
    "mlp": MLPProcess,
}
