"""What turns the pixels and the sound of clips into tokens, or stands in for what a clip lacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mirasol.batch import Clips
from mirasol.config import Config
from mirasol.encoders.audio import MelEmbedding
from mirasol.encoders.video import TubeEmbedding
from mirasol.layers import ViT
from mirasol.past import Past

Both = Callable[[Callable[[], Any], Callable[[], Any]], tuple[Any, Any]]
"""Calls two functions and gives what both gave."""


def in_turn(one: Callable[[], Any], other: Callable[[], Any]) -> tuple[Any, Any]:
    return one(), other()


class Encoders(nn.Module):
    """Tubes and a ViT for the picture, a spectrogram and a ViT for the sound; each chunk for itself.

    Every module runs for every batch, on learned tokens where video or audio is missing.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        vit = (config.encoder_dim, config.encoder_layers, config.encoder_heads, config.mlp_ratio, config.norm_eps)
        self.video_embedding = TubeEmbedding(config)
        self.video_vit = ViT(*vit)
        self.audio_embedding = MelEmbedding(config)
        self.audio_vit = None if config.share_encoders else ViT(*vit)

    def encoded(
        self, clips: Clips, past: Past | None = None, both: Both = in_turn
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """[B, T, n_v, d], [B, T, n_a, d] (1 x 1 where no clip has any), and the spectrogram's patches.

        Args:
            past: what a stream keeps of the chunks before.
            both: calls two functions, the picture's encoder and the sound's.
        """
        video, (audio, mel) = both(partial(self._video_features, clips), partial(self._audio_features, clips, past))
        return video, audio, mel

    def missing_features(self) -> tuple[Tensor, Tensor]:
        """What the encoders make of a chunk without picture [1, 1, n_v, d], and without sound [1, 1, n_a, d]."""
        return self._missing_video(self.video_embedding.missing), self._missing_audio(self.audio_embedding.missing)

    def _video_features(self, clips: Clips) -> Tensor:
        here = clips.chunks_with_video()
        if clips.video is not None and clips.video_features is None:
            return _per_chunk(self.video_vit, self.video_embedding(clips.video, here))
        if clips.video_features is not None and clips.video_present is None and clips.lengths is None:
            return clips.video_features
        return _where_present(here, clips.video_features, self._missing_video(here))

    def _audio_features(self, clips: Clips, past: Past | None) -> tuple[Tensor, Tensor | None]:
        here = clips.chunks_with_audio()
        mel = None
        if clips.audio is not None:
            mel = self.audio_embedding.patches(clips.audio, here, past.sound if past else None)
        if mel is not None and clips.audio_features is None:
            return _per_chunk(self._sound_vit, self.audio_embedding(mel, here)), mel
        if clips.audio_features is not None and clips.audio_present is None and clips.lengths is None:
            return clips.audio_features, mel
        return _where_present(here, clips.audio_features, self._missing_audio(here)), mel

    def _missing_video(self, like: Tensor) -> Tensor:
        size = self.config.image_size
        nothing = like.new_zeros((1, 3, self.config.frames_per_chunk, size, size), dtype=torch.uint8)
        return _per_chunk(self.video_vit, self.video_embedding(nothing, like.new_zeros((1, 1), dtype=torch.bool)))

    def _missing_audio(self, like: Tensor) -> Tensor:
        nothing = self.audio_embedding.patches(like.new_zeros((1, self.config.samples_per_chunk), dtype=torch.float32))
        nobody = like.new_zeros((1, 1), dtype=torch.bool)
        return _per_chunk(self._sound_vit, self.audio_embedding(nothing, nobody))

    @property
    def _sound_vit(self) -> ViT:
        return self.audio_vit if self.audio_vit is not None else self.video_vit


def _per_chunk(vit: ViT, tokens: Tensor) -> Tensor:
    """Run a ViT on [B, T, n, d] with the chunks folded into the batch."""
    return vit(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])


def _where_present(here: Tensor, features: Tensor | None, missing: Tensor) -> Tensor:
    """Features of the chunks that have some, and what a missing modality is encoded to for the others."""
    return missing if features is None else torch.where(here[:, :, None, None], features, missing.to(features.dtype))
