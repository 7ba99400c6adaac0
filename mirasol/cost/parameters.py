"""Numbers of parameters by part, equal to those of the model."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from math import prod

from mirasol.config import Config


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of the parts of a model. `losses`: what predicts and reconstructs the next chunk."""

    video: int
    audio: int
    enter: int
    combiner: int
    audio_video: int
    losses: int
    text: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def parameters(config: Config) -> Parameters:
    """Parameters of `mirasol.Model(config)` with its own text decoder; encoders that are shared count as video."""
    d, width = config.encoder_dim, config.combiner_dim
    return Parameters(
        video=tubes(config) + vit(d, config.encoder_layers, config.mlp_ratio),
        audio=linear(prod(config.mel_patch), d)
        + d  # in place of sound that is missing
        + (0 if config.share_encoders else vit(d, config.encoder_layers, config.mlp_ratio)),
        enter=linear(d, width) + 2 * width,
        combiner=combiner(config) + norm(width) + linear(width, config.av_dim),
        audio_video=(config.latents_per_chunk + 1) * config.av_dim
        + vit(config.av_dim, config.av_layers, config.mlp_ratio),
        losses=linear(config.av_dim, config.av_dim)
        + sum(reconstruction(config, size) for size in target_sizes(config)),
        text=text(config),
    )


def linear(inner: int, outer: int, bias: bool = True) -> int:
    return inner * outer + outer * bias


def norm(dim: int) -> int:
    return 2 * dim


def attention(dim: int, source: int | None = None) -> int:
    return 2 * linear(dim, dim) + linear(source or dim, 2 * dim)


def mlp(dim: int, inner: int, outer: int | None = None) -> int:
    return linear(dim, inner) + linear(inner, outer or dim)


def block(dim: int, mlp_ratio: int) -> int:
    return 2 * norm(dim) + attention(dim) + mlp(dim, mlp_ratio * dim)


def vit(dim: int, layers: int, mlp_ratio: int) -> int:
    return layers * block(dim, mlp_ratio) + norm(dim)


def decoder_block(config: Config, cross: bool) -> int:
    """A block of the text decoder, with or without cross-attention."""
    d = config.text_dim
    return block(d, config.mlp_ratio) + cross * (norm(d) + attention(d, config.av_dim))


def text(config: Config) -> int:
    crossed = config.text_layers // config.cross_every
    blocks = crossed * decoder_block(config, True) + (config.text_layers - crossed) * decoder_block(config, False)
    return 2 * config.vocab_size * config.text_dim + blocks + norm(config.text_dim)


def tubes(config: Config) -> int:
    """Projections of the tubes, and the token in place of pictures that are missing."""
    d = config.encoder_dim
    if config.tube_kernels == "interpolated":
        return d * 3 * prod(config.tube_kernel_size) + len(config.tubes) * d + d
    return sum(linear(tube.fine.size, d // tube.parts) for tube in config.merged_tubes) + d


def target_sizes(config: Config) -> tuple[int, int]:
    """Width of one token that is to be reconstructed: of the video, of the sound."""
    if config.reconstruction_target == "features":
        return config.encoder_dim, config.encoder_dim
    return config.frames_per_chunk * 3 * config.reconstruction_patch**2, prod(config.mel_patch)


def target_tokens(config: Config) -> tuple[int, int]:
    """How many tokens a chunk are to be reconstructed: of the video, of the sound."""
    if config.reconstruction_target == "features":
        return config.video_tokens, config.audio_tokens
    return (config.reconstruction_size // config.reconstruction_patch) ** 2, config.audio_tokens


def reconstruction(config: Config, size: int) -> int:
    d = config.reconstruction_dim
    return linear(config.av_dim, d) + d + vit(d, config.reconstruction_layers, config.mlp_ratio) + linear(d, size)


def combiner(config: Config) -> int:
    """All but the projection at its end."""
    d, m, layers = config.combiner_dim, config.combined_tokens, config.combiner_layers
    if config.combiner == "transformer":
        return layers * block(d, config.mlp_ratio)
    if config.combiner == "ttm":
        return ttm(config)
    if config.combiner == "attention":
        return m * d + norm(d) + attention(d)
    if config.combiner == "perceiver":
        return m * d + layers * (3 * norm(d) + attention(d) + mlp(d, config.mlp_ratio * d))
    return 0


def group_sizes(config: Config) -> tuple[int, int, int]:
    """n, s and r of one group of a Token Turing Machine: tokens of a chunk, of the memory, read."""
    groups = config.ttm_groups
    return config.tokens_per_chunk // groups, config.ttm_memory // groups, config.ttm_read // groups


def ttm(config: Config) -> int:
    """Memory, read, process and write; all groups share the weights."""
    n, s, r = group_sizes(config)
    memory = config.ttm_groups * s * config.combiner_dim if config.ttm_initial_memory == "learned" else 0
    write = erase_add(config, r) if config.ttm_write == "erase_add" else summary(config, s + n + r, s)
    return memory + summary(config, s + n, r) + process(config, r) + write


def summary(config: Config, tokens: int, k: int) -> int:
    d = config.combiner_dim
    own = tokens * d if config.ttm_positions else 0
    if config.ttm_summary == "token_learner":
        own += norm(d) + mlp(d, config.ttm_hidden, k)
    elif config.ttm_summary == "latent_query":
        own += k * d + 3 * linear(d, d) + linear(d, d, bias=False)
    return own


def process(config: Config, r: int) -> int:
    d, layers = config.combiner_dim, config.ttm_layers
    channels = norm(d) + mlp(d, config.mlp_ratio * d)
    if config.ttm_process == "transformer":
        return r * d + vit(d, layers, config.mlp_ratio)
    if config.ttm_process == "mixer":
        return layers * (norm(d) + mlp(r, config.ttm_mixer_hidden) + channels) + norm(d)
    return layers * channels + norm(d)


def erase_add(config: Config, r: int) -> int:
    d, hidden, slots = config.combiner_dim, config.ttm_hidden, config.ttm_slots
    return 3 * norm(d) + mlp(d, hidden, slots) + 2 * (mlp(r, hidden, slots) + mlp(d, hidden))
