"""The recurrence over chunks, in two exact forms, and the erase-add write.

Parallel: the partial summaries of the inputs of all T chunks are taken at once, and the recurrence touches memory and
output tokens only. Step by step: read, process, write for one chunk after another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .params import EraseAddParams, MlpParams, SummaryParams, WriteParams, summary_size
from .reference import NORM_EPS, mlp
from .summaries import INPUTS, MEMORY, OUTPUTS, Partial, Summary, inputs_of_all_chunks, prepare

Process = Callable[[torch.Tensor], torch.Tensor]
Write = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", "Partial | None"], torch.Tensor]


def prefers_parallel(chunks: int, inputs: int, kept: int) -> bool:
    """Whether the parallel form is the faster one.

    Its partials hold `kept` = r + s tokens a chunk (s = 0 for an erase-add write); that pays where the `inputs`
    tokens a chunk are at least as many and there is more than one chunk to take together.
    """
    return chunks > 1 and inputs >= kept


def read(memory: torch.Tensor, inputs: torch.Tensor, params: SummaryParams, backend: str) -> torch.Tensor:
    """S_r([memory | inputs])."""
    return prepare(params, [memory.shape[1], inputs.shape[1]], backend).finish({MEMORY: memory, INPUTS: inputs})


def write(
    memory: torch.Tensor, outputs: torch.Tensor, inputs: torch.Tensor, params: WriteParams, backend: str
) -> torch.Tensor:
    """S_s([memory | inputs | outputs]), or the erase-add update."""
    if isinstance(params, EraseAddParams):
        return erase_add(memory, outputs, params)
    sizes = [memory.shape[1], inputs.shape[1], outputs.shape[1]]
    return prepare(params, sizes, backend).finish({MEMORY: memory, INPUTS: inputs, OUTPUTS: outputs})


def scan(
    memory: torch.Tensor,
    inputs: torch.Tensor,
    read_params: SummaryParams,
    process: Process,
    write_params: WriteParams,
    parallel: bool,
    backend: str,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs [B, r, d] and memories [B, s, d] of every chunk; `inputs` is [B, T, n, d]."""
    sizes = [memory.shape[1], inputs.shape[2], summary_size(read_params)]
    reader = prepare(read_params, sizes[:2], backend)
    writer = None if isinstance(write_params, EraseAddParams) else prepare(write_params, sizes, backend)
    partials = _partials(reader, writer, inputs) if parallel else None
    outputs, memories = [], []
    for t, chunk in enumerate(inputs.unbind(1)):
        if partials is None:
            out = process(reader.finish({MEMORY: memory, INPUTS: chunk}))
            parts, carry = {MEMORY: memory, INPUTS: chunk, OUTPUTS: out}, None
        else:
            out = process(reader.finish({MEMORY: memory}, partials[0][t]))
            parts, carry = {MEMORY: memory, OUTPUTS: out}, partials[1][t] if writer is not None else None
        if isinstance(write_params, EraseAddParams):
            memory = erase_add(memory, out, write_params)
        elif writer is not None:
            memory = writer.finish(parts, carry)
        outputs.append(out)
        memories.append(memory)
    return outputs, memories


def _partials(reader: Summary, writer: Summary | None, inputs: torch.Tensor) -> list[list[Partial]]:
    """For the reader and, if it summarises, the writer: the inputs' partial of every chunk."""
    tokens = inputs.flatten(0, 1)
    if writer is None:
        found = [reader.partial({INPUTS: tokens})]
    else:
        found = list(inputs_of_all_chunks(reader, writer, tokens))
    batch, chunks = inputs.shape[:2]
    per_chunk = []
    for partial in found:
        outs = partial.out.unflatten(0, (batch, chunks)).unbind(1)
        lses = [None] * chunks if partial.lse is None else partial.lse.unflatten(0, (batch, chunks)).unbind(1)
        per_chunk.append([Partial(out, lse) for out, lse in zip(outs, lses, strict=True)])
    return per_chunk


def erase_add(memory: torch.Tensor, outputs: torch.Tensor, params: EraseAddParams) -> torch.Tensor:
    """As `reference.erase_add`, one slot after another, so that no [B, S, s, d] tensor is made."""
    d = memory.shape[-1:]
    normed = torch.nn.functional.layer_norm(memory, d, params.select_norm_weight, params.select_norm_bias, NORM_EPS)
    weights = mlp(normed, params.select).softmax(dim=1)  # [B, s, S]
    erase = _slots(
        outputs, params.erase_norm_weight, params.erase_norm_bias, params.erase_tokens, params.erase_channels
    )
    add = _slots(outputs, params.add_norm_weight, params.add_norm_bias, params.add_tokens, params.add_channels)
    erase = erase if params.official else erase.sigmoid()
    kept = memory
    for w, e in zip(weights.unbind(2), erase.unbind(1), strict=True):
        kept = torch.addcmul(kept, kept * w[..., None], e[:, None], value=-1)
    added = torch.bmm(weights, add)
    return kept + (1 - added / weights.shape[2] if params.official else added)


def _slots(
    outputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tokens: MlpParams, channels: MlpParams
) -> torch.Tensor:
    """One vector a slot [B, S, d] from the outputs [B, r, d]: an MLP over tokens, then one over channels."""
    normed = torch.nn.functional.layer_norm(outputs, outputs.shape[-1:], weight, bias, NORM_EPS)
    return mlp(mlp(normed.transpose(1, 2), tokens).transpose(1, 2), channels)
