"""Analytic FLOPs of one forward pass in eval mode: pure arithmetic over `mirasol.Config`.

Counted as `torch.utils.flop_counter` counts: 2 per multiply-add of a matrix product; norms, softmax, activations, FFTs
and pooling cost nothing. Attention costs `4 pairs width`, with the pairs that are visible. The numbers must equal the
counter's exactly, which counts the model as it runs: neither shares code with the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirasol.config import Config
from mirasol.kernels import tube_grid


@dataclass(frozen=True)
class Cost:
    """FLOPs of the parts of a model for one clip."""

    video: int
    audio: int
    enter: int
    combiner: int
    audio_video: int
    text: int

    @property
    def total(self) -> int:
        return self.video + self.audio + self.enter + self.combiner + self.audio_video + self.text


def model(config: Config, chunks: int, text_tokens: int) -> Cost:
    """FLOPs for `chunks` chunks of video and sound and `text_tokens` tokens of text.

    `text_tokens` 0: no text decoder runs.
    """
    d, n, layers, ratio = config.encoder_dim, config.tokens_per_chunk, config.encoder_layers, config.mlp_ratio
    n_v, n_a = config.video_tokens, config.audio_tokens
    encode = layers * chunks
    return Cost(
        video=tubes(config, chunks) + encode * block(n_v, d, n_v * n_v, ratio),
        audio=spectrogram(config, chunks)
        + linear(chunks * n_a, config.mel_patch[0] * config.mel_patch[1], d)
        + encode * block(n_a, d, n_a * n_a, ratio),
        enter=linear(chunks * n, d, config.combiner_dim),
        combiner=combiner(config, chunks),
        audio_video=audio_video(config, chunks),
        text=text(config, chunks * config.latents_per_chunk, text_tokens),
    )


def linear(tokens: int, inner: int, outer: int) -> int:
    return 2 * tokens * inner * outer


def attention(pairs: int, dim: int) -> int:
    """Scores and weighted sum over all heads: two products of `pairs` rows of `dim` numbers."""
    return 4 * pairs * dim


def block(tokens: int, dim: int, pairs: int, mlp_ratio: int, keep: int | None = None) -> int:
    """A Transformer block: q, k, v, out and an MLP.

    Args:
        keep: tokens for which queries, output and MLP are computed (last-m pruning); None for all.
    """
    rows = tokens if keep is None else keep
    return (
        linear(tokens, dim, 2 * dim)  # k, v
        + linear(rows, dim, 2 * dim)  # q, out
        + attention(pairs, dim)
        + linear(rows, dim, 2 * mlp_ratio * dim)  # up and down
    )


def chunk_pairs(chunks: int, queries: int, keys: int, window: int | None = None) -> int:
    """Visible pairs where chunk c sees min(c + 1, window) chunks, with so many queries and keys a chunk."""
    seen = chunks if window is None else min(window, chunks)
    return queries * keys * (seen * (seen + 1) // 2 + (chunks - seen) * seen)


def tubes(config: Config, chunks: int) -> int:
    """Projection of the video's tubes."""
    size = (config.frames_per_chunk, config.image_size, config.image_size)
    cost = 0
    for tube in config.tubes:
        nt, nh, nw = tube_grid(tube, *size)
        kt, kh, kw = tube.kernel
        cost += linear(chunks * nt * nh * nw, 3 * kt * kh * kw, config.encoder_dim)
    return cost


