"""The losses: what each compares, and over what it averages."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from einops import rearrange
from torch import Tensor, nn

from mirasol.config import Config

IGNORE = -100
"""A label that does not count."""


@dataclass
class Losses:
    """Scalars in float32, unweighted.

    Attributes:
        latent: 1 - cosine of the predicted and the real combined tokens of the next chunk.
        video: squared error of the next chunk's video (a smaller copy, or its features).
        audio: squared error of the next chunk's spectrogram patches (or features).
        text: cross-entropy in nats per token that counts; 0 without labels.
    """

    latent: Tensor
    video: Tensor
    audio: Tensor
    text: Tensor

    def total(self, config: Config) -> Tensor:
        """The weighted sum, by the weights that the configuration names."""
        return torch.stack([getattr(config, f"{f.name}_weight") * getattr(self, f.name) for f in fields(self)]).sum()


def latent_loss(predicted: Tensor, combined: Tensor) -> Tensor:
    """Cosine distance of `predicted[:, t]` to `combined[:, t + 1]`, both [B, T, m, d]; 0 where T is 1.

    The target is detached: the Combiner is not drawn to what is easy to predict.
    """
    target = combined[:, 1:].detach().float()
    distance = 1 - nn.functional.cosine_similarity(predicted[:, :-1].float(), target, dim=-1)
    return _mean(distance, torch.ones_like(distance))


def reconstruction_loss(predicted: Tensor, target: Tensor, present: Tensor) -> Tensor:
    """Mean squared error of `predicted[:, t]` to `target[:, t + 1]`, both [B, T, p, c], over present [B] clips."""
    error = (predicted[:, :-1].float() - target[:, 1:].detach().float()).square()
    return _mean(error, present[:, None, None, None].expand_as(error).float())


def text_loss(logits: Tensor, labels: Tensor, pad_id: int) -> Tensor:
    """Cross-entropy of logits [B, L, V] at i to labels [B, L] at i + 1; labels of -100 or pad_id do not count."""
    labels = labels[:, 1:].masked_fill(labels[:, 1:] == pad_id, IGNORE)
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return _mean(losses, (labels.flatten() != IGNORE).float())


def small_copy(video: Tensor, config: Config) -> Tensor:
    """The target of the video reconstruction: [B, 3, T * F, H, W] -> patches of a smaller, normalised copy.

    Returns:
        [B, T, (size / patch)^2, F * 3 * patch^2] float32.
    """
    size, patch = config.reconstruction_size, config.reconstruction_patch
    mean, std = (torch.tensor(v, device=video.device)[:, None, None] for v in (config.pixel_mean, config.pixel_std))
    frames = rearrange(video, "b c f h w -> (b f) c h w").float()
    if not video.is_floating_point():
        frames = frames / 255
    frames = (nn.functional.interpolate(frames, size=(size, size), mode="area") - mean) / std
    return rearrange(
        frames,
        "(b t f) c (h p) (w q) -> b t (h w) (f c p q)",
        b=video.shape[0], f=config.frames_per_chunk, p=patch, q=patch,
    )  # fmt: skip


def small_copy_features(config: Config) -> int:
    """Width of one patch of `small_copy`."""
    return config.frames_per_chunk * 3 * config.reconstruction_patch**2


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1)
