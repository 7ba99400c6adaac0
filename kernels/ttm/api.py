"""Token Turing Machine: read, write, scan over chunks and streaming step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from mirasol.kernels.core.checks import expect, expect_int, expect_shape, expect_tensor, refuse
from mirasol.kernels.core.device import triton_refusals
from mirasol.kernels.core.dispatch import Backend, autocast, choose_backend
from mirasol.kernels.ttm import recurrence, reference
from mirasol.kernels.ttm.params import (
    EraseAddParams,
    SummaryParams,
    TokenLearnerParams,
    WriteParams,
    check_erase_add,
    check_summary,
    summary_size,
)
from mirasol.kernels.ttm.pool.triton.config import size_refusals

Process = Callable[[torch.Tensor], torch.Tensor]
Form = Literal["auto", "parallel", "stepwise"]
FORMS = ("auto", "parallel", "stepwise")


def ttm_read(
    memory: torch.Tensor, inputs: torch.Tensor, params: SummaryParams, *, backend: Backend = "auto"
) -> torch.Tensor:
    """Summarise memory and inputs into r tokens: Z = S_r([memory | inputs]).

    Args:
        memory: [B, s, d], float32, bfloat16, float16 or float64.
        inputs: [B, n, d], dtype and device of `memory`; any strides with a contiguous last dimension.
        params: TokenLearnerParams, LatentQueryParams or MeanPoolParams for r tokens, in the dtype of `memory`;
            positions, if given, are [s + n, d].
        backend: "auto", "triton", "torch" or "reference". Under "triton" means, and latent queries of more than 1,024
            rows of heads times queries or of less work the other way, run as PyTorch's matrix products.
    Returns:
        [B, r, d], contiguous, dtype of `memory` (of autocast where that is on).
    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device.
    Source:
        Token Turing Machines, arXiv 2211.09119, section 3.2; TokenLearner v1.1.
    """
    memory, inputs, params = _lower(memory, inputs, params)
    _check_tokens(memory, inputs, "B n d")
    params = check_summary("params", params, memory.shape[1] + inputs.shape[1], memory)
    chosen = _backend("ttm_read", backend, [memory, inputs], params)
    if chosen == "reference":
        return reference.ttm_read(memory, inputs, params)
    return recurrence.summarise(params, [memory, inputs], chosen)


def ttm_write(
    memory: torch.Tensor,
    outputs: torch.Tensor,
    inputs: torch.Tensor,
    params: WriteParams,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """The memory after a chunk: M' = S_s([memory | inputs | outputs]), or the erase-add update by the outputs.

    Args:
        memory: [B, s, d], float32, bfloat16, float16 or float64.
        outputs: [B, r, d], the processed tokens; inputs: [B, n, d]; dtype and device of `memory`.
        params: TokenLearnerParams, LatentQueryParams or MeanPoolParams for s tokens, or EraseAddParams (which does not
            look at the inputs); positions, if given, are [s + n + r, d] in the order memory, inputs, outputs.
        backend: as for `ttm_read`; the erase-add update runs in PyTorch under "triton" too, so that summaries beside it
            in a scan keep their kernels.
    Returns:
        [B, s, d], contiguous, dtype of `memory` (of autocast where that is on).
    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device.
    Source:
        Token Turing Machines, arXiv 2211.09119, section 3.2; order of the sources as in the authors' code.
    """
    memory, outputs, inputs, params = _lower(memory, outputs, inputs, params)
    _check_tokens(memory, inputs, "B n d")
    _check_outputs("outputs", outputs, memory)
    params = _check_write("params", params, memory, inputs.shape[1], outputs.shape[1])
    chosen = _backend("ttm_write", backend, [memory, outputs, inputs], params)
    if chosen == "reference":
        return reference.ttm_write(memory, outputs, inputs, params)
    return recurrence.summarise(params, [memory, inputs, outputs], chosen)


def ttm_scan(
    memory: torch.Tensor,
    inputs: torch.Tensor,
    read_params: SummaryParams,
    process: Process,
    write_params: WriteParams,
    *,
    times: torch.Tensor | None = None,
    form: Form = "auto",
    return_memories: bool = False,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read, process and write over T chunks; chunk t sees the memory that chunks 0 to t - 1 left.

    Args:
        memory: [B, s, d], the memory before the first chunk, float32, bfloat16, float16 or float64.
        inputs: [B, T, n, d], dtype and device of `memory`.
        read_params, write_params: as for `ttm_read` and `ttm_write`.
        process: maps the tokens read [B, r, d] to the outputs of the chunk [B, r, d].
        times: [T, d], a time stamp added to every input token of its chunk, or None.
        form: "parallel" summarises the inputs of all chunks in one pass and leaves memory and outputs to the
            recurrence; "stepwise" goes chunk by chunk; both give the same result to rounding. "auto" takes the faster.
        return_memories: give the memory after every chunk in place of the last one.
        backend: "auto", "triton", "torch" or "reference" (which has one form only).
    Returns:
        outputs [B, T, r, d] and memory [B, s, d] (or memories [B, T, s, d]), contiguous.
    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, also what `process` returns.
    Source:
        Token Turing Machines, arXiv 2211.09119, section 3; time stamps: arXiv 2410.16267, section 2.
    """
    memory, inputs, read_params, write_params, times = _lower(memory, inputs, read_params, write_params, times)
    _check_tokens(memory, inputs, "B T n d")
    chunks, n = inputs.shape[1:3]
    read_params = check_summary("read_params", read_params, memory.shape[1] + n, memory)
    write_params = _check_write("write_params", write_params, memory, n, summary_size(read_params))
    expect(form in FORMS, "form", f"be one of {', '.join(FORMS)}", form)
    if not callable(process):
        raise TypeError(f"process must be callable, was {type(process).__name__}")
    if times is not None:
        expect_tensor("times", times, "T d", like=memory)
        expect_shape("times", times, (chunks, memory.shape[2]), "[T, d]")
        inputs = inputs + times[:, None]

    def checked(z: torch.Tensor) -> torch.Tensor:
        (out,) = autocast(process(z))
        if not isinstance(out, torch.Tensor) or (out.shape, out.dtype, out.device) != (z.shape, z.dtype, z.device):
            _check_outputs("what process returns", out, memory)
            expect_shape("what process returns", out, z.shape, "[B, r, d]")
        return out

    chosen = _backend("ttm_scan", backend, [memory, inputs], read_params, write_params)
    if chosen == "reference":
        outputs, memories = reference.ttm_scan(memory, inputs, read_params, checked, write_params)
        return outputs, memories if return_memories else memories[:, -1]
    out, mem = recurrence.scan(memory, inputs, read_params, checked, write_params, form, chosen)
    return torch.stack(out, dim=1), torch.stack(mem, dim=1) if return_memories else mem[-1]


