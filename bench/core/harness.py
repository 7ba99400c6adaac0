"""How a benchmark case runs: correctness first, then interleaved rounds in one process, on the same tensors.

A case is a `Comparison`: variants of one piece of work. Every variant is built, called once under a memory measurement
and judged; one that is wrong is never timed. The others take turns, round after round, so that drift of clocks and
neighbours hits all alike, and a ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from core.rows import Effort, Row, Settings, dtype_name

LEAST_ROUNDS = 7
"""Of whatever is timed, but in a quick run: below that a median and its spread say little."""
ROUNDS: dict[Effort, tuple[int, int, float]] = {
    "quick": (2, 3, 0.05),
    "default": (LEAST_ROUNDS, 25, 1.5),
    "full": (10, 100, 10.0),
}
"""Least and most rounds, and the seconds after which no more than the least are run."""

SAMPLE_MS = 2.0  # shorter calls are repeated within a sample until it lasts this long
L2_FLUSH_BYTES = 256 << 20


class Unavailable(Exception):
    """A peer cannot run here; the message says why. Its row reads SKIP, which is no failure."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a correctness check; `problem` is empty where the result is right."""

    error: float | None = None
    allowed: float | None = None
    problem: str = ""


Judge = Callable[[str, list[torch.Tensor]], Verdict]
"""Takes a variant's name and its outputs."""


@dataclass
class Variant:
    """One way to do the work. `make` builds what is needed (timed apart) and returns the call that is timed."""

    name: str
    make: Callable[[], Callable[[], Any]]
    role: Literal["ours", "peer", "limit"] = "peer"
    judged: bool = True  # False: other mathematics on purpose
    foreign: bool = False  # of another package: what it refuses by raising is skipped with the reason, no failure
    flops: int | None = None  # where it differs from the comparison's
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass
class Comparison:
    """Variants of one piece of work, on the same tensors."""

    suite: str
    case: str
    variants: list[Variant]
    judge: Judge
    baseline: str  # the variant that speed-ups refer to
    mode: str = "fwd"
    shape: str = ""
    dtype: torch.dtype = torch.float32
    flops: int | None = None  # useful work: visible pairs only
    bytes: int | None = None  # that must move
    roof: Literal["", "gemm", "copy"] = ""
    rounds: tuple[int, int, float] | None = None
    warm_up: bool = True  # False: the judged call is the warm-up too, for calls of many seconds
    detail: dict[str, Any] = field(default_factory=dict)

    def row(self, variant: Variant, settings: Settings) -> Row:
        return Row(
            self.suite,
            self.case,
            variant.name,
            mode=self.mode,
            role=variant.role,
            shape=self.shape,
            dtype=dtype_name(self.dtype),
            device=settings.device.type,
            baseline=self.baseline,
            flops=self.flops if variant.flops is None else variant.flops,
            bytes=self.bytes,
            roof=self.roof,
            detail={**self.detail, **variant.detail},
        )


def compare(case: Comparison, settings: Settings) -> list[Row]:
    """Build, judge and time every variant; a failure costs only its own row."""
    rows = {variant.name: case.row(variant, settings) for variant in case.variants}
    clock = Clock(settings.device)
    ready: dict[str, tuple[Callable[[], Any], int]] = {}
    for variant in case.variants:
        row = rows[variant.name]
        with _into(row, variant.foreign):
            started = time.perf_counter()
            call = variant.make()
            if case.warm_up:
                call()
                clock.wait()
            built = time.perf_counter() - started
            outputs, row.peak_bytes, seconds = peak_memory(call, settings.device)
            row.build_ms = 1e3 * max(0.0, built - seconds) if case.warm_up else 1e3 * built
            verdict = case.judge(variant.name, tensors_of(outputs)) if variant.judged else Verdict()
            del outputs
            row.error, row.allowed = verdict.error, verdict.allowed
            if verdict.problem:
                row.status, row.reason = "FAIL", f"wrong result: {verdict.problem}"
                continue
            if settings.traces is not None:
                write_trace(call, settings, f"{case.suite}-{case.case}-{case.mode}-{variant.name}")
            ready[variant.name] = call, max(1, min(1000, math.ceil(SAMPLE_MS / max(1e3 * seconds, 1e-3))))
    samples = _rounds(case, ready, rows, clock, settings)
    _summarise(rows, samples, case.baseline)
    return list(rows.values())


