"""The text decoder's cached step as one writes it in plain PyTorch, with the weights of ours.

Same mathematics: rotary positions, pre-LayerNorm, self- and cross-attention by `scaled_dot_product_attention`. The
position is an int of Python, the keys so far are a slice of the buffers, nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, layer_norm, linear, scaled_dot_product_attention

from mirasol.layers import rotary, rotate
from mirasol.text import TextDecoder


class PlainDecoder:
    """Tokens [R, 1] -> logits [R, 1, V], at position 0, 1, ... of buffers for `longest`; for latents [R, N, av_dim].

    Args:
        functions: call the functions behind the modules, with the weights at hand: what nothing can hang a hook on.
    """

    def __init__(self, decoder: TextDecoder, latents: Tensor, longest: int, functions: bool = False) -> None:
        take = _function if functions else _module
        config = decoder.config
        self.heads, self.position = config.text_heads, 0
        self.embedding, self.norm, self.logits = take(decoder.embedding), take(decoder.norm), take(decoder.logits)
        width = config.text_dim // config.text_heads
        like = latents.new_zeros((latents.shape[0], config.text_heads, longest, width))
        self.cos, self.sin = rotary(0, longest, width, config.rotary_base, latents)
        blocks: Any = decoder.blocks
        self.layers = [_Layer(block, latents, like, take) for block in blocks]

    def __call__(self, tokens: Tensor) -> Tensor:
        at = self.position
        self.position = at + 1
        angles = self.cos[at : at + 1], self.sin[at : at + 1]
        x = self.embedding(tokens)
        rows, _, dim = x.shape
        heads, width = self.heads, dim // self.heads
        for layer in self.layers:
            y = layer.norm1(x)
            q = rotate(layer.query(y).view(rows, 1, heads, width).transpose(1, 2), angles)
            k, v = layer.key_value(y).view(rows, 1, 2, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
            layer.keys[:, :, at : at + 1] = rotate(k, angles)
            layer.values[:, :, at : at + 1] = v
            y = scaled_dot_product_attention(q, layer.keys[:, :, : at + 1], layer.values[:, :, : at + 1])
            x = x + layer.out(y.transpose(1, 2).reshape(rows, 1, dim))
            if layer.cross is not None:
                q = layer.cross_query(layer.norm_cross(x)).view(rows, 1, heads, width).transpose(1, 2)
                y = scaled_dot_product_attention(q, *layer.cross)
                x = x + layer.cross_out(y.transpose(1, 2).reshape(rows, 1, dim))
            x = x + layer.leave(gelu(layer.enter(layer.norm2(x))))
        return self.logits(self.norm(x))


class _Layer:
    """What a block calls, and its keys and values."""

    def __init__(self, block: Any, latents: Tensor, like: Tensor, take: Callable[[Any], Callable[..., Any]]) -> None:
        self.norm1, self.norm2 = take(block.norm1), take(block.norm2)
        self.query, self.key_value, self.out = map(
            take, (block.attention.query, block.attention.key_value, block.attention.out)
        )
        self.enter, self.leave = take(block.mlp.enter), take(block.mlp.leave)
        self.keys, self.values = torch.zeros_like(like), torch.zeros_like(like)
        self.cross = None
        if block.cross_attention is not None:
            cross = block.cross_attention
            self.norm_cross, self.cross_query, self.cross_out = map(take, (block.norm_cross, cross.query, cross.out))
            self.cross = cross.keys_values(latents)


def _module(module: nn.Module) -> nn.Module:
    return module


def _function(module: Any) -> Callable[..., Tensor]:
    if isinstance(module, nn.Embedding):
        return partial(embedding, weight=module.weight)
    if isinstance(module, nn.LayerNorm):
        return partial(
            layer_norm,
            normalized_shape=tuple(module.normalized_shape),
            weight=module.weight,
            bias=module.bias,
            eps=module.eps,
        )
    return partial(linear, weight=module.weight, bias=module.bias)
