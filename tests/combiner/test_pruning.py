"""Last-m pruning: the last layer asks for m tokens a chunk, and equals running all n and keeping the last m."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mirasol.kernels import chunked_attention, combiner_project, last_m
from tolerance import assert_close

B, N, D, H, M = 2, 24, 16, 2, 3
EVEN, UNEVEN = [0, 6, 12, 18, 24], [0, 5, 8, 19, 24]


def _weights() -> dict[str, torch.Tensor]:
    shapes = {"qkv": (3 * D, D), "out": (D, D), "up": (4 * D, D), "down": (D, 4 * D), "project": (10, D)}
    weights = {name: torch.randn(shape, dtype=torch.float64) / D**0.5 for name, shape in shapes.items()}
    norms = {f"{name}_{part}": torch.randn(D, dtype=torch.float64) for name in ("norm1", "norm2") for part in "wb"}
    return weights | norms


def _heads(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.unflatten(-1, (H, D // H)).transpose(1, 2)


def _attend(q, k, v, q_chunk, k_chunk, window, backend):
    out = chunked_attention(
        _heads(q), _heads(k), _heads(v), q_chunk=q_chunk, k_chunk=k_chunk, window=window, backend=backend
    )
    return out.transpose(1, 2).flatten(2)


def _rest(x, attended, w):
    """Output projection, MLP and their residuals: the part of the block that treats every token alone."""
    x = x + F.linear(attended, w["out"])
    return x + F.linear(F.gelu(F.linear(F.layer_norm(x, (D,), w["norm2_w"], w["norm2_b"]), w["up"])), w["down"])


def run_all_then_slice(x, w, chunk, boundaries, window, backend):
    """[B, N, D] -> [B, T, M, 10]: every token goes through the block."""
    y = F.layer_norm(x, (D,), w["norm1_w"], w["norm1_b"])
    q, k, v = F.linear(y, w["qkv"]).chunk(3, dim=-1)
    x = _rest(x, _attend(q, k, v, chunk, chunk, window, backend), w)
    if boundaries is None:
        return combiner_project(x.unflatten(1, (-1, chunk)), M, w["project"], backend=backend)
    return combiner_project(x, M, w["project"], boundaries=boundaries, backend=backend)


def run_pruned(x, w, chunk, boundaries, window, backend):
    """The same with queries, output projection, MLP and norms for the last M tokens of each chunk only."""
    y = F.layer_norm(x, (D,), w["norm1_w"], w["norm1_b"])
    w_q, w_kv = w["qkv"].split((D, 2 * D))
    k, v = F.linear(y, w_kv).chunk(2, dim=-1)
    if boundaries is None:
        kept, y = (last_m(tokens.unflatten(1, (-1, chunk)), M) for tokens in (x, y))
    else:
        kept, y = last_m(x, M, boundaries), last_m(y, M, boundaries)
    T = kept.shape[1]
    attended = _attend(F.linear(y.flatten(1, 2), w_q), k, v, M, chunk, window, backend)
    return combiner_project(_rest(kept, attended.unflatten(1, (T, M)), w), M, w["project"], backend=backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("edges", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_pruned_is_run_all_then_slice(edges, window, backend):
    boundaries = torch.tensor(edges, dtype=torch.int32) if edges is UNEVEN else None
    chunk = edges[1] if boundaries is None else boundaries
    x, w = torch.randn(B, N, D, dtype=torch.float64), _weights()
    grad = torch.randn(B, len(edges) - 1, M, 10, dtype=torch.float64)
    results = []
    for run in (run_all_then_slice, run_pruned):
        tensors = [tensor.requires_grad_() for tensor in (x, *w.values())]
        out = run(x, w, chunk, boundaries, window, backend)
        results.append([out.detach(), *torch.autograd.grad(out, tensors, grad)])
    for name, pruned, full in zip(["out", "x", *w], results[1], results[0], strict=True):
        assert_close(name, pruned, full)


def test_pruning_saves_its_products():
    x, w = torch.randn(B, N, D, dtype=torch.float64), _weights()
    counts = []
    for run in (run_all_then_slice, run_pruned):
        with FlopCounterMode(display=False) as flops:
            run(x, w, 6, None, 1, "torch")
        counts.append(flops.get_total_flops())
    rows = B * (N - 4 * M)  # tokens that the pruned layer leaves out
    per_row = 2 * (D * D + D * D + 8 * D * D) + 2 * 2 * 6 * D  # queries, output, MLP; scores and values of one chunk
    assert counts[0] - counts[1] == rows * per_row
