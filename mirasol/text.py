"""The autoregressive text decoder, with cross-attention to the audio-video latents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mirasol.cache import Cache, Cross, Places, Seen
from mirasol.config import Config
from mirasol.kernels.core.checks import expect_int
from mirasol.kernels.core.dispatch import autocast_dtype
from mirasol.layers import MLP, Attention, Rotary, rotary


class Past(NamedTuple):
    """What a block continues in one call with a cache."""

    layer: int
    text: Tensor  # [2, R, H, longest, D]
    places: Places
    cross: Cross


class DecoderBlock(nn.Module):
    """Pre-LayerNorm block: causal self-attention, cross-attention where asked for, MLP."""

    def __init__(self, config: Config, cross: bool):
        super().__init__()
        dim, eps = config.text_dim, config.norm_eps
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attention = Attention(dim, config.text_heads)
        self.norm_cross = nn.LayerNorm(dim, eps) if cross else None
        self.cross_attention = Attention(dim, config.text_heads, config.av_dim) if cross else None
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim, config.mlp_ratio * dim)

    def forward(
        self,
        x: Tensor,
        latents: Tensor | None,
        angles: Rotary | None,
        *,
        clip_of_text: Tensor | None = None,
        k_lengths: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """x [Q, L, text_dim] -> the same.

        Args:
            latents: [B, N, av_dim]; None with `past`.
            angles: of the positions of x; None with `past`.
            clip_of_text: [Q], the row of `latents` that each text looks at; None: its own.
            k_lengths: [Q], how many of the N latents a text sees; None: all.
            past: what a decode holds, which receives the keys and values of x.
        """
        y = self.norm1(x)
        attention, cross_attention = self.attention, self.cross_attention
        if past is None:
            x = x + attention(y, attention.keys_values(y, angles), q_chunk=1, angles=angles)
        else:
            x = x + attention.extend(y, past.text, *past.places)
        if cross_attention is not None:
            assert self.norm_cross is not None
            y = self.norm_cross(x)
            if past is None:
                assert latents is not None
                keys, values = cross_attention.keys_values(latents)
                if clip_of_text is not None:
                    keys, values = keys[clip_of_text], values[clip_of_text]
                chunks: dict[str, Any] = dict(q_chunk=y.shape[1], k_chunk=keys.shape[2])
                x = x + cross_attention(y, (keys, values), k_lengths=k_lengths, **chunks)
            else:
                x = x + past.cross.attend(cross_attention, y, past.layer)
        return x + self.mlp(self.norm2(x))


class TextDecoder(nn.Module):
    """Token ids [Q, L] and latents [B, N, av_dim] -> logits [Q, L, vocab_size]."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.text_dim)
        self.blocks = nn.ModuleList(
            DecoderBlock(config, cross=(layer + 1) % config.cross_every == 0) for layer in range(config.text_layers)
        )
        self.norm = nn.LayerNorm(config.text_dim, config.norm_eps)
        self.logits = nn.Linear(config.text_dim, config.vocab_size, bias=False)

    def forward(
        self,
        text: Tensor,
        latents: Tensor | None,
        cache: Cache | None = None,
        *,
        lengths: Tensor | None = None,
        clip_of_text: Tensor | None = None,
    ) -> Tensor:
        """With a cache, `text` continues what the cache holds, and the latents are those that it was made of.

        Args:
            lengths: [B], how many of the N latents of each clip count; None: all.
            clip_of_text: [Q], the clip that each text is about; None: text q is about clip q.
        """
        x = self.embedding(text)
        blocks = cast(Iterable[DecoderBlock], self.blocks)
        if cache is None:
            angles = rotary(0, text.shape[1], self._head_dim, self.config.rotary_base, x)
            k_lengths = lengths_of_texts(lengths, clip_of_text)
            for block in blocks:
                x = block(x, latents, angles, clip_of_text=clip_of_text, k_lengths=k_lengths)
        else:
            places = cache.enter(text.shape[1])
            cache.cross.begin()
            for layer, block in enumerate(blocks):
                x = block(x, None, None, past=Past(layer, cache.text[layer], places, cache.cross))
            cache.leave(text.shape[1])
        return self.logits(self.norm(x))

    def see(self, latents: Tensor, lengths: Tensor | None = None) -> Seen:
        """Keys and values of latents [C, N, av_dim], of which the first `lengths` [C] count; None: all."""
        crosses = [block.cross_attention for block in cast(Iterable[DecoderBlock], self.blocks)]
        return Seen([cross.keys_values(latents) if cross is not None else None for cross in crosses], lengths)

    def new_cache(
        self, seen: Seen, longest: int, copies: int = 1, *, clip_of_text: Tensor | None = None, own: bool = False
    ) -> Cache:
        """An empty cache for Q texts of up to `longest` tokens, `copies` rows each, which follow one another.

        Args:
            clip_of_text: int64 [Q], the clip that each text is about; None: text q is about clip q. The keys and values
                of several clips are then gathered, once; otherwise `seen` is not copied.
            own: copy what is seen, so that `Cache.reset` puts what comes next in the same place.
        """
        expect_int("longest", longest)
        cross = Cross.of(seen, copies, clip_of_text, own)
        weight = self.embedding.weight
        like = torch.empty((), dtype=autocast_dtype(weight), device=weight.device)  # plain where weights are sharded
        shape = (2, cross.rows, self.config.text_heads, longest, self._head_dim)
        cos, sin = rotary(0, longest, self._head_dim, self.config.rotary_base, like)
        still = torch.ones_like(cos), torch.zeros_like(sin)
        return Cache(
            text=[like.new_zeros(shape) for _ in self.blocks],
            cross=cross,
            angles=(_three(cos, still[0]), _three(sin, still[1])),
            position=torch.zeros(1, dtype=torch.int64, device=like.device),
            places=torch.arange(longest, device=like.device),
            marks=(like.new_zeros(()), like.new_full((), -torch.inf)),
        )

    @property
    def _head_dim(self) -> int:
        return self.config.text_dim // self.config.text_heads


def _three(turned: Tensor, still: Tensor) -> Tensor:
    """[3, 1, 1, L, D], for queries, keys and values."""
    return torch.stack([turned, turned, still]).unsqueeze(1).unsqueeze(1)


def lengths_of_texts(lengths: Tensor | None, clip_of_text: Tensor | None) -> Tensor | None:
    """[Q], how many latents of its clip each text sees; None where all count."""
    return lengths if lengths is None or clip_of_text is None else lengths[clip_of_text]
