"""`combiner_project` and last-m pruning against plain PyTorch."""

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
from mirasol import cost
from mirasol.kernels import combiner_project
from mirasol.layers import Block, init_weights
from report.console import Table
from report.tables import comparison_table

SUITE = "combiner"
EAGER, WHOLE = "slice + norm + linear", "all tokens, then slice"
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """B clips of T chunks of n tokens of width d, of which m a chunk go on."""

    batch: int
    chunks: int
    tokens: int
    dim: int
    keep: int = 32

    @property
    def name(self) -> str:
        return f"B{self.batch} T{self.chunks} n{self.tokens} d{self.dim} m{self.keep}"


QUICK = [Shape(1, 2, 12, 32, keep=4)]
CPU = [Shape(1, 16, 448, 768), Shape(4, 64, 294, 1024)]
CPU_FULL = [*CPU, Shape(1, 4, 1176, 2048), Shape(32, 16, 390, 768)]
GPU = [Shape(1, 16, 390, 1024), Shape(16, 16, 390, 1024), Shape(4, 64, 390, 2048), Shape(32, 16, 1176, 768)]
GPU_FULL = [*GPU, Shape(1, 64, 294, 768), Shape(32, 64, 294, 1024)]
PRUNED = {"quick": Shape(1, 3, 12, 32, keep=4), "default": Shape(1, 16, 448, 768), "full": Shape(1, 16, 448, 768)}


def cases(settings: Settings) -> list[Case]:
    gpu = settings.device.type == "cuda"
    shapes = {"quick": QUICK, "default": GPU if gpu else CPU, "full": GPU_FULL if gpu else CPU_FULL}[settings.effort]
    project_modes = ("fwd", "bwd", "fwd+bwd") if gpu else ("fwd", "fwd+bwd")
    pruned = PRUNED[settings.effort]
    return [
        *(Case(f"project {s.name} {mode}", partial(_project, s, mode)) for s in shapes for mode in project_modes),
        *(Case(f"last layer {pruned.name} {mode}", partial(_last_layer, pruned, mode)) for mode in ("fwd", "fwd+bwd")),
    ]


def tables(rows: list[Row]) -> list[Table]:
    notes = [
        "project: last m tokens of each chunk, LayerNorm, projection; % of roof: of a matrix product's rate",
        "last layer: a Combiner block with queries, output and MLP for m tokens a chunk, and for all of them",
    ]
    return [comparison_table("Combiner projection and last-m pruning", rows, notes)]


def _project(shape: Shape, mode: str, settings: Settings) -> list[Row]:
    dtype = _dtype(settings)
    d, graded = shape.dim, mode != "fwd"
    x = settings.randn(shape.batch, shape.chunks, shape.tokens, d, dtype=dtype, grad=graded)
    parameters = [
        settings.randn(d, d, dtype=dtype, seed=1).mul_(d**-0.5),
        *(settings.randn(d, dtype=dtype, seed=seed) for seed in (2, 3, 4)),
    ]
    inputs = [x, *(p.requires_grad_(graded) for p in parameters)]
    grad = settings.randn(shape.batch, shape.chunks, shape.keep, d, dtype=dtype, seed=5)
    eager = partial(_eager_project, shape.keep)

    def ours(backend: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return combiner_project(x, shape.keep, weight, bias, scale, shift, NORM_EPS, backend=backend)

    def variant(name: str, forward: Callable[..., Tensor], role: Any = "peer") -> Variant:
        return Variant(name, lambda: three_modes(forward, inputs, grad, mode), role=role)

    backends = ("triton", "torch") if x.is_cuda else ("torch",)
    rows = shape.batch * shape.chunks * shape.keep
    work = {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode]
    return compare(
        Comparison(
            SUITE,
            f"project {shape.name}",
            [
                *(variant(f"mirasol, {name}", partial(ours, name), role="ours") for name in backends),
                variant(EAGER, eager),
                *_compiled(EAGER, eager, inputs, grad, mode, settings),
            ],
            judge=against(*(_gradients(eager, inputs, grad, mode, kind) for kind in (torch.float64, dtype))),
            baseline=EAGER,
            mode=mode,
            shape=shape.name,
            dtype=dtype,
            flops=work * cost.linear(rows, d, d),
            bytes=x.element_size() * (2 * rows * d + d * d),
            roof="gemm",
        ),
        settings,
    )


def _last_layer(shape: Shape, mode: str, settings: Settings) -> list[Row]:
    dtype = _dtype(settings)
    torch.manual_seed(0)
    block = Block(shape.dim, heads=max(1, shape.dim // 64), mlp_ratio=4, eps=NORM_EPS)
    block.apply(init_weights)
    block = block.to(settings.device, dtype)
    tokens = shape.chunks * shape.tokens
    x = settings.randn(shape.batch, tokens, shape.dim, dtype=dtype, grad=mode != "fwd")
    inputs = [x, *(p.requires_grad_(mode != "fwd") for p in block.parameters())]
    grad = settings.randn(shape.batch, shape.chunks * shape.keep, shape.dim, dtype=dtype, seed=5)

    def run(pruned: bool, x: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip((name for name, _ in block.named_parameters()), parameters, strict=True))
        keep = shape.keep if pruned else None
        out = torch.func.functional_call(block, values, (x, shape.tokens), {"keep": keep})
        return out if pruned else out.unflatten(1, (shape.chunks, -1))[:, :, -shape.keep :].flatten(1, 2)

    def flops(keep: int) -> int:
        pairs = cost.chunk_pairs(shape.chunks, keep, shape.tokens)
        once = cost.block(tokens, shape.dim, pairs, 4, keep=shape.chunks * keep)
        attention = cost.attention(pairs, shape.dim)
        return shape.batch * (once if mode == "fwd" else 3 * once + attention // 2)  # attention's backward is 2.5 times

    def variant(name: str, pruned: bool, role: Any) -> Variant:
        work = flops(shape.keep if pruned else shape.tokens)
        return Variant(name, lambda: three_modes(partial(run, pruned), inputs, grad, mode), role=role, flops=work)

    whole = partial(run, False)
    return compare(
        Comparison(
            SUITE,
            f"last layer {shape.name}",
            [variant("mirasol, last m only", True, "ours"), variant(WHOLE, False, "peer")],
            judge=against(*(_gradients(whole, inputs, grad, mode, kind) for kind in (torch.float64, dtype))),
            baseline=WHOLE,
            mode=mode,
            shape=shape.name,
            dtype=dtype,
            roof="gemm",
        ),
        settings,
    )


def _dtype(settings: Settings) -> torch.dtype:
    return settings.dtype or (torch.bfloat16 if settings.device.type == "cuda" else torch.float32)


def _eager_project(m: int, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    last = x[:, :, -m:]
    return F.linear(F.layer_norm(last, last.shape[-1:], scale, shift, NORM_EPS), weight, bias)


def _compiled(
    name: str, function: Callable[..., Any], inputs: list[Tensor], grad: Tensor, mode: str, settings: Settings
) -> list[Variant]:
    return compiled(f"{name}, compiled", function, inputs, settings, wrap=lambda f: three_modes(f, inputs, grad, mode))


def _gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, mode: str, dtype: torch.dtype
) -> list[Tensor]:
    """What a variant must return, computed in `dtype`."""
    cast = [t.detach().to(dtype).requires_grad_(mode != "fwd") for t in inputs]
    result = three_modes(function, cast, grad.to(dtype), mode)()
    return [result] if isinstance(result, Tensor) else list(result)
