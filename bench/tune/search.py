"""Search block sizes on the GPU at hand, beside those that the operators' `config` modules compute.

    python bench/tune/search.py attention --seconds 540 --json found.json
    python bench/tune/search.py blocks --seconds 540 --json found.json     # those of the TTM and of the Combiner

Nothing here runs during a call of an operator. A configuration is timed only if its results are those of the computed
one; what is found is a candidate, that ships once it has passed the compile-only tests and the emulator.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, the folder of all rooms

import torch
from torch import Tensor

from core import machine
from core.harness import one_line, tensors_of
from mirasol.kernels import TokenLearnerParams, chunked_attention, combiner_project, ttm_read, ttm_write
from mirasol.kernels.attention.triton.config import BACKWARD_KV, FORWARD, KERNELS, Config, pinned
from mirasol.kernels.combiner.triton import forward as combiner
from mirasol.kernels.combiner.triton.config import ForwardConfig
from mirasol.kernels.ttm.pool.triton import host as ttm
from mirasol.kernels.ttm.pool.triton.config import Block

Timer = Callable[[Callable[[], object]], float]  # milliseconds of one call
Pin = Callable[[Any], contextlib.AbstractContextManager[Any]]
AGREE = 0.02  # largest difference of a result, in shares of its largest value: another order of bfloat16 sums
BEST = 8  # configurations of a task that are written down


@dataclass(frozen=True)
class Task:
    """A call and the configurations to try on it; `pin` makes the call use one of them."""

    name: str
    call: Callable[[], Any]
    candidates: Sequence[Any]
    pin: Pin


def search(task: Task, timer: Timer, deadline: float) -> dict[str, Any]:
    """The computed configuration's milliseconds and the fastest others, tried in random order until the deadline."""
    exact = [out.detach().clone() for out in tensors_of(task.call())]
    computed = timer(task.call)
    tried, timed, refused = 0, [], []
    for found in random.Random(0).sample(list(task.candidates), len(task.candidates)):
        if time.monotonic() > deadline:
            break
        tried += 1
        with task.pin(found):
            try:
                if not _agree(exact, tensors_of(task.call())):
                    refused.append(f"{found}: other results")
                    continue
                timed.append((timer(task.call), found))
            except Exception as error:  # whatever does not fit raises: out of resources, compiler failures
                refused.append(f"{found}: {one_line(error)}")
    timed.sort(key=lambda row: row[0])
    return {
        "task": task.name,
        "computed_ms": computed,
        "tried": tried,
        "of": len(task.candidates),
        "best": [{"ms": ms, "config": asdict(found)} for ms, found in timed[:BEST]],
        "refused": refused,
    }


def _agree(exact: list[Tensor], found: list[Tensor]) -> bool:
    return len(exact) == len(found) and all(
        bool((a - b).abs().max() <= AGREE * a.abs().max()) for a, b in zip(exact, found, strict=True)
    )


def run(tasks: Sequence[Task], timer: Timer, seconds: float, file: Path | None) -> list[dict[str, Any]]:
    """All tasks, each with the same share of the time that is left; what there is is written after each."""
    end, results = time.monotonic() + seconds, []
    for index, task in enumerate(tasks):
        now = time.monotonic()
        if now >= end:
            break
        results.append(search(task, timer, now + (end - now) / (len(tasks) - index)))
        best = results[-1]["best"][:1]
        sys.stdout.write(f"{task.name}: computed {results[-1]['computed_ms']:.3f} ms, best {best or 'none'}\n")
        if file is not None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"machine": machine.describe(device), "tasks": results}, indent=1))
    return results