def _rounds(
    case: Comparison,
    ready: dict[str, tuple[Callable[[], Any], int]],
    rows: dict[str, Row],
    clock: Clock,
    settings: Settings,
) -> dict[str, list[float]]:
    least, most, seconds = case.rounds or ROUNDS[settings.effort]
    if settings.effort != "quick" and least < LEAST_ROUNDS:
        raise ValueError(f"{case.suite}/{case.case} must be timed {LEAST_ROUNDS} times at least, was {least}")
    samples: dict[str, list[float]] = {name: [] for name in ready}
    started = time.perf_counter()
    gc.collect()
    for index in range(most):
        if index >= least and time.perf_counter() - started > seconds:
            break
        names = [name for name in ready if rows[name].status == "ok"]
        shift = index % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            with _into(rows[name]):
                samples[name].append(clock.sample(*ready[name]))
    return samples


def _summarise(rows: dict[str, Row], samples: dict[str, list[float]], baseline: str) -> None:
    timed = {name: times for name, times in samples.items() if rows[name].status == "ok" and times}
    peers = {name: quantile(times, 0.5) for name, times in timed.items() if rows[name].role == "peer"}
    best = min(peers, key=lambda name: peers[name], default="")
    for name, times in timed.items():
        row = rows[name]
        row.n = len(times)
        row.p20_ms, row.median_ms, row.p80_ms = (quantile(times, q) for q in (0.2, 0.5, 0.8))
        row.tflops = row.flops / row.median_ms / 1e9 if row.flops else None
        row.gbps = row.bytes / row.median_ms / 1e6 if row.bytes else None
        if baseline in timed:
            ratios = [theirs / own for theirs, own in zip(timed[baseline], times, strict=False)]
            row.speedup_p20, row.speedup, row.speedup_p80 = (quantile(ratios, q) for q in (0.2, 0.5, 0.8))
        if row.role == "ours" and best:
            row.best_peer = best
            row.against_best = quantile([t / own for t, own in zip(timed[best], times, strict=False)], 0.5)


@contextlib.contextmanager
def _into(row: Row, foreign: bool = False) -> Iterator[None]:
    """Turn what goes wrong into the row's status."""
    try:
        yield
    except torch.OutOfMemoryError:
        row.status, row.reason = "FAIL" if row.role == "ours" else "SKIP", "out of memory"
    except Unavailable as why:
        row.status, row.reason = "SKIP", str(why)
    except Exception as error:
        row.status, row.reason = ("SKIP", f"does not run: {one_line(error)}") if foreign else ("FAIL", one_line(error))


