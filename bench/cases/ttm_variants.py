"""The variants of Token Turing Machine operators: latent-query read and erase-add write, against the official form.

Part of the suite `ttm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.harness import Comparison, Variant, against, compare, compiled, three_modes
from core.rows import Case, Row, Settings
from mirasol.kernels import EraseAddParams, LatentQueryParams, MlpParams, ttm_read, ttm_write

EAGER = "eager, official form"
HIDDEN = 64
HEADS = 8
SLOTS = 8
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Operator:
    """ours and eager map (tensors) to the result; `sizes` are the shapes and scales of the tensors.

    moved: tokens that must be read or written, in numbers of width d.
    """

    name: str
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    sizes: list[tuple[tuple[int, ...], float]]
    result: tuple[int, ...]
    moved: int


def cases(shapes: list[Any], modes: tuple[str, ...]) -> list[Case]:
    """For every shape of the suite and every mode."""
    return [
        Case(f"{name} {shape.name} {mode}", partial(_run, make, shape, mode))
        for name, make in (("latent-query read", latent_query_read), ("erase-add write", erase_add_write))
        for shape in dict.fromkeys(shapes)
        for mode in modes
    ]


def latent_query_read(shape: Any) -> Operator:
    """memory, inputs, queries, then wq, bq, wk, bk, wv, bv, wo, bo; eight heads, as in the official code."""
    b, s, n, r, d = shape.batch, shape.memory, shape.tokens, shape.read, shape.dim
    layer = [((d, d), d**-0.5), ((d,), 0.1)]
    sizes = [((b, s, d), 1.0), ((b, n, d), 1.0), ((r, d), 1.0), *layer * 4]

    def ours(memory: Tensor, inputs: Tensor, *weights: Tensor, backend: Any) -> Tensor:
        return ttm_read(memory, inputs, LatentQueryParams(*weights, heads=HEADS), backend=backend)

    def eager(memory: Tensor, inputs: Tensor, queries: Tensor, *projections: Tensor) -> Tensor:
        wq, bq, wk, bk, wv, bv, wo, bo = projections
        v = torch.cat([memory, inputs], 1)
        q = F.linear(queries, wq, bq).unflatten(-1, (HEADS, -1)).transpose(0, 1)
        k = F.linear(v, wk, bk).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        values = F.linear(v, wv, bv).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
        return F.linear((weights @ values).transpose(1, 2).flatten(2), wo, bo)

    return Operator("latent-query read", ours, eager, sizes, (b, r, d), b * (s + n + r))


def erase_add_write(shape: Any) -> Operator:
    """memory, outputs, then the fields of EraseAddParams; eight slots and hidden layers of 64, as in the official code.

    The eager form is the official one but for its add term, which is that of Neural Turing Machines in ours.
    """
    b, s, r, d = shape.batch, shape.memory, shape.read, shape.dim

    def mlp(inside: int, outside: int) -> list[tuple[tuple[int, ...], float]]:
        return [
            ((HIDDEN, inside), inside**-0.5),
            ((HIDDEN,), 0.1),
            ((outside, HIDDEN), HIDDEN**-0.5),
            ((outside,), 0.1),
        ]

    norm: list[tuple[tuple[int, ...], float]] = [((d,), 1.0), ((d,), 0.1)]
    network = [*norm, *mlp(r, SLOTS), *mlp(d, d)]
    sizes = [((b, s, d), 1.0), ((b, r, d), 1.0), *norm, *mlp(d, SLOTS), *network, *network]

    def ours(memory: Tensor, outputs: Tensor, *weights: Tensor, backend: Any) -> Tensor:
        return ttm_write(memory, outputs, outputs, _erase_add_params(weights), backend=backend)

    def eager(memory: Tensor, outputs: Tensor, *weights: Tensor) -> Tensor:
        p = _erase_add_params(weights)
        selected = _mlp(_norm(memory, p.select_norm_weight, p.select_norm_bias), p.select).softmax(1).transpose(1, 2)
        erase = _mlp(_norm(outputs, p.erase_norm_weight, p.erase_norm_bias).transpose(1, 2), p.erase_tokens)
        erase = _mlp(erase.transpose(1, 2), p.erase_channels).sigmoid()
        add = _mlp(_norm(outputs, p.add_norm_weight, p.add_norm_bias).transpose(1, 2), p.add_tokens)
        add = _mlp(add.transpose(1, 2), p.add_channels)
        kept = (1 - selected[..., None] * erase[:, :, None]).prod(1)
        return memory * kept + (selected[..., None] * add[:, :, None]).sum(1)

    return Operator("erase-add write", ours, eager, sizes, (b, s, d), b * (2 * s + r))


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS)


def _mlp(x: Tensor, params: MlpParams) -> Tensor:
    return F.linear(F.gelu(F.linear(x, params.w1, params.b1), approximate="tanh"), params.w2, params.b2)


def _erase_add_params(weights: tuple[Tensor, ...]) -> EraseAddParams:
    """From 26 tensors in the order of the fields."""
    mlps = [MlpParams(*weights[at : at + 4]) for at in (2, 8, 12, 18, 22)]
    norms = [weights[at : at + 2] for at in (0, 6, 16)]
    return EraseAddParams._make([*norms[0], mlps[0], *norms[1], *mlps[1:3], *norms[2], *mlps[3:], False])


def _run(make: Callable[[Any], Operator], shape: Any, mode: str, settings: Settings) -> list[Row]:
    dtype = settings.dtype or (torch.bfloat16 if settings.device.type == "cuda" else torch.float32)
    op = make(shape)
    tensors = [settings.randn(*size, dtype=dtype, seed=i).mul_(scale) for i, (size, scale) in enumerate(op.sizes)]
    graded = [t.requires_grad_(mode != "fwd") for t in tensors]
    grad = settings.randn(*op.result, dtype=dtype, seed=99)

    def expected(kind: torch.dtype) -> list[Tensor]:
        cast = [t.detach().to(kind).requires_grad_(t.requires_grad) for t in graded]
        result = three_modes(op.eager, cast, grad.to(kind), mode)()
        return [result] if isinstance(result, Tensor) else list(result)

    def wrap(forward: Callable[..., Tensor]) -> Callable[[], Any]:
        return three_modes(forward, graded, grad, mode)

    kernels = settings.device.type == "cuda" and op.name != "erase-add write"  # which PyTorch serves on every device
    backends = ("triton", "torch") if kernels else ("torch",)
    ours = [Variant(f"mirasol, {b}", partial(wrap, partial(op.ours, backend=b)), role="ours") for b in backends]
    eager = Variant(EAGER, partial(wrap, op.eager), role="peer")
    times = {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode]
    return compare(
        Comparison(
            "ttm",
            f"{op.name} {shape.name}",
            [*ours, eager, *compiled(f"{EAGER}, compiled", op.eager, graded, settings, wrap=wrap)],
            judge=against(expected(torch.float64), expected(dtype)),
            baseline=EAGER,
            mode=mode,
            shape=shape.name,
            dtype=dtype,
            bytes=times * op.moved * shape.dim * dtype.itemsize,
            roof="copy",
        ),
        settings,
    )
