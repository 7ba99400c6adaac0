"""What every Transformer of the model is made of."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from mirasol.kernels import chunked_attention, last_m


def sincos(points: Tensor, dim: int, tau: float = 10000.0) -> Tensor:
    """Fixed positions of points in any number of axes.

    Group j of 2 x axes channels holds sin and cos of every coordinate times `tau ** (-j / J)`, J = dim // (2 axes);
    channels left over are 0. No parameter, no longest length.

    Args:
        points: [N, axes] float, coordinates in pixels, frames or chunks.
        dim: width d.
    Returns:
        [N, dim] float32.
    Source: TubeViT (arXiv 2212.03229), section 3.2, with the exponent scaled to the width.
    """
    count, axes = points.shape
    groups = dim // (2 * axes)
    rates = tau ** -(torch.arange(groups, device=points.device, dtype=torch.float32) / max(groups, 1))
    angles = points.float()[:, None, :, None] * rates[None, :, None, None]  # [N, J, axes, 1]
    table = torch.cat([angles.sin(), angles.cos()], dim=-1).reshape(count, -1)
    return nn.functional.pad(table, (0, dim - table.shape[1]))


def sequence_positions(start: int, length: int, dim: int, like: Tensor) -> Tensor:
    """[length, dim] positions start, start + 1, ... in the dtype and on the device of `like`."""
    points = torch.arange(start, start + length, device=like.device)[:, None]
    return sincos(points, dim).to(like.dtype)


class Attention(nn.Module):
    """Multi-head attention of x [B, Nq, dim] to a source [B, Nk, source_dim].

    The keys and values are a step of their own so that a cache can hold them.
    """

    def __init__(self, dim: int, heads: int, source_dim: int | None = None):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(source_dim or dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Two [B, H, Nk, D] of a source [B, Nk, source_dim]."""
        keys, values = rearrange(self.key_value(source), "b n (two h d) -> two b h n d", two=2, h=self.heads).unbind(0)
        return keys, values

    def forward(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor],
        *,
        q_chunk: int,
        k_chunk: int | None = None,
        window: int | None = None,
    ) -> Tensor:
        q = rearrange(self.query(x), "b n (h d) -> b h n d", h=self.heads)
        out = chunked_attention(q, *keys_values, q_chunk=q_chunk, k_chunk=k_chunk, window=window)
        return self.out(rearrange(out, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    """Linear, GELU, Linear: dim -> inner -> out (default: dim)."""

    def __init__(self, dim: int, inner: int, out: int | None = None):
        super().__init__()
        self.enter = nn.Linear(dim, inner)
        self.leave = nn.Linear(inner, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(nn.functional.gelu(self.enter(x)))


class Block(nn.Module):
    """A pre-LayerNorm Transformer block over chunks of tokens."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim, mlp_ratio * dim)

    def forward(self, x: Tensor, chunk: int, window: int | None = None, keep: int | None = None) -> Tensor:
        """x [B, T * chunk, dim] -> the same, or [B, T * keep, dim].

        Args:
            chunk: tokens per chunk; a token sees its own chunk and earlier ones.
            window: chunks seen, the own one included; None: all earlier ones.
            keep: compute the last `keep` tokens of every chunk only. All tokens still serve as keys and values, so
                the result is what computing everything and slicing gives.
        """
        y = self.norm1(x)
        keys_values = self.attention.keys_values(y)
        if keep is not None:
            x, y = _last_of_chunks(x, chunk, keep), _last_of_chunks(y, chunk, keep)
        x = x + self.attention(y, keys_values, q_chunk=keep or chunk, k_chunk=chunk, window=window)
        return x + self.mlp(self.norm2(x))


def _last_of_chunks(x: Tensor, chunk: int, keep: int) -> Tensor:
    return last_m(rearrange(x, "b (t n) d -> b t n d", n=chunk), keep).flatten(1, 2)


class ViT(nn.Module):
    """Blocks in which all tokens of a sequence see each other, and a final LayerNorm. [B, n, dim] -> [B, n, dim]."""

    def __init__(self, dim: int, layers: int, heads: int, mlp_ratio: int, eps: float):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, eps) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, chunk=x.shape[1])
        return self.norm(x)


def init_weights(module: nn.Module) -> None:
    """Give one module its initial values in place; meant for `Module.apply`, also after `to_empty`.

    Linear layers: Xavier uniform, zero bias. Embeddings: N(0, 0.02). Own modules: their `reset_parameters`.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    else:
        for name in ("reset_parameters", "reset_buffers"):
            reset = getattr(module, name, None)
            if reset is not None:
                reset()
