"""Clips for a browser: which it plays as they are, and what is made of the others."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

PLAYED = {
    ("mp4", "h264", "aac"), ("mp4", "h264", "mp3"), ("mp4", "av1", "aac"), ("mp4", "av1", "opus"),
    ("webm", "vp8", "vorbis"), ("webm", "vp8", "opus"), ("webm", "vp9", "opus"), ("webm", "av1", "opus"),
}  # fmt: skip
"""(suffix, codec of the picture, codec of the sound) that browsers play."""

RATE = 48000
"""Hz of the sound of a new file."""


def playable(path: str | Path, out: str | Path) -> Path:
    """A clip as every browser plays it: the file itself, or H.264 and AAC in a new mp4 file at `out`.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: a file that holds neither picture nor sound that can be read.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("clips are read by PyAV: pip install -e '.[media]'") from error
    path, out = Path(path), Path(out)
    try:
        with av.open(str(path)) as clip:
            video, audio = (next(iter(tracks), None) for tracks in (clip.streams.video, clip.streams.audio))
            if video is None and audio is None:
                raise ValueError("it holds neither picture nor sound")
            if _is_played(path, video, audio):
                return path
            with av.open(str(out), "w", format="mp4", options={"movflags": "+faststart"}) as film:
                _copy(clip, film, video, audio)
    except (av.FFmpegError, ValueError) as error:
        out.unlink(missing_ok=True)
        raise ValueError(f"{path.name} cannot be played: {getattr(error, 'strerror', error)}") from error
    return out


def _is_played(path: Path, video: Any, audio: Any) -> bool:
    codecs = [track and track.codec_context.codec.canonical_name for track in (video, audio)]
    return any(
        path.suffix.lower() == f".{suffix}" and codecs[0] in (picture, None) and codecs[1] in (sound, None)
        for suffix, picture, sound in PLAYED
    )


def _copy(clip: Any, film: Any, video: Any, audio: Any) -> None:
    """Decode and encode both tracks, in the order and at the times in which they come."""
    import av

    tracks, resampler = {}, av.AudioResampler(format="fltp", layout="stereo", rate=RATE)
    if video is not None:
        picture = film.add_stream("libx264", rate=video.average_rate or 25, options={"preset": "veryfast", "crf": "20"})
        picture.width, picture.height = (max(side // 2 * 2, 2) for side in (video.width, video.height))
        picture.pix_fmt = "yuv420p"
        picture.codec_context.time_base = video.time_base
        tracks[video.index] = picture
    if audio is not None:
        tracks[audio.index] = film.add_stream("aac", rate=RATE, layout="stereo")
    for packet in clip.demux([track for track in (video, audio) if track is not None]):
        track = tracks[packet.stream.index]
        with contextlib.suppress(av.error.InvalidDataError):  # a broken packet, as players pass over it
            for frame in packet.decode():
                for piece in [frame] if track.type == "video" else resampler.resample(frame):
                    film.mux(track.encode(piece))
    if audio is not None:
        for piece in resampler.resample(None):
            film.mux(tracks[audio.index].encode(piece))
    for track in tracks.values():
        film.mux(track.encode(None))
