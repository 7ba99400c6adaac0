"""What the compiled kernels of a call move and execute: counted by running their PTX in the emulator of tests/emulator.

Emulation is slow, so that a large call is counted at small sizes. All counters are linear in two numbers of a call
(rows and visible pairs of attention; one and the batch elsewhere): two sizes fix the line, and a third one, counted as
well, must lie on it within 1 %.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from core import machine
from core.predict import Work

TESTS = machine.REPOSITORY / "tests"  # where the emulator and the compile-only harness stand
TARGET, MULTIPROCESSORS = "sm_90", 132
TOLERANCE = 0.01
GRID = 0.03  # difference of a grid: a smaller device holds a whole number of multiprocessors
MINOR = 0.05  # share of a call's instructions below which a kernel may be split otherwise: its sums cost little
NEGLIGIBLE = 0.002  # of a launch's largest counter: what is smaller costs nothing
WAITING = ("mbarrier.", "bra", "selp.", "setp.", "warp_instructions", "thread_instructions")
"""What a warp that waits executes over and over, as often as turns happen to fall: not compared, with its sums."""

Size = tuple[float, float]
Call = Callable[[], Any]


class Unlike(Exception):
    """What was counted at small sizes does not predict another size."""


@dataclass(frozen=True)
class Problem:
    """A call to be counted.

    make: (size, device) -> the call, where size is whatever the problem varies (tokens, batch, ...).
    size: the one asked for.
    numbers: size -> the two numbers in which counters are linear.
    counted: the sizes emulated: the one asked for alone; or two that fix the line, and a third to check it, if any.
    multiprocessors: of the device that host code sees at a size: where it decides by programs a multiprocessor, a
    smaller size must see a smaller device.
    copies: how often what is emulated repeats independently: batch times heads.
    weights: relative lengths of the programs with matrix products, in the order of what they own; empty: all alike.
    """

    make: Callable[[int, str], Call]
    size: int
    counted: Sequence[int] = ()
    numbers: Callable[[int], Size] = lambda size: (1.0, float(size))
    multiprocessors: Callable[[int], int] = lambda size: MULTIPROCESSORS
    copies: int = 1
    weights: Sequence[float] = ()


def measure(problem: Problem) -> list[Work]:
    """The launches of the call at the size asked for, with registers from the assembler."""
    counted = {size: count(problem, size) for size in problem.counted or (problem.size,)}
    if problem.size in counted:
        works = counted[problem.size]
    else:
        line = [(problem.numbers(size), counted[size]) for size in problem.counted[:2]]
        for size in problem.counted[2:]:
            worst = deviation(extrapolate(line, problem.numbers(size)), counted[size])
            if worst > TOLERANCE:
                raise Unlike(f"counters at {problem.counted[:2]} miss those at {size} by {worst:.1%}")
        works = extrapolate(line, problem.numbers(problem.size))
        if problem.copies == 1:  # else the call at its real size is too large to be started
            works = regrid(works, count(problem, problem.size, programs=(0,)))
    needed = registers(problem.make, problem.size if problem.copies == 1 else (problem.counted or [problem.size])[0])
    return [finish(replace(work, registers=needed.get(work.name, 0)), problem) for work in works]


def count(problem: Problem, size: int, programs: tuple[int, ...] | None = None) -> list[Work]:
    """Every launch of the call at a size, emulated whole or only the given programs of each."""
    return _count(problem.make, size, problem.multiprocessors(size), programs)


@cache  # sequences of many lengths share the sizes that are counted
def _count(
    make: Callable[[int, str], Call], size: int, multiprocessors: int, programs: tuple[int, ...] | None
) -> list[Work]:
    require_compiler()
    from emulator.device import emulated

    with emulated(TARGET, multiprocessors=multiprocessors, count=True, check=False, programs=programs) as launches:
        make(size, "cpu")()
    wrong = [f"{launch.name}: {error}" for launch in launches for error in launch.errors]
    if wrong and programs is None:
        raise RuntimeError(f"the emulator found {wrong[0]}")
    return [work_of(launch) for launch in launches]


def require_compiler() -> None:
    """Put the emulator on the path, where Triton compiles; interpreted kernels execute nothing that could be counted.

    Raises:
        RuntimeError: Triton interprets in this process.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("counting needs a process with TRITON_INTERPRET=0: it counts compiled kernels")
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))


