"""An estimate of the memory that training takes on each GPU: what is sharded, what is gathered, what backward needs.

What backward needs is counted tensor by tensor, as PyTorch's operators and ours keep them; a test compares it with what
autograd keeps. Not counted: the allocator's fragments, the CUDA context, NCCL's buffers.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from math import prod
from typing import NamedTuple

import torch

from mirasol.config import Config
from mirasol.cost import parameters as count
from mirasol.cost.flops import most_seen
from mirasol.kernels import tube_grid

SINGLE = 4
"""Bytes of a float32: of statistics and losses, whatever the dtype of the model."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, at the end of the forward pass.

    Attributes:
        parameters, gradients, optimizer: the GPU's share of the float32 parameters, of their gradients, and of AdamW's
            two moments.
        gathered: what lies there whole where parameters are sharded: those outside of the blocks and their gradients,
            two blocks, one at work and one on its way, and the gradients of one.
        casts: weights in the dtype of autocast, which backward needs: of all blocks, or of one that is checkpointed.
        activations: what backward needs, and the largest block computed again where blocks are checkpointed.
        inputs: the clips.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    casts: int
    activations: int
    inputs: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def memory(
    config: Config,
    chunks: int,
    text_tokens: int,
    *,
    clips: int = 1,
    texts: int = 1,
    world: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
) -> Memory:
    """Memory of one GPU as `mirasol.train` uses it: float32 parameters, autocast, FSDP2 over `world` GPUs.

    Args:
        chunks, text_tokens, texts: as in `mirasol.cost.model`.
        clips: clips on this GPU.
        dtype: of autocast; float32: none.
        checkpointing: every Transformer block keeps its input alone and is computed again in backward.
    """
    total = count.parameters(config).total
    blocks = _block_parameters(config)
    beside, largest = total - sum(n * size for n, size in blocks), max(size for _, size in blocks)
    share = -(-total // world) * SINGLE
    gathered = (2 * beside + 3 * largest) * SINGLE if world > 1 else 0
    casts = (beside + largest if checkpointing else total) * dtype.itemsize if dtype.itemsize < SINGLE else 0
    one = activations(config, chunks, text_tokens, texts=texts, dtype=dtype, checkpointing=checkpointing)
    pixels = 3 * config.frames_per_chunk * config.image_size**2
    clip = chunks * (pixels + SINGLE * config.samples_per_chunk)
    return Memory(share, share, 2 * share, gathered, casts, clips * one, clips * clip)


def _block_parameters(config: Config) -> list[tuple[int, int]]:
    """How many blocks of how many parameters each, of those that are gathered one by one."""
    encoders, ratio = (1 if config.share_encoders else 2), config.mlp_ratio
    crossed = config.text_layers // config.cross_every
    found = [
        (encoders * config.encoder_layers, count.block(config.encoder_dim, ratio)),
        (config.av_layers, count.block(config.av_dim, ratio)),
        (2 * config.reconstruction_layers, count.block(config.reconstruction_dim, ratio)),
        (crossed, count.decoder_block(config, True)),
        (config.text_layers - crossed, count.decoder_block(config, False)),
    ]
    if config.combiner == "transformer":
        found.append((config.combiner_layers, count.block(config.combiner_dim, ratio)))
    if config.combiner == "ttm" and config.ttm_process == "transformer":
        found.append((config.ttm_layers, count.block(config.combiner_dim, ratio)))
    return found


class Blocks(NamedTuple):
    """So many blocks, of which each keeps `size` bytes for backward.

    first: bytes of its input alone. work: bytes of the gradients within one block at their most, at its MLP.
    """

    number: int
    size: int
    first: int
    work: int


@dataclass(frozen=True)
class Kept:
    """What a part keeps for backward: bytes beside its blocks, and these."""

    beside: int
    blocks: tuple[Blocks, ...] = ()


def activations(
    config: Config,
    chunks: int,
    text_tokens: int,
    *,
    texts: int = 1,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> int:
    """Bytes that one clip's forward pass keeps for backward, parameters not counted, in `dtype` by autocast.

    Under autocast what blocks add to stays float32.

    Summaries of a Token Turing Machine are counted as the `torch` backend keeps them, which is more than the kernels.
    Arguments as in `memory`.
    """
    kept = [part for parts in _kept(config, chunks, text_tokens, texts, dtype).values() for part in parts]
    blocks = [block for part in kept for block in part.blocks if block.number]
    beside = sum(part.beside for part in kept)
    if not checkpointing:
        return beside + sum(b.number * b.size for b in blocks)
    return beside + sum(b.number * b.first for b in blocks) + max(b.size - b.first for b in blocks)


def peak(
    config: Config,
    chunks: int,
    text_tokens: int,
    *,
    clips: int = 1,
    texts: int = 1,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> int:
    """Bytes that a training step holds at most beside parameters, AdamW's moments and clips.

    Backward frees what the forward pass kept and casts of weights, part by part from the end, while gradients come to
    be; in the block at work are its own gradients too. The largest of these sums stands at the beginning of a part or
    at its end. Arguments as in `memory`; `checkpointing` as there.
    """
    own = count.parameters(config)
    casts = memory(config, chunks, text_tokens, dtype=dtype, checkpointing=checkpointing).casts
    held = most = 0
    after = own.total  # parameters whose gradients have come to be when backward begins with a part
    for name, parts in _kept(config, chunks, text_tokens, texts, dtype).items():
        blocks = [block for part in parts for block in part.blocks if block.number]
        one = max((block.size + block.work for block in blocks), default=0)
        most = max(most, held + clips * one + SINGLE * after)  # with the first of its blocks, the last for backward
        after -= getattr(own, name)
        held += clips * sum(part.beside for part in parts) + casts * getattr(own, name) // own.total
        held += clips * sum(b.number * (b.first if checkpointing else b.size) for b in blocks)
        again = [b.size - b.first if checkpointing else 0 for b in blocks]
        working = max((b.work + more for b, more in zip(blocks, again, strict=True)), default=0)
        most = max(most, held + clips * working + SINGLE * after)
    return max(most, SINGLE * own.total)


def _kept(config: Config, chunks: int, text_tokens: int, texts: int, dtype: torch.dtype) -> dict[str, list[Kept]]:
    """What each part of a model keeps, in the order of the forward pass; `enter` keeps what the Combiner takes in."""
    e, m, n = dtype.itemsize, config.latents_per_chunk, config.tokens_per_chunk
    latents, read = chunks * m, most_seen(chunks, config.reach("text")) * m
    video, audio = _encoders(config, chunks, e)
    projected = chunks * (n if config.combiner == "none" else m)  # rows, before and after their norm
    return {
        "video": video,
        "audio": audio,
        "enter": [],
        "combiner": [_combiner(config, chunks, e), Kept(projected * 2 * config.combiner_dim * e)],
        "audio_video": [_stack(config.av_layers, latents, config.av_dim, config.av_heads, config.mlp_ratio, e)],
        "text": [
            Kept(read * config.av_dim * e if read < latents else 0),  # the latents within reach, taken out
            *([_text(config, read, text_tokens, texts, e)] if text_tokens else []),
        ],
        "losses": [
            Kept(latents * 3 * config.av_dim * SINGLE),  # cosine distance
            *_reconstructions(config, chunks, e),
        ],
    }


def _block(number: int, rows: int, dim: int, heads: int, mlp_ratio: int, e: int, keep: int | None = None) -> Blocks:
    """Blocks over `rows` tokens; `keep`: tokens of a pruned one."""
    kept = rows if keep is None else keep
    singles = (rows + kept) * dim  # input and residual, which the norms keep
    tokens = rows * 3 * dim  # input's norm, keys and values
    # query, attention's output, residual's norm, the inner layer before and after GELU; normed rows that are cut out
    tokens += kept * (3 + 2 * mlp_ratio + (keep is not None)) * dim
    statistics = kept * heads + 2 * (rows + kept)
    work = kept * dim * (mlp_ratio * e + SINGLE)  # inner layer and output
    return Blocks(number, tokens * e + (singles + statistics) * SINGLE, rows * dim * SINGLE, work)


def _stack(layers: int, rows: int, dim: int, heads: int, mlp_ratio: int, e: int) -> Kept:
    """Blocks and the norm behind them: its input, its output and its statistics."""
    return Kept(rows * (dim * e + (dim + 2) * SINGLE), (_block(layers, rows, dim, heads, mlp_ratio, e),))


def _encoders(config: Config, chunks: int, e: int) -> tuple[list[Kept], list[Kept]]:
    """Both encoders, with the pixels and the spectrogram that are projected."""
    d, heads, layers, ratio = config.encoder_dim, config.encoder_heads, config.encoder_layers, config.mlp_ratio
    size = (config.frames_per_chunk, config.image_size, config.image_size)
    pixels = sum(prod(tube_grid(tube.fine, *size)) * tube.fine.size for tube in config.merged_tubes)
    patches = config.audio_tokens * prod(config.mel_patch)
    return (
        [Kept(chunks * pixels * e), _stack(layers, chunks * config.video_tokens, d, heads, ratio, e)],
        [Kept(chunks * patches * e), _stack(layers, chunks * config.audio_tokens, d, heads, ratio, e)],
    )


def _combiner(config: Config, chunks: int, e: int) -> Kept:
    """All but the projection at its end."""
    d, n, m, heads = config.combiner_dim, config.tokens_per_chunk, config.combined_tokens, config.combiner_heads
    if config.combiner == "transformer":
        whole = _block(config.combiner_layers - 1, chunks * n, d, heads, config.mlp_ratio, e)
        last = _block(1, chunks * n, d, heads, config.mlp_ratio, e, keep=chunks * m)
        return Kept(0, (whole, last))
    if config.combiner == "ttm":
        return _ttm(config, chunks, e)
    if config.combiner == "mean":
        return Kept(chunks * n * d * e)
    if config.combiner == "attention":  # tokens, their norm, keys and values; queries, twice, and what they find
        return Kept(chunks * (4 * n + 3 * m) * d * e + chunks * (m * heads + 2 * n) * SINGLE)
    if config.combiner == "perceiver":
        tokens = 3 * (n + m) + (6 + 2 * config.mlp_ratio) * m  # of a layer: source, keys and values; latents
        statistics = m * heads + 2 * n + 4 * m
        layers = config.combiner_layers * (tokens * d * e + statistics * SINGLE)
        return Kept(chunks * (n * d * e + layers))
    return Kept(0)


def _ttm(config: Config, chunks: int, e: int) -> Kept:
    d, (n, s, r) = config.combiner_dim, count.group_sizes(config)
    times = chunks * config.ttm_groups
    beside = _summary(config, s + n, r, e)
    if config.ttm_write == "erase_add":
        beside += _erase_add(config, s, r, e)
    else:
        beside += _summary(config, s + n + r, s, e)
    layers, ratio = config.ttm_layers, config.mlp_ratio
    if config.ttm_process == "transformer":
        stack = _stack(layers, times * r, d, config.combiner_heads, ratio, e)
        return Kept(times * beside + stack.beside, stack.blocks)
    channels = r * (2 + 2 * ratio) * d
    tokens = (2 * r * d + 2 * d * config.ttm_mixer_hidden) if config.ttm_process == "mixer" else 0
    return Kept(times * (beside + (layers * (channels + tokens) + 2 * r * d) * e))


def _summary(config: Config, tokens: int, k: int, e: int) -> int:
    """Tokens put together, and what gives them their weights, for k rows."""
    d, heads, hidden = config.combiner_dim, config.combiner_heads, config.ttm_hidden
    if config.ttm_summary == "token_learner":
        return tokens * (d + 2 * hidden + k) * e + 2 * tokens * SINGLE
    if config.ttm_summary == "mean":
        return 0
    if heads * k <= d + k:
        return (tokens * (d + heads * k) + k * (heads + 1) * d) * e
    return (tokens * (3 * d + heads * k) + k * d) * e


def _erase_add(config: Config, s: int, r: int, e: int) -> int:
    """The memory after every slot's erasure; selection; the vectors of erasure and addition."""
    d, hidden, slots = config.combiner_dim, config.ttm_hidden, config.ttm_slots
    memory = s * (2 + 2 * slots) * d + s * (2 * hidden + slots)
    vectors = 2 * (2 * r * d + 2 * d * hidden + slots * (2 * d + 2 * hidden))
    return (memory + vectors) * e


def _reconstructions(config: Config, chunks: int, e: int) -> list[Kept]:
    """Small Transformers over what is known and what is asked for, their answers, and the squared errors."""
    d, m = config.reconstruction_dim, config.latents_per_chunk
    parts = []
    for tokens, size in zip(count.target_tokens(config), count.target_sizes(config), strict=True):
        times, tokens = (chunks - 1, tokens) if chunks > 1 else (1, 1)
        rows = times * (m + tokens)
        parts.append(_stack(config.reconstruction_layers, rows, d, config.reconstruction_heads, config.mlp_ratio, e))
        parts.append(Kept(times * tokens * size * 3 * SINGLE))
    return parts


def _text(config: Config, latents: int, tokens: int, texts: int, e: int) -> Kept:
    """The decoder and the float32 logits."""
    d, heads, rows = config.text_dim, config.text_heads, texts * tokens
    crossed = config.text_layers // config.cross_every
    plain = _block(config.text_layers - crossed, rows, d, heads, config.mlp_ratio, e)
    plain = plain._replace(size=plain.size + rows * d * e)  # turned keys, beside those that the values' memory holds
    cross = (4 * rows * d + 2 * latents * d) * e + rows * (heads + 2) * SINGLE
    beside = 2 * rows * d * e + rows * config.vocab_size * (SINGLE if e == SINGLE else e + SINGLE)
    return Kept(beside, (plain, plain._replace(number=crossed, size=plain.size + cross)))
