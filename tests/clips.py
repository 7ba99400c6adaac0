"""Small real media files with known contents: numbered frames, a moving square, tones that change at known times."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

BITS = 8
TONES = (150.0, 330.0, 210.0, 470.0)
"""Hz. No two of their periods have nearly a common multiple below 10 ms, so that a shift of the sound shows."""


def write_clip(
    path: Path,
    *,
    seconds: float = 2.0,
    fps: int = 25,
    width: int = 64,
    height: int = 48,
    codec: str = "mpeg4",
    pix_fmt: str = "yuv420p",
    key_every: int = 12,
    b_frames: int = 0,
    stamps: Sequence[float] | None = None,
    tones: Sequence[float] | None = TONES,
    rate: int = 44100,
    audio_codec: str = "aac",
    sound_from: float = 0.0,
    sound_seconds: float | None = None,
    silence: tuple[float, float] | None = None,
    cover: bool = False,
    title: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a file whose container the suffix names.

    Args:
        width: 0 leaves the video out.
        stamps: seconds at which the frames come on screen, for a variable rate; default i / fps.
        tones: Hz, equal parts of the duration one after the other; None leaves the audio out.
        sound_from: seconds at which the sound begins; what comes before has no samples.
        sound_seconds: how long the sound is; default: as long as the video.
        silence: (from, to) in seconds: a hole in the sound's timestamps.
        cover: attach a picture, as music files do.
        title: a tag of the file.
        options: of the container's muxer.
    """
    tick = Fraction(1, fps if stamps is None else 1000)
    stamps = [i / fps for i in range(round(seconds * fps))] if stamps is None else stamps
    with av.open(str(path), "w", options=options or {}) as container:
        video = audio = None
        if title is not None:
            container.metadata["title"] = title
        if width:
            video = container.add_stream(codec, rate=fps)
            video.width, video.height, video.pix_fmt = width, height, pix_fmt
            video.bit_rate, video.gop_size = 2_000_000, key_every
            video.codec_context.time_base, video.max_b_frames = tick, b_frames
        if tones is not None:
            audio = container.add_stream(audio_codec, rate=rate, layout="stereo")
        if cover:
            _attach_cover(container)
        if video is not None:
            _encode_video(container, video, stamps, seconds, tick)
        if audio is not None:
            _encode_audio(container, audio, tones, sound_seconds or seconds, rate, sound_from, silence)
    return path


def picture(index: int, time: float, seconds: float, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: the number in `BITS` black or white blocks, below it a green square that crosses."""
    image = np.full((height, width, 3), 40, dtype=np.uint8)
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        image[: height // 3, left:right] = 255 if index >> bit & 1 else 0
    side = height // 4
    left = round((width - side) * min(time / seconds, 1.0))
    image[height // 2 : height // 2 + side, left : left + side] = (30, 220, 30)
    return image


def tone(tones: Sequence[float], seconds: float, rate: int) -> torch.Tensor:
    """float64 [seconds * rate]: the sound, its phase continuous."""
    t = np.arange(round(seconds * rate)) / rate
    pitch, part = np.asarray(tones), seconds / len(tones)
    index = np.minimum((t / part).astype(int), len(tones) - 1)
    cycles_before = (np.cumsum(pitch) - pitch) * part
    return torch.from_numpy(0.5 * np.sin(2 * math.pi * (cycles_before[index] + pitch[index] * (t - index * part))))


def frame_numbers(video: torch.Tensor) -> list[int]:
    """The numbers that the frames of uint8 [3, N, H, W] show."""
    height, width = video.shape[2:]
    rows = video[:, :, height // 12 : height // 4].float().mean((0, 2))
    numbers = []
    for row in rows:
        blocks = [row[int((bit + 0.25) * width / BITS) : int((bit + 0.75) * width / BITS)] for bit in range(BITS)]
        numbers.append(sum(int(block.mean() > 128) << bit for bit, block in enumerate(blocks)))
    return numbers


def square_centres(video: torch.Tensor) -> torch.Tensor:
    """Where the green square is in each frame of uint8 [3, N, H, W]: [N], a share of the width."""
    red, green, _ = video.float()
    weight = (green - red - 60).clamp_min(0).sum(1)
    return (weight * (torch.arange(video.shape[-1]) + 0.5)).sum(1) / weight.sum(1) / video.shape[-1]


def rotate_header(path: Path, turns: int) -> Path:
    """Ask, in the MP4 track header of the video, for `turns` counterclockwise quarter turns, as telephones do."""
    data = bytearray(path.read_bytes())
    box = data.find(b"tkhd")
    while struct.unpack_from(">I", data, box + 80)[0] == 0:  # the width, which the audio track does not have
        box = data.find(b"tkhd", box + 4)
    cos, sin = round(math.cos(turns * math.pi / 2)), round(math.sin(turns * math.pi / 2))
    matrix = [cos << 16, -sin << 16, 0, sin << 16, cos << 16, 0, 0, 0, 1 << 30]
    struct.pack_into(">9i", data, box + 44, *matrix)
    path.write_bytes(data)
    return path


def _encode_video(container: av.container.OutputContainer, stream, stamps, seconds, tick) -> None:
    for index, time in enumerate(stamps):
        image = picture(index, time, seconds, stream.height, stream.width)
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = round(time / tick), tick
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _encode_audio(container: av.container.OutputContainer, stream, tones, seconds, rate, sound_from, silence) -> None:
    sound = tone(tones, seconds, rate).float().numpy()
    block = 1024
    for first in range(round(sound_from * rate), len(sound), block):
        if silence is not None and silence[0] <= first / rate < silence[1]:
            continue
        piece = sound[first : first + block]
        frame = av.AudioFrame.from_ndarray(np.stack([piece, piece]), format="fltp", layout="stereo")
        frame.rate, frame.pts, frame.time_base = rate, first, Fraction(1, rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _attach_cover(container: av.container.OutputContainer) -> None:
    stream = container.add_stream("mjpeg", rate=1)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
    stream.disposition = av.stream.Disposition.attached_pic.value
    container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
    container.mux(stream.encode(None))
