"""What chunks, Combiners and last-m pruning save: work of the 3B model, time and memory of one that fits this machine.

Three models of one preset take the same clips: (a) every token of every chunk at once in one Transformer, (b) chunks
with the causal-Transformer Combiner, (c) chunks with the Token-Turing-Machine Combiner.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cases import attention as suite_attention
from cases.attention_shapes import Shape
from cases.sweep import MODELS, Sweep
from core.counting import TEXT_TOKENS, count, count_combiner
from core.harness import Comparison, Variant, against, compare
from core.rows import Case, Row, Settings
from mirasol import Config, combiner, cost, layers
from report.savings import PRUNED, SUITE, TTM_ALONE, UNPRUNED, headline, tables

__all__ = ["cases", "headline", "tables"]

FRAMES = (16, 32, 64, 128, 256, 512)
LAYERS = (4, 5, 6)
LAYER_FRAMES = (32, 128, 512)
EVERY_COMBINER: dict[str, tuple[str, dict[str, Any]]] = {
    "Transformer": ("all earlier chunks", {"combiner": "transformer"}),
    "Transformer, this chunk": ("this chunk", {"combiner": "transformer", "combiner_window": 1}),
    "Transformer, 1 layer": ("all earlier chunks", {"combiner": "transformer", "combiner_layers": 1}),
    "Transformer, 1 layer, this chunk": (
        "this chunk",
        {"combiner": "transformer", "combiner_layers": 1, "combiner_window": 1},
    ),
    "Perceiver resampler": ("this chunk", {"combiner": "perceiver"}),
    "Perceiver resampler, 1 layer": ("this chunk", {"combiner": "perceiver", "combiner_layers": 1}),
    "attention pooling": ("all earlier chunks", {"combiner": "attention"}),
    "attention pooling, this chunk": ("this chunk", {"combiner": "attention", "combiner_window": 1}),
    TTM_ALONE: ("all, by its memory", {"combiner": "ttm"}),
    "mean pooling": ("this chunk", {"combiner": "mean"}),
}
"""What each sees, and how it is asked for: the cheaper ones too, against which TTM need not save anything."""
SWEEP_SECONDS = 120.0
"""For the sweep over frames in a default run, which is to end within three minutes."""


def cases(settings: Settings) -> list[Case]:
    """Counts first, then the sweep over frames from short to long, then pruning and attention."""
    quick = settings.effort == "quick"
    counted = "tiny" if quick else "mirasol-3b"
    timed = "tiny" if quick else "base" if settings.device.type == "cuda" else "small"
    frames = (8, 16) if quick else FRAMES
    layer_frames = (16,) if quick else LAYER_FRAMES
    sweep = Sweep(timed, frames, SWEEP_SECONDS if settings.effort == "default" else float("inf"))
    chunks = (4,) if quick else (4, 16)
    return [
        *(Case(f"work {f} frames", partial(_work, counted, f)) for f in frames),
        *(Case(f"TTM share {f} frames", partial(_shares, counted, f)) for f in layer_frames),
        *(Case(f"every Combiner {f} frames", partial(_every_combiner, counted, f)) for f in layer_frames),
        *(Case(f"time {f} frames", partial(sweep.run, f)) for f in frames),
        *(Case(f"last-m pruning {c} chunks", partial(_pruning, counted, timed, c)) for c in chunks),
        *(Case(f"chunk-causal attention {c} chunks", partial(_attention, timed, c)) for c in chunks),
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


def _every_combiner(preset: str, frames: int, settings: Settings) -> list[Row]:
    """Whole model and Combiner alone, for every Combiner in its dear and in its cheap form.

    The rest of the model is the same: it is counted once.
    """
    ttm = Config.preset(preset, combiner="ttm")
    chunks = frames // ttm.frames_per_chunk
    whole, combiner_of_ttm = count(ttm, chunks)
    rows = []
    for name, (sees, changes) in EVERY_COMBINER.items():
        config = Config.preset(preset, **changes)
        alone, model = count_combiner(config, chunks), cost.model(config, chunks, TEXT_TOKENS)
        more = {"frames": frames, "sees": sees, "combiner_flops": alone}
        counted = whole - combiner_of_ttm + alone
        rows.append(_count_row(f"every Combiner {frames} frames", name, preset, counted, model.total, **more))
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
        y = block(y, n, module.reach)
    return module.project(y.unflatten(1, (chunks, n)))


def _attention(preset: str, chunks: int, settings: Settings) -> list[Row]:
    """The Combiner's attention: chunk-causal by ours and by a dense mask, and full attention, which sees the future."""
    config = Config.preset(preset)
    heads = config.combiner_heads
    shape = Shape("Combiner", 1, heads, config.combiner_dim // heads, chunks, config.tokens_per_chunk, modes=("fwd",))
    only = ("mirasol, triton", suite_attention.OURS, suite_attention.DENSE, suite_attention.FULL)
    dtype = settings.dtype or torch.float32
    return suite_attention.compare_shape(
        shape, "fwd", dtype, settings, suite=SUITE, case=f"chunk-causal attention {chunks} chunks", only=only
    )


@lru_cache(maxsize=4)
def _combiner(config: Config, device: torch.device, dtype: torch.dtype) -> combiner.TransformerCombiner:
    torch.manual_seed(0)
    module = combiner.TransformerCombiner(config)
    module.apply(layers.init_weights)
    return module.to(device, dtype)


def _no_grad(call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return call(x)

    return run
