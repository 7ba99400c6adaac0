"""The losses: what each compares, and over what it averages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from mirasol.batch import IGNORE
from mirasol.config import Config
from mirasol.records import Record, record


@record
@dataclass
class Losses(Record):
    """Scalars in float32, unweighted; 0 where there is nothing to compare.

    Attributes:
        latent: 1 - cosine of the predicted and the real combined tokens of the next chunk, these centred.
        video: squared error of the next chunk's video (a smaller copy, or its features).
        audio: squared error of the next chunk's spectrogram patches (or features).
        text: cross-entropy in nats per token that counts.
        latent_constant: the latent loss of the best prediction that is the same for all clips and chunks. A latent loss
            near it has learned nothing of the clips; it is told beside the others and never part of the sum.
    """

    latent: Tensor
    video: Tensor
    audio: Tensor
    text: Tensor
    latent_constant: Tensor

    def total(self, config: Config) -> Tensor:
        """The weighted sum, by the weights that the configuration names; what weighs 0 is left out."""
        weighted = [
            weight * getattr(self, name)
            for name in ("latent", "video", "audio", "text")
            if (weight := getattr(config, f"{name}_weight")) > 0
        ]
        return torch.stack(weighted).sum() if weighted else torch.zeros_like(self.latent)


def latent_loss(predicted: Tensor, combined: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine distance of `predicted[:, t]` to `combined[:, t + 1]`, and that of the best constant prediction.

    Combined tokens are mostly what all chunks have in common, slot by slot, and a prediction that knows no more is near
    them. So their mean over the batch's chunks is taken off each slot: what is left tells chunks apart. The target is
    detached: the Combiner is not drawn to what is easy to predict.

    Args:
        predicted: [B, T - 1, m, d].
        combined: [B, T, m, d].
        counts: [B, T] bool, chunks that exist.
    Returns:
        Two scalars, float32; both 0 where T is 1.
    """
    combined = combined.detach().float()
    exists = counts[:, :, None, None]
    mean = _mean(combined, exists, (0, 1))
    target = nn.functional.normalize((combined - mean)[:, 1:], dim=-1)
    distance = 1 - nn.functional.cosine_similarity(predicted.float(), target, dim=-1)
    # Of all unit vectors, the mean of the targets is the nearest to them on average.
    constant = 1 - _mean(target, exists[:, 1:], (0, 1)).norm(dim=-1).mean()
    return _mean(distance, exists[:, 1:, :, 0]), torch.where(counts[:, 1:].any(), constant, 0.0)


def reconstruction_loss(predicted: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """Mean squared error of `predicted` to `target`, both [B, T, p, c], over the chunks that count [B, T]."""
    here = counts[:, :, None, None]
    error = torch.where(here, predicted.float() - target.detach().float(), 0.0)
    return _mean(error.square(), here)


def text_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [Q, L, V] at i to labels [Q, L] at i + 1; labels of -100 do not count, all others do."""
    labels = labels[:, 1:].flatten()
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=IGNORE, reduction="none"
    )
    return _mean(losses, labels != IGNORE)


def small_copy(video: Tensor, config: Config) -> Tensor:
    """The target of the video reconstruction: [B, 3, T * F, H, W] -> patches of a smaller, normalised copy.

    One chunk at a time is held in float32.

    Returns:
        [B, T, (size / patch)^2, F * 3 * patch^2] float32.
    """
    chunks = video.split(config.frames_per_chunk, dim=2)
    return torch.stack([_small_chunk(chunk, config) for chunk in chunks], dim=1)


def _small_chunk(video: Tensor, config: Config) -> Tensor:
    size, patch, scale = config.reconstruction_size, config.reconstruction_patch, 1.0
    if not video.is_floating_point():
        scale = 1 / 255
    frames = rearrange(video, "b c f h w -> (b f) c h w").float()
    frames = nn.functional.interpolate(frames, size=(size, size), mode="area") * scale
    colours = zip(frames.unbind(1), config.pixel_mean, config.pixel_std, strict=True)
    frames = torch.stack([(colour - mean) / std for colour, mean, std in colours], dim=1)
    return rearrange(frames, "(b f) c (h p) (w q) -> b (h w) (f c p q)", f=config.frames_per_chunk, p=patch, q=patch)


def small_copy_features(config: Config) -> int:
    """Width of one patch of `small_copy`."""
    return config.frames_per_chunk * 3 * config.reconstruction_patch**2


def _mean(values: Tensor, counts: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Mean of the values that count (bool, broadcast), over some dimensions or all; 0 where none does."""
    counts = counts.expand_as(values)
    dims = tuple(range(values.ndim)) if dims is None else dims
    return torch.where(counts, values, 0.0).sum(dims) / counts.sum(dims).clamp(min=1)
