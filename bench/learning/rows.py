"""What the study compares: one row a model, each trained by the same recipe on the same clips and questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mirasol.config import Config
from mirasol.data.worlds.wordings import WORDINGS
from mirasol.kernels import Tube

FAMILIES = ("what", "ago", "order")
"""Of questions (keys of `mirasol.data.worlds.wordings.WORDINGS`) that rows ask, where they do not say otherwise."""
CHUNKS, SHORT = 32, 16
"""T of the clips that Combiners are compared on, and of those for all else that is compared."""
LENGTHS = (8, 16, 32, 64)
PICTURES = (Tube((4, 16, 16), (4, 16, 16)), Tube((2, 16, 16), (4, 16, 16)))
"""Two tokens for each quarter of a chunk's picture: of all its time, and of its beginning."""

STREAMED = {"text_window": 1, "av_window": 1}
"""Texts look at the last chunk only: whatever was before, the Combiner must have kept."""
MODEL: dict[str, Any] = dict(
    tubes=PICTURES, mel_patch=(8, 8), encoder_layers=1, combiner_layers=1, av_layers=1, text_layers=2,
    combined_tokens=16, ttm_memory=64, ttm_read=16, ttm_hidden=64,
    latent_weight=0.0, video_weight=0.0, audio_weight=0.0, mask_ratio=0.0, **STREAMED,
)  # fmt: skip
"""Of all rows, beside the preset "tiny": n = m = 16 tokens a chunk."""


@dataclass(frozen=True)
class Stage:
    """Steps on so many clips of so many chunks and events each."""

    chunks: int
    events: int
    steps: int
    batch: int = 16


BASE = Stage(1, 1, 600)
"""Single chunks, no memory: encoders, text decoder and all that is not the Combiner, shared by the rows of a seed."""
STAGES = (
    *(Stage(2, 2, 300), Stage(4, 2, 400), Stage(8, 3, 700)),
    *(Stage(16, 3, 500, batch=8), Stage(32, 3, 600, batch=8), Stage(64, 3, 400, batch=4)),
)
"""Up to those of a row's length; a shorter clip ends where a longer one does, and begins later."""
QUESTIONS_PER_STEP = 128
LEARNING: dict[str, Any] = dict(weight_decay=0.01, warmup=0.05)
"""Options of `mirasol.train`."""
CLIPS, PER_TYPE = 3000, 4.0
"""Drawn for each stage, and questions of each type a clip."""


@dataclass(frozen=True)
class Row:
    """A model of the study.

    Attributes:
        name: of the row; unique.
        group: the table that it stands in: "combiner", "sight", "training", "questions" or "length".
        says: what the row is, for people.
        changes: fields of `Config`, beside `MODEL`.
        chunks: T of its last stage, and of the test.
        families: of questions that it learns and is measured on.
        pretrain: steps that predict the next chunk only, before the first question.
        lr: highest learning rate of each stage.
        times: steps of each stage, in those of `STAGES`.
        main: also without `--full`.
    """

    name: str
    group: str
    says: str
    changes: dict[str, Any] = field(default_factory=dict)
    chunks: int = CHUNKS
    pretrain: int = 0
    lr: float = 3e-3
    times: int = 1
    families: tuple[str, ...] = FAMILIES
    main: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """Changes to the preset."""
        return {**MODEL, **self.changes}

    @property
    def stages(self) -> tuple[Stage, ...]:
        own = (stage for stage in STAGES if stage.chunks <= self.chunks)
        return tuple(replace(stage, steps=self.times * stage.steps) for stage in own)

    @property
    def digest(self) -> str:
        """Of all that a result depends on but the code: a stored result of another recipe does not count."""
        config = Config.preset("tiny", **self.config).to_dict()
        told = [config, [asdict(stage) for stage in (BASE, *self.stages)], self.pretrain]
        told += [self.families, QUESTIONS_PER_STEP, LEARNING, self.lr, CLIPS, PER_TYPE]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


