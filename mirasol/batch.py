"""What the model is given, checked: clips of any lengths, with or without picture and sound, and texts about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mirasol.config import Config
from mirasol.kernels.core.checks import FLOATS, describe, expect, expect_shape, expect_tensor

IGNORE = -100
"""A label that does not count."""


@dataclass
class Clips:
    """A batch of clips.

    Attributes:
        batch, chunks: B and T.
        device: where all tensors lie.
        lengths: [B], chunks of each clip; None where all have T.
        times: [B, T] float32, when each chunk begins, in seconds.
        video: [B, 3, T * F, H, W], or None.
        audio: [B, T * S], or None.
        video_features, audio_features: [B, T, n, encoder_dim] that stand in for the encoders' outputs, or None.
        video_present, audio_present: [B] or [B, T] bool; None where every clip has what is given.
    """

    batch: int
    chunks: int
    device: torch.device
    lengths: Tensor | None
    times: Tensor
    video: Tensor | None
    audio: Tensor | None
    video_features: Tensor | None
    audio_features: Tensor | None
    video_present: Tensor | None
    audio_present: Tensor | None

    @classmethod
    def check(
        cls,
        config: Config,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        *,
        chunks: Tensor | None = None,
        times: Tensor | None = None,
        video_present: Tensor | None = None,
        audio_present: Tensor | None = None,
        video_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        text: Tensor | None = None,
    ) -> Clips:
        """Check every argument against the configuration and against the others.

        Without picture and sound, every text has an empty clip of one chunk.

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
                sizes[name] = _features_size(config, name, features)
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
        batch, longest = sizes[first] if first is not None else (given.shape[0], 1)
        expect(batch > 0, first or "text", "hold at least one clip", given)
        device = given.device
        others = {"video": video, "audio": audio, "video_features": video_features, "audio_features": audio_features}
        for name, tensor in {**others, "text": text}.items():
            expect_device(name, tensor, device)
        has_video = video is not None or video_features is not None
        has_audio = audio is not None or audio_features is not None
        return cls(
            batch,
            longest,
            device,
            _lengths(chunks, batch, longest, device),
            _times(config, times, batch, longest, device),
            video,
            audio,
            video_features,
            audio_features,
            _presence("video_present", video_present, batch, longest, device, has_video),
            _presence("audio_present", audio_present, batch, longest, device, has_audio),
        )

    @property
    def has_video(self) -> bool:
        return self.video is not None or self.video_features is not None

    @property
    def has_audio(self) -> bool:
        return self.audio is not None or self.audio_features is not None

    def chunks_that_exist(self) -> Tensor:
        """[B, T] bool: false behind a clip's end."""
        if self.lengths is None:
            return torch.ones(self.batch, self.chunks, dtype=torch.bool, device=self.device)
        return torch.arange(self.chunks, device=self.device) < self.lengths[:, None]

    def chunks_with_video(self) -> Tensor:
        """[B, T] bool: false too where the clip, or the chunk, has no picture."""
        return _of_present(self.chunks_that_exist(), self.video_present)

    def chunks_with_audio(self) -> Tensor:
        """[B, T] bool: false too where the clip, or the chunk, has no sound."""
        return _of_present(self.chunks_that_exist(), self.audio_present)


def _of_present(exists: Tensor, present: Tensor | None) -> Tensor:
    return exists if present is None else exists & (present if present.ndim == 2 else present[:, None])


def check_text(text: Tensor, labels: Tensor | None, clip_of_text: Tensor | None, clips: int, vocabulary: int) -> None:
    """Check texts; values are looked at where they lie on the CPU.

    Args:
        clips: B.
        vocabulary: number of token ids.
    """
    expect_tensor("text", text, "Q L", dtypes=(torch.int64,))
    expect(text.shape[0] > 0 and text.shape[1] > 0, "text", "hold at least one token", text)
    check_values("text", text, 0, vocabulary, f"token ids in [0, vocab_size = {vocabulary})")
    if labels is not None:
        expect_tensor("labels", labels, "Q L", dtypes=(torch.int64,))
        expect_shape("labels", labels, text.shape, "[Q, L] like text")
        expect_device("labels", labels, text.device)
        counted = labels[labels != IGNORE] if may_look_at(labels) else labels
        check_values("labels", counted, 0, vocabulary, f"token ids in [0, vocab_size = {vocabulary}) or {IGNORE}")
    check_clip_of_text(clip_of_text, "text", text, clips)


def check_clip_of_text(clip_of_text: Tensor | None, name: str, texts: Tensor, clips: int) -> None:
    """Every text has a clip: the one that it names, or that of its own row."""
    if clip_of_text is None:
        expect(clips == texts.shape[0], name, f"hold {clips} rows like the clips, or come with clip_of_text", texts)
        return
    expect_tensor("clip_of_text", clip_of_text, "Q", dtypes=(torch.int64,))
    expect_shape("clip_of_text", clip_of_text, texts.shape[:1], f"[Q] like {name}")
    expect_device("clip_of_text", clip_of_text, texts.device)
    check_values("clip_of_text", clip_of_text, 0, clips, f"rows of the {clips} clips")


