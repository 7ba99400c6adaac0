"""Combiners: the n tokens of a chunk become m, without looking at later chunks.

All map [B, T, n, combiner_dim] to [B, T, m, av_dim]. With a `past`, which `new_past` gave, they go on from it by one
chunk (T = 1), and add that to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from mirasol.config import Config
from mirasol.kernels import combiner_project, group_tokens, ttm_scan, ungroup_tokens
from mirasol.kernels.core.dispatch import autocast_dtype
from mirasol.layers import MLP, Attention, Block
from mirasol.past import EVERYTHING, Memory, Reach, Ring, Rows
from mirasol.ttm import PROCESSES, SUMMARIES, EraseAdd, Summary


class Projection(nn.Module):
    """LayerNorm and projection of the last m tokens of every chunk: `mirasol.kernels.combiner_project` with weights."""

    def __init__(self, dim: int, out_dim: int, m: int, eps: float):
        super().__init__()
        self.m, self.eps = m, eps
        self.norm = nn.LayerNorm(dim, eps)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return combiner_project(
            x, self.m, self.linear.weight, self.linear.bias, self.norm.weight, self.norm.bias, self.eps
        )


class Combiner(nn.Module):
    """What one that looks at each chunk alone, or at rings of keys and values, has in common with the others."""

    def new_past(self, rows: Rows, reach: Reach) -> Sequence[Ring | Memory]:
        """What a stream keeps of earlier chunks: here nothing."""
        return ()


class TransformerCombiner(Combiner):
    """Causal Transformer over the chunks' tokens; the last layer runs for the last m tokens of each chunk only."""

    def __init__(self, config: Config):
        super().__init__()
        self.reach, self.m, self.n = config.reach("combiner"), config.combined_tokens, config.tokens_per_chunk
        dim = config.combiner_dim
        self.blocks = nn.ModuleList(
            Block(dim, config.combiner_heads, config.mlp_ratio, config.norm_eps) for _ in range(config.combiner_layers)
        )
        self.project = Projection(dim, config.av_dim, self.m, config.norm_eps)

    def new_past(self, rows: Rows, reach: Reach) -> Sequence[Ring | Memory]:
        return [block.attention.new_ring(rows, reach, self.n) for block in cast(Sequence[Block], self.blocks)]

    def forward(self, x: Tensor, past: Sequence[Ring] | None = None) -> Tensor:
        chunks, n = x.shape[1:3]
        x = x.flatten(1, 2)
        for i, block in enumerate(self.blocks):
            keep = self.m if i == len(self.blocks) - 1 else None
            x = block(x, n, self.reach, keep=keep, past=past[i] if past else None)
        return self.project(rearrange(x, "b (t m) d -> b t m d", t=chunks))


class TTMCombiner(Combiner):
    """Token Turing Machine: a memory of s tokens is read, processed and written once a chunk.

    With G groups, each share of a chunk's tokens has its own s / G memory tokens and gives r / G; the weights are the
    same for all. The cost per chunk does not depend on T.

    Source: arXiv 2211.09119; groups, arXiv 2410.16267; exact formulas in `mirasol.kernels.ttm_scan`.
    """

    def __init__(self, config: Config):
        super().__init__()
        dim, self.groups = config.combiner_dim, config.ttm_groups
        n, s, r = (count // self.groups for count in (config.tokens_per_chunk, config.ttm_memory, config.ttm_read))
        self.initial = config.ttm_initial_memory
        if self.initial == "learned":
            self.memory = nn.Parameter(torch.empty(self.groups, s, dim))
        else:
            self.register_buffer("memory", torch.empty(self.groups, s, dim))
        self.read = SUMMARIES[config.ttm_summary](config, k=r, p=s + n)
        self.process = PROCESSES[config.ttm_process](config)
        if config.ttm_write == "erase_add":
            self.write: Summary | EraseAdd = EraseAdd(config)
        else:
            self.write = SUMMARIES[config.ttm_summary](config, k=s, p=s + n + r)
        self.project = Projection(dim, config.av_dim, config.combined_tokens, config.norm_eps)

    def reset_parameters(self) -> None:
        if self.initial == "zeros":
            nn.init.zeros_(self.memory)
        else:
            nn.init.normal_(self.memory, std=0.02 if self.initial == "learned" else 1.0)

    def new_past(self, rows: Rows, reach: Reach) -> Sequence[Ring | Memory]:
        return [Memory(rows, self.memory.detach().to(autocast_dtype(self.memory)))]

    def forward(self, x: Tensor, past: Sequence[Memory] | None = None) -> Tensor:
        memory = past[0].read().flatten(0, 1) if past else self.memory.to(x.dtype).repeat(x.shape[0], 1, 1)
        inputs = group_tokens(x, self.groups)
        outputs, memory = ttm_scan(memory, inputs, self.read.params(), self.process, self.write.params())
        if past:
            past[0].write(memory.unflatten(0, (-1, self.groups)))
        return self.project(ungroup_tokens(outputs, self.groups))


class AttentionCombiner(Combiner):
    """Space-time attentional pooling: m learned queries a chunk attend once to the tokens of this and earlier chunks.

    Source: the baseline of arXiv 2410.16267, made causal.
    """

    def __init__(self, config: Config):
        super().__init__()
        dim, self.m, self.n = config.combiner_dim, config.combined_tokens, config.tokens_per_chunk
        self.reach = config.reach("combiner")
        self.queries = nn.Parameter(torch.empty(self.m, dim))
        self.norm = nn.LayerNorm(dim, config.norm_eps)
        self.attention = Attention(dim, config.combiner_heads)
        self.project = Projection(dim, config.av_dim, self.m, config.norm_eps)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.queries)

    def new_past(self, rows: Rows, reach: Reach) -> Sequence[Ring | Memory]:
        return [self.attention.new_ring(rows, reach, self.n)]

    def forward(self, x: Tensor, past: Sequence[Ring] | None = None) -> Tensor:
        batch, chunks, n = x.shape[:3]
        queries = self.queries.to(x.dtype).expand(batch, chunks, -1, -1).flatten(1, 2)
        keys_values, reach, k_lengths = self.attention.keys_values(self.norm(x.flatten(1, 2))), self.reach, None
        if past:
            keys_values, k_lengths = past[0].append(*keys_values)
            n, reach = keys_values[0].shape[2], EVERYTHING
        pooled = self.attention(queries, keys_values, q_chunk=self.m, k_chunk=n, reach=reach, k_lengths=k_lengths)
        return self.project(pooled.unflatten(1, (chunks, self.m)))


