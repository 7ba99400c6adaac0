"""One folder of small media files for all tests of the data."""

from pathlib import Path

import pytest

from clips import write_clip


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """0.mp4 .. 4.mp4 of 0.4 to 0.8 s, long.mp4 of 2 s, sound.wav, silent.mp4 and still.png."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("media")
    for i in range(5):
        tones = (150.0 + 40 * i, 330.0)
        write_clip(folder / f"{i}.mp4", seconds=0.4 + 0.1 * i, tones=tones, rate=16000, width=32, height=32)
    write_clip(folder / "long.mp4", width=32, height=32)
    write_clip(folder / "sound.wav", seconds=0.5, width=0, audio_codec="pcm_s16le")
    write_clip(folder / "silent.mp4", seconds=0.4, tones=None, width=32, height=32)
    Image.new("RGB", (40, 30), (200, 30, 90)).save(folder / "still.png")
    return folder
