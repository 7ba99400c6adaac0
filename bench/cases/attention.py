"""`chunked_attention` against what people use today, on the same tensors.

Work is counted in visible pairs, for every implementation alike: one that computes hidden pairs gets no credit for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from cases.attention_shapes import CPU, CPU_FULL, GPU, GPU_FULL, QUICK, Shape, windows
from core.harness import Comparison, Judge, Unavailable, Variant, against, compare, three_modes
from core.rows import Case, Row, Settings, dtype_name
from mirasol.kernels import chunked_attention
from peers import attention as peers
from report.console import Table
from report.tables import comparison_table

SUITE = "attention"
OURS, DENSE, FULL, CAUSAL = "mirasol, torch", "SDPA, dense mask", "full attention", "causal SDPA"
FLEX = "FlexAttention, compiled"
TLX = "TLX, full attention"
MASKED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)


def cases(settings: Settings) -> list[Case]:
    """One case for each shape, mode and dtype."""
    gpu = settings.device.type == "cuda"
    shapes = {"quick": QUICK, "default": GPU if gpu else CPU, "full": GPU_FULL if gpu else CPU_FULL}[settings.effort]
    default = [torch.bfloat16 if gpu else torch.float32]
    if settings.effort == "full" and not gpu:
        default = [torch.float32, torch.bfloat16]
    dtypes = [settings.dtype] if settings.dtype else default
    return [
        Case(f"{shape.name} {mode} {dtype_name(dtype)}", partial(_run, shape, mode, dtype))
        for dtype in dtypes
        for mode in ("fwd", "bwd", "step", "fwd+bwd")  # all shapes forward first: a run may be cut off
        for shape in shapes
        if mode in shape.modes
    ]


def tables(rows: list[Row]) -> list[Table]:
    notes = ["TFLOP/s: visible pairs over time; build ms: mask or block mask and compilation, once per shape"]
    return [comparison_table("Chunked attention", rows, notes)]


def _run(shape: Shape, mode: str, dtype: torch.dtype, settings: Settings) -> list[Row]:
    return compare_shape(shape, mode, dtype, settings)


def compare_shape(
    shape: Shape,
    mode: str,
    dtype: torch.dtype,
    settings: Settings,
    *,
    suite: str = SUITE,
    case: str | None = None,
    only: Sequence[str] = (),
) -> list[Row]:
    """One shape in one mode; `only` names the implementations, none: all that make sense here but full attention."""
    size = (shape.batch, shape.heads, shape.chunks * shape.tokens, shape.head_dim)
    graded = mode in ("bwd", "fwd+bwd")
    q, k, v = (settings.randn(*size, dtype=dtype, seed=seed, grad=graded) for seed in range(3))
    if mode == "step":
        q = q[:, :, -shape.tokens :].contiguous()
    grad = settings.randn(*q.shape, dtype=dtype, seed=3)

    def variant(name: str, make: Callable[[], Callable[..., Any]], **more: Any) -> Variant:
        return Variant(name, lambda: three_modes(make(), (q, k, v), grad, "fwd" if mode == "step" else mode), **more)

    others = _step_peers(shape, variant) if mode == "step" else _peers(shape, settings, mode, dtype, variant)
    variants = [*_ours(shape, settings, variant), *others]
    seen = shape.chunks if shape.window is None else min(shape.window, shape.chunks)
    moved = 2 * q.numel() * q.element_size() * (1 + seen)  # q, out and the keys and values in sight
    comparison = Comparison(
        suite,
        case or shape.name,
        [variant for variant in variants if variant.name in only or not (only or variant.name == FULL)],
        judge=_judge(shape, q, k, v, grad, mode),
        baseline="SDPA" if mode == "step" else DENSE,
        mode=mode,
        shape=f"B{shape.batch} H{shape.heads} N{size[2]} D{shape.head_dim}",
        dtype=dtype,
        flops=shape.flops(mode),
        bytes=moved if mode == "step" else None,
        roof="copy" if mode == "step" else "gemm",
        detail={"chunks": shape.chunks, "tokens": shape.tokens, "window": shape.window},
    )
    rows = compare(comparison, settings)
    if mode == "fwd" and settings.device.type == "cuda" and not only:
        rows.append(_tlx(shape, comparison, settings))
    return rows


def _ours(shape: Shape, settings: Settings, variant: Callable[..., Variant]) -> list[Variant]:
    def run(backend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunked_attention(q, k, v, q_chunk=shape.tokens, window=shape.window, backend=backend)

    backends = ("triton", "torch") if settings.device.type == "cuda" else ("torch",)
    return [variant(f"mirasol, {name}", lambda name=name: partial(run, name), role="ours") for name in backends]


def _peers(
    shape: Shape, settings: Settings, mode: str, dtype: torch.dtype, variant: Callable[..., Variant]
) -> list[Variant]:
    device, cudnn = settings.device, SDPBackend.CUDNN_ATTENTION
    built = {"show_build": True}

    def flex(name: str, backend: str | None = None) -> Variant:
        return variant(name, lambda: peers.flex(shape, device, dtype, mode, backend), detail=built, foreign=True)

    found = [variant(DENSE, lambda: peers.dense(shape, device, None), detail=built)]
    if device.type != "cuda":
        found += [] if settings.effort == "quick" else [flex(FLEX)]
    else:
        found += [
            variant(
                f"SDPA {_name(b)}, dense mask", lambda b=b: peers.dense(shape, device, b), detail=built, foreign=True
            )
            for b in MASKED
        ]
        found += [flex(f"{FLEX}, Triton", "TRITON"), flex(f"{FLEX}, FlashAttention-4", "FLASH")]
        for name, make in (("FlashAttention-4", peers.flash4), ("cuDNN flex_attention", peers.cudnn_flex)):
            found.append(variant(name, lambda make=make: make(shape, device), detail=built, foreign=True))
            if mode != "fwd":
                slower = partial(make, shape, device, deterministic=True)
                found.append(variant(f"{name}, deterministic", slower, detail=built, foreign=True))
    found += [
        variant("loop of SDPA", lambda: peers.loop(shape, None)),
        variant(FULL, lambda: partial(peers.sdpa, None), judged=False, flops=shape.dense_flops(mode)),
        variant(CAUSAL, lambda: partial(peers.sdpa, None, is_causal=True), role="limit", judged=False),
    ]
    if device.type != "cuda":
        return found
    recorded = [variant("loop of SDPA cuDNN, graph", lambda: peers.graph(peers.loop(shape, cudnn)))]
    return [
        *found,
        variant("loop of SDPA cuDNN", lambda: peers.loop(shape, cudnn)),
        *(recorded if mode == "fwd" else []),
        variant("loop of flash_attn", lambda: peers.flash2(shape), foreign=True),
        variant("causal SDPA cuDNN", lambda: partial(peers.sdpa, cudnn, is_causal=True), role="limit", judged=False),
    ]


def _name(backend: SDPBackend) -> str:
    return str(backend.name).partition("_")[0].lower()


def _tlx(shape: Shape, comparison: Comparison, settings: Settings) -> Row:
    """A row of a process of its own, so without a ratio; it computes all pairs."""
    variant = Variant(TLX, lambda: lambda: None, flops=shape.dense_flops("fwd"), detail={"own_process": True})
    row = comparison.row(variant, settings)
    try:
        for name, value in peers.tlx(shape, settings.tlx_python).items():
            setattr(row, name, value)
    except Unavailable as why:
        row.status, row.reason = "SKIP", str(why)
        return row
    if row.flops and row.median_ms:
        row.tflops = row.flops / row.median_ms / 1e9
    return row


def _step_peers(shape: Shape, variant: Callable[..., Variant]) -> list[Variant]:
    """The last chunk sees all keys of its window, so plain attention over a slice is the same mathematics."""
    first = 0 if shape.window is None else max(0, shape.chunks - shape.window) * shape.tokens

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k[:, :, first:], v[:, :, first:])

    def copy(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [k[:, :, first:].clone(), v[:, :, first:].clone()]

    return [
        variant("SDPA", lambda: plain),
        variant("copy of keys and values", lambda: copy, role="limit", judged=False),
    ]


def _judge(shape: Shape, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mode: str) -> Judge:
    """Against float64 softmax, chunk by chunk, for the first head of the first clip."""
    exact, plain = (_head(shape, (q, k, v), grad, mode, dtype) for dtype in (torch.float64, q.dtype))
    return against(exact, plain, part=lambda outputs: [out[:1, :1] for out in outputs])


def _head(shape: Shape, inputs: tuple[Tensor, ...], grad: Tensor, mode: str, dtype: torch.dtype) -> list[Tensor]:
    graded = mode in ("bwd", "fwd+bwd")
    q, k, v = (t.detach()[:1, :1].to(dtype).requires_grad_(graded) for t in inputs)
    seen = windows(shape)
    if mode == "step":
        seen = [(slice(None), seen[-1][1])]
    parts = []
    for rows, keys in seen:
        scores = q[:, :, rows] @ k[:, :, keys].mT * (1 / math.sqrt(shape.head_dim))
        parts.append(scores.softmax(-1) @ v[:, :, keys])
    out = torch.cat(parts, dim=2)
    if not graded:
        return [out]
    return list(torch.autograd.grad(out, (q, k, v), grad[:1, :1].to(dtype)))
