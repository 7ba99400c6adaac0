"""Opt-in search for tiles: times candidates on the GPU at hand and prints rows for the table in `configs`.

    python -m mirasol.kernels.attention.search --width 128 --dtype bfloat16 --chunk 448 --chunks 64

Nothing here runs during a call of `chunked_attention`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mirasol.kernels.attention import configs
from mirasol.kernels.attention.api import chunked_attention
from mirasol.kernels.attention.configs import Tile

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


def candidates(kernel: str, itemsize: int, *, tma: bool) -> Iterator[Tile]:
    """Tiles worth trying; many of them do not fit, which the search finds out."""
    sizes = (64, 128) if itemsize == 2 else (16, 32, 64)
    stages = (1, 2, 3, 4) if kernel == configs.FORWARD else (1, 2, 3)
    for block_m, block_n, warps, stage in itertools.product(sizes, sizes, (4, 8), stages):
        yield Tile(block_m, block_n, warps, stage, tma=tma)


def search(problem: Problem, kernel: str, tiles: Sequence[Tile], timer: Timer, device: str) -> list[tuple[float, Tile]]:
    """(milliseconds, tile) of all tiles that run, the fastest first; of forward and backward for backward kernels."""
    shape = (problem.batch, problem.heads, problem.chunks * problem.chunk, problem.width)
    needs_grad = kernel != configs.FORWARD
    q, k, v = (torch.randn(shape, device=device, dtype=problem.dtype, requires_grad=needs_grad) for _ in range(3))
    grad = torch.randn(shape, device=device, dtype=problem.dtype)

    def call() -> None:
        out = chunked_attention(q, k, v, q_chunk=problem.chunk, window=problem.window, backend="triton")
        if needs_grad:
            torch.autograd.grad(out, (q, k, v), grad)

    timed = []
    for tile in tiles:
        with configs.pinned(**{kernel: tile}):
            try:
                timed.append((timer(call), tile))
            except Exception as error:  # whatever a tile that does not fit raises: out of resources, compiler failures
                sys.stderr.write(f"{tile}: {type(error).__name__}\n")
    return sorted(timed, key=lambda row: row[0])


def format_row(problem: Problem, kernel: str, tile: Tile, masked: bool, machine: str) -> str:
    """A line for the table."""
    key = (kernel, configs.padded_width(problem.width), problem.dtype.itemsize, masked)
    return f"    {key!r}: {replace(tile, source=f'measured on {machine}')!r},"


def main(arguments: Sequence[str] | None = None) -> int:
    """Search one problem; returns 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 1), ("heads", 16), ("chunks", 64), ("chunk", 448), ("width", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--window", type=int, default=None)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--kernel", choices=configs.KERNELS, default=configs.FORWARD)
    parser.add_argument("--pointers", action="store_true", help="search the rows without descriptors")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("The search times kernels and needs a GPU.\n")
        return 1
    from triton.testing import do_bench

    dtype = getattr(torch, options.dtype)
    sizes = (options.batch, options.heads, options.chunks, options.chunk, options.width)
    problem = Problem(*sizes, dtype, options.window)
    tma = not options.pointers and torch.cuda.get_device_capability()[0] >= 9
    tiles = list(candidates(options.kernel, dtype.itemsize, tma=tma))
    for milliseconds, tile in search(problem, options.kernel, tiles, do_bench, "cuda")[:5]:
        masked = bool(problem.chunk % tile.block_m or problem.chunk % tile.block_n)
        row = format_row(problem, options.kernel, tile, masked, torch.cuda.get_device_name())
        sys.stdout.write(f"{row}  # {milliseconds:.3f} ms\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
