"""What chunks, Combiners and last-m pruning save: work of the 3B model, time and memory of one that fits this machine.

Three models of one preset take the same clips: (a) every token of every chunk at once in one Transformer, (b) chunks
with the causal-Transformer Combiner, (c) chunks with the Token-Turing-Machine Combiner.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cost
import suite_attention
from counting import TEXT_TOKENS, count
from harness import Comparison, Judge, Variant, Verdict, against, compare
from mirasol import Config, Model, combiner, encoders, layers
from rows import Case, Row, Settings
from savings_tables import (
    CHUNKED,
    CHUNKED_TTM,
    EVERYTHING,
    PRUNED,
    SUITE,
    UNPRUNED,
    tables,
)

__all__ = ["cases", "tables"]

PREFIX_CHANGE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}
"""Rounding that another length of clip may bring, relative to the largest latent."""
MODELS: dict[str, dict[str, Any]] = {
    EVERYTHING: {"combiner": "none", "av_causal": False},
    CHUNKED: {"combiner": "transformer"},
    CHUNKED_TTM: {"combiner": "ttm"},
}
FRAMES = (16, 32, 64, 128, 256, 512)
LAYERS = (4, 5, 6)
LAYER_FRAMES = (32, 128, 512)
SWEEP_SECONDS = {"quick": 10.0, "default": 100.0, "full": float("inf")}
"""For the timed sweep over frames: rounds that would not fit are not run, and the table says how many there were."""


def cases(settings: Settings) -> list[Case]:
    """Counts first, then pruning and attention, then the sweep over frames from short to long."""
    quick = settings.effort == "quick"
    counted = "tiny" if quick else "mirasol-3b"
    timed = "tiny" if quick else "base" if settings.device.type == "cuda" else "small"
    frames = (8, 16) if quick else FRAMES
    layer_frames = (16,) if quick else LAYER_FRAMES
    sweep = _Sweep(timed, SWEEP_SECONDS[settings.effort])
    chunks = (4,) if quick else (4, 16)
    return [
        *(Case(f"work {f} frames", partial(_work, counted, f)) for f in frames),
        *(Case(f"TTM share {f} frames", partial(_shares, counted, f)) for f in layer_frames),
        *(Case(f"last-m pruning {c} chunks", partial(_pruning, counted, timed, c)) for c in chunks),
        *(Case(f"chunk-causal attention {c} chunks", partial(_attention, timed, c)) for c in chunks),
        *(Case(f"time {f} frames", partial(sweep.run, f)) for f in frames),
    ]


def _work(preset: str, frames: int, settings: Settings) -> list[Row]:
    """Counted and analytic FLOPs of the three models."""
    rows = []
    for name, changes in MODELS.items():
        config = Config.preset(preset, **changes)
        chunks = frames // config.frames_per_chunk
        model = cost.model(config, chunks, TEXT_TOKENS)
        counted = count(config, chunks)[0]
        rows.append(_count_row(f"work {frames} frames", name, preset, counted, model.total, frames=frames))
    return rows


def _shares(preset: str, frames: int, settings: Settings) -> list[Row]:
    """Whole model and Combiner alone, for several depths of the Transformer Combiner and for TTM."""
    variants: list[tuple[str, dict[str, Any]]] = [
        *((f"Transformer, {n} layers", {"combiner_layers": n}) for n in LAYERS),
        ("TTM", {"combiner": "ttm"}),
    ]
    rows = []
    for name, changes in variants:
        config = Config.preset(preset, **changes)
        chunks = frames // config.frames_per_chunk
        whole, alone = count(config, chunks)
        model = cost.model(config, chunks, TEXT_TOKENS)
        more = {"frames": frames, "layers": changes.get("combiner_layers")}
        case = f"TTM share {frames} frames"
        rows.append(_count_row(case, name, preset, whole, model.total, part="whole model", **more))
        rows.append(_count_row(case, f"{name}, Combiner alone", preset, alone, model.combiner, part="Combiner", **more))
    return rows


def _count_row(case: str, name: str, preset: str, counted: int, model: int, **detail: Any) -> Row:
    row = Row(SUITE, case, name, mode="count", device="meta", flops=counted, flops_model=model)
    row.shape, row.detail = f"{preset}, {TEXT_TOKENS} text tokens", {"preset": preset, **detail}
    if counted != model:
        row.status, row.reason = "FAIL", f"counted {counted}, the cost model says {model}"
    return row


def _pruning(counted: str, timed: str, chunks: int, settings: Settings) -> list[Row]:
    """The Transformer Combiner with its last layer for m tokens a chunk, and computed in full and sliced."""
    config = Config.preset(timed)
    dtype = settings.dtype or torch.float32
    module = _combiner(config, settings.device, dtype)
    x = settings.randn(1, chunks, config.tokens_per_chunk, config.combiner_dim, dtype=dtype)
    project = cost.linear(chunks * config.combined_tokens, config.combiner_dim, config.av_dim)
    flops = {pruned: cost.transformer_combiner(config, chunks, pruned) + project for pruned in (True, False)}
    with torch.no_grad():
        exact = _unpruned(_combiner(config, settings.device, torch.float64), x.double())
        plain = _unpruned(module, x)
    rows = compare(
        Comparison(
            SUITE,
            f"last-m pruning {chunks} chunks",
            [
                Variant(PRUNED, lambda: _no_grad(module, x), role="ours", flops=flops[True]),
                Variant(UNPRUNED, lambda: _no_grad(partial(_unpruned, module), x), flops=flops[False]),
            ],
            judge=against([exact], [plain]),
            baseline=UNPRUNED,
            shape=f"{timed}, {config.combiner_layers} layers",
            dtype=dtype,
            detail={"preset": timed, "chunks": chunks, "layers": config.combiner_layers},
        ),
        settings,
    )
    return rows + [row for layers in (4, 6) for row in _pruning_work(counted, layers, chunks)]


def _pruning_work(preset: str, layers: int, chunks: int) -> list[Row]:
    """Counted: the Combiner as it runs, and with no token of the last layer left out."""
    config = Config.preset(preset, combiner_layers=layers)
    with torch.device("meta"):
        module = combiner.TransformerCombiner(config)
        x = torch.empty(1, chunks, config.tokens_per_chunk, config.combiner_dim)
    project = cost.linear(chunks * config.combined_tokens, config.combiner_dim, config.av_dim)
    rows = []
    for name, call in ((PRUNED, module), (UNPRUNED, partial(_unpruned, module))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(x)
        model = cost.transformer_combiner(config, chunks, name == PRUNED) + project
        case = f"last-m pruning {chunks} chunks, {layers} layers"
        rows.append(_count_row(case, name, preset, counter.get_total_flops(), model, chunks=chunks, layers=layers))
        rows[-1].shape = f"{preset}, {layers} layers"
    return rows


def _unpruned(module: combiner.TransformerCombiner, x: Tensor) -> Tensor:
    """Every layer for every token; the projection then takes the last m of each chunk."""
    chunks, n = x.shape[1:3]
    y = x.flatten(1, 2)
    for block in module.blocks:
        y = block(y, n, module.window)
    return module.project(y.unflatten(1, (chunks, n)))


def _attention(preset: str, chunks: int, settings: Settings) -> list[Row]:
    """The Combiner's attention: chunk-causal by ours and by a dense mask, and full attention, which sees the future."""
    config = Config.preset(preset)
    heads = config.combiner_heads
    shape = suite_attention.Shape(
        "Combiner", 1, heads, config.combiner_dim // heads, chunks, config.tokens_per_chunk, modes=("fwd",)
    )
    only = (suite_attention.OURS, suite_attention.DENSE, suite_attention.FULL)
    dtype = settings.dtype or torch.float32
    return suite_attention.compare_shape(
        shape, "fwd", dtype, settings, suite=SUITE, case=f"chunk-causal attention {chunks} chunks", only=only
    )


