"""One training step, ours beside mirasol-pytorch: forward, backward, AdamW; what each computes stands in
`peers.mirasol_pytorch`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from core.harness import LEAST_ROUNDS, Comparison, Unavailable, Variant, Verdict, compare
from core.rows import Case, Row, Settings
from mirasol import Model
from peers import mirasol_pytorch
from peers.mirasol_pytorch import QUICK, Setting
from report import tables as report
from report.console import Table

SUITE = "step"
TRANSFORMER, TTM = "mirasol, Transformer", "mirasol, TTM"
SMALL, DEFAULT = "mirasol-pytorch, small reconstruction", "mirasol-pytorch, default"
COMBINED = (3, 8, 32)
"""Tokens a chunk: the peer's default, one between, and the paper's."""
ROUNDS = (LEAST_ROUNDS, 9, 60.0)
STATE = 16
"""Bytes a parameter: itself, its gradient and AdamW's moments."""


def cases(settings: Settings) -> list[Case]:
    quick = settings.effort == "quick"
    found = [(m, 1) for m in (COMBINED[:1] if quick else COMBINED)] + [(COMBINED[0] if quick else 8, 2)]
    return [Case(_name(m, clips), partial(_case, m, clips)) for m, clips in found]


def _name(combined: int, clips: int) -> str:
    return f"{combined} combined tokens" + (f", {clips} clips" if clips > 1 else "")


def _case(combined: int, clips: int, settings: Settings) -> list[Row]:
    at = replace(QUICK if settings.effort == "quick" else Setting(), clips=clips)
    makers = {
        TRANSFORMER: partial(_ours, at, combined, "transformer", settings),
        TTM: partial(_ours, at, combined, "ttm", settings),
        SMALL: partial(_theirs, at, combined, True, settings),
        DEFAULT: partial(_theirs, at, combined, False, settings),
    }
    steps: dict[str, Step] = {}

    def make(name: str) -> Step:
        steps[name] = makers[name]()
        return steps[name]

    rows = compare(
        Comparison(
            SUITE,
            _name(combined, clips),
            [
                Variant(
                    name,
                    partial(make, name),
                    role="ours" if name in (TRANSFORMER, TTM) else "peer",
                    foreign=name in (SMALL, DEFAULT),
                )
                for name in makers
            ],
            judge=lambda name, outputs: steps[name].verdict(),
            baseline=SMALL,
            mode="step",
            shape=f"{at.chunks * mirasol_pytorch.FRAMES} frames, {at.text} text tokens",
            rounds=(2, 2, 0.0) if settings.effort == "quick" else ROUNDS,
            detail={"setting": asdict(at), "combined": combined, "computes": mirasol_pytorch.__doc__},
        ),
        settings,
    )
    for row in rows:
        if row.status == "ok":
            steps[row.impl].describe(row)
    return rows


class Step:
    """A model, its optimizer and its clip; a call is one step and gives the loss before it."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        self.model, self.loss = model, loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.first: float | None = None

    def __call__(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.first is None:
            self.first = loss.item()
        return loss.detach()

    def verdict(self) -> Verdict:
        """Right means: the optimizer moves every weight, and the loss on the clip falls."""
        still = [name for name, p in self.model.named_parameters() if p.requires_grad and p not in self.optimizer.state]
        if still:
            return Verdict(problem=f"no gradient reaches {still[0]}")
        now = self().item()
        falls = self.first is not None and now < self.first
        return Verdict(problem="" if falls else f"the loss went from {self.first} to {now}")

    def describe(self, row: Row) -> None:
        """Work, and what the model holds all the time, into the row."""
        parameters = sum(p.numel() for p in self.model.parameters())
        with FlopCounterMode(display=False) as counter:
            self.loss().backward()
        self.optimizer.zero_grad()
        row.flops = counter.get_total_flops()
        row.tflops = row.flops / row.median_ms / 1e9 if row.median_ms else None
        row.detail.update(parameters=parameters, held_bytes=(STATE - 4) * parameters)


def _ours(at: Setting, combined: int, combiner: str, settings: Settings) -> Step:
    config = mirasol_pytorch.config(at, combined, combiner)
    torch.manual_seed(0)
    model = Model(config).to(settings.device)
    clip = _moved(mirasol_pytorch.inputs(at, config), settings)

    def loss() -> Tensor:
        found = model(**clip).loss
        assert found is not None
        return found

    return Step(model, loss)


def _theirs(at: Setting, combined: int, small: bool, settings: Settings) -> Step:
    _expect_room(STATE * mirasol_pytorch.peer_heads(at, combined, small), settings)
    torch.manual_seed(0)
    model = mirasol_pytorch.peer(at, combined, small).to(settings.device)
    clip = _moved(mirasol_pytorch.peer_inputs(at), settings)
    return Step(model, lambda: model(**clip))


def _moved(clip: dict[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    return {name: tensor.to(settings.device) for name, tensor in clip.items()}


def _expect_room(needed: int, settings: Settings) -> None:
    if settings.device.type == "cuda":
        free = torch.cuda.mem_get_info(settings.device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if needed > 0.85 * free:
        raise Unavailable(f"its weights and AdamW's state need {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")


def tables(rows: list[Row]) -> list[Table]:
    columns = [
        "m",
        "clips",
        "implementation",
        "ms (p20–p80)",
        "n",
        "x small peer (p20–p80)",
        "GFLOP",
        "GFLOP/s",
        "parameters",
    ]
    columns += ["memory: state", "beside it"]
    lines = [_line(row) for row in rows]
    at = rows[0].detail.get("setting", {})
    sizes = ", ".join(f"{name} {value}" for name, value in at.items() if name != "clips")
    notes = [
        f"forward, backward and AdamW of clips of {rows[0].shape}: {sizes}",
        "m: combined tokens a chunk: 3 is the peer's default, 32 the paper's",
        "every ratio from one process, in turns; what each model computes: bench/peers/mirasol_pytorch.py",
        "state: weights and AdamW's moments; beside it: the most that a step holds more, gradients included",
        *report.troubles(rows),
    ]
    return [Table("One training step", columns, lines, 3, notes)]


def _line(row: Row) -> list[str]:
    detail: dict[str, Any] = row.detail
    spread = f" ({report.number(row.speedup_p20)}–{report.number(row.speedup_p80)})" if row.speedup else ""
    return [
        row.case.split()[0],
        str(row.detail.get("setting", {}).get("clips", 1)),
        row.impl,
        report.time_range(row),
        str(row.n or ""),
        f"{report.ratio(row.speedup)}{spread}",
        report.number(row.flops / 1e9) if row.flops else "",
        report.number(1e3 * row.tflops) if row.tflops else "",
        report.scaled(detail.get("parameters")),
        report.mebibytes(detail.get("held_bytes")),
        report.mebibytes(row.peak_bytes),
    ]


def headline(rows: list[Row]) -> str:
    """Ours against the faster form of the peer, for each number of combined tokens."""
    ours = [row for row in rows if row.against_best]
    parts = [f"{report.ratio(row.against_best)} ({row.case}, {row.impl.split(', ')[1]})" for row in ours]
    return f"A training step beside the faster form of mirasol-pytorch: {', '.join(parts)}" if parts else ""