def check_latents(config: Config, latents: Tensor, chunks: Tensor | None) -> Tensor | None:
    """Check what `encode` gave; -> how many of the latents of each clip count, [B], or None for all."""
    m = config.latents_per_chunk
    expect_tensor("latents", latents, "B N av_dim")
    expect_shape("latents", latents, (*latents.shape[:2], config.av_dim), "[B, T * m, av_dim]")
    expect(latents.shape[0] > 0, "latents", "hold at least one clip", latents)
    expect(latents.shape[1] > 0 and latents.shape[1] % m == 0, "latents", f"hold m = {m} tokens a chunk", latents)
    lengths = _lengths(chunks, latents.shape[0], latents.shape[1] // m, latents.device)
    return lengths * m if lengths is not None else None


def within_reach(config: Config, latents: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The latents of `text_window` and `text_sinks`, of every clip's last chunks and first ones.

    Args:
        latents: [B, T * m, av_dim].
        lengths: [B], how many of a clip's latents count; None: all.
    Returns:
        latents [B, N, av_dim] and how many of the N count, or None for all.
    """
    window, sinks = config.reach("text")
    m, chunks = config.latents_per_chunk, latents.shape[1] // config.latents_per_chunk
    if window is None or chunks <= window + sinks:
        return latents, lengths
    kept = torch.arange(window + sinks, device=latents.device)
    counts = latents.new_full((1,), chunks, dtype=torch.int64) if lengths is None else lengths // m
    gone = (counts - window - sinks).clamp(min=0)[:, None]
    places = torch.where(kept < sinks, kept, kept + gone)  # [1 or B, window + sinks]
    index = places[:, :, None, None].expand(latents.shape[0], -1, m, latents.shape[2])
    seen = latents.unflatten(1, (chunks, m)).gather(1, index).flatten(1, 2)
    return seen, lengths if lengths is None else lengths.clamp(max=(window + sinks) * m)


def expect_device(name: str, tensor: Tensor | None, device: torch.device) -> None:
    """A tensor that is given lies beside the others."""
    expect(tensor is None or tensor.device == device, name, f"be on {device} like the other inputs", tensor)


def may_look_at(tensor: Tensor) -> bool:
    """Whether reading values costs no wait for a device and breaks no graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_values(name: str, tensor: Tensor, low: int, high: int, what: str) -> None:
    """Values lie in [low, high), as far as one may look at them."""
    if may_look_at(tensor) and tensor.numel():
        smallest, largest = int(tensor.min()), int(tensor.max())
        if smallest < low or largest >= high:
            raise ValueError(f"{name} must hold {what}, was {smallest}..{largest}")


def _still(config: Config, video: Tensor) -> Tensor:
    """An image [B, 3, 1, H, W] as a chunk that stands still, without a copy."""
    if isinstance(video, Tensor) and video.ndim == 5 and video.shape[2] == 1:
        return video.expand(-1, -1, config.frames_per_chunk, -1, -1)
    return video


def _video_size(config: Config, video: Tensor) -> tuple[int, int]:
    """B and T."""
    expect_tensor("video", video, "B 3 frames H W", dtypes=(torch.uint8, *FLOATS))
    expect(video.shape[1] == 3, "video", "be [B, 3, frames, H, W] with 3 colours", video)
    frames, per_chunk, size = video.shape[2], config.frames_per_chunk, config.image_size
    expect(
        frames > 0 and frames % per_chunk == 0,
        "video",
        f"hold a multiple of frames_per_chunk = {per_chunk} frames",
        video,
    )
    expect(video.shape[3] == video.shape[4] == size, "video", f"have H = W = image_size = {size}", video)
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


def _features_size(config: Config, name: str, features: Tensor) -> tuple[int, int]:
    """B and T."""
    expect_tensor(name, features, "B T n d")
    n = config.video_tokens if name == "video_features" else config.audio_tokens
    meaning = "[B, T, n_v, encoder_dim]" if name == "video_features" else "[B, T, n_a, encoder_dim]"
    expect_shape(name, features, (*features.shape[:2], n, config.encoder_dim), meaning)
    expect(features.shape[1] > 0, name, "hold at least one chunk", features)
    return features.shape[0], features.shape[1]


def _lengths(chunks: Tensor | None, batch: int, longest: int, device: torch.device) -> Tensor | None:
    if chunks is None:
        return None
    expect_tensor("chunks", chunks, "B", dtypes=(torch.int64, torch.int32))
    expect_shape("chunks", chunks, (batch,), "[B]")
    expect_device("chunks", chunks, device)
    check_values("chunks", chunks, 1, longest + 1, f"1..{longest}, the chunks of each clip")
    return chunks


def _times(config: Config, times: Tensor | None, batch: int, longest: int, device: torch.device) -> Tensor:
    if times is None:
        # Rounded once, as a time that is given is.
        return (torch.arange(longest, device=device).double() * config.seconds_per_chunk).float().expand(batch, -1)
    expect_tensor("times", times, "B T")
    expect_shape("times", times, (batch, longest), "[B, T]")
    expect_device("times", times, device)
    if may_look_at(times):
        expect(bool(times.isfinite().all()), "times", "be finite numbers of seconds", times.tolist())
    return times.float()


def _presence(
    name: str, mask: Tensor | None, batch: int, longest: int, device: torch.device, given: bool
) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor [B] or [B, T], was {describe(mask)}")
    if mask.ndim == 2:
        expect_shape(name, mask, (batch, longest), "[B, T]")
    else:
        expect_shape(name, mask, (batch,), "[B] or [B, T]")
    expect_device(name, mask, device)
    if not given and may_look_at(mask):
        expect(not bool(mask.any()), name, f"be False without {name.removesuffix('_present')}", mask)
    return mask