def work_of(launch: Any) -> Work:
    """A launch of the emulator as work."""
    x, y, z = launch.grid
    executed = dict(launch.executed)
    return Work(
        launch.name,
        x * y * z,
        launch.threads,
        launch.shared,
        asdict(launch.counters),
        executed,
        specialized=any(opcode.startswith("setmaxnreg") for opcode in executed),  # registers move between warps
    )


@cache
def registers(make: Callable[[int, str], Call], size: int) -> dict[str, int]:
    """Registers of a thread by kernel, assembled without a GPU; the first launch of a kernel counts."""
    require_compiler()
    from aot.harness import compile_only, resources

    with compile_only(TARGET) as kernels:
        make(size, "meta")()
    found: dict[str, int] = {}
    for kernel in kernels:
        if kernel.name not in found:
            found[kernel.name] = resources(kernel).registers
    return found


def finish(work: Work, problem: Problem) -> Work:
    """All copies of a launch, with the lengths of its programs, the longest first, as the kernels start them."""
    programs = round(work.programs) * problem.copies
    lengths: list[float] = []
    if problem.weights and work.count("matrix_flops"):
        owners, least = len(problem.weights), round(work.programs)
        own = sorted((problem.weights[i * owners // least] for i in range(least)), reverse=True)
        lengths = [length for length in own for _ in range(problem.copies)]
    return replace(
        work,
        programs=programs,
        counters={name: problem.copies * n for name, n in work.counters.items()},
        executed={opcode: problem.copies * n for opcode, n in work.executed.items()},
        lengths=lengths,
    )


def extrapolate(counted: Sequence[tuple[Size, list[Work]]], at: Size) -> list[Work]:
    """The launches at `at` by those at two other sizes: whatever is linear in both numbers follows their line."""
    ((x1, y1), first), ((x2, y2), second) = counted
    area = x1 * y2 - x2 * y1
    a, b = (at[0] * y2 - x2 * at[1]) / area, (x1 * at[1] - at[0] * y1) / area
    _expect_alike(first, second)

    def line(one: Mapping[str, float], two: Mapping[str, float]) -> dict[str, float]:
        return {name: max(0.0, a * one.get(name, 0) + b * two.get(name, 0)) for name in {**one, **two}}

    return [
        replace(
            one,
            programs=round(a * one.programs + b * two.programs),
            counters=line(one.counters, two.counters),
            executed=line(one.executed, two.executed),
        )
        for one, two in zip(first, second, strict=True)
    ]


def regrid(works: list[Work], started: list[Work]) -> list[Work]:
    """With the grids that the call really has, which must be those extrapolated but for minor kernels."""
    _expect_alike(works, started)
    total = sum(work.count("warp_instructions") for work in works)
    for work, real in zip(works, started, strict=True):
        if abs(work.programs / real.programs - 1) > GRID and work.count("warp_instructions") > MINOR * total:
            raise Unlike(f"{work.name} has {real.programs} programs, {work.programs} were extrapolated")
    return [replace(work, programs=real.programs) for work, real in zip(works, started, strict=True)]


def deviation(predicted: list[Work], counted: list[Work]) -> float:
    """The largest relative difference between any two grids, and counters that matter."""
    _expect_alike(predicted, counted)
    worst = 0.0
    for guess, real in zip(predicted, counted, strict=True):
        worst = max(worst, abs(guess.programs / real.programs - 1))
        for of_guess, of_real in ((guess.counters, real.counters), (guess.executed, real.executed)):
            least = NEGLIGIBLE * max(of_real.values(), default=0)
            for name in {**of_guess, **of_real}:
                if name.startswith(WAITING):
                    continue
                difference = abs(of_guess.get(name, 0) - of_real.get(name, 0))
                if difference > least:
                    worst = max(worst, difference / max(of_real.get(name, 0), least))
    return worst


def _expect_alike(first: list[Work], second: list[Work]) -> None:
    """Two sizes must start the same kernels with the same blocks."""
    kinds = [[(work.name, work.threads, work.shared) for work in works] for works in (first, second)]
    if kinds[0] != kinds[1]:
        raise Unlike(f"launches differ between sizes: {kinds[0]} and {kinds[1]}")
