"""What the model is given, checked and made complete: a modality that is missing becomes zeros marked as absent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mirasol.config import Config
from mirasol.kernels.core.checks import FLOATS, describe, expect, expect_shape, expect_tensor


@dataclass
class Clips:
    """A batch of clips.

    Attributes:
        batch, chunks: B and T.
        video: [B, 3, T * F, H, W]; zeros without storage where there is none.
        audio: [B, T * S]; likewise.
        video_present, audio_present: [B] bool.
        video_features, audio_features: [B, T, n, encoder_dim] that stand in for the encoders' outputs, or None.
    """

    batch: int
    chunks: int
    video: Tensor
    audio: Tensor
    video_present: Tensor
    audio_present: Tensor
    video_features: Tensor | None
    audio_features: Tensor | None

    @classmethod
    def check(
        cls,
        config: Config,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        video_present: Tensor | None = None,
        audio_present: Tensor | None = None,
        video_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        text: Tensor | None = None,
    ) -> Clips:
        """Check every argument against the configuration and against the others.

        Raises:
            TypeError, ValueError: naming the argument, what it must be and what it was.
        """
        sizes: dict[str, tuple[int, int]] = {}
        if video is not None:
            video = _still(config, video)
            sizes["video"] = _video_size(config, video)
        if audio is not None:
            sizes["audio"] = _audio_size(config, audio)
        for name, features in (("video_features", video_features), ("audio_features", audio_features)):
            if features is not None:
                expect_tensor(name, features, "B T n d")
                expect_shape(name, features, (*features.shape[:3], config.encoder_dim), "[B, T, n, encoder_dim]")
                sizes[name] = (features.shape[0], features.shape[1])
        first = next(iter(sizes), None)
        for name, size in sizes.items():
            if first is not None and size != sizes[first]:
                raise ValueError(
                    f"{name} must hold {sizes[first][0]} clips of {sizes[first][1]} chunks like {first}, "
                    f"was {size[0]} clips of {size[1]} chunks"
                )
        given = next((x for x in (video, audio, video_features, audio_features, text) if x is not None), None)
        if given is None:
            raise ValueError("video, audio or text must be given, was None for all of them")
        batch, chunks = sizes[first] if first is not None else (given.shape[0], 1)
        device = given.device
        others = {"audio": audio, "video_features": video_features, "audio_features": audio_features, "text": text}
        for name, tensor in others.items():
            if tensor is not None:
                expect(tensor.device == device, name, f"be on {device} like the other inputs", tensor)
                expect(tensor.shape[0] == batch, name, f"hold {batch} rows like the clips", tensor)
        return cls(
            batch,
            chunks,
            video if video is not None else _no_video(config, batch, chunks, device),
            audio if audio is not None else torch.zeros(batch, chunks * config.samples_per_chunk, device=device),
            _presence("video_present", video_present, batch, device, video is not None),
            _presence("audio_present", audio_present, batch, device, audio is not None),
            video_features,
            audio_features,
        )


def check_text(config: Config, text: Tensor, labels: Tensor | None) -> None:
    """Check token ids and labels; ids are compared with the vocabulary where they lie on the CPU."""
    expect_tensor("text", text, "B L", dtypes=(torch.int64,))
    expect(text.shape[1] > 0, "text", "hold at least one token", text)
    if text.device.type == "cpu" and not torch.compiler.is_compiling():
        largest, smallest = int(text.max()), int(text.min())
        if smallest < 0 or largest >= config.vocab_size:
            raise ValueError(
                f"text must hold token ids in [0, vocab_size = {config.vocab_size}), was {smallest}..{largest}"
            )
    if labels is not None:
        expect_tensor("labels", labels, "B L", dtypes=(torch.int64,))
        expect_shape("labels", labels, text.shape, "[B, L] like text")


def _still(config: Config, video: Tensor) -> Tensor:
    """An image [B, 3, 1, H, W] as a chunk that stands still, without a copy."""
    if isinstance(video, Tensor) and video.ndim == 5 and video.shape[2] == 1:
        return video.expand(-1, -1, config.frames_per_chunk, -1, -1)
    return video


def _video_size(config: Config, video: Tensor) -> tuple[int, int]:
    """B and T."""
    expect_tensor("video", video, "B 3 frames H W", dtypes=(torch.uint8, *FLOATS))
    expect(video.shape[1] == 3, "video", "be [B, 3, frames, H, W] with 3 colours", video)
    frames, per_chunk = video.shape[2], config.frames_per_chunk
    expect(
        frames > 0 and frames % per_chunk == 0,
        "video",
        f"hold a multiple of frames_per_chunk = {per_chunk} frames",
        video,
    )
    return video.shape[0], frames // per_chunk


def _audio_size(config: Config, audio: Tensor) -> tuple[int, int]:
    """B and T."""
    expect_tensor("audio", audio, "B samples")
    samples, per_chunk = audio.shape[1], config.samples_per_chunk
    expect(
        samples > 0 and samples % per_chunk == 0,
        "audio",
        f"hold a multiple of samples_per_chunk = {per_chunk} samples",
        audio,
    )
    return audio.shape[0], samples // per_chunk


def _no_video(config: Config, batch: int, chunks: int, device: torch.device) -> Tensor:
    pixel = torch.zeros((), dtype=torch.uint8, device=device)
    return pixel.expand(batch, 3, chunks * config.frames_per_chunk, config.image_size, config.image_size)


def _presence(name: str, mask: Tensor | None, batch: int, device: torch.device, given: bool) -> Tensor:
    if mask is None:
        return torch.full((batch,), given, device=device)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor [B], was {describe(mask)}")
    expect_shape(name, mask, (batch,), "[B]")
    expect(given or not bool(mask.any()), name, f"be False without {name.removesuffix('_present')}", mask)
    return mask
