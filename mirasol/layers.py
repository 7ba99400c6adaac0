"""What every Transformer of the model is made of."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from mirasol.kernels import chunked_attention, last_m
from mirasol.kernels.core.dispatch import autocast_dtype
from mirasol.past import EVERYTHING, Reach, Ring, Rows

SINCOS_STD = 0.5**0.5
"""Root of the mean square of a sin-cos position, what a learned position beside one starts with."""


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


def time_positions(times: Tensor, chunk: float, dim: int, like: Tensor) -> Tensor:
    """times [B, T] -> [B, T, 1, dim] in the dtype of `like`: a position for every token of a chunk.

    A chunk of so many seconds counts 1, so that neighbours are told apart as well where chunks are short.
    """
    return sincos(times.flatten()[:, None] / chunk, dim).to(like.dtype).unflatten(0, times.shape)[:, :, None]


Rotary = tuple[Tensor, Tensor]
"""Cosines and signed sines [L, D] that turn the queries and keys of L positions."""


def rotary(start: int, length: int, dim: int, base: float, like: Tensor) -> Rotary:
    """Angles of positions start, start + 1, ... for heads of width `dim`, on the device of `like`, in float32.

    Source: RoFormer (arXiv 2104.09864), equation 15.
    """
    rates = base ** -(torch.arange(0, dim, 2, device=like.device, dtype=torch.float32) / dim)
    angles = torch.arange(start, start + length, device=like.device).unsqueeze(1) * rates
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, angles: Rotary | None) -> Tensor:
    """x [B, H, L, D] with channels i and i + D / 2 turned by angle i of its position, computed in float32 at least."""
    if angles is None:
        return x
    cos, sin = angles
    turned = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)


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

    def keys_values(self, source: Tensor, angles: Rotary | None = None) -> tuple[Tensor, Tensor]:
        """Two [B, H, Nk, D] of a source [B, Nk, source_dim]."""
        both = self.key_value(source).unflatten(-1, (2, self.heads, -1))
        keys, values = both.permute(2, 0, 3, 1, 4).unbind(0)
        return rotate(keys, angles), values

    def new_ring(self, rows: Rows, reach: Reach, tokens: int) -> Ring:
        """Room for the keys and values of a stream's chunks of so many tokens."""
        weight = self.key_value.weight
        like = weight.new_empty(0, dtype=autocast_dtype(weight))
        return Ring(rows, reach, tokens, self.heads, weight.shape[0] // (2 * self.heads), like)

    def forward(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor],
        *,
        q_chunk: int,
        k_chunk: int | None = None,
        reach: Reach = EVERYTHING,
        k_lengths: Tensor | None = None,
        angles: Rotary | None = None,
    ) -> Tensor:
        """
        Args:
            k_lengths: [B] int; row b sees its first `k_lengths[b]` keys, all of them: chunks are then left out.
            angles: of the queries' positions.
        """
        q = rotate(rearrange(self.query(x), "b n (h d) -> b h n d", h=self.heads), angles)
        if k_lengths is None:
            window, sinks = reach
            out = chunked_attention(q, *keys_values, q_chunk=q_chunk, k_chunk=k_chunk, window=window, sinks=sinks)
        else:
            out = _attend_to_first(q, *keys_values, k_lengths)
        return self.out(rearrange(out, "b h n d -> b n (h d)"))

    def extend(self, x: Tensor, past: Tensor, positions: Tensor, angles: Rotary, mask: Tensor) -> Tensor:
        """x [R, L, dim] -> the same, by attention to the keys and values of `past`, once those of x stand there.

        Queries, keys and values are turned in one go, so that a step is few calls.

        Args:
            past: [2, R, H, longest, D], keys and values, which receive those of x.
            positions: int64 [L], where.
            angles: each [3, 1, 1, L, D]; of the queries, the keys, and the values, which stay as they are: 1 and 0.
            mask: [L, longest], added to the scores, in the dtype of `past`.
        """
        rows, length, dim = x.shape
        three = torch.cat([self.query(x), self.key_value(x)], dim=-1).view(rows, length, 3, self.heads, -1)
        three = rotate(three.permute(2, 0, 3, 1, 4), angles)
        if three.dtype != past.dtype:
            three = three.to(past.dtype)
        keys, values = past.index_copy_(3, positions, three.narrow(0, 1, 2)).unbind(0)
        out = nn.functional.scaled_dot_product_attention(three.select(0, 0), keys, values, attn_mask=mask)
        return self.out(out.transpose(1, 2).reshape(rows, length, dim))

    def look(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """x [R, L, dim] -> the same, by one dense attention to keys and values that groups of rows share.

        Args:
            keys_values: two [G, H, Nk, D]. The R / G rows of a group follow one another, and their queries are folded
                into one sequence, so that no key is copied.
            mask: [G, 1, 1, Nk], added to the scores, in the dtype of the keys.
        """
        keys, values = keys_values
        q = self.query(x).view(keys.shape[0], -1, self.heads, keys.shape[3]).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.out(out.transpose(1, 2).reshape(x.shape))

    def shares(self, x: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """[R, Nk] float32: how the last token of each row of x [R, L, dim] shares its attention; mean over the heads.

        `keys` and `mask` as in `look`.
        """
        last = x.narrow(1, x.shape[1] - 1, 1)
        q = self.query(last).view(keys.shape[0], -1, self.heads, keys.shape[3]).transpose(1, 2)
        scores = q @ keys.mT * keys.shape[3] ** -0.5
        scores = scores if mask is None else scores + mask
        return scores.float().softmax(-1).mean(1).flatten(0, 1)


def _attend_to_first(q: Tensor, k: Tensor, v: Tensor, k_lengths: Tensor) -> Tensor:
    """q [B, H, Nq, D] to the first `k_lengths` [B] of k, v [B, H, Nk, D].

    The rows are packed end to end; a row's padding is a sequence of its own, which no query belongs to. So no length
    is read, and nothing is gathered.
    """
    rows, _, n_q, _ = q.shape
    n_k = k.shape[2]
    packed = [rearrange(x, "b h n d -> 1 h (b n) d") for x in (q, k, v)]
    row = torch.arange(rows, device=q.device, dtype=torch.int32)
    ends = torch.stack([row * n_k + k_lengths.to(torch.int32), (row + 1) * n_k], dim=1).flatten()
    cu_k = nn.functional.pad(ends, (1, 0))
    cu_q = nn.functional.pad(((row + 1) * n_q).repeat_interleave(2, output_size=2 * rows), (1, 0))
    out = chunked_attention(*packed, q_chunk=n_q, k_chunk=n_k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    return rearrange(out, "1 h (b n) d -> b h n d", b=rows)


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

    def forward(
        self,
        x: Tensor,
        chunk: int,
        reach: Reach = EVERYTHING,
        keep: int | None = None,
        k_lengths: Tensor | None = None,
        past: Ring | None = None,
    ) -> Tensor:
        """x [B, T * chunk, dim] -> the same, or [B, T * keep, dim].

        Args:
            chunk: tokens per chunk; a token sees its own chunk and earlier ones.
            reach: how many of these.
            keep: compute the last `keep` tokens of every chunk only. All tokens still serve as keys and values, so
                the result is what computing everything and slicing gives.
            k_lengths: [B], all tokens see the first `k_lengths[b]` ones, whatever their chunk.
            past: the chunks before x, which is then one chunk and is added to them; its reach takes the place of
                `reach`.
        """
        y = self.norm1(x)
        keys_values = self.attention.keys_values(y)
        if keep is not None:
            x, y = _last_of_chunks(x, chunk, keep), _last_of_chunks(y, chunk, keep)
        if past is not None:
            keys_values, k_lengths = past.append(*keys_values)
            chunk, reach = keys_values[0].shape[2], EVERYTHING
        x = x + self.attention(y, keys_values, q_chunk=keep or chunk, k_chunk=chunk, reach=reach, k_lengths=k_lengths)
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

    Linear layers: Xavier uniform, zero bias. Embeddings: N(0, 1), as large as what the blocks add to them. Own modules:
    their `reset_parameters`.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight)
    else:
        for name in ("reset_parameters", "reset_buffers"):
            reset = getattr(module, name, None)
            if reset is not None:
                reset()