_TTM = {"combiner": "ttm"}
_ALL = {"combiner": "transformer"}
_THIS = {"combiner": "transformer", "combiner_window": 1}
_PREDICT = {"latent_weight": 0.3}
_REBUILD = {"video_weight": 0.3, "audio_weight": 0.3}
_MASK = {"mask_ratio": 0.25}

COMBINERS = (
    Row("ttm", "combiner", "TTM, 2 groups, time stamps", _TTM, main=True),
    Row("ttm-plain", "combiner", "TTM as published: 1 memory, no time stamps", {**_TTM, "ttm_official": True}),
    Row("all-1", "combiner", "Transformer, all chunks, 1 layer", _ALL),
    Row("all-4", "combiner", "Transformer, all chunks, 4 layers", {**_ALL, "combiner_layers": 4}, main=True),
    Row("this-1", "combiner", "Transformer, this chunk, 1 layer", _THIS, main=True),
    Row("this-4", "combiner", "Transformer, this chunk, 4 layers", {**_THIS, "combiner_layers": 4}),
    Row("pooling", "combiner", "attention pooling, all chunks", {"combiner": "attention"}),
    Row("perceiver", "combiner", "Perceiver resampler, this chunk", {"combiner": "perceiver"}),
    Row("mean", "combiner", "mean of the chunk's tokens, in 4 groups", {"combiner": "mean", "combined_tokens": 4}),
    Row("none", "combiner", "no Combiner", {"combiner": "none"}),
)
PATIENCE = (
    Row("all-4-slow", "combiner", "Transformer, all chunks, 4 layers, a third of the rate",
        {**_ALL, "combiner_layers": 4}, lr=1e-3),
    Row("all-4-long", "combiner", "Transformer, all chunks, 4 layers, twice the steps",
        {**_ALL, "combiner_layers": 4}, times=2),
)  # fmt: skip
"""Whether the strongest baseline lacked only these."""
SIGHT = tuple(
    replace(
        row,
        name=f"whole-{row.name}",
        group="sight",
        changes={**row.changes, "text_window": None},
        chunks=SHORT,
        main=False,
    )
    for row in COMBINERS
    if row.name in ("ttm", "this-1", "mean", "none")
)
TRAINING = tuple(
    Row(f"ttm-{name}", "training", says, {**_TTM, **changes}, SHORT, pretrain)
    for name, says, changes, pretrain in (
        ("predict", "+ the next chunk's latents are predicted", _PREDICT, 0),
        ("rebuild", "+ the next chunk is reconstructed", _REBUILD, 0),
        ("mask", "+ a quarter of the combined tokens is masked", _MASK, 0),
        ("paper", "+ all three", {**_PREDICT, **_REBUILD, **_MASK}, 0),
        ("pretrained", "+ 400 steps of the first two before the first question", {**_PREDICT, **_REBUILD}, 400),
    )
)
QUESTIONS = (
    Row("ttm-while", "questions", "+ what was heard while something was seen, and the other way round",
        _TTM, SHORT, families=(*FAMILIES, "while")),
    Row("ttm-all", "questions", "all families of questions", _TTM, SHORT, families=tuple(WORDINGS)),
)  # fmt: skip
LENGTH = tuple(
    replace(row, name=f"{row.name}-{chunks}", group="length", chunks=chunks, main=False)
    for chunks in LENGTHS
    if chunks != CHUNKS
    for row in COMBINERS
    if row.name in ("ttm", "all-1", "this-1")
)
ROWS = {row.name: row for row in (*COMBINERS, *PATIENCE, *SIGHT, *TRAINING, *QUESTIONS, *LENGTH)}


def chosen(full: bool, names: Iterable[str] = ()) -> list[Row]:
    """The rows that a study runs; some by name, or the main ones, or all.

    Raises:
        ValueError: a name that no row has.
    """
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise ValueError(f"--only must name rows out of {', '.join(ROWS)}, was {', '.join(unknown)}")
    return [ROWS[name] for name in names] or [row for row in ROWS.values() if full or row.main]
