"""The autoregressive text decoder, with cross-attention to the audio-video latents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from mirasol.config import Config
from mirasol.kernels.core.dispatch import autocast_dtype
from mirasol.layers import MLP, Attention, sequence_positions

KeysValues = tuple[Tensor, Tensor]


@dataclass
class Cache:
    """Keys and values of a decode: those of the text, in buffers of a fixed length, and those of the latents.

    Attributes:
        text: per layer, two [B, H, longest, D]; the first `length` positions are filled.
        latents: per layer, two [B, H, Nk, D], or None in a layer without cross-attention.
        length: tokens seen so far.
    """

    text: list[KeysValues]
    latents: list[KeysValues | None]
    length: int = 0

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on as a copy of row `rows[i]`."""
        self.text = [(k[rows], v[rows]) for k, v in self.text]


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
        past: KeysValues | None = None,
        latent_keys_values: KeysValues | None = None,
        start: int = 0,
    ) -> Tensor:
        """x [B, L, text_dim] at positions start..start + L -> the same.

        Args:
            latents: [B, N, av_dim], or None where `latent_keys_values` holds what is needed of them.
            past: buffers that hold the keys and values of positions 0..start, and receive those of x.
        """
        y = self.norm1(x)
        keys_values = self.attention.keys_values(y)
        if past is not None:
            keys_values = _append(past, keys_values, start)
        x = x + self.attention(y, keys_values, q_chunk=1)
        if self.cross_attention is not None and self.norm_cross is not None:
            if latent_keys_values is None:
                assert latents is not None
                latent_keys_values = self.cross_attention.keys_values(latents)
            y = self.norm_cross(x)
            x = x + self.cross_attention(
                y, latent_keys_values, q_chunk=y.shape[1], k_chunk=latent_keys_values[0].shape[2]
            )
        return x + self.mlp(self.norm2(x))


def _append(past: KeysValues, new: KeysValues, start: int) -> KeysValues:
    end = start + new[0].shape[2]
    for buffer, values in zip(past, new, strict=True):
        buffer[:, :, start:end] = values
    return past[0][:, :, :end], past[1][:, :, :end]


class TextDecoder(nn.Module):
    """Token ids [B, L] and latents [B, N, av_dim] -> logits [B, L, vocab_size]."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.text_dim)
        self.blocks = nn.ModuleList(
            DecoderBlock(config, cross=(layer + 1) % config.cross_every == 0) for layer in range(config.text_layers)
        )
        self.norm = nn.LayerNorm(config.text_dim, config.norm_eps)
        self.logits = nn.Linear(config.text_dim, config.vocab_size, bias=False)

    def forward(self, text: Tensor, latents: Tensor | None, cache: Cache | None = None) -> Tensor:
        """With a cache, `text` continues what the cache holds and `latents` is not looked at."""
        start = cache.length if cache is not None else 0
        x = self.embedding(text)
        x = x + sequence_positions(start, text.shape[1], x.shape[-1], x)
        for layer, block in enumerate(self.blocks):
            if cache is None:
                x = block(x, latents)
            else:
                x = block(x, None, cache.text[layer], cache.latents[layer], start)
        if cache is not None:
            cache.length = start + text.shape[1]
        return self.logits(self.norm(x))

    def new_cache(self, latents: Tensor, longest: int, copies: int = 1) -> Cache:
        """An empty cache for up to `longest` tokens; every row of `latents` [B, N, av_dim] serves `copies` rows.

        The latents' keys and values are computed once, and shared by all copies and all questions asked of them.
        """
        config = self.config
        text: list[KeysValues] = []
        cross: list[KeysValues | None] = []
        shape = (latents.shape[0] * copies, config.text_heads, longest, config.text_dim // config.text_heads)
        for block in cast(Iterable[DecoderBlock], self.blocks):
            weight = block.attention.key_value.weight
            dtype = autocast_dtype(weight)
            text.append((weight.new_zeros(shape, dtype=dtype), weight.new_zeros(shape, dtype=dtype)))
            if block.cross_attention is None:
                cross.append(None)
                continue
            keys, values = block.cross_attention.keys_values(latents)
            cross.append((keys.repeat_interleave(copies, 0), values.repeat_interleave(copies, 0)))
        return Cache(text, cross)
