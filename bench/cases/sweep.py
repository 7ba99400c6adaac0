"""Models over longer and longer clips: forward passes and training steps, within the time that a run may take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from cases.step import Step
from core.counting import TEXT_TOKENS
from core.harness import LEAST_ROUNDS, ROUNDS, Comparison, Judge, Variant, Verdict, against, compare
from core.rows import Row, Settings
from mirasol import Config, Model, combiner, cost, layers
from mirasol.encoders import video
from peers import everything
from report.savings import CHUNKED, CHUNKED_TTM, EVERYTHING, POOLED, RESAMPLED, SUITE

MODELS: dict[str, dict[str, Any]] = {
    EVERYTHING: {"combiner": "none", "av_causal": False},
    POOLED: {"combiner": "mean", "av_causal": False},
    RESAMPLED: {"combiner": "perceiver", "av_causal": False},
    CHUNKED: {"combiner": "transformer"},
    CHUNKED_TTM: {"combiner": "ttm"},
}
"""The first three see the whole clip at once: all its tokens, what means over them leave, what a resampler leaves."""
PREFIX_CHANGE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}
"""Rounding that another length of clip may bring, relative to the largest latent."""
LEAST, MOST, SECONDS = LEAST_ROUNDS, 25, 3.0
"""Rounds of each point, and seconds after which no more than the least are run."""


@dataclass(frozen=True)
class Point:
    """What is timed: a forward pass or a training step of so many clips of so many frames."""

    frames: int
    clips: int = 1
    mode: Literal["fwd", "step"] = "fwd"

    @property
    def case(self) -> str:
        if self.mode == "fwd" and self.clips == 1:
            return f"time {self.frames} frames"
        kind = "batch" if self.mode == "fwd" else "step"
        return f"{kind} {self.frames} frames x {self.clips} clip{'s' * (self.clips > 1)}"

    def flops(self, config: Config) -> int:
        chunks = self.frames // config.frames_per_chunk
        if self.mode == "step":
            return everything.step_flops(config, chunks, TEXT_TOKENS, self.clips)
        return self.clips * everything.forward_flops(config, chunks, TEXT_TOKENS)


class Sweep:
    """Points in turn until a deadline.

    How long one takes is predicted from its FLOPs and the rate of the point before it. One that would not be through
    with its least rounds is skipped.

    Args:
        seconds: from the first point to the deadline.
    """

    def __init__(self, preset: str, seconds: float) -> None:
        self.preset, self.seconds, self.deadline = preset, seconds, float("inf")
        self.configs = {name: Config.preset(preset, **changes) for name, changes in MODELS.items()}
        self.rate: float | None = None  # FLOPs a second of the point before

    def once(self, point: Point) -> float:
        """Predicted seconds of one round; 0 where nothing is known."""
        return sum(point.flops(config) for config in self.configs.values()) / self.rate if self.rate else 0.0

    def run(self, point: Point, settings: Settings) -> list[Row]:
        if self.rate is None:
            self.deadline = time.perf_counter() + self.seconds
        dtype, once = settings.dtype or torch.float32, self.once(point)
        stepping = point.mode == "step"
        warm_up = once < 2 and not stepping
        makers, judge = (_steps if stepping else _passes)(self.configs, settings, dtype, point)
        comparison = Comparison(
            SUITE,
            point.case,
            [
                Variant(
                    name,
                    makers[name],
                    role="ours" if name in (CHUNKED, CHUNKED_TTM) else "peer",
                    flops=point.flops(config),
                    detail=_predicted(config, point) if stepping and dtype == torch.float32 else {},
                )
                for name, config in self.configs.items()
            ],
            judge=judge,
            baseline=EVERYTHING,
            mode=point.mode,
            shape=f"{self.preset}, {TEXT_TOKENS} text tokens",
            dtype=dtype,
            rounds=ROUNDS["quick"] if settings.effort == "quick" else (LEAST, MOST, SECONDS),
            warm_up=warm_up,
            detail={"preset": self.preset, "frames": point.frames, "clips": point.clips},
        )
        needed = (LEAST + 1 + warm_up + 2 * stepping) * once  # judged; and a step before it, and one that judges
        if needed > self.deadline - time.perf_counter():
            return [_too_long(comparison.row(variant, settings), needed) for variant in comparison.variants]
        rows = compare(comparison, settings)
        timed = [(row.flops, row.median_ms) for row in rows if row.flops and row.median_ms]
        if timed:
            self.rate = sum(work for work, _ in timed) / sum(1e-3 * ms for _, ms in timed)
        return rows


def _too_long(row: Row, seconds: float) -> Row:
    row.status, row.reason = "SKIP", f"would take about {seconds:.0f} s, more than is left of this run; --full runs it"
    return row


def _predicted(config: Config, point: Point) -> dict[str, int]:
    """Bytes that a step holds at most beside weights, moments and clips, by the cost model."""
    chunks = point.frames // config.frames_per_chunk
    return {"predicted_bytes": cost.peak(config, chunks, TEXT_TOKENS, clips=point.clips)}


Makers = dict[str, Callable[[], Callable[[], Any]]]


def _passes(configs: dict[str, Config], settings: Settings, dtype: torch.dtype, point: Point) -> tuple[Makers, Judge]:
    """Forward passes."""
    calls: Makers = {name: partial(_call, config, settings, dtype, point) for name, config in configs.items()}
    return calls, _judge(configs, settings, dtype, point)


def _steps(configs: dict[str, Config], settings: Settings, dtype: torch.dtype, point: Point) -> tuple[Makers, Judge]:
    """Training steps: forward, backward and AdamW; right where every weight moves and the loss falls."""
    steps: dict[str, Step] = {}

    def make(name: str) -> Step:
        _model.cache_clear()  # models with their optimizers need the room
        model = _new(configs[name], settings.device, dtype).train()
        video, audio, text = _inputs(configs[name], settings, point)

        def loss() -> Tensor:
            torch.manual_seed(0)  # the same tokens are masked in every step, so that the loss can only fall
            found = model(video, audio, text, text).loss
            assert found is not None
            return found

        steps[name] = Step(model, loss)
        steps[name]()  # makes AdamW's moments, which are no part of what a step holds
        return steps[name]

    return {name: partial(make, name) for name in configs}, lambda name, outputs: steps[name].verdict()


def _new(config: Config, device: torch.device, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    return everything.build(config).eval().to(device, dtype)


_model = lru_cache(maxsize=2 * len(MODELS))(_new)


def _inputs(config: Config, settings: Settings, point: Point) -> tuple[Tensor, Tensor, Tensor]:
    """Clips and a text about each; a longer clip begins as a shorter one does."""
    longest = max(512, point.frames)
    samples = config.samples_per_chunk // config.frames_per_chunk
    videos, sounds, texts = [], [], []
    for clip in range(point.clips):
        generator = torch.Generator().manual_seed(clip)
        size = (longest, 3, config.image_size, config.image_size)
        videos.append(torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)[: point.frames])
        sounds.append(0.1 * torch.randn(longest * samples, generator=generator)[: point.frames * samples])
        texts.append(torch.randint(0, 256, (TEXT_TOKENS,), generator=generator))
    video = torch.stack(videos).movedim(1, 2).contiguous()
    return video.to(settings.device), torch.stack(sounds).to(settings.device), torch.stack(texts).to(settings.device)


def _call(config: Config, settings: Settings, dtype: torch.dtype, point: Point) -> Callable[[], tuple[Tensor, Tensor]]:
    model, inputs = _model(config, settings.device, dtype), _inputs(config, settings, point)

    @torch.no_grad()
    def forward() -> tuple[Tensor, Tensor]:
        output = model(*inputs)
        assert output.logits is not None
        return output.logits, output.latents

    return forward


def _judge(configs: dict[str, Config], settings: Settings, dtype: torch.dtype, point: Point) -> Judge:
    """Short clips against the same model on the reference operators in float64; longer ones against a short one.

    The latents of the first chunks must not change when the clip goes on, for the models that are causal over chunks.
    """

    def judge(name: str, outputs: list[Tensor]) -> Verdict:
        config = configs[name]
        if not all(torch.isfinite(out).all() for out in outputs):
            return Verdict(problem="a value is not finite")
        short = 4 * config.frames_per_chunk
        if point.frames <= short:
            with _reference_operators():
                exact = _call(config, settings, torch.float64, point)()
                plain = _call(config, settings, dtype, point)()
            return against(exact, plain)(name, outputs)
        if not config.av_causal:
            return Verdict()
        latents = _call(config, settings, dtype, replace(point, frames=short))()[1]
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
