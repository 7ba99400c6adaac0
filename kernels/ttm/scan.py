"""The recurrence over chunks, in two exact forms.

Parallel: the partial summaries of the inputs of all T chunks are taken at once, and the recurrence touches memory and
output tokens only. Step by step: read, process, write for one chunk after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from . import ops
from .configs import size_refusals
from .erase_add import EraseAdd
from .fold import fold
from .params import EraseAddParams, SummaryParams, TokenLearnerParams, WriteParams, summary_size
from .summaries import INPUTS, MEMORY, OUTPUTS, Partial, Summary, prepare

Process = Callable[[torch.Tensor], torch.Tensor]


def choose_form(inputs: torch.Tensor, kept: int, backend: str) -> str:
    """The faster form for inputs [B, T, n, d], "parallel" or "stepwise".

    The parallel form's partials hold `kept` rows a chunk, r + s but for what `partial_size` says. On a CPU the matrix
    products take most of the time, and large ones are faster than the parallel form's large and small ones.
    """
    _, chunks, n, _ = inputs.shape
    if backend == "torch" and inputs.device.type == "cpu":
        return "stepwise"
    return "parallel" if chunks > 1 and n >= kept else "stepwise"


def read(memory: torch.Tensor, inputs: torch.Tensor, params: SummaryParams, backend: str) -> torch.Tensor:
    """S_r([memory | inputs])."""
    return prepare(params, [memory.shape[1], inputs.shape[1]], backend).finish({MEMORY: memory, INPUTS: inputs})


def write(
    memory: torch.Tensor, outputs: torch.Tensor, inputs: torch.Tensor, params: WriteParams, backend: str
) -> torch.Tensor:
    """S_s([memory | inputs | outputs]), or the erase-add update."""
    if isinstance(params, EraseAddParams):
        return EraseAdd(params, backend).write(memory, outputs)
    sizes = [memory.shape[1], inputs.shape[1], outputs.shape[1]]
    return prepare(params, sizes, backend).finish({MEMORY: memory, INPUTS: inputs, OUTPUTS: outputs})


def scan(
    memory: torch.Tensor,
    inputs: torch.Tensor,
    read_params: SummaryParams,
    process: Process,
    write_params: WriteParams,
    form: str,
    backend: str,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs [B, r, d] and memories [B, s, d] of every chunk; `inputs` is [B, T, n, d]."""
    sizes = [memory.shape[1], inputs.shape[2], summary_size(read_params)]
    recurrence = choose_recurrence(read_params, write_params, sizes, form, backend)
    outputs, memories = [], []
    for chunk in recurrence.prepare(inputs):
        tokens, pending = recurrence.read(memory, chunk)
        out = process(tokens)
        memory = recurrence.write(memory, out, pending)
        outputs.append(out)
        memories.append(memory)
    return outputs, memories


class Recurrence(Protocol):
    """What differs between the forms of the scan; `chunk` and `pending` are each form's own."""

    def prepare(self, inputs: torch.Tensor) -> list[Any]:
        """inputs [B, T, n, d] -> what is needed of each chunk."""
        ...

    def read(self, memory: torch.Tensor, chunk: Any) -> tuple[torch.Tensor, Any]:
        """The tokens read [B, r, d], and what the write of the same chunk needs."""
        ...

    def write(self, memory: torch.Tensor, outputs: torch.Tensor, pending: Any) -> torch.Tensor:
        """The next memory [B, s, d]."""
        ...


