"""A token of a decode beside plain PyTorch's step with the same weights; one attention call of it beside training's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from core.harness import Comparison, Unavailable, Variant, against, compare, one_line
from core.rows import Case, Row, Settings
from mirasol import Config
from mirasol.generation.decode import ROOM
from mirasol.kernels import chunked_attention
from mirasol.layers import init_weights
from mirasol.text import TextDecoder
from peers.decode import PlainDecoder
from report import tables as report
from report.console import Table

SUITE = "decode"
PLAIN, BARE = "plain PyTorch", "plain PyTorch, functions alone"
OURS, COMPILED, WATCHED = "mirasol", "mirasol, compiled", "mirasol, attention shown"
CHUNKED, DENSE = "chunked_attention", "scaled_dot_product_attention"
COPIED, FOLDED = "keys copied for each beam", "beams folded into the queries"
TOKENS, LATENTS = 32, 64
ROUNDS = (9, 41, 8.0)
QUICK = (2, 2, 0.0)


def cases(settings: Settings) -> list[Case]:
    presets = ("tiny",) if settings.effort == "quick" else ("tiny", "small")
    steps = [Case(f"step, {preset}", partial(_steps, preset)) for preset in presets]
    calls = [Case(f"attention, {preset}", partial(_attention, preset)) for preset in presets]
    return [*steps, *calls, Case("cross-attention of 4 beams", _beams)]


def _steps(preset: str, settings: Settings) -> list[Row]:
    """All tokens of a text, each by a step of its own."""
    config = Config.preset(preset)
    torch.manual_seed(0)
    decoder = TextDecoder(config).apply(init_weights).to(settings.device).eval().requires_grad_(False)
    latents = torch.randn(1, LATENTS, config.av_dim, device=settings.device)
    text = torch.randint(0, 256, (1, TOKENS), device=settings.device)
    exact = TextDecoder(config).to(settings.device).double()
    exact.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        judge = against([exact(text, latents.double())], [decoder(text, latents)])
    variants = [
        Variant(PLAIN, lambda: _run_plain(decoder, latents, text)),
        Variant(BARE, lambda: _run_plain(decoder, latents, text, functions=True)),
        Variant(OURS, lambda: _run_ours(decoder, decoder, latents, text), role="ours"),
        Variant(WATCHED, lambda: _run_ours(decoder, decoder, latents, text, watch=True), role="ours"),
    ]
    if settings.effort != "quick":
        compiled = Variant(COMPILED, lambda: _compiled(decoder, latents, text), detail={"show_build": True})
        variants.append(compiled)
    return compare(
        Comparison(
            SUITE,
            f"step, {preset}",
            variants,
            judge,
            PLAIN,
            mode="step",
            shape=f"1 row, {LATENTS} latents, {TOKENS} tokens",
            rounds=QUICK if settings.effort == "quick" else ROUNDS,
            detail={"calls": TOKENS},
        ),
        settings,
    )


def _run_plain(decoder: TextDecoder, latents: Tensor, text: Tensor, functions: bool = False) -> Callable[[], Tensor]:
    tokens = text.split(1, dim=1)
    with torch.no_grad():
        step = PlainDecoder(decoder, latents, ROOM, functions)

    def run() -> Tensor:
        step.position = 0
        with torch.no_grad():
            return torch.cat([step(token) for token in tokens], dim=1)

    return run


def _run_ours(
    decoder: TextDecoder, call: Callable[..., Tensor], latents: Tensor, text: Tensor, watch: bool = False
) -> Callable[[], Tensor]:
    tokens = text.split(1, dim=1)
    with torch.no_grad():
        cache = decoder.new_cache(decoder.see(latents), ROOM)
    if watch:
        cache.cross.watch()

    def run() -> Tensor:
        cache.position.zero_()
        with torch.no_grad():
            return torch.cat([call(token, None, cache) for token in tokens], dim=1)

    return run


def _compiled(decoder: TextDecoder, latents: Tensor, text: Tensor) -> Callable[[], Tensor]:
    torch._dynamo.reset()
    run = _run_ours(decoder, torch.compile(decoder, fullgraph=True, dynamic=False), latents, text)
    try:
        run()
    except Exception as error:
        raise Unavailable(f"does not compile here: {one_line(error)}") from error
    return run


def _attention(preset: str, settings: Settings) -> list[Row]:
    """One query of every head to the latents."""
    config = Config.preset(preset)
    q, k, v = _inputs(config, 1, LATENTS, settings)
    return _calls(
        f"attention, {preset}",
        {
            CHUNKED: lambda: chunked_attention(q, k, v, q_chunk=1, k_chunk=LATENTS),
            DENSE: lambda: scaled_dot_product_attention(q, k, v),
        },
        (q, k, v),
        settings,
    )


def _beams(settings: Settings) -> list[Row]:
    """One query of every head of 4 beams to the same latents."""
    beams, latents = 4, 128 if settings.effort == "quick" else 2048
    q, k, v = _inputs(Config.preset("small"), beams, latents, settings)
    k, v = k[:1], v[:1]
    keys, values = (x.repeat_interleave(beams, 0) for x in (k, v))

    def folded() -> Tensor:
        return scaled_dot_product_attention(q.transpose(0, 2), k, v).transpose(0, 2)

    copied = partial(scaled_dot_product_attention, q, keys, values)
    return _calls("cross-attention of 4 beams", {COPIED: copied, FOLDED: folded}, (q, keys, values), settings)


def _inputs(config: Config, rows: int, latents: int, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    heads, width = config.text_heads, config.text_dim // config.text_heads
    like: dict[str, Any] = dict(device=settings.device)
    q = torch.randn(rows, heads, 1, width, **like)
    return q, torch.randn(rows, heads, latents, width, **like), torch.randn(rows, heads, latents, width, **like)


def _calls(
    case: str, calls: dict[str, Callable[[], Tensor]], inputs: tuple[Tensor, Tensor, Tensor], settings: Settings
) -> list[Row]:
    """The first call is the baseline, the last is what the decode does."""
    first, last = calls
    q, k, _ = inputs
    return compare(
        Comparison(
            SUITE,
            case,
            [
                Variant(name, lambda call=call: call, role="ours" if name == last else "peer")
                for name, call in calls.items()
            ],
            against(
                [scaled_dot_product_attention(*(x.double() for x in inputs))], [scaled_dot_product_attention(*inputs)]
            ),
            first,
            shape=f"{q.shape[0]} x {q.shape[1]} queries of width {q.shape[3]}, {k.shape[2]} latents",
            rounds=QUICK if settings.effort == "quick" else None,
            detail={"calls": 1},
        ),
        settings,
    )


def tables(rows: list[Row]) -> list[Table]:
    columns = ["case", "implementation", "us a call (p20–p80)", "n", "x baseline (p20–p80)", "compile s"]
    notes = [
        "step: one token's call of the decoder in a text of 32; baseline: plain PyTorch, bench/peers/decode.py",
        *sorted({f"{row.case}: {row.shape}" for row in rows}),
        *report.troubles(rows),
    ]
    return [Table("Decoding", columns, [_line(row) for row in rows], 2, notes)]


def _line(row: Row) -> list[str]:
    calls: int = row.detail.get("calls", 1)
    times = [None if t is None else 1e3 * t / calls for t in (row.median_ms, row.p20_ms, row.p80_ms)]
    middle, low, high = (report.number(t) for t in times)
    spread = f" ({report.number(row.speedup_p20)}–{report.number(row.speedup_p80)})" if row.speedup else ""
    shown = row.detail.get("show_build") and row.build_ms
    return [
        row.case,
        row.impl,
        f"{middle} ({low}–{high})" if row.median_ms else "",
        str(row.n or ""),
        f"{report.ratio(row.speedup)}{spread}",
        report.number(row.build_ms / 1e3) if shown else "",
    ]


def headline(rows: list[Row]) -> str:
    """Our step's time over plain PyTorch's."""
    ours = [row for row in rows if row.impl == OURS and row.speedup]
    parts = [f"{1 / row.speedup:.2f} ({row.case.split()[-1]})" for row in ours if row.speedup]
    return f"A step's time over plain PyTorch's: {', '.join(parts)}" if parts else ""
