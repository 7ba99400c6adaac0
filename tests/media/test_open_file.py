"""A binary file that is open is read like one of the disk; a transport stream with packets of other tracks, too."""

import io
import warnings

import pytest
import torch

from clips import write_clip
from mirasol.media import load

ASKED = dict(chunks=3, frames_per_chunk=4, size=32, samples_per_chunk=2560)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("start", [0.0, 3.0])
def test_bytes_in_memory_give_what_the_file_gives(tmp_path, suffix, start):
    path = write_clip(tmp_path / f"x.{suffix}", seconds=4.0, width=32, height=32)
    memory = io.BytesIO(path.read_bytes())
    memory.seek(7)
    for _ in range(2):  # it stays open
        clip, expected = load(memory, start=start, **ASKED), load(path, start=start, **ASKED)
        assert torch.equal(clip.video, expected.video)
        assert torch.equal(clip.audio, expected.audio)


def test_errors_and_warnings_tell_the_name_of_an_open_file(tmp_path):
    memory = io.BytesIO(b"nothing to see here")
    with pytest.raises(ValueError, match="was '<file>'"):
        load(memory, **ASKED)
    memory.name = "shard.tar:7.mp4"
    with pytest.raises(ValueError, match=r"was 'shard\.tar:7\.mp4'"):
        load(memory, **ASKED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no file is left open
        path = tmp_path / "text.mp4"
        path.write_bytes(memory.getvalue())
        with path.open("rb") as file, pytest.raises(ValueError, match=r"text\.mp4"):
            load(file, **ASKED)
        assert file.closed


def test_a_packet_of_an_unknown_track_does_not_end_a_transport_stream(tmp_path):
    good = write_clip(tmp_path / "x.ts", seconds=0.8, width=32, height=32).read_bytes()
    asked = {**ASKED, "chunks": 5}
    begins = [place for place in range(20 * 188, len(good), 188) if good[place + 1] & 0x40]  # of a frame
    assert len(begins) > 10
    for place in begins[::4]:
        damaged = bytearray(good)
        damaged[place + 2] ^= 0x5A  # the track's number
        clip = load(io.BytesIO(damaged), **asked)
        assert clip.video_valid.sum() >= 18  # of 20
