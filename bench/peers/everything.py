"""What else sees a whole clip at once: a Perceiver over all of its tokens, in place of one over each chunk."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor

from mirasol import Config, Model, cost
from mirasol.combiner import PerceiverCombiner
from mirasol.layers import init_weights, sequence_positions
from mirasol.past import Ring


class ClipResampler(PerceiverCombiner):
    """A resampler whose latents, m a chunk, attend to the tokens of all chunks. Source: arXiv 2204.14198, 3.1."""

    def forward(self, x: Tensor, past: Sequence[Ring] | None = None) -> Tensor:
        chunks, tokens = x.shape[1], x.flatten(1, 2)
        where = sequence_positions(0, chunks, x.shape[3], x)[:, None]  # else the latents of all chunks were the same
        latents = (self.latents.to(x.dtype) + where).flatten(0, 1).expand(x.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, tokens)
        return self.project(rearrange(latents, "b (t m) d -> b t m d", t=chunks))


def at_once(config: Config) -> bool:
    """Whether a configuration stands for a Perceiver over the whole clip: it resamples and sees what is to come."""
    return config.combiner == "perceiver" and not config.av_causal


def build(config: Config) -> Model:
    """`Model(config)`, with a resampler of the whole clip where that is meant."""
    model = Model(config)
    if at_once(config):
        model.combiner = ClipResampler(config).apply(init_weights)
    return model


def forward_flops(config: Config, chunks: int, text_tokens: int) -> int:
    """`mirasol.cost.model`, and what the resampler's latents of every chunk do with the tokens of the others."""
    m, n = config.combined_tokens, config.tokens_per_chunk
    others = config.combiner_layers * cost.attention(chunks * (chunks - 1) * m * (n + m), config.combiner_dim)
    return cost.model(config, chunks, text_tokens).total + others * at_once(config)


def step_flops(config: Config, chunks: int, text_tokens: int, clips: int = 1) -> int:
    """`mirasol.cost.training`, likewise."""
    more = forward_flops(config, chunks, text_tokens) - cost.model(config, chunks, text_tokens).total
    return cost.training(config, chunks, text_tokens, clips=clips) + 3 * clips * more
