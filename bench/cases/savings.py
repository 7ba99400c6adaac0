"""What chunks, Combiners and last-m pruning save: work and memory of the 3B model, time of one that fits this machine.

Models of one preset take the same clips: every token of every chunk at once in one Transformer; the same of pooled or
resampled tokens; chunks with the causal-Transformer Combiner; chunks with the Token-Turing-Machine Combiner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cases import attention as suite_attention
from cases import footprint
from cases.attention_shapes import Shape
from cases.sweep import MODELS, Point, Sweep
from core.counting import TEXT_TOKENS, count, count_combiner
from core.harness import Comparison, Variant, against, compare
from core.rows import Case, Row, Settings
from mirasol import Config, combiner, cost, layers
from peers import everything
from report.savings import PRUNED, SUITE, UNPRUNED, headline, tables

__all__ = ["cases", "headline", "tables"]

FRAMES = (16, 32, 64, 128, 256, 512)
LAYERS = (4, 5, 6)
LAYER_FRAMES = (32, 128, 512)
TEXTS = (64, TEXT_TOKENS, 1450)
"""Tokens of a short text, of 256 words in subwords, and of as many words in bytes."""
POINTS = {
    "quick": [Point(8), Point(16), Point(8, 2), Point(8, 2, "step")],
    "default": [Point(16), Point(16, 2, "step"), Point(64), Point(128), Point(16, 4)],
    "full": [
        *map(Point, FRAMES),
        *(Point(frames, clips) for frames, clips in ((16, 4), (16, 16))),
        *(Point(frames, clips, "step") for frames, clips in ((16, 1), (64, 1), (128, 1), (16, 2), (16, 8))),
    ],
}
SWEEP_SECONDS = 125.0
"""For what is timed in a default run, which is to end within three and a half minutes."""


def cases(settings: Settings) -> list[Case]:
    """Counts first, then memory, then the sweep over what is timed, then pruning and attention."""
    quick = settings.effort == "quick"
    counted = "tiny" if quick else "mirasol-3b"
    timed = "tiny" if quick else "base" if settings.device.type == "cuda" else "small"
    frames = (8, 16) if quick else FRAMES
    layer_frames = (16,) if quick else LAYER_FRAMES
    sweep = Sweep(timed, SWEEP_SECONDS if settings.effort == "default" else float("inf"))
    chunks = (4,) if quick else (4, 16)
    return [
        *(Case(f"work {f} frames", partial(_work, counted, f)) for f in frames),
        *(Case(f"text of {n} tokens", partial(_text, counted, frames[-1] if quick else 128, n)) for n in TEXTS),
        *(Case(f"TTM share {f} frames", partial(_shares, counted, f)) for f in layer_frames),
        *(Case(f"every Combiner {f} frames", partial(_every_combiner, counted, f)) for f in layer_frames),
        *footprint.cases(("tiny",) if quick else ("base", "mirasol-3b"), 16 if quick else 128),
        *(Case(point.case, partial(sweep.run, point)) for point in POINTS[settings.effort]),
        *(Case(f"last-m pruning {c} chunks", partial(_pruning, counted, timed, c)) for c in chunks),
        *(Case(f"chunk-causal attention {c} chunks", partial(_attention, timed, c)) for c in chunks),
    ]


def _work(preset: str, frames: int, settings: Settings) -> list[Row]:
    """FLOPs of a forward pass, counted and analytic; of a training step, and what that holds, analytic."""
    return [_model_row(f"work {frames} frames", name, preset, frames, TEXT_TOKENS) for name in MODELS]


def _text(preset: str, frames: int, tokens: int, settings: Settings) -> list[Row]:
    """The same for another length of the text."""
    return [_model_row(f"text of {tokens} tokens", name, preset, frames, tokens) for name in MODELS]


def _model_row(case: str, name: str, preset: str, frames: int, text_tokens: int) -> Row:
    config = Config.preset(preset, **MODELS[name])
    chunks = frames // config.frames_per_chunk
    return _count_row(
        case,
        name,
        preset,
        count(config, chunks, text_tokens, make=everything.build)[0],
        everything.forward_flops(config, chunks, text_tokens),
        text_tokens,
        frames=frames,
        step_flops=everything.step_flops(config, chunks, text_tokens),
        parameters=cost.parameters(config).total,
        **footprint.step(config, chunks, text_tokens),
    )


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

    The rest of the model is the same where as many tokens go on: it is counted once.
    """
    ttm = Config.preset(preset, combiner="ttm")
    chunks = frames // ttm.frames_per_chunk
    whole, combiner_of_ttm = count(ttm, chunks)
    rows = []
    for name, (sees, changes) in footprint.EVERY_COMBINER.items():
        config = Config.preset(preset, **changes)
        alone, model = count_combiner(config, chunks), cost.model(config, chunks, TEXT_TOKENS)
        same = config.latents_per_chunk == ttm.latents_per_chunk
        counted = whole - combiner_of_ttm + alone if same else count(config, chunks)[0]
        more = {
            "frames": frames,
            "sees": sees,
            "combiner_flops": alone,
            "step_flops": cost.training(config, chunks, TEXT_TOKENS),
            "parameters": asdict(cost.parameters(config)),
        }
        rows.append(_count_row(f"every Combiner {frames} frames", name, preset, counted, model.total, **more))
        if alone != model.combiner:
            rows[-1].status, rows[-1].reason = "FAIL", f"Combiner: counted {alone}, the model says {model.combiner}"
    return rows


def _count_row(
    case: str, name: str, preset: str, counted: int, model: int, text_tokens: int = TEXT_TOKENS, **detail: Any
) -> Row:
    row = Row(SUITE, case, name, mode="count", device="meta", flops=counted, flops_model=model)
    row.shape, row.detail = (
        f"{preset}, {text_tokens} text tokens",
        {"preset": preset, "text_tokens": text_tokens, **detail},
    )
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
