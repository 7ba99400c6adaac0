"""What people use for this attention today, each as a function of q, k and v [B, H, N, D]; a peer that cannot run here
raises `Unavailable` with a sentence that says what is missing.

All of them compute attention that is causal between chunks of the shape's tokens and full inside them.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import FlexKernelOptions, create_block_mask, flex_attention

from cases.attention_shapes import Shape, windows
from core.harness import Unavailable, one_line

Attention = Callable[..., Any]
MOST_SCORES = 8192**2  # of a head, where a peer writes all of them to memory
TLX_SECONDS = 120
RECOMPILES = 256  # shapes, modes and backends in one process; beyond its limit Dynamo silently runs eager code


def sdpa(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """PyTorch's attention, by one of its backends or by its own choice."""
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, **options)
    try:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)
    except RuntimeError as error:
        if "No available kernel" in str(error):
            raise Unavailable(f"{backend.name} does not serve this") from error
        raise


def dense(shape: Shape, device: torch.device, backend: SDPBackend | None) -> Attention:
    """SDPA with the mask written out."""
    if backend == SDPBackend.MATH and shape.length**2 > MOST_SCORES:
        raise Unavailable(f"MATH keeps all scores in memory, {shape.length} x {shape.length} a head")
    chunk = torch.arange(shape.length, device=device) // shape.tokens
    ahead = chunk[:, None] - chunk[None, :]
    mask = (ahead >= 0) & (ahead < (shape.window or shape.length))
    return partial(sdpa, backend, attn_mask=mask)


def loop(shape: Shape, backend: SDPBackend | None) -> Attention:
    """One SDPA a chunk, over the keys that it sees."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = windows(shape)
        return torch.cat([sdpa(backend, q[:, :, rows], k[:, :, keys], v[:, :, keys]) for rows, keys in seen], dim=2)

    return attend


def flash2(shape: Shape) -> Attention:
    """FlashAttention-2, one call a chunk."""
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Unavailable("flash_attn is not installed (pip install flash-attn)") from error

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        parts = [flash_attn_func(q[:, rows], k[:, keys], v[:, keys]) for rows, keys in windows(shape)]
        return torch.cat(parts, dim=1).transpose(1, 2)

    return attend


def flex(shape: Shape, device: torch.device, dtype: torch.dtype, mode: str, backend: str | None = None) -> Attention:
    """FlexAttention, compiled; backend: "TRITON" or "FLASH" (FlashAttention-4), None: its own choice."""
    if device.type == "cpu" and mode != "fwd":
        raise Unavailable("FlexAttention has no backward on the CPU")
    if backend is not None and "BACKEND" not in FlexKernelOptions.__annotations__:
        raise Unavailable("this PyTorch's FlexAttention has no backends to choose from")
    if backend == "FLASH":
        _flash4()
    torch._dynamo.config.recompile_limit = RECOMPILES
    try:
        mask = create_block_mask(_visible(shape), None, None, shape.length, shape.length, device=device)
        options = {} if backend is None else {"kernel_options": {"BACKEND": backend}}
        compiled = partial(torch.compile(flex_attention, dynamic=False), block_mask=mask, **options)
        if device.type == "cpu":
            sample = torch.zeros(shape.batch, shape.heads, shape.length, shape.head_dim, dtype=dtype)
            compiled(sample, sample, sample)
    except Exception as error:
        raise Unavailable(f"does not compile here: {one_line(error)}") from error
    return compiled


def _visible(shape: Shape) -> Callable[..., Tensor]:
    """The rule as FlexAttention takes it."""
    n, window = shape.tokens, shape.window or shape.chunks

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ahead = query // n - key // n
        return (ahead >= 0) & (ahead < window)

    return visible


def _flash4() -> tuple[Any, Any]:
    """FlashAttention-4's function and its type of block masks."""
    try:
        from flash_attn.cute import flash_attn_func
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    except ImportError as error:
        raise Unavailable(f"FlashAttention-4 cannot be imported (pip install --pre flash-attn-4): {error}") from error
    return flash_attn_func, BlockSparseTensorsTorch


