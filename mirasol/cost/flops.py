"""Analytic FLOPs of a forward pass and of a training step: pure arithmetic over `mirasol.Config`.

Counted as `torch.utils.flop_counter` counts: 2 per multiply-add of a matrix product; norms, softmax, activations, FFTs
and pooling cost nothing. Attention costs `4 pairs width`, with the pairs that are visible. The numbers must equal the
counter's exactly, which counts the model as it runs: neither shares code with the other.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from math import prod

from mirasol.config import Config
from mirasol.cost.parameters import group_sizes, target_sizes, target_tokens
from mirasol.kernels import tube_grid
from mirasol.past import EVERYTHING, Reach


@dataclass(frozen=True)
class Cost:
    """FLOPs of the parts of a model for one clip. `losses`: what predicts and reconstructs the next chunk."""

    video: int
    audio: int
    enter: int
    combiner: int
    audio_video: int
    text: int
    losses: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))


def training(config: Config, chunks: int, text_tokens: int, *, clips: int = 1, texts: int | None = None) -> int:
    """FLOPs of one training step: three times those of its forward pass, the losses' heads included.

    What counts as work for a share of a device's peak: a block that is computed again in backward counts once. The text
    decoder is that of the configuration, no other language model.

    Args:
        chunks: T of every clip, padding included.
        text_tokens: L of every text.
        texts: Q, about all clips together; None: one a clip.
    """
    beside = model(config, chunks, text_tokens, texts=0, losses=True)
    text = model(config, chunks, text_tokens).text - beside.text
    return 3 * (clips * beside.total + (clips if texts is None else texts) * text)


def model(
    config: Config,
    chunks: int,
    text_tokens: int,
    *,
    texts: int = 1,
    video: bool = True,
    audio: bool = True,
    losses: bool = False,
) -> Cost:
    """FLOPs of a forward pass of one clip.

    Args:
        chunks: T, of video and sound.
        text_tokens: L of each text; 0: no text decoder runs.
        texts: how many texts are about the clip; 0: its latents' keys and values are computed all the same.
        video, audio: whether there is any. What is missing is encoded once, one chunk for all clips of a batch: here it
            counts in full.
        losses: whether the next chunk is predicted and reconstructed, as in training.
    """
    d, layers, ratio = config.encoder_dim, config.encoder_layers, config.mlp_ratio
    n_v, n_a = config.video_tokens, config.audio_tokens
    seen, heard = chunks if video else 1, chunks if audio else 1
    return Cost(
        video=tubes(config, seen) + layers * seen * block(n_v, d, n_v * n_v, ratio),
        audio=spectrogram(config, heard)
        + linear(heard * n_a, prod(config.mel_patch), d)
        + layers * heard * block(n_a, d, n_a * n_a, ratio),
        enter=linear(seen * n_v + heard * n_a, d, config.combiner_dim),
        combiner=combiner(config, chunks),
        audio_video=audio_video(config, chunks),
        text=text(config, most_seen(chunks, config.reach("text")) * config.latents_per_chunk, text_tokens, texts),
        losses=heads(config, chunks, video, audio) if losses else 0,
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


def most_seen(chunks: int, reach: Reach) -> int:
    """Of so many chunks, how many the last one sees."""
    return chunks if reach.slots is None else min(reach.slots, chunks)


def chunk_pairs(chunks: int, queries: int, keys: int, reach: Reach = EVERYTHING) -> int:
    """Visible pairs where chunk c sees min(c + 1, window + sinks) chunks, with so many queries and keys a chunk."""
    seen = most_seen(chunks, reach)
    return queries * keys * (seen * (seen + 1) // 2 + (chunks - seen) * seen)


def tubes(config: Config, chunks: int) -> int:
    """Projection of the video's tubes."""
    size = (config.frames_per_chunk, config.image_size, config.image_size)
    return sum(
        linear(chunks * prod(tube_grid(tube.fine, *size)), tube.fine.size, config.encoder_dim // tube.parts)
        for tube in config.merged_tubes
    )


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
    if config.combiner == "attention":
        return pooling(config, chunks) + project
    if config.combiner == "perceiver":
        return chunks * perceiver(config) + project
    return project


def transformer_combiner(config: Config, chunks: int, pruned: bool = True) -> int:
    """The blocks of the causal-Transformer Combiner; `pruned`: the last one computes m tokens a chunk only."""
    d, n, m, ratio = config.combiner_dim, config.tokens_per_chunk, config.combined_tokens, config.mlp_ratio
    reach = config.reach("combiner")
    whole = block(chunks * n, d, chunk_pairs(chunks, n, n, reach), ratio)
    if not pruned:
        return config.combiner_layers * whole
    last = block(chunks * n, d, chunk_pairs(chunks, m, n, reach), ratio, keep=chunks * m)
    return (config.combiner_layers - 1) * whole + last


def pooling(config: Config, chunks: int) -> int:
    """Learned queries that attend to the tokens of this and earlier chunks."""
    d, n, m = config.combiner_dim, config.tokens_per_chunk, config.combined_tokens
    pairs = chunk_pairs(chunks, m, n, config.reach("combiner"))
    return linear(chunks * (n + m), d, 2 * d) + attention(pairs, d)


def perceiver(config: Config) -> int:
    """A resampler over one chunk: latents attend to its tokens and to themselves."""
    d, m, ratio = config.combiner_dim, config.combined_tokens, config.mlp_ratio
    seen = config.tokens_per_chunk + m
    return config.combiner_layers * block(seen, d, m * seen, ratio, keep=m)


def ttm(config: Config, chunks: int) -> int:
    """A Token Turing Machine over all chunks: read, process and write for each, in every group."""
    n, s, r = group_sizes(config)
    times = chunks * config.ttm_groups
    reads = summary(config, s + n, r, times)
    writes = (
        times * erase_add(config, s, r) if config.ttm_write == "erase_add" else summary(config, s + n + r, s, times)
    )
    return reads + times * process(config, r) + writes


def summary(config: Config, tokens: int, k: int, times: int) -> int:
    """So many tokens (memory, inputs, outputs) summarised into k, so many times with the same weights."""
    d, hidden = config.combiner_dim, config.ttm_hidden
    if config.ttm_summary == "token_learner":
        return times * (linear(tokens, d, hidden) + linear(tokens, hidden, k) + linear(k, tokens, d))
    if config.ttm_summary == "latent_query":
        return latent_query(config, tokens, k, times)
    return times * linear(k, tokens, d)


def latent_query(config: Config, tokens: int, k: int, times: int) -> int:
    """Attention of k learned queries as the `torch` backend computes it.

    Keys are never projected where that is no more work (heads x k <= d + k): the queries go through the keys' weights
    once, and the values are projected after pooling.
    """
    d, heads = config.combiner_dim, config.combiner_heads
    ask = linear(k, d, d)  # a product of the k queries with a d x d matrix
    if heads * k <= d + k:
        shift = linear(k, d, 1)  # the queries with the keys' bias
        return 2 * ask + shift + times * (heads * attention(k * tokens, d) + 2 * ask)
    return ask + times * (linear(tokens, d, 2 * d) + attention(k * tokens, d) + ask)


def process(config: Config, r: int) -> int:
    """What turns the r tokens read into the r outputs."""
    d, ratio, layers = config.combiner_dim, config.mlp_ratio, config.ttm_layers
    channels = linear(r, d, 2 * ratio * d)
    if config.ttm_process == "transformer":
        return layers * block(r, d, r * r, ratio)
    if config.ttm_process == "mixer":
        return layers * (linear(d, r, 2 * config.ttm_mixer_hidden) + channels)
    return layers * channels


def erase_add(config: Config, s: int, r: int) -> int:
    """Selection over the s tokens of a memory, and erase and add vectors from the r outputs."""
    d, hidden, slots = config.combiner_dim, config.ttm_hidden, config.ttm_slots
    select = linear(s, d + slots, hidden)
    over_tokens = linear(d, r + slots, hidden)
    over_channels = linear(slots, 2 * d, hidden)
    add = linear(s, slots, d)
    return select + 2 * (over_tokens + over_channels) + add


def audio_video(config: Config, chunks: int) -> int:
    """The Transformer over the combined tokens of all chunks."""
    d, m = config.av_dim, config.latents_per_chunk
    pairs = chunk_pairs(chunks, m, m, config.reach("av")) if config.av_causal else (chunks * m) ** 2
    return config.av_layers * block(chunks * m, d, pairs, config.mlp_ratio)


def heads(config: Config, chunks: int, video: bool, audio: bool) -> int:
    """The prediction of the next chunk's combined tokens, and the reconstruction of its video and sound.

    A head that has nothing to reconstruct runs for one token of one chunk; one whose loss weighs 0 does not run.
    """
    m, d, layers = config.latents_per_chunk, config.reconstruction_dim, config.reconstruction_layers
    cost = linear((chunks - 1) * m, config.av_dim, config.av_dim)
    given, weights = (video, audio), (config.video_weight, config.audio_weight)
    for here, weight, tokens, size in zip(given, weights, target_tokens(config), target_sizes(config), strict=True):
        if weight == 0:
            continue
        times, tokens = (chunks - 1, tokens) if here and chunks > 1 else (1, 1)
        seen = m + tokens
        once = linear(m, config.av_dim, d) + layers * block(seen, d, seen * seen, config.mlp_ratio)
        cost += times * (once + linear(tokens, d, size))
    return cost


def text(config: Config, latents: int, tokens: int, texts: int) -> int:
    """The text decoder: causal self-attention, cross-attention to the latents of one clip, MLP, logits."""
    if not tokens:
        return 0
    d, layers = config.text_dim, config.text_layers
    own = block(tokens, d, tokens * (tokens + 1) // 2, config.mlp_ratio)
    cross = linear(tokens, d, 2 * d) + attention(tokens * latents, d)
    once = linear(latents, config.av_dim, 2 * d)  # keys and values, for all texts
    crossed = layers // config.cross_every
    return crossed * once + texts * (layers * own + crossed * cross + linear(tokens, d, config.vocab_size))