class _Sweep:
    """The three models over longer and longer clips, within a number of seconds."""

    def __init__(self, preset: str, seconds: float) -> None:
        self.preset, self.left = preset, seconds
        self.rate: float | None = None  # FLOPs a second of the last clip length

    def run(self, frames: int, settings: Settings) -> list[Row]:
        started = time.perf_counter()
        rows = self._run(frames, settings)
        self.left -= time.perf_counter() - started
        timed = [(row.flops, row.median_ms) for row in rows if row.flops and row.median_ms]
        if timed:
            self.rate = sum(flops for flops, _ in timed) / sum(1e-3 * ms for _, ms in timed)
        return rows

    def _run(self, frames: int, settings: Settings) -> list[Row]:
        dtype = settings.dtype or torch.float32
        configs = {name: Config.preset(self.preset, **changes) for name, changes in MODELS.items()}
        chunks = frames // configs[EVERYTHING].frames_per_chunk
        flops = {name: cost.model(config, chunks, TEXT_TOKENS).total for name, config in configs.items()}
        once = sum(flops.values()) / self.rate if self.rate else 0.0
        fitting = int(self.left / once) - 1 if once else 25  # the first pass measures memory and is judged
        comparison = Comparison(
            SUITE,
            f"time {frames} frames",
            [],
            judge=_judge_models(configs, settings, dtype, frames),
            baseline=EVERYTHING,
            shape=f"{self.preset}, {TEXT_TOKENS} text tokens",
            dtype=dtype,
            rounds=(max(1, min(3, fitting)), max(1, min(25, fitting)), 3.0),
            warm_up=once < 2,
            detail={"preset": self.preset, "frames": frames},
        )
        comparison.variants = [
            Variant(
                name,
                partial(_call, config, settings, dtype, frames),
                role="peer" if name == EVERYTHING else "ours",
                flops=flops[name],
            )
            for name, config in configs.items()
        ]
        if fitting < 1:
            return [_too_long(comparison.row(variant, settings), 2 * once) for variant in comparison.variants]
        return compare(comparison, settings)


def _too_long(row: Row, seconds: float) -> Row:
    row.status, row.reason = "SKIP", f"would take about {seconds:.0f} s more than the default run has; --full runs it"
    return row


@lru_cache(maxsize=6)
def _model(config: Config, device: torch.device, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    return Model(config).eval().to(device, dtype)


@lru_cache(maxsize=4)
def _combiner(config: Config, device: torch.device, dtype: torch.dtype) -> combiner.TransformerCombiner:
    torch.manual_seed(0)
    module = combiner.TransformerCombiner(config)
    module.apply(layers.init_weights)
    return module.to(device, dtype)


def _inputs(config: Config, settings: Settings, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """One clip; a longer one begins as a shorter one does."""
    longest = max(*FRAMES, frames)
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


def _no_grad(call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return call(x)

    return run


def _judge_models(configs: dict[str, Config], settings: Settings, dtype: torch.dtype, frames: int) -> Judge:
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
        (encoders, "extract_tubes"),
    )
    with contextlib.ExitStack() as stack:
        for module, name in homes:
            slow = partial(getattr(module, name), backend="reference")
            stack.enter_context(mock.patch.object(module, name, slow))
        yield
