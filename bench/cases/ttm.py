"""Token Turing Machine operators against eager PyTorch written as the official code is, and the same compiled.

Every variant runs the same process unit, of the same weights; only reading, writing and the recurrence differ, and
whether the unit is compiled, which the name says. "scan" has a Transformer layer as process unit, "recurrence" a tanh,
so that what differs is not hidden behind what does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cases import ttm_variants
from core.harness import Comparison, Variant, Verdict, against, compare, compiled, launches, three_modes
from core.rows import Case, Row, Settings
from mirasol import Config, combiner, cost
from mirasol.kernels import TokenLearnerParams, ttm_read, ttm_scan, ttm_step, ttm_write
from mirasol.layers import ViT, init_weights
from report.console import Table
from report.tables import comparison_table

SUITE = "ttm"
EAGER = "eager, official form"
TRANSFORMER = "causal-Transformer Combiner"
HIDDEN = 64
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """B clips of T chunks of n tokens, a memory of s tokens, r tokens read, width d."""

    batch: int
    chunks: int
    tokens: int
    dim: int
    memory: int = 96
    read: int = 32

    @property
    def name(self) -> str:
        return f"B{self.batch} T{self.chunks} n{self.tokens} d{self.dim} s{self.memory} r{self.read}"


SCANS = {
    "quick": [Shape(1, 3, 12, 32, 8, 4)],
    "cpu": [Shape(1, 16, 448, 768), Shape(1, 64, 170, 384, 64, 16)],
    "cpu full": [Shape(1, 16, 448, 768), Shape(1, 64, 448, 768), Shape(4, 16, 390, 1024), Shape(1, 4, 294, 768)],
    "cuda": [Shape(1, 16, 390, 1024), Shape(1, 64, 390, 1024), Shape(16, 16, 390, 1024), Shape(4, 16, 1176, 2048)],
    "cuda full": [Shape(32, 64, 294, 768), Shape(1, 64, 390, 1024, 512, 64), Shape(1, 4, 294, 768, 96, 16)],
}
ONES = {
    "quick": [Shape(2, 1, 12, 32, 8, 4)],
    "cpu": [Shape(4, 1, 448, 768)],
    "cpu full": [Shape(1, 1, 294, 768), Shape(16, 1, 448, 768), Shape(4, 1, 1176, 2048, 512, 64)],
    "cuda": [Shape(16, 1, 390, 1024), Shape(32, 1, 1176, 2048), Shape(16, 1, 390, 768, 512, 64)],
    "cuda full": [Shape(1, 1, 390, 1024), Shape(32, 1, 294, 768, 96, 16)],
}
STREAM_MARKS = (10, 100, 1000)


def cases(settings: Settings) -> list[Case]:
    """Read and write of one chunk, scans, variants of both, a long stream, and the Combiner as a whole."""
    kind = settings.device.type
    names = {"quick": ["quick"], "default": [kind], "full": [kind, f"{kind} full"]}[settings.effort]
    modes = ("fwd", "fwd+bwd") if kind == "cpu" else ("fwd", "bwd", "fwd+bwd")
    scans, ones = ([shape for name in names for shape in table[name]] for table in (SCANS, ONES))
    stream = SCANS["quick"][0] if settings.effort == "quick" else SCANS["cpu"][0]
    found = [
        Case(f"{op} {shape.name} {mode}", partial(_operator, op, shape, mode))
        for op, shapes in (("read", ones), ("write", ones), ("scan", scans), ("recurrence", scans))
        for shape in dict.fromkeys(shapes)
        for mode in modes
    ]
    found += ttm_variants.cases(ones, modes)
    combiners = (2,) if settings.effort == "quick" else (4, 16, 64)
    found += [Case(f"Combiner {chunks} chunks", partial(_combiners, chunks)) for chunks in combiners]
    return [*found, Case(f"stream {stream.name}", partial(_stream, stream))]


def tables(rows: list[Row]) -> list[Table]:
    streams = [row for row in rows if row.case.startswith("stream")]
    others = [row for row in rows if row not in streams]
    notes = [
        "GB/s: memory, inputs and outputs moved once (backward: twice); % of roof: of the copy bandwidth",
        "Combiner: encoders left out; TTM against the causal Transformer with last-m pruning, forward only",
    ]
    found = [comparison_table("Token Turing Machine", others, notes)] if others else []
    return (
        [*found, comparison_table("A stream: time and memory of one more chunk, after so many", streams)]
        if streams
        else found
    )


@dataclass(frozen=True)
class _Work:
    """Tensors of a shape, and the ways to use them: forward(memory, inputs, outputs, *parameters)."""

    shape: Shape
    process: Callable[[Tensor], Tensor]

    def ours(self, op: str, backend: Any, memory: Tensor, inputs: Tensor, outputs: Tensor, *weights: Tensor) -> Tensor:
        read, write = (TokenLearnerParams(*weights[i : i + 7]) for i in (0, 7))
        if op == "read":
            return ttm_read(memory, inputs[:, 0], read, backend=backend)
        if op == "write":
            return ttm_write(memory, outputs, inputs[:, 0], write, backend=backend)
        return ttm_scan(memory, inputs, read, self.process, write, backend=backend)[0]

    def eager(self, op: str, memory: Tensor, inputs: Tensor, outputs: Tensor, *weights: Tensor) -> Tensor:
        read, write = weights[:7], weights[7:]
        if op == "read":
            return _summary(torch.cat([memory, inputs[:, 0]], 1), *read)
        if op == "write":
            return _summary(torch.cat([memory, inputs[:, 0], outputs], 1), *write)
        return self.loop(self.step, memory, inputs, *weights)

    def step(self, memory: Tensor, chunk: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        out = self.process(_summary(torch.cat([memory, chunk], 1), *weights[:7]))
        return out, _summary(torch.cat([memory, chunk, out], 1), *weights[7:])

    def loop(self, step: Callable[..., Any], memory: Tensor, inputs: Tensor, *weights: Tensor) -> Tensor:
        found = []
        for chunk in inputs.unbind(1):
            out, memory = step(memory, chunk, *weights)
            found.append(out)
        return torch.stack(found, 1)


def _summary(
    v: Tensor, scale: Tensor, shift: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, positions: Tensor
) -> Tensor:
    """TokenLearner v1.1 in the steps of the official code."""
    v = v + positions
    hidden = F.gelu(F.linear(F.layer_norm(v, v.shape[-1:], scale, shift, NORM_EPS), w1, b1), approximate="tanh")
    weights = F.linear(hidden, w2, b2).transpose(1, 2).softmax(-1)
    return torch.einsum("bkp,bpd->bkd", weights, v)


def _operator(op: str, shape: Shape, mode: str, settings: Settings) -> list[Row]:
    dtype = settings.dtype or (torch.bfloat16 if settings.device.type == "cuda" else torch.float32)
    work, inputs = _Work(shape, _process(op, shape, settings, dtype)), _tensors(shape, settings, dtype)
    used = _used(op, mode)
    graded = [t.requires_grad_(mode != "fwd" and i in used) for i, t in enumerate(inputs)]
    size = (shape.read, shape.memory)[op == "write"]
    in_loop = op in ("scan", "recurrence")
    out_shape = (shape.batch, shape.chunks, size, shape.dim) if in_loop else (shape.batch, size, shape.dim)
    grad = settings.randn(*out_shape, dtype=dtype, seed=99)
    exact_work = _Work(shape, _process(op, shape, settings, torch.float64))

    def wrap(forward: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> Callable[[], Any]:
        def of_used(*chosen: Tensor) -> Tensor:
            values = list(tensors)
            for place, tensor in zip(used, chosen, strict=True):
                values[place] = tensor
            return forward(*values)

        return three_modes(of_used, [tensors[i] for i in used], grad, mode)

    def expected(kind: torch.dtype, work: _Work) -> list[Tensor]:
        cast = [t.detach().to(kind).requires_grad_(t.requires_grad) for t in graded]
        result = wrap(partial(work.eager, op), cast, grad.to(kind))()
        return [result] if isinstance(result, Tensor) else list(result)

    eager = partial(work.eager, op)

    def looped(step: Callable[..., Any]) -> Callable[[], Any]:
        """The loop over chunks around a compiled step: compiling the loop itself takes minutes and again for each T."""
        return wrap(lambda memory, inputs, outputs, *rest: work.loop(step, memory, inputs, *rest), graded, grad)

    if in_loop:
        fast = compiled(f"{EAGER}, compiled", work.step, graded, settings, wrap=looped)
    else:
        fast = compiled(f"{EAGER}, compiled", eager, graded, settings, wrap=lambda f: wrap(f, graded, grad))
    if op == "scan":  # the peer's process unit is compiled with its step, so ours is too

        def around(process: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
            return wrap(partial(_Work(shape, process).ours, op, "auto"), graded, grad)

        unit = compiled("mirasol, process compiled", work.process, [inputs[2]], settings, wrap=around)
        fast += [replace(variant, role="ours") for variant in unit]
    backends = ("triton", "torch") if settings.device.type == "cuda" else ("torch",)
    calls = {f"mirasol, {b}": partial(wrap, partial(work.ours, op, b), graded, grad) for b in backends}
    calls[EAGER] = partial(wrap, eager, graded, grad)
    rows = compare(
        Comparison(
            SUITE,
            f"{op} {shape.name}",
            [
                *(Variant(name, make, role="peer" if name == EAGER else "ours") for name, make in calls.items()),
                *fast,
            ],
            judge=against(expected(torch.float64, exact_work), expected(dtype, work)),
            baseline=EAGER,
            mode=mode,
            shape=shape.name,
            dtype=dtype,
            flops=_flops(op, shape, mode),
            bytes=_bytes(op, shape, mode, dtype),
            roof="copy",
        ),
        settings,
    )
    if in_loop and settings.device.type == "cuda":
        for row in rows:
            if row.impl in calls and row.status == "ok":
                row.detail["launches_per_chunk"] = launches(calls[row.impl]()) / shape.chunks
    return rows


def _used(op: str, mode: str) -> list[int]:
    """Places in (memory, inputs, outputs, read weights, write weights) that the operator looks at."""
    reading, writing = list(range(3, 10)), list(range(10, 17))
    return {"read": [0, 1, *reading], "write": [0, 1, 2, *writing]}.get(op, [0, 1, *reading, *writing])


def _flops(op: str, shape: Shape, mode: str) -> int | None:
    """Forward work of reading and writing; None for modes with a backward, whose work depends on what is kept."""
    if mode != "fwd":
        return None
    config = Config.preset(
        "base", ttm_hidden=HIDDEN, ttm_memory=shape.memory, ttm_read=shape.read, combined_tokens=min(32, shape.read),
        combiner_dim=shape.dim, combiner_heads=_heads(shape),
    )  # fmt: skip
    s, n, r = shape.memory, shape.tokens, shape.read
    read, write = (cost.summary(config, tokens, k, shape.chunks) for tokens, k in ((s + n, r), (s + n + r, s)))
    process = shape.chunks * cost.block(r, shape.dim, r * r, 4)
    work = {"read": read, "write": write, "scan": read + write + process, "recurrence": read + write}
    return shape.batch * work[op]


def _bytes(op: str, shape: Shape, mode: str, dtype: torch.dtype) -> int:
    """What must move: every source read once and the result written once; backward, as much again and the gradients."""
    s, n, r = shape.memory, shape.tokens, shape.read
    tokens = {"read": s + n + r, "write": s + n + r + s}.get(op, n + r)
    times = {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode]
    return times * shape.batch * shape.chunks * tokens * shape.dim * dtype.itemsize


def _heads(shape: Shape) -> int:
    return max(1, shape.dim // 64)


def _process(op: str, shape: Shape, settings: Settings, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    if op == "recurrence":
        return torch.tanh
    torch.manual_seed(0)
    vit = ViT(shape.dim, 1, _heads(shape), 4, NORM_EPS)
    vit.apply(init_weights)
    return vit.to(settings.device, dtype).requires_grad_(False)


def _tensors(shape: Shape, settings: Settings, dtype: torch.dtype) -> list[Tensor]:
    """memory, inputs, outputs, then the weights of the read and of the write."""
    b, n, s, r, d = shape.batch, shape.tokens, shape.memory, shape.read, shape.dim
    sizes: list[tuple[tuple[int, ...], float]] = [((b, s, d), 1.0), ((b, shape.chunks, n, d), 1.0), ((b, r, d), 1.0)]
    for p, k in ((s + n, r), (s + n + r, s)):
        sizes += [((d,), 1.0), ((d,), 0.1), ((HIDDEN, d), d**-0.5), ((HIDDEN,), 0.1)]
        sizes += [((k, HIDDEN), HIDDEN**-0.5), ((k,), 0.1), ((p, d), 0.02)]
    return [settings.randn(*size, dtype=dtype, seed=seed).mul_(scale) for seed, (size, scale) in enumerate(sizes)]


def _combiners(chunks: int, settings: Settings) -> list[Row]:
    """The whole Combiner of a preset: TTM, and the causal Transformer that it replaces."""
    preset = "tiny" if settings.effort == "quick" else "base" if settings.device.type == "cuda" else "small"
    dtype = settings.dtype or torch.float32
    kinds: dict[str, Any] = {TRANSFORMER: combiner.TransformerCombiner, "TTM Combiner": combiner.TTMCombiner}
    configs = {name: Config.preset(preset, combiner="ttm" if "TTM" in name else "transformer") for name in kinds}
    config = configs[TRANSFORMER]
    x = settings.randn(1, chunks, config.tokens_per_chunk, config.combiner_dim, dtype=dtype)

    def make(name: str) -> Callable[[], Tensor]:
        torch.manual_seed(0)
        module = kinds[name](configs[name]).apply(init_weights).to(settings.device, dtype)
        return lambda: torch.no_grad()(module)(x)

    def judge(name: str, outputs: list[Tensor]) -> Verdict:
        """Both are causal over chunks, so the first chunks alone must give the same."""
        half = max(1, chunks // 2)
        torch.manual_seed(0)
        module = kinds[name](configs[name]).apply(init_weights).to(settings.device, torch.float64)
        with torch.no_grad():
            exact = module(x[:, :half].double())
            plain = module.to(dtype)(x[:, :half])
        return against([exact], [plain], part=lambda outs: [outs[0][:, :half]])(name, outputs)

    return compare(
        Comparison(
            SUITE,
            f"Combiner {chunks} chunks",
            [
                Variant(name, partial(make, name), role="ours", flops=work)
                for name, work in ((name, cost.combiner(configs[name], chunks)) for name in kinds)
            ],
            judge=judge,
            baseline=TRANSFORMER,
            shape=f"{preset}, n{config.tokens_per_chunk}",
            dtype=dtype,
            detail={"chunks": chunks},
        ),
        settings,
    )


def _stream(shape: Shape, settings: Settings) -> list[Row]:
    """Chunk after chunk through `ttm_step`; then the same step from the states that were kept on the way."""
    dtype = settings.dtype or torch.float32
    memory, inputs, _, *weights = _tensors(shape, settings, dtype)
    read, write = (TokenLearnerParams(*weights[i : i + 7]) for i in (0, 7))
    process = _process("scan", shape, settings, dtype)
    marks = (4, 8) if settings.effort == "quick" else STREAM_MARKS
    states = {}

    @torch.no_grad()
    def step(memory: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
        return ttm_step(memory, chunk, read, process, write)

    for index in range(1, marks[-1] + 1):
        if index in marks:
            states[f"chunk {index}"] = memory
        memory = step(memory, inputs[:, index % shape.chunks])[1]

    def judge(name: str, outputs: list[Tensor]) -> Verdict:
        finite = all(torch.isfinite(out).all() for out in outputs)
        return Verdict(problem="" if finite else "a value is not finite")

    chunk = inputs[:, 0]
    variants = [Variant(name, partial(partial, step, state, chunk), role="ours") for name, state in states.items()]
    first = f"chunk {marks[0]}"
    return compare(
        Comparison(SUITE, f"stream {shape.name}", variants, judge=judge, baseline=first, mode="step", dtype=dtype),
        settings,
    )
