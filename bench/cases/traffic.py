"""Without a GPU: what every launch of the operators moves and executes, and how long it should take on an H100 or H200.

Nothing is timed. Compiled kernels run in the emulator of tests/emulator (`traffic`), and arithmetic on what they did
predicts their time (`predict`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.predict import H100, H200, Work, predict
from core.rows import Case, Row, Settings
from core.traffic import MULTIPROCESSORS, TARGET, Call, Problem, measure, require_compiler, work_of
from mirasol.kernels import (
    TUBEVIT_TUBES,
    TokenLearnerParams,
    chunked_attention,
    combiner_project,
    extract_tubes,
    ttm_read,
    ttm_scan,
    ttm_write,
    tube_grid,
    visible_pairs,
)
from report.console import Table
from report.pages import conflicts
from report.tables import number, scaled

SUITE = "traffic"
CHUNK = 512
HIDDEN = 64


@dataclass(frozen=True)
class Operator:
    """One line of a page: what is counted, and what its time is held against.

    problem: the call to be counted, or what counts it.
    flops: useful operations of a pass; moved: bytes that a pass must move, each once; by "fwd" and "bwd".
    listed: whether a page shows its single launches.
    """

    page: str
    name: str
    problem: Problem | Callable[[], list[Work]]
    flops: dict[str, float]
    moved: dict[str, float]
    listed: bool = False


def cases(settings: Settings) -> list[Case]:
    """One case for every operator and shape; quick: the smallest of each operator."""
    found = [*attentions(), *ttms(), *combiners(), *tubes()]
    if settings.effort == "quick":
        found = list({operator.page: operator for operator in reversed(found)}.values())[::-1]
    return [Case(f"{operator.page} {operator.name}", partial(run, operator)) for operator in found]


def run(operator: Operator, settings: Settings) -> list[Row]:
    """A row for every launch."""
    works = measure(operator.problem) if isinstance(operator.problem, Problem) else operator.problem()
    return [_row(operator, index, work) for index, work in enumerate(works)]


def _row(operator: Operator, index: int, work: Work) -> Row:
    mode = "bwd" if "_bwd_" in work.name else "fwd"
    times = {device.name: predict(work, device) for device in (H100, H200)}
    return Row(
        SUITE,
        f"{operator.page} {operator.name}",
        f"{index} {work.name.removesuffix('_kernel')}",
        mode=mode,
        role="ours",
        dtype="bfloat16",
        flops=int(operator.flops[mode]) if mode in operator.flops else None,
        bytes=int(operator.moved[mode]) if mode in operator.moved else None,
        detail={
            "predicted": {name: asdict(time) for name, time in times.items()},
            "programs": work.programs,
            "threads": work.threads,
            "registers": work.registers,
            "shared": work.shared,
            "specialized": work.specialized,
            "listed": operator.listed,
            "distinct": work.distinct,
            "loaded": work.loaded,
            "counters": dict(work.counters),
            "executed": dict(work.executed),
        },
    )


def tables(rows: list[Row]) -> list[Table]:
    columns = ["case", "launch", "programs", "DRAM", "L2 to SM", "matrix", "exp2", "instructions", "bank conflicts"]
    columns += ["bound", "H100 us", "H200 us"]
    notes = [
        "Predicted, not measured: compiled sm_90 kernels counted in an emulator, times by bench/core/predict.py",
        "DRAM: distinct bytes; matrix: operations; exp2 and instructions: warps' PTX instructions, which are not SASS",
    ]
    return [Table("Predicted traffic and times", columns, [_line(row) for row in rows], left=2, notes=notes)]


def _line(row: Row) -> list[str]:
    if row.status != "ok":
        return [row.case, row.impl, row.status, row.reason, *[""] * 8]
    d, counters = row.detail, row.detail["counters"]
    exponentials = sum(n for opcode, n in d["executed"].items() if opcode.startswith("ex2."))
    times = [number(1e6 * d["predicted"][device]["seconds"]) for device in ("H100", "H200")]
    return [
        row.case,
        f"{row.impl} {row.mode}",
        str(d["programs"]),
        scaled(d["distinct"], "B"),
        scaled(d["loaded"], "B"),
        scaled(counters.get("matrix_flops")),
        scaled(exponentials),
        scaled(counters.get("warp_instructions")),
        conflicts(counters),
        d["predicted"]["H200"]["bound"],
        *times,
    ]


def headline(rows: list[Row]) -> str:
    launches = sum(row.status == "ok" for row in rows)
    return f"{launches} launches counted and predicted; nothing was timed" if launches else ""


def _values(device: str, *shape: int, grad: bool = True) -> Tensor:
    """Counters do not depend on values, so zeros do: large ones take no memory before they are written."""
    return torch.zeros(shape, dtype=torch.bfloat16, device=device, requires_grad=grad)


def _both(forward: Callable[[], Tensor]) -> Any:
    """Forward and backward."""
    out = forward()
    out.backward(torch.zeros_like(out))


def attentions() -> list[Operator]:
    long = [(width, n, None) for width in (64, 128) for n in (2048, 4096, 8192, 16384, 32768)]
    windowed = [(width, 32768, 2) for width in (64, 128)]
    found = [attention(width, n, window) for width, n, window in [*long, *windowed]]
    found += [attention(width, 8192, None, specialized=True) for width in (64, 128)]
    return [*found, video(), stream()]


def attention(width: int, n: int, window: int | None, *, specialized: bool = False) -> Operator:
    """B x H heads of n tokens in chunks of 512, so many that every length has 32,768 x 16 rows."""
    heads = 16 * 32768 // n
    chunks = n // CHUNK
    pairs = [CHUNK * min(c + 1, window or chunks) for c in range(chunks)]  # a row of each chunk sees so many keys

    def numbers(tokens: int) -> tuple[float, float]:
        return tokens, visible_pairs(tokens, tokens, q_chunk=CHUNK, window=window)

    problem = Problem(
        _head(width, window, specialized),
        n,
        counted=[size * CHUNK for size in ((3, 5, 4) if window else (2, 4, 3))],
        numbers=numbers,
        multiprocessors=lambda _: 1,  # so many heads leave nothing to split
        copies=heads,
        weights=pairs,
    )
    flops, moved = _attention_costs(heads * numbers(n)[1], heads * n, width)
    name = f"B·H {heads} N {n} chunk {CHUNK} D {width}"
    name += f" window {window}" if window else ""
    name += " specialised warps" if specialized else ""
    return Operator("attention", name, problem, flops, moved, listed=n == 8192 or window is not None)


@cache
def _head(width: int, window: int | None, specialized: bool) -> Callable[[int, str], Call]:
    """One head's call, by tokens and device."""
    from mirasol.kernels.attention.triton.config import specialized_warps

    def make(tokens: int, device: str) -> Call:
        q, k, v = (_values(device, 1, 1, tokens, width) for _ in range(3))

        def call() -> None:
            with specialized_warps() if specialized else contextlib.nullcontext():
                _both(lambda: chunked_attention(q, k, v, q_chunk=CHUNK, window=window, backend="triton"))

        return call

    return make


