"""Small shapes of every Triton operator, forward and backward: what compute-sanitizer runs in `make gpu`."""

import pytest
import torch

from mirasol.kernels import (
    EraseAddParams,
    MlpParams,
    TokenLearnerParams,
    chunked_attention,
    combiner_project,
    ttm_scan,
    ttm_write,
)

pytestmark = pytest.mark.gpu


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "chunks",
    [
        {"q_chunk": 64},
        {"q_chunk": 50, "window": 2, "sinks": 1},
        {"q_chunk": 1},
        {"q_chunk": 40, "causal": True},
    ],
    ids=str,
)
def test_sanitizer_attention(chunks, dtype):
    q, k, v = leaf(1, 4, 200, 64, dtype=dtype), leaf(1, 2, 200, 64, dtype=dtype), leaf(1, 2, 200, 64, dtype=dtype)
    chunked_attention(q, k, v, backend="triton", **chunks).float().sum().backward()
    chunked_attention(q[:, :, -1:].detach(), k, v, q_chunk=1, backend="triton")
    torch.cuda.synchronize()


def test_sanitizer_combiner():
    x, weight = leaf(2, 3, 50, 96), leaf(80, 96)
    norm = (leaf(96), leaf(96))
    combiner_project(x, 7, weight, leaf(80), *norm, backend="triton").float().sum().backward()
    torch.cuda.synchronize()


def test_sanitizer_ttm():
    d, hidden = 96, 64
    read, write = (
        TokenLearnerParams(leaf(d), leaf(d), leaf(hidden, d), leaf(hidden), leaf(k, hidden), leaf(k)) for k in (5, 9)
    )
    outputs, memory = ttm_scan(leaf(2, 9, d), leaf(2, 3, 33, d), read, torch.tanh, write, backend="triton")
    (outputs.float().sum() + memory.float().sum()).backward()
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slots", [1, 6])
def test_sanitizer_erase_add(slots, dtype):
    d, r, hidden = 96, 5, 33

    def mlp(inside: int, outside: int) -> MlpParams:
        shapes = ((hidden, inside), (hidden,), (outside, hidden), (outside,))
        return MlpParams(*[leaf(*shape, dtype=dtype) for shape in shapes])

    def norm() -> list[torch.Tensor]:
        return [leaf(d, dtype=dtype), leaf(d, dtype=dtype)]

    erase, add = ([*norm(), mlp(r, slots), mlp(d, d)] for _ in range(2))
    params = EraseAddParams(*norm(), mlp(d, slots), *erase, *add)
    memory, outputs = leaf(2, 35, d, dtype=dtype), leaf(2, r, d, dtype=dtype)
    ttm_write(memory, outputs, outputs, params, backend="triton").float().sum().backward()
    torch.cuda.synchronize()