class Stepwise:
    """Chunk by chunk, all sources at a time."""

    def __init__(self, read: SummaryParams, write: WriteParams, sizes: list[int], backend: str) -> None:
        self.reader = prepare(read, sizes[:2], backend)
        self.writer = _prepare_write(write, sizes, backend)

    def prepare(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        return list(inputs.unbind(1))

    def read(self, memory: torch.Tensor, chunk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.reader.finish({MEMORY: memory, INPUTS: chunk}), chunk

    def write(self, memory: torch.Tensor, outputs: torch.Tensor, pending: torch.Tensor) -> torch.Tensor:
        if isinstance(self.writer, EraseAdd):
            return self.writer.write(memory, outputs)
        return self.writer.finish({MEMORY: memory, INPUTS: pending, OUTPUTS: outputs})


class Apart:
    """The inputs of all chunks first, once for the read and once for the write."""

    def __init__(self, read: SummaryParams, write: WriteParams, sizes: list[int], backend: str) -> None:
        self.reader = prepare(read, sizes[:2], backend)
        self.writer = _prepare_write(write, sizes, backend)

    def prepare(self, inputs: torch.Tensor) -> list[tuple[Partial, Partial | None]]:
        tokens, shape = inputs.flatten(0, 1), inputs.shape[:2]
        reads = _by_chunk(self.reader.partial({INPUTS: tokens}), shape)
        if isinstance(self.writer, EraseAdd):
            return [(partial, None) for partial in reads]
        return list(zip(reads, _by_chunk(self.writer.partial({INPUTS: tokens}), shape), strict=True))

    def read(self, memory: torch.Tensor, chunk: tuple[Partial, Partial | None]) -> tuple[torch.Tensor, Partial | None]:
        return self.reader.finish({MEMORY: memory}, chunk[0]), chunk[1]

    def write(self, memory: torch.Tensor, outputs: torch.Tensor, pending: Partial | None) -> torch.Tensor:
        if isinstance(self.writer, EraseAdd):
            return self.writer.write(memory, outputs)
        return self.writer.finish({MEMORY: memory, OUTPUTS: outputs}, pending)


class SideBySide:
    """Two TokenLearners that see the same tokens, by the fused operator: a pass over inputs or memory serves both."""

    def __init__(self, read: TokenLearnerParams, write: TokenLearnerParams) -> None:
        reading, self.writing = fold(read), fold(write)
        self.w1, self.b1 = torch.cat([reading.w1, self.writing.w1]), torch.cat([reading.b1, self.writing.b1])
        self.w2, self.b2 = [read.w2, write.w2], [read.b2, write.b2]
        self.sizes = [read.w2.shape[0], write.w2.shape[0]]

    def prepare(self, inputs: torch.Tensor) -> list[Partial]:
        return _by_chunk(self._both(inputs.flatten(0, 1), None), inputs.shape[:2])

    def read(self, memory: torch.Tensor, chunk: Partial) -> tuple[torch.Tensor, Partial]:
        out, lse = self._both(memory, chunk)
        assert lse is not None
        tokens, pending = out.split(self.sizes, dim=1)
        return tokens.contiguous(), Partial(pending, lse[:, self.sizes[0] :])

    def write(self, memory: torch.Tensor, outputs: torch.Tensor, pending: Partial) -> torch.Tensor:
        return ops.summary([outputs], [], *self.writing, self.w2[1:], self.b2[1:], *pending)[0]

    def _both(self, tokens: torch.Tensor, carry: Partial | None) -> Partial:
        carried = (None, None) if carry is None else carry
        return Partial(*ops.summary([tokens], [], self.w1, self.b1, self.w2, self.b2, *carried))


def choose_recurrence(read: SummaryParams, write: WriteParams, sizes: list[int], form: str, backend: str) -> Recurrence:
    """The fused operator takes two TokenLearners side by side unless positions make their tokens differ."""
    if form == "stepwise":
        return Stepwise(read, write, sizes, backend)
    if backend == "triton" and isinstance(read, TokenLearnerParams) and isinstance(write, TokenLearnerParams):
        same_tokens = read.positions is None and write.positions is None
        if same_tokens and not size_refusals([read, write]):
            return SideBySide(read, write)
    return Apart(read, write, sizes, backend)


def _prepare_write(params: WriteParams, sizes: list[int], backend: str) -> Summary | EraseAdd:
    return EraseAdd(params, backend) if isinstance(params, EraseAddParams) else prepare(params, sizes, backend)


def _by_chunk(partial: Partial, shape: torch.Size) -> list[Partial]:
    """Cut a partial of [B T] items into T partials of B; one stack in backward, not T padded slices."""
    outs = partial.out.unflatten(0, shape).unbind(1)
    lses = [None] * shape[1] if partial.lse is None else partial.lse.unflatten(0, shape).unbind(1)
    return [Partial(out, lse) for out, lse in zip(outs, lses, strict=True)]