def one_line(error: BaseException) -> str:
    """Kind and first line of an exception, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}{where}"


class Clock:
    """Times a call: CUDA events behind a flushed L2 cache on a GPU, `perf_counter` elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def sample(self, call: Callable[[], Any], repeats: int) -> float:
        """Milliseconds per call, the mean over `repeats` calls."""
        return self._events(call, repeats) if self.cuda else self._wall(call, repeats)

    def _wall(self, call: Callable[[], Any], repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return 1e3 * (time.perf_counter() - started) / repeats

    def _events(self, call: Callable[[], Any], repeats: int) -> float:
        pairs = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()  # also keeps the queue filled while the call is being launched
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / repeats


def peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[Any, int, float]:
    """Run `call` once: its result, the bytes it held at most beyond those held before, and its seconds.

    Both ways are exact. On CUDA the caching allocator counts; on the CPU the profiler records every allocation and
    release of PyTorch's allocator, and the peak is the largest running sum.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        held, started = torch.cuda.memory_allocated(device), time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated(device) - held, time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        started = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - started
    now = peak = 0
    for size in _allocations(recorded):
        now += size
        peak = max(peak, now)
    return result, peak, seconds


def _allocations(recorded: profile) -> list[int]:
    results = recorded.profiler.kineto_results if recorded.profiler is not None else None
    events: list[Any] = results.events() if results is not None else []
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


def write_trace(call: Callable[[], Any], settings: Settings, name: str) -> None:
    """One call under torch.profiler, as a Chrome trace."""
    assert settings.traces is not None
    settings.traces.mkdir(parents=True, exist_ok=True)
    with profile() as recorded:
        call()
    safe = "".join(letter if letter.isalnum() or letter in "-+." else "_" for letter in name)
    recorded.export_chrome_trace(str(settings.traces / f"{safe}.json"))


def launches(call: Callable[[], Any]) -> int:
    """Kernels that one call launches on the GPU, those of a replayed CUDA graph not counted one by one."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in recorded.key_averages() if "LaunchKernel" in event.key)


def against(exact: Sequence[torch.Tensor], plain: Sequence[torch.Tensor], part: Any = None) -> Judge:
    """Right means: at most twice as far from the exact result as plain PyTorch in the same dtype, plus one rounding.

    Args:
        exact: float64 results.
        plain: the same by plain PyTorch in the dtype under test.
        part: a function that takes from a variant's outputs what `exact` and `plain` hold; None for all.
    """

    def judge(name: str, outputs: list[torch.Tensor]) -> Verdict:
        taken = list(part(outputs)) if part is not None else outputs
        if len(taken) != len(exact):
            return Verdict(problem=f"{len(taken)} outputs, expected {len(exact)}")
        worst = Verdict(0.0, math.inf)
        largest = max(want.abs().max().item() for want in exact)
        for out, want, simple in zip(taken, exact, plain, strict=True):
            if out.shape != want.shape:
                return Verdict(problem=f"shape {list(out.shape)}, expected {list(want.shape)}")
            if not torch.isfinite(out).all():
                return Verdict(problem="a value is not finite")
            error, allowed = _error_and_budget(out, want, simple, largest)
            if worst.allowed is None or worst.error is None or error * worst.allowed >= worst.error * allowed:
                worst = Verdict(error, allowed)
        if worst.error is not None and worst.allowed is not None and worst.error > worst.allowed:
            return Verdict(worst.error, worst.allowed, f"error {worst.error:.2e} exceeds {worst.allowed:.2e}")
        return worst

    return judge


def _error_and_budget(
    out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, largest: float
) -> tuple[float, float]:
    """Error and what is allowed, relative to the magnitude of `exact`.

    A result that is 0 but for rounding, as some gradients are, is measured by the `largest` of all results.
    """
    own = exact.abs().max().item()
    scale = max(own if own > 1e-6 * largest else largest, 1e-30)
    error = (out.detach().double() - exact).abs().max().item()
    theirs = (plain.detach().double() - exact).abs().max().item()
    low = exact.to(out.dtype)
    rounding = 2 * ((low + 0.3 - 0.3).double() - low.double()).abs().max().item()
    floor = scale * (1e-5 if out.dtype in (torch.float32, torch.float64) else 5e-3)
    return error / scale, max(2 * theirs + rounding, floor) / scale


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    """The tensors in a result, in order."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, list | tuple):
        return [tensor for item in outputs for tensor in tensors_of(item)]
    return []


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the sorted values."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def compiled(
    name: str,
    function: Callable[..., Any],
    inputs: Sequence[Any],
    settings: Settings,
    *,
    wrap: Callable[[Callable[..., Any]], Callable[[], Any]] | None = None,
) -> list[Variant]:
    """A peer under `torch.compile`, its build time shown; none in a quick run, which is not to wait for a compiler.

    Args:
        wrap: makes of the compiled function the call that is timed; None: the function on `inputs`.
    """
    if settings.effort == "quick":
        return []
    mode = "max-autotune-no-cudagraphs" if settings.device.type == "cuda" else "default"

    def make() -> Callable[[], Any]:
        torch._dynamo.reset()
        fast = torch.compile(function, dynamic=False, mode=mode)
        call = wrap(fast) if wrap is not None else lambda: fast(*inputs)
        try:
            call()
        except Exception as error:
            raise Unavailable(f"does not compile here: {one_line(error)}") from error
        return call

    return [Variant(name, make, detail={"show_build": True})]


def three_modes(forward: Callable[..., Any], inputs: Sequence[torch.Tensor], grad: torch.Tensor, mode: str) -> Any:
    """The call that is timed for `mode`: fwd (no graph), bwd (of a graph built beforehand) or fwd+bwd.

    Returns outputs for fwd, and the gradients of `inputs` otherwise.
    """
    if mode == "fwd":

        def run_forward() -> Any:
            with torch.no_grad():
                return forward(*inputs)

        return run_forward
    if mode == "bwd":
        out = forward(*inputs)
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)
    return lambda: torch.autograd.grad(forward(*inputs), inputs, grad)
