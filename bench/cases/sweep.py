"""The three models over longer and longer clips: time and peak memory, within the time that a run may take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from core.counting import TEXT_TOKENS
from core.harness import ROUNDS, Comparison, Judge, Variant, Verdict, against, compare
from core.rows import Row, Settings
from mirasol import Config, Model, combiner, cost, layers
from mirasol.encoders import video
from report.savings import CHUNKED, CHUNKED_TTM, EVERYTHING, SUITE

MODELS: dict[str, dict[str, Any]] = {
    EVERYTHING: {"combiner": "none", "av_causal": False},
    CHUNKED: {"combiner": "transformer"},
    CHUNKED_TTM: {"combiner": "ttm"},
}
PREFIX_CHANGE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}
"""Rounding that another length of clip may bring, relative to the largest latent."""
LEAST, MOST, SECONDS = 3, 25, 3.0
"""Rounds wanted for each length, and seconds after which no more than the least are run."""


class Sweep:
    """The lengths of clip in turn, from short to long, until a deadline.

    How long a length takes is predicted from its FLOPs and the rate of the length before it. Rounds that would not fit
    are not run, with at least one for each length that fits; the tables show how many there were.

    Args:
        seconds: from the first length to the deadline.
    """

    def __init__(self, preset: str, frames: Sequence[int], seconds: float) -> None:
        self.preset, self.frames = preset, sorted(frames)
        self.configs = {name: Config.preset(preset, **changes) for name, changes in MODELS.items()}
        self.seconds, self.deadline = seconds, float("inf")
        self.rate: float | None = None  # FLOPs a second of the length before

    def flops(self, frames: int) -> dict[str, int]:
        chunks = frames // self.configs[EVERYTHING].frames_per_chunk
        return {name: cost.model(config, chunks, TEXT_TOKENS).total for name, config in self.configs.items()}

    def rounds(self, frames: int) -> tuple[int, float]:
        """How many rounds fit, and the predicted seconds of one.

        The lengths after this one keep two passes each, but for a tenth of the time that is left.
        """
        if self.rate is None:
            return MOST, 0.0
        once = sum(self.flops(frames).values()) / self.rate
        later = sum(2 * sum(self.flops(f).values()) / self.rate for f in self.frames if f > frames)
        left = self.deadline - time.perf_counter()
        if left < 2 * once:  # one pass is judged and measures memory, one is timed
            return 0, once
        fitting = int(min((left - later) / once - 1, MOST))
        cheap = (LEAST + 1) * once < 0.1 * left
        return max(LEAST if cheap else 1, fitting), once

    def run(self, frames: int, settings: Settings) -> list[Row]:
        if self.rate is None:
            self.deadline = time.perf_counter() + self.seconds
        rounds, once = self.rounds(frames)
        dtype = settings.dtype or torch.float32
        flops = self.flops(frames)
        comparison = Comparison(
            SUITE,
            f"time {frames} frames",
            [
                Variant(
                    name,
                    partial(_call, config, settings, dtype, frames),
                    role="peer" if name == EVERYTHING else "ours",
                    flops=flops[name],
                )
                for name, config in self.configs.items()
            ],
            judge=_judge(self.configs, settings, dtype, frames),
            baseline=EVERYTHING,
            shape=f"{self.preset}, {TEXT_TOKENS} text tokens",
            dtype=dtype,
            rounds=ROUNDS["quick"] if settings.effort == "quick" else (min(LEAST, rounds), rounds, SECONDS),
            warm_up=once < 2,
            detail={"preset": self.preset, "frames": frames},
        )
        if not rounds:
            return [_too_long(comparison.row(variant, settings), 2 * once) for variant in comparison.variants]
        rows = compare(comparison, settings)
        timed = [(row.flops, row.median_ms) for row in rows if row.flops and row.median_ms]
        if timed:
            self.rate = sum(work for work, _ in timed) / sum(1e-3 * ms for _, ms in timed)
        return rows


def _too_long(row: Row, seconds: float) -> Row:
    row.status, row.reason = "SKIP", f"would take about {seconds:.0f} s, more than is left of this run; --full runs it"
    return row


@lru_cache(maxsize=6)
def _model(config: Config, device: torch.device, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    return Model(config).eval().to(device, dtype)


def _inputs(config: Config, settings: Settings, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """One clip; a longer one begins as a shorter one does."""
    longest = max(512, frames)
    generator = torch.Generator().manual_seed(0)
    size = (longest, 3, config.image_size, config.image_size)
    video = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)[:frames].movedim(0, 1)[None]
    samples = config.samples_per_chunk // config.frames_per_chunk
    audio = 0.1 * torch.randn(1, longest * samples, generator=generator)[:, : frames * samples]
    text = torch.randint(0, 256, (1, TEXT_TOKENS), generator=generator)
    return video.contiguous().to(settings.device), audio.to(settings.device), text.to(settings.device)


def _call(config: Config, settings: Settings, dtype: torch.dtype, frames: int) -> Callable[[], tuple[Tensor, Tensor]]:
    model, inputs = _model(config, settings.device, dtype), _inputs(config, settings, frames)

    @torch.no_grad()
    def forward() -> tuple[Tensor, Tensor]:
        output = model(*inputs)
        assert output.logits is not None
        return output.logits, output.latents

    return forward


def _judge(configs: dict[str, Config], settings: Settings, dtype: torch.dtype, frames: int) -> Judge:
    """Short clips against the same model on the reference operators in float64; longer ones against a short one.

    The latents of the first chunks must not change when the clip goes on, for the models that are causal over chunks.
    """

    def judge(name: str, outputs: list[Tensor]) -> Verdict:
        config = configs[name]
        if not all(torch.isfinite(out).all() for out in outputs):
            return Verdict(problem="a value is not finite")
        short = 4 * config.frames_per_chunk
        if frames <= short:
            with _reference_operators():
                exact = _call(config, settings, torch.float64, frames)()
                plain = _call(config, settings, dtype, frames)()
            return against(exact, plain)(name, outputs)
        if config.combiner == "none":
            return Verdict()
        latents = _call(config, settings, dtype, short)()[1]
        change = (outputs[1][:, : latents.shape[1]] - latents).abs().max().item() / latents.abs().max().item()
        allowed = PREFIX_CHANGE[dtype]
        problem = f"a later chunk changes an earlier one's latents by {change:.1e}" if change > allowed else ""
        return Verdict(change, allowed, problem)

    return judge


@contextlib.contextmanager
def _reference_operators() -> Iterator[None]:
    """The model's operators on their specification."""
    homes = (
        (layers, "chunked_attention"),
        (combiner, "combiner_project"),
        (combiner, "ttm_scan"),
        (video, "extract_tubes"),
    )
    with contextlib.ExitStack() as stack:
        for module, name in homes:
            slow = partial(getattr(module, name), backend="reference")
            stack.enter_context(mock.patch.object(module, name, slow))
        yield
