"""`chunked_attention` against what people use today, on the same tensors.

Work is counted in visible pairs, for every implementation alike: one that computes hidden pairs gets no credit for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from console import Table
from cost import chunk_pairs
from harness import Comparison, Judge, Unavailable, Variant, against, compare, one_line, three_modes
from mirasol.kernels import chunked_attention
from report import comparison_table
from rows import Case, Row, Settings, dtype_name

SUITE = "attention"
OURS, DENSE, FULL, CAUSAL = "mirasol, torch", "SDPA, dense mask", "full attention", "causal SDPA"
FLEX = "FlexAttention, compiled"
WORK = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5, "step": 1.0}
"""Matrix products of a mode over those of the forward pass."""


@dataclass(frozen=True)
class Shape:
    """T chunks of n tokens, seen through a window of so many chunks (None: all earlier ones)."""

    label: str
    batch: int
    heads: int
    head_dim: int
    chunks: int
    tokens: int
    window: int | None = None
    modes: tuple[str, ...] = ("fwd", "fwd+bwd")

    @property
    def name(self) -> str:
        window = f" window {self.window}" if self.window else ""
        return f"{self.label} {self.chunks}x{self.tokens} D{self.head_dim}{window}"

    def pairs(self, mode: str) -> int:
        chunks = self.chunks if self.window is None else min(self.window, self.chunks)
        if mode == "step":
            return self.tokens * self.tokens * chunks
        return chunk_pairs(self.chunks, self.tokens, self.tokens, self.window)

    def flops(self, mode: str) -> int:
        return int(WORK[mode] * 4 * self.pairs(mode) * self.head_dim * self.batch * self.heads)

    def dense_flops(self, mode: str) -> int:
        """Of all pairs."""
        return int(WORK[mode] * 4 * (self.chunks * self.tokens) ** 2 * self.head_dim * self.batch * self.heads)


QUICK = [Shape("tiny", 1, 2, 32, 4, 16, modes=("fwd", "fwd+bwd", "step"))]
CPU = [
    Shape("model", 1, 2, 64, 16, 448, modes=("fwd", "fwd+bwd", "step")),
    Shape("model", 1, 2, 64, 16, 448, window=2, modes=("fwd",)),
    Shape("latents", 1, 12, 64, 16, 32),
    Shape("video", 1, 1, 128, 4, 1560),
]
CPU_FULL = [
    *CPU,
    Shape("model", 1, 1, 64, 64, 448, modes=("fwd", "fwd+bwd", "step")),
    Shape("model", 1, 1, 64, 64, 448, window=2),
    Shape("latents", 1, 12, 64, 64, 32),
]
GPU_MODES = ("fwd", "bwd", "fwd+bwd")
GPU = [
    Shape("model", 4, 16, 64, 16, 448, modes=(*GPU_MODES, "step")),
    Shape("model", 1, 16, 64, 64, 448, modes=(*GPU_MODES, "step")),
    Shape("model", 1, 16, 128, 64, 448, modes=(*GPU_MODES, "step")),
    Shape("model", 1, 16, 128, 64, 448, window=2, modes=GPU_MODES),
    Shape("latents", 16, 12, 128, 16, 32, modes=GPU_MODES),
    Shape("video", 1, 24, 128, 7, 1560, modes=GPU_MODES),
]
GPU_FULL = [*GPU, Shape("video", 1, 24, 128, 21, 1560, modes=GPU_MODES)]


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
        for shape in shapes
        for mode in shape.modes
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

    peers = _step_peers(shape, variant) if mode == "step" else _peers(shape, settings, mode, dtype, variant)
    variants = [*_ours(shape, settings, variant), *peers]
    seen = shape.chunks if shape.window is None else min(shape.window, shape.chunks)
    moved = 2 * q.numel() * q.element_size() * (1 + seen)  # q, out and the keys and values in sight
    return compare(
        Comparison(
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
        ),
        settings,
    )


def _ours(shape: Shape, settings: Settings, variant: Callable[..., Variant]) -> list[Variant]:
    def run(backend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunked_attention(q, k, v, q_chunk=shape.tokens, window=shape.window, backend=backend)

    backends = ("triton", "torch") if settings.device.type == "cuda" else ("torch",)
    return [variant(f"mirasol, {name}", lambda name=name: partial(run, name), role="ours") for name in backends]


def _peers(
    shape: Shape, settings: Settings, mode: str, dtype: torch.dtype, variant: Callable[..., Variant]
) -> list[Variant]:
    n, length, cudnn = shape.tokens, shape.chunks * shape.tokens, SDPBackend.CUDNN_ATTENTION
    built = {"show_build": True}

    def dense(backend: SDPBackend | None) -> Callable[..., Any]:
        chunk = torch.arange(length, device=settings.device) // n
        ahead = chunk[:, None] - chunk[None, :]
        mask = (ahead >= 0) & (ahead < (shape.window or length))
        return partial(_sdpa, backend, attn_mask=mask)

    def loop(backend: SDPBackend | None) -> Callable[..., Any]:
        return partial(_loop, shape, backend)

    peers = [
        *(
            []
            if settings.effort == "quick"
            else [variant(FLEX, lambda: _flex(shape, settings, mode, dtype), detail=built)]
        ),
        variant("loop of SDPA", lambda: loop(None)),
        variant(FULL, lambda: partial(_sdpa, None), judged=False, flops=shape.dense_flops(mode)),
        variant(CAUSAL, lambda: partial(_sdpa, None, is_causal=True), role="limit", judged=False),
    ]
    if settings.device.type != "cuda":
        return [variant(DENSE, lambda: dense(None), detail=built), *peers]
    return [
        variant(DENSE, lambda: dense(None), detail=built),
        variant("SDPA efficient, dense mask", lambda: dense(SDPBackend.EFFICIENT_ATTENTION), detail=built),
        variant("SDPA cuDNN, dense mask", lambda: dense(cudnn), detail=built),
        *peers,
        variant("loop of SDPA cuDNN", lambda: loop(cudnn)),
        *([variant("loop of SDPA cuDNN, graph", lambda: _graph(loop(cudnn)))] if mode == "fwd" else []),
        variant("loop of flash_attn", lambda: _flash(shape)),
        variant("causal SDPA cuDNN", lambda: partial(_sdpa, cudnn, is_causal=True), role="limit", judged=False),
    ]


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


def _sdpa(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, **options)
    try:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)
    except RuntimeError as error:
        if "No available kernel" in str(error):
            raise Unavailable(f"{backend.name} does not serve this") from error
        raise


def _windows(shape: Shape) -> list[tuple[slice, slice]]:
    """Rows and visible keys of every chunk."""
    n, window = shape.tokens, shape.window or shape.chunks
    return [(slice(c * n, (c + 1) * n), slice(max(0, c + 1 - window) * n, (c + 1) * n)) for c in range(shape.chunks)]


def _loop(shape: Shape, backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [_sdpa(backend, q[:, :, rows], k[:, :, keys], v[:, :, keys]) for rows, keys in _windows(shape)]
    return torch.cat(parts, dim=2)


def _flex(shape: Shape, settings: Settings, mode: str, dtype: torch.dtype) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if settings.device.type == "cpu" and mode != "fwd":
        raise Unavailable("FlexAttention has no backward on the CPU")
    n, window, length = shape.tokens, shape.window or shape.chunks, shape.chunks * shape.tokens

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ahead = query // n - key // n
        return (ahead >= 0) & (ahead < window)

    try:
        block_mask = create_block_mask(visible, None, None, length, length, device=settings.device)
        compiled = torch.compile(flex_attention, dynamic=False)
        if settings.device.type == "cpu":
            sample = torch.zeros(shape.batch, shape.heads, length, shape.head_dim, dtype=dtype)
            compiled(sample, sample, sample, block_mask=block_mask)
    except Exception as error:
        raise Unavailable(f"does not compile here: {one_line(error)}") from error
    return partial(compiled, block_mask=block_mask)


def _flash(shape: Shape) -> Callable[..., Any]:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Unavailable("flash_attn is not installed") from error

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        parts = [flash_attn_func(q[:, rows], k[:, keys], v[:, keys]) for rows, keys in _windows(shape)]
        return torch.cat(parts, dim=1).transpose(1, 2)

    return loop


def _graph(loop: Callable[..., Tensor]) -> Callable[..., Any]:
    """The loop as one CUDA graph, captured at its first call."""
    captured: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []

    def replay(*inputs: Tensor) -> Tensor:
        if not captured:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                loop(*inputs)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = loop(*inputs)
            captured.append((graph, out))
        captured[0][0].replay()
        return captured[0][1]

    return replay


def _judge(shape: Shape, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mode: str) -> Judge:
    """Against float64 softmax, chunk by chunk, for the first head of the first clip."""
    exact, plain = (_head(shape, (q, k, v), grad, mode, dtype) for dtype in (torch.float64, q.dtype))
    return against(exact, plain, part=lambda outputs: [out[:1, :1] for out in outputs])


def _head(shape: Shape, inputs: tuple[Tensor, ...], grad: Tensor, mode: str, dtype: torch.dtype) -> list[Tensor]:
    graded = mode in ("bwd", "fwd+bwd")
    q, k, v = (t.detach()[:1, :1].to(dtype).requires_grad_(graded) for t in inputs)
    windows = _windows(shape)
    if mode == "step":
        windows = [(slice(None), windows[-1][1])]
    parts = []
    for rows, keys in windows:
        scores = q[:, :, rows] @ k[:, :, keys].mT * (1 / math.sqrt(shape.head_dim))
        parts.append(scores.softmax(-1) @ v[:, :, keys])
    out = torch.cat(parts, dim=2)
    if not graded:
        return [out]
    return list(torch.autograd.grad(out, (q, k, v), grad[:1, :1].to(dtype)))