class ResamplerLayer(nn.Module):
    """Latents attend to a chunk's tokens and to themselves, then an MLP; [N, m, dim], [N, n, dim] -> [N, m, dim]."""

    def __init__(self, config: Config):
        super().__init__()
        dim, eps = config.combiner_dim, config.norm_eps
        self.norm_tokens, self.norm_latents, self.norm_mlp = (nn.LayerNorm(dim, eps) for _ in range(3))
        self.attention = Attention(dim, config.combiner_heads)
        self.mlp = MLP(dim, config.mlp_ratio * dim)

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        y = self.norm_latents(latents)
        source = torch.cat([self.norm_tokens(tokens), y], dim=1)
        keys_values = self.attention.keys_values(source)
        latents = latents + self.attention(y, keys_values, q_chunk=y.shape[1], k_chunk=source.shape[1])
        return latents + self.mlp(self.norm_mlp(latents))


class PerceiverCombiner(Combiner):
    """Perceiver resampler over each chunk alone, `combiner_layers` deep. Source: Flamingo (arXiv 2204.14198), 3.1."""

    def __init__(self, config: Config):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.combined_tokens, config.combiner_dim))
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.combiner_layers))
        self.project = Projection(config.combiner_dim, config.av_dim, config.combined_tokens, config.norm_eps)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.latents)

    def forward(self, x: Tensor, past: Sequence[Ring] | None = None) -> Tensor:
        batch, tokens = x.shape[0], x.flatten(0, 1)
        latents = self.latents.to(x.dtype).expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, tokens)
        return self.project(latents.unflatten(0, (batch, -1)))


class MeanCombiner(Combiner):
    """Baseline without parameters of its own: the n tokens in m neighbouring groups, each group's mean, projected."""

    def __init__(self, config: Config):
        super().__init__()
        self.m = config.combined_tokens
        self.project = Projection(config.combiner_dim, config.av_dim, self.m, config.norm_eps)

    def forward(self, x: Tensor, past: Sequence[Ring] | None = None) -> Tensor:
        batch = x.shape[0]
        pooled = nn.functional.adaptive_avg_pool1d(rearrange(x, "b t n d -> (b t) d n"), self.m)
        return self.project(rearrange(pooled, "(b t) d m -> b t m d", b=batch))


class NoCombiner(Combiner):
    """Baseline: every token is passed on (m = n)."""

    def __init__(self, config: Config):
        super().__init__()
        self.project = Projection(config.combiner_dim, config.av_dim, config.tokens_per_chunk, config.norm_eps)

    def forward(self, x: Tensor, past: Sequence[Ring] | None = None) -> Tensor:
        return self.project(x)


COMBINERS: dict[str, Callable[[Config], Combiner]] = {
    "transformer": TransformerCombiner,
    "ttm": TTMCombiner,
    "attention": AttentionCombiner,
    "perceiver": PerceiverCombiner,
    "mean": MeanCombiner,
    "none": NoCombiner,
}
