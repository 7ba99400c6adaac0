"""The autoregressive audio-video Transformer, and what it predicts of the next chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from mirasol.config import Config
from mirasol.layers import SINCOS_STD, Block, ViT, sequence_positions, time_positions
from mirasol.past import Memory, Reach, Ring, Rows


class AudioVideoTransformer(nn.Module):
    """Chunk-causal Transformer over the combined tokens: [B, T, m, av_dim] -> h [B, T, m, av_dim].

    h[t] sees chunks 0..t and predicts chunk t + 1. In training a random share of the combined tokens is replaced by
    a learned token.

    Learned tokens are as large as what they stand beside: those that take a token's place of unit deviation, those that
    are added as a position like a sin-cos one.
    """

    def __init__(self, config: Config):
        super().__init__()
        dim = config.av_dim
        self.reach, self.causal, self.mask_ratio = config.reach("av"), config.av_causal, config.mask_ratio
        self.chunk = config.seconds_per_chunk
        self.slots = nn.Parameter(torch.empty(config.latents_per_chunk, dim))
        self.mask = nn.Parameter(torch.empty(dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.av_heads, config.mlp_ratio, config.norm_eps) for _ in range(config.av_layers)
        )
        self.norm = nn.LayerNorm(dim, config.norm_eps)
        self.predict = nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.slots, std=SINCOS_STD)
        nn.init.normal_(self.mask)

    def new_past(self, rows: Rows, reach: Reach) -> Sequence[Ring | Memory]:
        """What a stream keeps of earlier chunks."""
        m = self.slots.shape[0]
        return [block.attention.new_ring(rows, reach, m) for block in cast(Sequence[Block], self.blocks)]

    def forward(
        self,
        combined: Tensor,
        times: Tensor,
        lengths: Tensor | None = None,
        past: Sequence[Ring] | None = None,
    ) -> Tensor:
        """
        Args:
            combined: [B, T, m, av_dim].
            times: [B, T], when each chunk begins, in seconds.
            lengths: [B], chunks of each clip; None: T. What is given for chunks behind these means nothing.
            past: what `new_past` gave, to go on from by one chunk.
        """
        chunks, m, dim = combined.shape[1:]
        ratio = self.mask_ratio if self.training else 0.0
        masked = torch.rand(combined.shape[:3], device=combined.device) < ratio
        x = torch.where(masked[..., None], self.mask, combined)
        x = x + self.slots + time_positions(times, self.chunk, dim, combined)
        x = x.flatten(1, 2)
        k_lengths = lengths * m if lengths is not None else None
        for i, block in enumerate(self.blocks):
            if self.causal:
                x = block(x, m, self.reach, past=past[i] if past else None)
            else:
                x = block(x, chunks * m, k_lengths=k_lengths)
        return rearrange(self.norm(x), "b (t m) d -> b t m d", t=chunks)


class Reconstruction(nn.Module):
    """A small Transformer from h[t] to what chunk t + 1 holds: [B, T, m, av_dim] -> [B, T, p, features].

    Queries with fixed positions attend, together with the m tokens of one chunk, to all of these.

    Args:
        features: width of one target token; the number p of target tokens is asked for at each call.
    """

    def __init__(self, config: Config, features: int):
        super().__init__()
        dim = config.reconstruction_dim
        self.enter = nn.Linear(config.av_dim, dim)
        self.query = nn.Parameter(torch.empty(dim))
        self.vit = ViT(
            dim, config.reconstruction_layers, config.reconstruction_heads, config.mlp_ratio, config.norm_eps
        )
        self.leave = nn.Linear(dim, features)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.query)

    def forward(self, h: Tensor, p: int) -> Tensor:
        batch = h.shape[0]
        context = self.enter(rearrange(h, "b t m d -> (b t) m d"))
        queries = self.query + sequence_positions(0, p, context.shape[-1], context)
        x = torch.cat([context, queries.expand(context.shape[0], -1, -1)], dim=1)
        return rearrange(self.leave(self.vit(x)[:, -p:]), "(b t) p c -> b t p c", b=batch)
