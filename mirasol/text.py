"""The autoregressive text decoder, with cross-attention to the audio-video latents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mirasol.config import Config
from mirasol.kernels.core.dispatch import autocast_dtype
from mirasol.layers import MLP, Attention, Rotary, rotary

KeysValues = tuple[Tensor, Tensor]


@dataclass
class Cache:
    """Keys and values of a decode: those of the text, in buffers of a fixed length, and those of the latents.

    Attributes:
        text: per layer, two [B, H, longest, D]; the first `length` positions are filled.
        latents: per layer, two [B, H, Nk, D], or None in a layer without cross-attention.
        latent_lengths: [B], how many of the Nk count; None for all.
        length: tokens seen so far.
    """

    text: list[KeysValues]
    latents: list[KeysValues | None]
    latent_lengths: Tensor | None = None
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
        angles: Rotary,
        *,
        clip_of_text: Tensor | None = None,
        k_lengths: Tensor | None = None,
        past: KeysValues | None = None,
        latent_keys_values: KeysValues | None = None,
        start: int = 0,
    ) -> Tensor:
        """x [Q, L, text_dim] at positions start..start + L -> the same.

        Args:
            latents: [B, N, av_dim], or None where `latent_keys_values` holds what is needed of them.
            angles: of the positions.
            clip_of_text: [Q], the row of `latents` that each text looks at; None: its own.
            k_lengths: [Q], how many of the N latents a text sees; None: all.
            past: buffers that hold the keys and values of positions 0..start, and receive those of x.
        """
        y = self.norm1(x)
        keys_values = self.attention.keys_values(y, angles)
        if past is not None:
            keys_values = _append(past, keys_values, start)
        x = x + self.attention(y, keys_values, q_chunk=1, angles=angles)
        if self.cross_attention is not None and self.norm_cross is not None:
            if latent_keys_values is None:
                assert latents is not None
                latent_keys_values = self.latent_keys_values(latents, clip_of_text)
            y, n = self.norm_cross(x), latent_keys_values[0].shape[2]
            x = x + self.cross_attention(y, latent_keys_values, q_chunk=y.shape[1], k_chunk=n, k_lengths=k_lengths)
        return x + self.mlp(self.norm2(x))

    def latent_keys_values(self, latents: Tensor, clip_of_text: Tensor | None) -> KeysValues:
        """Two [Q, H, N, D] of the latents [B, N, av_dim], computed once a clip."""
        assert self.cross_attention is not None
        keys, values = self.cross_attention.keys_values(latents)
        return (keys, values) if clip_of_text is None else (keys[clip_of_text], values[clip_of_text])


def _append(past: KeysValues, new: KeysValues, start: int) -> KeysValues:
    end = start + new[0].shape[2]
    for buffer, values in zip(past, new, strict=True):
        buffer[:, :, start:end] = values
    return past[0][:, :, :end], past[1][:, :, :end]


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
        start = cache.length if cache is not None else 0
        x = self.embedding(text)
        angles = rotary(start, text.shape[1], self._head_dim, self.config.rotary_base, x)
        if cache is None:
            k_lengths = lengths_of_texts(lengths, clip_of_text)
            for block in self.blocks:
                x = block(x, latents, angles, clip_of_text=clip_of_text, k_lengths=k_lengths)
        else:
            for block, past, seen in zip(self.blocks, cache.text, cache.latents, strict=True):
                x = block(
                    x, None, angles, k_lengths=cache.latent_lengths, past=past, latent_keys_values=seen, start=start
                )
            cache.length = start + text.shape[1]
        return self.logits(self.norm(x))

    def new_cache(
        self,
        latents: Tensor,
        longest: int,
        copies: int = 1,
        *,
        lengths: Tensor | None = None,
        clip_of_text: Tensor | None = None,
    ) -> Cache:
        """An empty cache for Q texts of up to `longest` tokens, `copies` rows each; other arguments as in `forward`.

        The latents' keys and values are computed once a clip.
        """
        if clip_of_text is None:
            clip_of_text = torch.arange(latents.shape[0], device=latents.device)
        rows = clip_of_text.repeat_interleave(copies)
        text: list[KeysValues] = []
        cross: list[KeysValues | None] = []
        shape = (rows.shape[0], self.config.text_heads, longest, self._head_dim)
        for block in cast(Iterable[DecoderBlock], self.blocks):
            weight = block.attention.key_value.weight
            dtype = autocast_dtype(weight)
            text.append((weight.new_zeros(shape, dtype=dtype), weight.new_zeros(shape, dtype=dtype)))
            cross.append(block.latent_keys_values(latents, rows) if block.cross_attention is not None else None)
        return Cache(text, cross, lengths_of_texts(lengths, rows))

    @property
    def _head_dim(self) -> int:
        return self.config.text_dim // self.config.text_heads


def lengths_of_texts(lengths: Tensor | None, clip_of_text: Tensor | None) -> Tensor | None:
    """[Q], how many latents of its clip each text sees; None where all count."""
    return lengths if lengths is None or clip_of_text is None else lengths[clip_of_text]