def ttm_step(
    memory: torch.Tensor,
    inputs: torch.Tensor,
    read_params: SummaryParams,
    process: Process,
    write_params: WriteParams,
    *,
    time: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk of a stream: the memory is the whole state, so cost and size do not grow with the chunks seen.

    Args:
        memory: [B, s, d]; inputs: [B, n, d]; time: [d], the chunk's time stamp, or None.
        read_params, process, write_params, backend: as in `ttm_scan`.
    Returns:
        outputs [B, r, d] and the next memory [B, s, d]; over all chunks equal to `ttm_scan`.
    """
    expect_tensor("inputs", inputs, "B n d")
    if time is not None:
        expect_tensor("time", time, "d")
    outputs, memory = ttm_scan(
        memory,
        inputs[:, None],
        read_params,
        process,
        write_params,
        times=None if time is None else time[None],
        backend=backend,
    )
    return outputs[:, 0], memory


def group_tokens(tokens: torch.Tensor, groups: int) -> torch.Tensor:
    """Split the tokens of every chunk into groups, each with a memory of its own: [B, T, n, d] -> [B G, T, n / G, d].

    Grouped Token Turing Machine: with a memory [B G, s, d] the scan runs as ever, weights shared between the groups and
    no token of one group ever seen by another; `ungroup_tokens` undoes it on outputs and memories.
    Args:
        tokens: [B, ..., n, d]; group g takes tokens g n / G to (g + 1) n / G - 1.
        groups: G, a divisor of n.
    Returns:
        [B G, ..., n / G, d], contiguous.
    Source:
        xGen-MM-Vid (BLIP-3-Video), arXiv 2410.16267, section 2: separate memories for groups of tokens.
    """
    expect(tokens.ndim >= 3, "tokens", "be [B, ..., n, d]", tokens)
    groups = expect_int("groups", groups)
    expect(tokens.shape[-2] % groups == 0, "groups", f"divide n = {tokens.shape[-2]}", groups)
    split = tokens.unflatten(-2, (groups, -1))
    return split.movedim(-3, 1).flatten(0, 1).contiguous()


def ungroup_tokens(tokens: torch.Tensor, groups: int) -> torch.Tensor:
    """The inverse of `group_tokens`.

    Args:
        tokens: [B G, ..., n / G, d], any dtype.
        groups: G, a divisor of the first dimension.
    Returns:
        [B, ..., n, d], contiguous.
    Raises:
        ValueError: `groups` does not divide B G, or `tokens` has fewer than three dimensions.
    """
    expect(tokens.ndim >= 3, "tokens", "be [B G, ..., n / G, d]", tokens)
    groups = expect_int("groups", groups)
    expect(tokens.shape[0] % groups == 0, "groups", f"divide B G = {tokens.shape[0]}", groups)
    return tokens.unflatten(0, (-1, groups)).movedim(1, -3).flatten(-3, -2).contiguous()


def _backend(op: str, backend: str, tensors: Sequence[torch.Tensor], *params: WriteParams) -> str:
    """Only TokenLearners may be refused for their sizes: what else the kernels do not hold runs as matrix products."""
    refusals = triton_refusals(*tensors)
    for given in params:
        if isinstance(given, TokenLearnerParams):
            refusals += size_refusals(given.w2.shape[0], given.w1.shape[0], given.w1.shape[1], given.w1.dtype)
    return choose_backend(op, backend, tensors[0].device.type == "cuda", refusals)


def _lower(*values: Any) -> Any:
    """Tensors, also inside parameters, in the autocast dtype where autocast is on."""
    flat, spec = torch.utils._pytree.tree_flatten(values)
    return torch.utils._pytree.tree_unflatten(autocast(*flat), spec)


def _check_tokens(memory: torch.Tensor, inputs: torch.Tensor, dims: str) -> None:
    expect_tensor("memory", memory, "B s d")
    expect_tensor("inputs", inputs, dims, like=memory)
    _check_like("inputs", inputs, memory)
    for name, value in (("memory", memory), ("inputs", inputs)):
        expect(value.numel() > 0, name, "not be empty", value)


def _check_like(name: str, value: torch.Tensor, memory: torch.Tensor) -> None:
    """Sizes are put into words only where they differ: that alone would fix a size for the compiler."""
    for symbol, dim in (("B", 0), ("d", -1)):
        if value.shape[dim] != memory.shape[dim]:
            refuse(name, f"have {symbol} = {memory.shape[dim]} like memory", value)


def _check_outputs(name: str, outputs: torch.Tensor, memory: torch.Tensor) -> None:
    expect_tensor(name, outputs, "B r d", like=memory)
    _check_like(name, outputs, memory)
    expect(outputs.numel() > 0, name, "not be empty", outputs)


def _check_write(name: str, params: WriteParams, memory: torch.Tensor, inputs: int, read_size: int) -> WriteParams:
    if isinstance(params, EraseAddParams):
        check_erase_add(name, params, read_size, memory)
        return params
    params = check_summary(name, params, memory.shape[1] + inputs + read_size, memory)
    if summary_size(params) != memory.shape[1]:
        refuse(name, f"give s = {memory.shape[1]} tokens, as many as memory has", summary_size(params))
    return params
