"""Read, write and the recurrence over chunks, for any summaries.

The scan has two exact forms. Parallel: the partial summaries of the inputs of all T chunks are taken at once, and the
recurrence touches memory and output tokens only. Stepwise: all parts, one chunk after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat

import torch

from mirasol.kernels.ttm.erase_add import EraseAdd
from mirasol.kernels.ttm.latent_query import LatentQuery, pooled_rows
from mirasol.kernels.ttm.mean import MeanPool
from mirasol.kernels.ttm.params import (
    EraseAddParams,
    LatentQueryParams,
    SummaryParams,
    TokenLearnerParams,
    WriteParams,
    summary_size,
)
from mirasol.kernels.ttm.summary import Partial, Parts, Summary
from mirasol.kernels.ttm.token_learner import TokenLearner

Process = Callable[[torch.Tensor], torch.Tensor]


def prepare(params: WriteParams, sizes: Sequence[int], like: torch.Tensor, backend: str) -> Summary:
    """The summary that `params` describe, by "triton" or "torch", for parts of `sizes` tokens such as `like`."""
    if isinstance(params, TokenLearnerParams):
        return TokenLearner(params, sizes, backend)
    if isinstance(params, LatentQueryParams):
        return LatentQuery(params, sizes, backend)
    if isinstance(params, EraseAddParams):
        return EraseAdd(params)
    return MeanPool(params, sizes, like)


def summarise(params: WriteParams, parts: Sequence[torch.Tensor], backend: str) -> torch.Tensor:
    """Read from (memory, inputs), or write from (memory, inputs, outputs)."""
    return prepare(params, [part.shape[1] for part in parts], parts[0], backend).finish(parts)


def scan(
    memory: torch.Tensor,
    inputs: torch.Tensor,
    read_params: SummaryParams,
    process: Process,
    write_params: WriteParams,
    form: str,
    backend: str,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs [B, r, d] and memories [B, s, d] of every chunk; `inputs` is [B, T, n, d], `form` may be "auto"."""
    sizes = [memory.shape[1], inputs.shape[2], summary_size(read_params)]
    reader, writer = prepare(read_params, sizes[:2], memory, backend), prepare(write_params, sizes, memory, backend)
    chunks: Iterable[torch.Tensor | None] = inputs.unbind(1)
    reads: Iterable[Partial | None] = repeat(None)
    writes: Iterable[Partial | None] = repeat(None)
    if form == "auto":
        form = choose_form(inputs, carried_rows(read_params, backend) + carried_rows(write_params, backend), backend)
    if form == "parallel":
        reads, writes = _by_chunk(reader, [None, inputs]), _by_chunk(writer, [None, inputs, None])
        chunks = [None] * inputs.shape[1]
    outputs, memories = [], []
    for chunk, read, write in zip(chunks, reads, writes, strict=False):
        out = process(reader.finish([memory, chunk], read))
        memory = writer.finish([memory, chunk, out], write)
        outputs.append(out)
        memories.append(memory)
    return outputs, memories


def choose_form(inputs: torch.Tensor, rows: int, backend: str) -> str:
    """The faster form for inputs [B, T, n, d] whose partials hold `rows` a chunk, "parallel" or "stepwise".

    On a CPU the matrix products take most of the time, and large ones are faster than the parallel form's large and
    small ones.
    """
    _, chunks, n, _ = inputs.shape
    if backend == "torch" and inputs.device.type == "cpu":
        return "stepwise"
    return "parallel" if chunks > 1 and n >= rows else "stepwise"


def carried_rows(params: WriteParams, backend: str) -> int:
    """How many rows of width d the partial summary of a chunk's inputs holds."""
    if isinstance(params, EraseAddParams):
        return 0
    pooled = pooled_rows(params, backend) if isinstance(params, LatentQueryParams) else None
    return summary_size(params) if pooled is None else pooled


def _by_chunk(summary: Summary, parts: Parts) -> Iterable[Partial | None]:
    """Partials of the inputs [B, T, n, d] of all chunks at once; cut so that backward has one stack, not T slices."""
    inputs = parts[1]
    assert inputs is not None
    shape = inputs.shape[:2]
    partial = summary.partial([None if part is None else part.flatten(0, 1) for part in parts])
    if partial is None:
        return repeat(None)
    outs = partial.out.unflatten(0, shape).unbind(1)
    lses = [None] * shape[1] if partial.lse is None else partial.lse.unflatten(0, shape).unbind(1)
    return [Partial(out, lse) for out, lse in zip(outs, lses, strict=True)]
