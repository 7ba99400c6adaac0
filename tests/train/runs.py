"""Training runs of a second or two: a model of a few thousand parameters on clips that are made, not decoded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from mirasol.config import Config
from mirasol.data import ClipTensors, Example
from mirasol.training.options import TrainOptions

CONFIG: dict[str, Any] = dict(
    frames_per_chunk=2, image_size=16, tubes=[[[2, 8, 8], [2, 8, 8]]],
    samples_per_chunk=640, n_mels=16, mel_patch=[16, 2], reconstruction_size=4,
    encoder_dim=16, encoder_layers=1, encoder_heads=2,
    combined_tokens=2, combiner_dim=16, combiner_layers=1, combiner_heads=2,
    av_dim=16, av_layers=1, av_heads=2,
    reconstruction_dim=16, reconstruction_heads=2,
    text_dim=16, text_layers=1, text_heads=2,
)  # fmt: skip


def write_table(folder: Path, clips: int = 6) -> str:
    """Two questions about each of some clips that need not exist."""
    rows = ["clip,question,answer"]
    for i in range(clips):
        rows += [f"{i}.mp4,Which?,{i}", f"{i}.mp4,How?,{'so' * (i % 3 + 1)}"]
    path = folder / "questions.csv"
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def options(table: str, out: Path | str, **changes: Any) -> TrainOptions:
    """Those of a small run on the CPU; fields of the configuration among the changes go into it."""
    config = {**CONFIG, **changes.pop("config", {})}
    defaults: dict[str, Any] = dict(preset="tiny", config=config, batch=4, steps=6, workers=0, device="cpu", lr=1e-2)
    return TrainOptions(table, str(out), **{**defaults, **changes})


def made_clip(example: Example, config: Config, max_chunks: int) -> ClipTensors:
    """1 to 3 chunks of noise that the clip's name decides; the sound of some is missing."""
    seed = int.from_bytes(hashlib.sha256(Path(example.clip).name.encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)
    chunks = min(1 + seed % 3, max_chunks)
    size = (3, chunks * config.frames_per_chunk, config.image_size, config.image_size)
    video = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    audio = torch.randn(chunks * config.samples_per_chunk, generator=generator) * 0.1
    times = torch.arange(chunks) * config.seconds_per_chunk
    return ClipTensors(times, video, audio if seed % 4 else None)


def run(told: TrainOptions) -> Path:
    """Train on made clips."""
    from mirasol.train import train

    return train(told, source=made_clip)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    import mirasol

    return dict(mirasol.Model.from_pretrained(folder).state_dict())


def log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a log, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("clips_per_s", "tokens_per_s", "share_of_peak", "waiting"):
            del line[name]
    return lines