def attention_tasks(device: str) -> Iterator[Task]:
    """Chunks of 512, which need no masks, and of 448, which do; both head widths, every kernel."""
    for width, chunk, kernel in itertools.product((128, 64), (512, 448), KERNELS):
        shape = (1, 16, 16 * chunk, width)
        graded = kernel != FORWARD
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=graded) for _ in range(3))

        def call(q: Tensor = q, k: Tensor = k, v: Tensor = v, chunk: int = chunk, graded: bool = graded) -> Any:
            out = chunked_attention(q, k, v, q_chunk=chunk, backend="triton")
            return torch.autograd.grad(out, (q, k, v), torch.ones_like(out)) if graded else out

        def pin(found: Config, kernel: str = kernel) -> contextlib.AbstractContextManager[Any]:
            return pinned(**{kernel: found})

        yield Task(f"attention {kernel} D {width} chunk {chunk}", call, list(attention_candidates(kernel)), pin)


def attention_candidates(kernel: str) -> Iterator[Config]:
    """Configurations worth trying; many of them do not fit, which the search finds out."""
    own, other = (64, 128), (32, 64, 128)
    for a, b, warps, stage in itertools.product(own, other, (4, 8), (1, 2, 3, 4) if kernel == FORWARD else (1, 2, 3)):
        block_m, block_n = (b, a) if kernel == BACKWARD_KV else (a, b)
        yield Config(block_m, block_n, warps, stage, tma=True)


def block_tasks(device: str) -> Iterator[Task]:
    """Every block of the TTM's kernels in a read and a write, and the Combiner's forward pass."""
    d, s, n, r, batch = 768, 96, 448, 32, 16
    memory, inputs, outputs = (_randn(device, batch, tokens, d) for tokens in (s, n, r))
    for k in (r, s):
        sizes = ((d,), (d,), (64, d), (64,), (k, 64), (k,))
        params = TokenLearnerParams(*(_randn(device, *size) * size[-1] ** -0.5 for size in sizes))

        def forward(k: int = k, params: TokenLearnerParams = params) -> Tensor:
            if k == r:
                return ttm_read(memory, inputs, params, backend="triton")
            return ttm_write(memory, outputs, inputs, params, backend="triton")

        def both(forward: Callable[[], Tensor] = forward) -> Any:
            out = forward()
            return torch.autograd.grad(out, (memory, inputs), torch.ones_like(out))

        for room in (field.name for field in fields(ttm.Config) if field.type == "Block"):
            call = forward if room == "pool" else both
            yield Task(f"ttm {'read' if k == r else 'write'} {room}", call, list(block_candidates()), _ttm_pin(room))
    x, weight = _randn(device, 16, 16, 390, 1024), _randn(device, 1024, 1024) * 1024**-0.5
    norm = _randn(device, 1024), _randn(device, 1024)

    def project() -> Tensor:
        with torch.no_grad():
            return combiner_project(x, 32, weight, None, *norm, backend="triton")

    yield Task("combiner forward", project, list(combiner_candidates()), _combiner_pin)


def _randn(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16).requires_grad_()


def block_candidates() -> Iterator[Block]:
    for values in itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (1, 2, 3)):
        yield Block(*values)


def combiner_candidates() -> Iterator[ForwardConfig]:
    for values in itertools.product((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4)):
        yield ForwardConfig(*values)


def _ttm_pin(room: str) -> Pin:
    computed = ttm.config

    def pin(block: Block) -> contextlib.AbstractContextManager[Any]:
        return mock.patch.object(ttm, "config", lambda *a, **k: replace(computed(*a, **k), **{room: block}))

    return pin


def _combiner_pin(found: ForwardConfig) -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(combiner, "forward_config", return_value=found)


TASKS: dict[str, Callable[[str], Iterable[Task]]] = {"attention": attention_tasks, "blocks": block_tasks}


def main(arguments: Sequence[str] | None = None) -> int:
    """Search; returns 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(TASKS))
    parser.add_argument("--filter", default="", help="only tasks whose name contains this text")
    parser.add_argument("--seconds", type=float, default=540, help="for all of them (default: 540)")
    parser.add_argument("--json", type=Path, help="results file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("The search times kernels and needs a GPU.\n")
        return 1
    from triton.testing import do_bench

    tasks = [task for task in TASKS[options.what]("cuda") if options.filter in task.name]
    run(tasks, do_bench, options.seconds, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
