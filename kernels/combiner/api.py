"""`combiner_project` and `last_m`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mirasol.kernels.combiner import eager, reference
from mirasol.kernels.combiner.op import CombinerProject, check_edges, checked_boundaries
from mirasol.kernels.combiner.triton.config import MAX_WIDTH
from mirasol.kernels.core.checks import expect, expect_int, expect_number, expect_tensor, refuse
from mirasol.kernels.core.device import triton_refusals
from mirasol.kernels.core.dispatch import Backend, autocast, autocast_dtype, choose_backend
from mirasol.kernels.core.registration import apply, transformed

NORMS = ("layer", "rms", None)
_DIMS = {"weight": "d_out d", "bias": "d_out", "norm_weight": "d", "norm_bias": "d"}
_MANY_ROWS = 2048  # enough blocks of the product for every multiprocessor


def last_m(x: Tensor, m: int, boundaries: Tensor | Sequence[int] | None = None) -> Tensor:
    """The last m tokens of every chunk: what the last Combiner layer computes queries, MLP and residuals for.

    Args:
        x: [B, T, n, d], or [B, N, d] with `boundaries`; any float dtype, any strides.
        m: tokens kept of every chunk, 1 <= m <= the shortest chunk.
        boundaries: [T+1] int32 or as many ints, where the chunks of N begin and end: 0 first, N last.
    Returns:
        [B, T, m, d]: a view of x for even chunks, a gathered copy for uneven ones.
    Raises:
        ValueError: wrong shapes, or a chunk shorter than m (boundaries on a GPU are not read).
    Source: Mirasol3B (arXiv 2311.05698): a Combiner hands on its last m outputs.
    """
    return eager.last_m(x, *_check_chunks(x, m, boundaries))


def combiner_project(
    x: Tensor,
    m: int,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: str | None = "layer",
    boundaries: Tensor | Sequence[int] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Take the last m tokens of every chunk, normalise them and project them, without a gathered copy.

    `out[b, t, i] = N(x[b, t, n - m + i]) @ weight.T + bias`, where N is `(r - mean(r)) / sqrt(var(r) + eps)` for
    "layer" and `r / sqrt(mean(r * r) + eps)` for "rms", times norm_weight, plus norm_bias.

    Args:
        x: [B, T, n, d], or [B, N, d] with `boundaries`; float32, bfloat16 or float16 (float64 on the backends
            "reference" and "torch"). Strides are free; the other tensors have its dtype and device.
        m: tokens kept of every chunk, 1 <= m <= the shortest chunk.
        weight: [d_out, d].
        bias: [d_out].
        norm_weight, norm_bias: [d]. "layer" takes either or both, "rms" takes norm_weight, None takes neither.
        eps: added to the variance or the mean square, finite, at least 0.
        norm: "layer", "rms", or None to project as it is.
        boundaries: [T+1] int32 or as many ints, where the chunks of N begin and end: 0 first, N last.
        backend: "auto" (Triton for training with many 16-bit rows on a GPU, else "torch"), "triton", "torch" or
            "reference".
    Returns:
        [B, T, m, d_out], contiguous, dtype of x (the autocast dtype where autocast is on).
    Raises:
        TypeError: not a tensor or number where one is due, or a dtype that is not served.
        ValueError: wrong shapes, dtypes or devices that differ, a chunk shorter than m (boundaries on a GPU are not
            read), or a backend that cannot serve the call.
        NotImplementedError: torch.func transforms and second derivatives of the backend "triton".
    Source: Mirasol3B (arXiv 2311.05698), "last m outputs"; LayerNorm arXiv 1607.06450, RMSNorm arXiv 1910.07467.
    """
    m, edges = _check_chunks(x, m, boundaries)
    parameters = {"weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    _check_parameters(x, parameters, norm)
    eps = expect_number("eps", eps)
    expect(eps >= 0, "eps", "be at least 0", eps)
    worth_it = _kernels_win(x, m, edges)
    if autocast_dtype(x) != x.dtype:  # cast the rows that are used, not all of x
        x, edges = eager.last_m(x, m, edges).to(autocast_dtype(x)), None
    weight, bias, norm_weight, norm_bias = autocast(*parameters.values())
    for name, value in zip(parameters, (weight, bias, norm_weight, norm_bias), strict=True):
        if value is not None and value.dtype != x.dtype:
            refuse(name, f"be {x.dtype} like x", value)
    refusals = _triton_refusals(x) if worth_it or backend == "triton" else []
    chosen = choose_backend("combiner_project", backend, worth_it, refusals)
    arguments = (x, m, weight, bias, norm_weight, norm_bias, eps)
    if chosen == "triton":
        return apply("combiner_project", CombinerProject, *arguments, norm or "none", edges)
    if chosen == "torch":
        return eager.combiner_project(*arguments, norm, edges)
    expect(edges is None or not edges.is_meta, "boundaries", 'have values for backend="reference"', edges)
    return reference.combiner_project(*arguments, norm, edges)


def _kernels_win(x: Tensor, m: int, boundaries: Tensor | None) -> bool:
    """Where PREDICTIONS.md expects less time of the kernels: in training, as backward saves more than forward loses.

    Not in float32, whose products are the library's; not with few rows, for which forward is all latency; not where a
    compiler fuses the norm, nor under torch.func, which only PyTorch's own operators serve.
    """
    if not x.is_cuda or x.element_size() != 2 or torch.compiler.is_compiling() or transformed():
        return False
    chunks = x.shape[1] if boundaries is None else boundaries.shape[0] - 1
    return torch.is_grad_enabled() and x.requires_grad and x.shape[0] * chunks * m >= _MANY_ROWS


def _check_chunks(x: Tensor, m: int, boundaries: Tensor | Sequence[int] | None) -> tuple[int, Tensor | None]:
    """m as Python's int, boundaries as a tensor."""
    expect_tensor("x", x, "B T n d" if boundaries is None else "B N d")
    m = expect_int("m", m)
    if boundaries is None:
        if m > x.shape[2]:  # a symbolic length in a message is a length that specialises
            refuse("m", f"be at most the tokens of a chunk, {x.shape[2]}", m)
        return m, None
    if not isinstance(boundaries, Tensor):
        if not isinstance(boundaries, list | tuple):
            refuse("boundaries", "be a tensor, a list or a tuple of ints", boundaries, TypeError)
        edges = [expect_int("boundaries", edge, minimum=0) for edge in boundaries]
        check_edges(edges, m, x.shape[1])
        return m, torch.tensor(edges, dtype=torch.int32, device=x.device)
    expect_tensor("boundaries", boundaries, "T+1", dtypes=(torch.int32,))
    if boundaries.device != x.device:
        refuse("boundaries", f"be on {x.device} like x", boundaries)
    expect(boundaries.shape[0] >= 2, "boundaries", "hold at least two positions", boundaries)
    if boundaries.device.type == "cpu":  # reading a GPU's values would stall it
        if torch.compiler.is_compiling():
            return m, checked_boundaries(boundaries, m, x.shape[1])
        if type(boundaries) is Tensor:  # a fake tensor has no values
            check_edges(boundaries.tolist(), m, x.shape[1])
    return m, boundaries


def _triton_refusals(x: Tensor) -> list[str]:
    reasons = triton_refusals(x)
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        reasons.append(f"Its kernels serve a width d of 1 to {MAX_WIDTH}, x has {x.shape[-1]}.")
    return reasons


def _check_parameters(x: Tensor, parameters: dict[str, Any], norm: str | None) -> None:
    expect_tensor("weight", parameters["weight"], "d_out d")
    sizes = {"d_out": parameters["weight"].shape[0], "d": x.shape[-1]}
    for name, value in parameters.items():
        if value is None:
            continue
        expect_tensor(name, value, _DIMS[name])
        dims = _DIMS[name].split()
        shape = [sizes[dim] for dim in dims]
        if list(value.shape) != shape:
            refuse(name, f"be [{', '.join(dims)}] = {shape}", value)
        if value.device != x.device:
            refuse(name, f"be on {x.device} like x", value)
    expect(norm in NORMS, "norm", 'be "layer", "rms" or None', norm)
    norm_weight, norm_bias = parameters["norm_weight"], parameters["norm_bias"]
    expect(norm is not None or norm_weight is None, "norm_weight", "be None without a norm", norm_weight)
    expect(norm == "layer" or norm_bias is None, "norm_bias", 'be None unless norm is "layer"', norm_bias)