def _attention_costs(pairs: float, rows: float, width: int) -> tuple[dict[str, float], dict[str, float]]:
    forward = 4 * pairs * width
    return {"fwd": forward, "bwd": 2.5 * forward}, {"fwd": 8 * rows * width, "bwd": 16 * rows * width}


def video() -> Operator:
    heads, frames, tokens, width = 24, 4, 1560, 128
    n = frames * tokens

    def make(size: int, device: str) -> Call:
        q, k, v = (_values(device, 1, 1, size, width) for _ in range(3))
        return lambda: _both(lambda: chunked_attention(q, k, v, q_chunk=tokens, backend="triton"))

    weights = [float(c + 1) for c in range(frames)]
    problem = Problem(make, n, multiprocessors=lambda _: 1, copies=heads, weights=weights)
    flops, moved = _attention_costs(heads * visible_pairs(n, n, q_chunk=tokens), heads * n, width)
    return Operator("attention", f"video B·H {heads} {frames} x {tokens} D {width}", problem, flops, moved, listed=True)


def stream() -> Operator:
    """One query of a stream over all keys, grouped heads: keys are split over programs."""
    batch, heads, heads_k, keys, width = 8, 16, 2, 20000, 128

    def make(size: int, device: str) -> Call:
        q, k, v = (
            _values(device, 1, h, t, width, grad=False) for h, t in ((heads, 1), (heads_k, size), (heads_k, size))
        )
        return lambda: chunked_attention(q, k, v, q_chunk=1, k_chunk=size, backend="triton")

    problem = Problem(make, keys, multiprocessors=lambda _: MULTIPROCESSORS // batch, copies=batch)
    flops, moved = {"fwd": 4.0 * batch * heads * keys * width}, {"fwd": 4.0 * batch * heads_k * keys * width}
    name = f"stream B {batch} H {heads} over {heads_k} keys {keys} D {width}"
    return Operator("attention", name, problem, flops, moved, listed=True)


def ttms() -> list[Operator]:
    found = [ttm(kind, batch) for batch in (1, 16, 32) for kind in ("read", "write")]
    return [*found, scan()]


def _learner(device: str, d: int, k: int) -> TokenLearnerParams:
    shapes = ((d,), (d,), (HIDDEN, d), (HIDDEN,), (k, HIDDEN), (k,))
    return TokenLearnerParams(*(_values(device, *shape) for shape in shapes))


def ttm(kind: str, batch: int, n: int = 448, s: int = 96, r: int = 32, d: int = 768) -> Operator:
    """A read of r tokens from s of memory and n inputs, or a write of memory from those and r outputs."""

    def make(size: int, device: str) -> Call:
        memory, inputs, outputs = (_values(device, size, tokens, d) for tokens in (s, n, r))
        params = _learner(device, d, r if kind == "read" else s)
        if kind == "read":
            return lambda: _both(lambda: ttm_read(memory, inputs, params, backend="triton"))
        return lambda: _both(lambda: ttm_write(memory, outputs, inputs, params, backend="triton"))

    read = batch * (s + n + (r if kind == "write" else 0)) * d * 2.0
    problem = Problem(
        make,
        batch,
        counted=() if batch == 1 else (2, 4),
        multiprocessors=lambda size: round(MULTIPROCESSORS * size / batch),
    )
    name = f"{kind} B {batch} n {n} s {s} r {r} d {d}"
    return Operator("ttm", name, problem, {}, {"fwd": read, "bwd": 2 * read}, listed=batch == 16)


def scan(n: int = 448, s: int = 96, r: int = 32, d: int = 768) -> Operator:
    """Forward over one chunk, process unit left out: a read and a write in turn, as a stream does them."""

    def make(size: int, device: str) -> Call:
        memory, inputs = _values(device, 1, s, d), _values(device, 1, size, n, d)
        read, write = _learner(device, d, r), _learner(device, d, s)

        @torch.no_grad()
        def call() -> None:
            ttm_scan(memory, inputs, read, lambda tokens: tokens, write, backend="triton")

        return call

    moved = {"fwd": (2 * s + 2 * n + 2 * r) * d * 2.0}
    return Operator("ttm", f"scan of 1 chunk B 1 n {n} s {s} r {r} d {d}", Problem(make, 1), {}, moved)


def combiners() -> list[Operator]:
    return [combiner(*shape) for shape in ((4, 16, 390, 32, 1024), (16, 16, 390, 32, 1024), (32, 16, 390, 32, 1024))]


def combiner(batch: int, chunks: int, n: int, m: int, d: int) -> Operator:
    """Training of `combiner_project`; backward without the two products and the sums that PyTorch does."""

    def make(size: int, device: str) -> Call:
        x, weight = _values(device, size, chunks, n, d), _values(device, d, d)
        bias, norm_weight, norm_bias = (_values(device, d) for _ in range(3))
        return lambda: _both(lambda: combiner_project(x, m, weight, bias, norm_weight, norm_bias, backend="triton"))

    kept = batch * chunks * m
    problem = Problem(
        make,
        batch,
        counted=(1, 2) if batch <= 4 else (batch // 8, batch // 4),
        multiprocessors=lambda size: round(MULTIPROCESSORS * size / batch),
    )
    forward = (2 * kept * d + d * d) * 2.0
    return Operator(
        "combiner",
        f"B {batch} T {chunks} n {n} m {m} d {d}",
        problem,
        {"fwd": 2.0 * kept * d * d},
        {"fwd": forward, "bwd": 6.0 * kept * d},
        listed=batch == 16,
    )


def tubes() -> list[Operator]:
    sources = ((torch.uint8, True), (torch.uint8, False), (torch.bfloat16, True))
    return [tube(batch, source, packed) for batch in (1, 8) for source, packed in sources]


def tube(batch: int, source: torch.dtype, packed: bool, frames: int = 32, size: int = 224) -> Operator:
    """TubeViT's tubes of clips as bfloat16 tokens, and the gradient of clips that have one."""
    tokens = 2.0 * sum(int(np.prod(tube_grid(t, frames, size, size))) * t.size for t in TUBEVIT_TUBES)
    wanted = int(_covered(frames, size).sum()) * source.itemsize
    pixels = frames * size * size * 3 * source.itemsize
    name = (
        f"B {batch} {frames} x {size} x {size} {str(source).removeprefix('torch.')} {'packed' if packed else 'planar'}"
    )
    moved = {"fwd": batch * (wanted + tokens), "bwd": batch * (pixels + tokens)}
    return Operator("tubes", name, partial(_count_tubes, batch, source, packed, frames, size), {}, moved, listed=True)


def _count_tubes(batch: int, source: torch.dtype, packed: bool, frames: int, size: int) -> list[Work]:
    """Clips are alike: one is counted. Their bytes in memory decide, not the order of their dimensions."""
    require_compiler()
    from emulator.tubes import emulated

    video = torch.zeros((1, frames, 3, size, size), dtype=source).permute(0, 1, 3, 4, 2)
    if packed:
        video = video.contiguous()
    video.requires_grad_(source.is_floating_point)
    call: dict[str, Any] = dict(mean=(0.5,) * 3, std=(0.25,) * 3, dtype=torch.bfloat16, backend="native")
    with emulated(TARGET, count=True) as launches:
        out = extract_tubes(video, TUBEVIT_TUBES, **call)
        if video.requires_grad:
            torch.autograd.grad(out, video, [torch.zeros_like(t) for t in out])
    return [_tube_work(launch, batch) for launch in launches]


def _tube_work(launch: Any, batch: int) -> Work:
    forward, work = "extract" in launch.name, work_of(launch)
    return replace(
        work,
        name=f"extract_tubes_{'fwd' if forward else 'bwd'}_kernel",
        programs=batch * work.programs,
        counters={name: batch * n for name, n in work.counters.items()},
        executed={opcode: batch * n for opcode, n in work.executed.items()},
        registers=80 if forward else 64,  # the budgets of tests/tubes/test_cuda_build.py
    )


def _covered(frames: int, size: int) -> Any:
    """Which values of a clip some tube covers."""
    clip = np.zeros((frames, size, size, 3), bool)
    for tube in TUBEVIT_TUBES:
        starts = [
            [o + i * s for i in range(n)]
            for o, s, n in zip(tube.offset, tube.stride, tube_grid(tube, frames, size, size), strict=True)
        ]
        (kt, kh, kw), (ts, hs, ws) = tube.kernel, starts
        for t in ts:
            for h in hs:
                for w in ws:
                    clip[t : t + kt, h : h + kh, w : w + kw] = True
    return clip
