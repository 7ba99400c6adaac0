"""`combiner_project` and `last_m`."""

from __future__ import annotations

import itertools

import torch

from mirasol.kernels.combiner import eager, reference
from mirasol.kernels.combiner.chunks import take_last_m
from mirasol.kernels.combiner.configs import MAX_WIDTH
from mirasol.kernels.combiner.ops import CombinerProject
from mirasol.kernels.core.checks import describe, expect, expect_int, expect_shape, expect_tensor
from mirasol.kernels.core.device import triton_refusals
from mirasol.kernels.core.dispatch import Backend, autocast, autocast_dtype, choose_backend

NORMS = ("layer", "rms", None)
_DIMS = {"weight": ("d_out", "d"), "bias": ("d_out",), "norm_weight": ("d",), "norm_bias": ("d",)}


def last_m(x: torch.Tensor, m: int, boundaries: torch.Tensor | None = None) -> torch.Tensor:
    """The last m tokens of every chunk: what the last Combiner layer computes queries, MLP and residuals for.

    Args:
        x: [B, T, n, d], or [B, N, d] with `boundaries`; any dtype, any strides.
        m: tokens kept of every chunk, 1 <= m <= the shortest chunk.
        boundaries: [T+1] int32, where the chunks of N begin and end: 0 first, N last.
    Returns:
        [B, T, m, d]: a view of x for even chunks, a gathered copy for uneven ones.
    Raises:
        ValueError: wrong shapes, or a chunk shorter than m (boundaries on a GPU are not read).
    Source: Mirasol3B (arXiv 2311.05698): a Combiner hands on its last m outputs.
    """
    _check_chunks(x, m, boundaries)
    return take_last_m(x, m, boundaries)


def combiner_project(
    x: torch.Tensor,
    m: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: str | None = "layer",
    boundaries: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
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
        eps: added to the variance or the mean square, at least 0.
        norm: "layer", "rms", or None to project as it is.
        boundaries: [T+1] int32, where the chunks of N begin and end: 0 first, N last.
        backend: "auto" (Triton for 16-bit tensors on a GPU, else "torch"), "triton", "torch" or "reference".
    Returns:
        [B, T, m, d_out], contiguous, dtype of x (the autocast dtype where autocast is on).
    Raises:
        TypeError: not a tensor, or a dtype that is not served.
        ValueError: wrong shapes, dtypes or devices that differ, a chunk shorter than m (boundaries on a GPU are not
            read), or a backend that cannot serve the call.
    Source: Mirasol3B (arXiv 2311.05698), "last m outputs"; LayerNorm arXiv 1607.06450, RMSNorm arXiv 1910.07467.
    """
    _check_chunks(x, m, boundaries)
    _check_parameters(x, weight, bias, norm_weight, norm_bias, eps, norm)
    if autocast_dtype(x) != x.dtype:  # cast the rows that are used, not all of x
        x, boundaries = take_last_m(x, m, boundaries).to(autocast_dtype(x)), None
    weight = weight.to(autocast_dtype(weight))
    bias, norm_weight, norm_bias = autocast(bias, norm_weight, norm_bias)
    for name, value in _named(weight, bias, norm_weight, norm_bias):
        if value.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} like x, was {describe(value)}")
    refusals = [] if backend in ("torch", "reference") else _triton_refusals(x)
    worth_it = x.is_cuda and x.element_size() == 2  # cuBLAS has the faster IEEE float32 product
    chosen = choose_backend("combiner_project", backend, worth_it, refusals)
    if chosen == "triton":
        return CombinerProject.apply(x, m, weight, bias, norm_weight, norm_bias, eps, norm or "none", boundaries)
    serve = reference.combiner_project if chosen == "reference" else eager.combiner_project
    return serve(x, m, weight, bias, norm_weight, norm_bias, eps, norm, boundaries)


def _check_chunks(x: torch.Tensor, m: int, boundaries: torch.Tensor | None) -> None:
    expect_tensor("x", x, "B T n d" if boundaries is None else "B N d")
    expect_int("m", m)
    if boundaries is None:
        if m > x.shape[2]:
            raise ValueError(f"m must be at most the tokens of a chunk, {x.shape[2]}, was {m}")
        return
    expect_tensor("boundaries", boundaries, "T+1", dtypes=(torch.int32,))
    expect(boundaries.device == x.device, "boundaries", f"be on {x.device} like x", boundaries)
    expect(boundaries.shape[0] >= 2, "boundaries", "hold at least two positions", boundaries)
    if _values_are_at_hand(boundaries):
        edges = boundaries.tolist()
        expect(edges[0] == 0, "boundaries", "begin with 0", edges[0])
        expect(edges[-1] == x.shape[1], "boundaries", f"end with the {x.shape[1]} tokens of x", edges[-1])
        shortest = min(end - start for start, end in itertools.pairwise(edges))
        expect(shortest >= m, "boundaries", f"leave every chunk at least m = {m} tokens", shortest)


def _triton_refusals(x: torch.Tensor) -> list[str]:
    reasons = triton_refusals(x)
    if x.shape[-1] > MAX_WIDTH:
        reasons.append(f"Its kernels serve a width d of at most {MAX_WIDTH}, x has {x.shape[-1]}.")
    return reasons


def _values_are_at_hand(tensor: torch.Tensor) -> bool:
    """Reading a GPU's values would stall it, and traced tensors have none."""
    return not torch.compiler.is_compiling() and type(tensor) is torch.Tensor and tensor.device.type == "cpu"


def _check_parameters(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    norm: str | None,
) -> None:
    expect_tensor("weight", weight, "d_out d")
    sizes = {"d_out": weight.shape[0], "d": x.shape[-1]}
    for name, value in _named(weight, bias, norm_weight, norm_bias):
        dims = _DIMS[name]
        expect_tensor(name, value, " ".join(dims))
        expect_shape(name, value, [sizes[dim] for dim in dims], "[d_out, d]" if len(dims) == 2 else f"[{dims[0]}]")
        if value.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, was {describe(value)}")
    expect(norm in NORMS, "norm", 'be "layer", "rms" or None', norm)
    expect(norm is not None or norm_weight is None, "norm_weight", "be None without a norm", norm_weight)
    expect(norm == "layer" or norm_bias is None, "norm_bias", 'be None unless norm is "layer"', norm_bias)
    expect(eps >= 0, "eps", "be at least 0", eps)


def _named(*parameters: torch.Tensor | None) -> list[tuple[str, torch.Tensor]]:
    return [(name, value) for name, value in zip(_DIMS, parameters, strict=True) if value is not None]
