"""Search block sizes of the attention kernels on the GPU at hand, beside those that `config` computes.

    python bench/search_attention.py --width 128 --dtype bfloat16 --chunk 448 --chunks 64

Nothing here runs during a call of `chunked_attention`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mirasol.kernels import chunked_attention
from mirasol.kernels.attention.triton.config import FORWARD, KERNELS, Config, pinned

Timer = Callable[[Callable[[], object]], float]  # milliseconds of one call


@dataclass(frozen=True)
class Problem:
    """What is timed: B x H heads of `width` columns, `chunks` chunks of `chunk` tokens."""

    batch: int
    heads: int
    chunks: int
    chunk: int
    width: int
    dtype: torch.dtype
    window: int | None = None


def candidates(kernel: str, itemsize: int, *, tma: bool) -> Iterator[Config]:
    """Configurations worth trying; many of them do not fit, which the search finds out."""
    sizes = (64, 128) if itemsize == 2 else (16, 32, 64)
    stages = (1, 2, 3, 4) if kernel == FORWARD else (1, 2, 3)
    for block_m, block_n, warps, stage in itertools.product(sizes, sizes, (4, 8), stages):
        yield Config(block_m, block_n, warps, stage, tma=tma)


def search(
    problem: Problem, kernel: str, configs: Iterable[Config | None], timer: Timer, device: str
) -> list[tuple[float, Config | None]]:
    """(milliseconds, configuration) of all that run, the fastest first; None is what `config` computes.

    Backward kernels are timed with the forward pass.
    """
    shape = (problem.batch, problem.heads, problem.chunks * problem.chunk, problem.width)
    needs_grad = kernel != FORWARD
    q, k, v = (torch.randn(shape, device=device, dtype=problem.dtype, requires_grad=needs_grad) for _ in range(3))
    grad = torch.randn(shape, device=device, dtype=problem.dtype)

    def call() -> None:
        out = chunked_attention(q, k, v, q_chunk=problem.chunk, window=problem.window, backend="triton")
        if needs_grad:
            torch.autograd.grad(out, (q, k, v), grad)

    timed: list[tuple[float, Config | None]] = []
    for found in configs:
        with pinned(**({} if found is None else {kernel: found})):
            try:
                timed.append((timer(call), found))
            except Exception as error:  # whatever does not fit raises: out of resources, compiler failures
                sys.stderr.write(f"{found}: {type(error).__name__}\n")
    return sorted(timed, key=lambda row: row[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Search one problem; returns 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 1), ("heads", 16), ("chunks", 64), ("chunk", 448), ("width", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--window", type=int, default=None)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--kernel", choices=KERNELS, default=FORWARD)
    parser.add_argument("--pointers", action="store_true", help="search loads without descriptors")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("The search times kernels and needs a GPU.\n")
        return 1
    from triton.testing import do_bench

    dtype = getattr(torch, options.dtype)
    sizes = (options.batch, options.heads, options.chunks, options.chunk, options.width)
    problem = Problem(*sizes, dtype, options.window)
    tma = not options.pointers and torch.cuda.get_device_capability()[0] in (9, 10)
    tried = [None, *candidates(options.kernel, dtype.itemsize, tma=tma)]
    for rank, (milliseconds, found) in enumerate(search(problem, options.kernel, tried, do_bench, "cuda")):
        if rank < 5 or found is None:
            sys.stdout.write(f"{milliseconds:.3f} ms  {found or 'as computed'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