def spectrogram(config: Config, chunks: int) -> int:
    """The mel filterbank; the Fourier transform before it is not counted."""
    frames = chunks * config.samples_per_chunk // config.hop
    return linear(frames, config.n_fft // 2 + 1, config.n_mels)


def combiner(config: Config, chunks: int) -> int:
    """From n to m tokens a chunk, the projection to the audio-video width included."""
    project = linear(chunks * config.latents_per_chunk, config.combiner_dim, config.av_dim)
    if config.combiner == "transformer":
        return transformer_combiner(config, chunks) + project
    if config.combiner == "ttm":
        return ttm(config, chunks) + project
    return project


def transformer_combiner(config: Config, chunks: int, pruned: bool = True) -> int:
    """The blocks of the causal-Transformer Combiner; `pruned`: the last one computes m tokens a chunk only."""
    d, n, m, ratio = config.combiner_dim, config.tokens_per_chunk, config.combined_tokens, config.mlp_ratio
    window = config.combiner_window
    whole = block(chunks * n, d, chunk_pairs(chunks, n, n, window), ratio)
    if not pruned:
        return config.combiner_layers * whole
    last = block(chunks * n, d, chunk_pairs(chunks, m, n, window), ratio, keep=chunks * m)
    return (config.combiner_layers - 1) * whole + last


def ttm(config: Config, chunks: int) -> int:
    """A Token Turing Machine over all chunks: read, process and write for each."""
    n, s, r = config.tokens_per_chunk, config.ttm_memory, config.ttm_read
    reads = summary(config, [s, n], r, chunks)
    writes = chunks * erase_add(config) if config.ttm_write == "erase_add" else summary(config, [s, n, r], s, chunks)
    return reads + chunks * process(config) + writes


def summary(config: Config, parts: list[int], k: int, chunks: int) -> int:
    """The tokens of several parts (memory, inputs, outputs) summarised into k, for every chunk."""
    d, hidden, tokens = config.combiner_dim, config.ttm_hidden, sum(parts)
    if config.ttm_summary == "token_learner":
        return chunks * (linear(tokens, d, hidden) + linear(tokens, hidden, k) + linear(k, tokens, d))
    if config.ttm_summary == "latent_query":
        return latent_query(config, parts, k, chunks)
    return chunks * linear(k, tokens, d)


def latent_query(config: Config, parts: list[int], k: int, chunks: int) -> int:
    """Attention of k learned queries as the `torch` backend computes it.

    Keys are never projected where that is no more work (heads x k <= d + k): the queries go through the keys' weights
    once, and the values are projected after pooling.
    """
    d, heads, tokens = config.combiner_dim, config.combiner_heads, sum(parts)
    ask = linear(k, d, d)  # a product of the k queries with a d x d matrix
    if heads * k <= d + k:
        shift = linear(k, d, 1)  # the queries with the keys' bias
        return 2 * ask + shift + chunks * (heads * attention(k * tokens, d) + 2 * ask)
    return ask + chunks * (linear(tokens, d, 2 * d) + attention(k * tokens, d) + ask)


def process(config: Config) -> int:
    """What turns the r tokens read into the r outputs."""
    d, r, ratio, layers = config.combiner_dim, config.ttm_read, config.mlp_ratio, config.ttm_layers
    channels = linear(r, d, 2 * ratio * d)
    if config.ttm_process == "transformer":
        return layers * block(r, d, r * r, ratio)
    if config.ttm_process == "mixer":
        return layers * (linear(d, r, 2 * config.ttm_mixer_hidden) + channels)
    return layers * channels


def erase_add(config: Config) -> int:
    """Selection over the memory, and erase and add vectors from the outputs."""
    d, hidden, slots = config.combiner_dim, config.ttm_hidden, config.ttm_slots
    select = linear(config.ttm_memory, d + slots, hidden)
    over_tokens = linear(d, config.ttm_read + slots, hidden)
    over_channels = linear(slots, 2 * d, hidden)
    add = linear(config.ttm_memory, slots, d)
    return select + 2 * (over_tokens + over_channels) + add


def audio_video(config: Config, chunks: int) -> int:
    """The Transformer over the combined tokens of all chunks."""
    d, m = config.av_dim, config.latents_per_chunk
    pairs = chunk_pairs(chunks, m, m, config.av_window) if config.av_causal else (chunks * m) ** 2
    return config.av_layers * block(chunks * m, d, pairs, config.mlp_ratio)


def text(config: Config, latents: int, tokens: int) -> int:
    """The text decoder: causal self-attention, cross-attention to the latents, MLP, logits."""
    if not tokens:
        return 0
    d, layers = config.text_dim, config.text_layers
    own = block(tokens, d, tokens * (tokens + 1) // 2, config.mlp_ratio)
    cross = linear(tokens, d, 2 * d) + linear(latents, config.av_dim, 2 * d) + attention(tokens * latents, d)
    return layers * own + layers // config.cross_every * cross + linear(tokens, d, config.vocab_size)