def flash4(shape: Shape, device: torch.device, *, deterministic: bool = False) -> Attention:
    """FlashAttention-4 with a mask function and the blocks that it leaves."""
    flash_attn_func, blocks_of = _flash4()
    import cutlass
    from cutlass import cute
    from flash_attn.cute.utils import scalar_to_ssa

    n, window = shape.tokens, shape.window or shape.chunks

    @cute.jit
    def visible(batch, head, query, key, lengths, tensors):  # type: ignore[no-untyped-def]
        size, most = scalar_to_ssa(n, cutlass.Int32), scalar_to_ssa(window, cutlass.Int32)
        of_query, of_key = query // size, key // size
        return (of_key <= of_query) & (of_query < of_key + most)

    rows = 256 if torch.cuda.get_device_capability(device)[0] >= 10 else 128  # what its forward pass takes at a time
    mask = create_block_mask(
        _visible(shape), None, None, shape.length, shape.length, device=device, BLOCK_SIZE=(rows, 128)
    )
    by_rows = blocks_of(
        mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices, block_size=(rows, 128)
    )
    by_keys = blocks_of(
        mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices, block_size=(rows, 128)
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = flash_attn_func(
            q, k, v, mask_mod=visible, block_sparse_tensors=by_rows, block_sparse_tensors_bwd=by_keys,
            deterministic=deterministic,
        )  # fmt: skip
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def cudnn_flex(shape: Shape, device: torch.device, *, deterministic: bool = False) -> Attention:
    """cuDNN's attention over intervals of keys; its plan is made at the first call."""
    try:
        from cudnn.flex_attention import create_mask_plan, flex_attn_func
    except ImportError as error:
        raise Unavailable(
            f"cudnn.flex_attention cannot be imported (pip install 'nvidia-cudnn-frontend>=1.32'): {error}"
        ) from error
    intervals = cudnn_intervals(shape).to(device)
    plans: list[Any] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if not plans:
            plans.append(create_mask_plan(intervals, q, k, v))
        return flex_attn_func(q, k, v, mask_plan=plans[0], deterministic=deterministic).transpose(1, 2)

    return attend


def cudnn_intervals(shape: Shape) -> Tensor:
    """[1, 3, B N] int32: row F of a query sees keys [0, F0) and [F1, F2), here [F1, F2) alone."""
    chunk = torch.arange(shape.length) // shape.tokens
    window = shape.window or shape.chunks
    ends = torch.stack([0 * chunk, (chunk + 1 - window).clamp(min=0) * shape.tokens, (chunk + 1) * shape.tokens])
    return ends.to(torch.int32).repeat(1, shape.batch)[None].contiguous()


def graph(attention: Attention) -> Attention:
    """As one CUDA graph, captured at its first call."""
    captured: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []

    def replay(*inputs: Tensor) -> Tensor:
        if not captured:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                attention(*inputs)
            torch.cuda.synchronize()
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                out = attention(*inputs)
            captured.append((recorded, out))
        captured[0][0].replay()
        return captured[0][1]

    return replay


def tlx(shape: Shape, python: Path | None) -> dict[str, Any]:
    """Dense attention by TLX's Hopper tutorial, checked and timed in a process of its own, whose Triton is another.

    Args:
        python: the interpreter of an environment with torch and fbtriton.
    Returns:
        median_ms, p20_ms, p80_ms, n, error and allowed.
    """
    if python is None:
        raise Unavailable("TLX needs an environment with torch and fbtriton: name its interpreter by --tlx-python")
    if not python.is_file():
        raise Unavailable(f"--tlx-python names {python}, which is no file")
    command = tlx_command(shape, python)
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TLX_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"TLX took more than {TLX_SECONDS} s") from error
    lines = ended.stdout.strip().splitlines()
    if ended.returncode or not lines:
        raise Unavailable(f"TLX's process ended with {ended.returncode}: {ended.stderr.strip()[-200:]}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if "unavailable" in answer:
        raise Unavailable(answer["unavailable"])
    return answer


def tlx_command(shape: Shape, python: Path) -> list[str]:
    sizes = (shape.batch, shape.heads, shape.length, shape.head_dim)
    return [str(python), str(Path(__file__).with_name("tlx.py")), *map(str, sizes)]
