"""What only a GPU can show of chunked attention: `python -m pytest tests/gpu -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mirasol.kernels import chunked_attention
from mirasol.kernels.attention import configs
from mirasol.kernels.attention.triton_forward import attention_fwd_kernel
from tolerance import assert_within_budget

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYOUTS: dict[str, dict[str, Any]] = {
    "aligned": {"q_chunk": 128},
    "unaligned": {"q_chunk": 100},
    "window": {"q_chunk": 64, "window": 2, "sinks": 1},
    "causal": {"q_chunk": 1},
    "causal_in_chunk": {"q_chunk": 96, "causal": True},
    "alone": {"q_chunk": 49, "window": 1},
}


def inputs(width: int, dtype: torch.dtype, n: int = 512, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    shapes = ((heads, n), (kv_heads, n), (kv_heads, n))
    return [torch.randn(2, h, m, width, device="cuda", dtype=dtype, requires_grad=True) for h, m in shapes]


def run(tensors: list[torch.Tensor], layout: dict[str, Any], backend: str) -> list[torch.Tensor]:
    out = chunked_attention(*tensors, **layout, backend=backend)
    rng = torch.Generator(out.device).manual_seed(1)
    grad = torch.randn(out.shape, generator=rng, device=out.device, dtype=torch.float32).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, grad)]


def check(tensors: list[torch.Tensor], layout: dict[str, Any]) -> None:
    ours = run(tensors, layout, "triton")
    plain = run([t.detach().requires_grad_() for t in tensors], layout, "reference")
    exact = run([t.detach().double().requires_grad_() for t in tensors], layout, "reference")
    for name, out, low, ref in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert_within_budget(name, out, low, ref)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity(layout: str, width: int, dtype: torch.dtype) -> None:
    check(inputs(width, dtype), LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_parity_in_float32(layout: str, width: int) -> None:
    check(inputs(width, torch.float32, n=300), LAYOUTS[layout])


@pytest.mark.parametrize("width", [64, 128])
def test_parity_with_specialised_warps(width: int) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("warps are specialised on Hopper only")
    with configs.warp_specialized():
        check(inputs(width, torch.bfloat16, n=4096, heads=4, kv_heads=4), {"q_chunk": 512})


@pytest.mark.parametrize("n", [1, 7, 64])
def test_streaming(n: int) -> None:
    q = torch.randn(2, 16, n, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 4, 20000, 128, device="cuda", dtype=torch.bfloat16)
    layout = {"q_chunk": n, "k_chunk": 448}
    ours, plain = (chunked_attention(q, k, v, **layout, backend=backend) for backend in ("triton", "reference"))
    exact = chunked_attention(q.double(), k.double(), v.double(), **layout, backend="reference")
    assert_within_budget("out", ours, plain, exact)


@pytest.mark.parametrize("layout", ["unaligned", "window"])
def test_ten_runs_are_bitwise_equal(layout: str) -> None:
    tensors = inputs(128, torch.bfloat16, n=2048)
    first = run(tensors, LAYOUTS[layout], "triton")
    for _ in range(9):
        for one, other in zip(first, run(tensors, LAYOUTS[layout], "triton"), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("packed", [False, True])
def test_a_call_is_captured_in_a_graph(packed: bool) -> None:
    q, k, v = (t.detach() for t in inputs(64, torch.bfloat16))
    cu = torch.tensor([0, 100, 512], dtype=torch.int32, device="cuda") if packed else None
    expected = chunked_attention(q, k, v, q_chunk=64, cu_seqlens_q=cu, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chunked_attention(q, k, v, q_chunk=64, cu_seqlens_q=cu, backend="triton")
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_lengths_do_not_compile_again() -> None:
    def kernels() -> int:
        return sum(len(cache[0]) for cache in attention_fwd_kernel.device_caches.values())

    before = kernels()
    for i in range(20):
        chunk = (64, 128, 100, 448, 17)[i % 5] * (1 + i // 5)
        q = torch.randn(1 + i % 3, 4, chunk * (3 + i), 64, device="cuda", dtype=torch.bfloat16)
        chunked_attention(q, q, q, q_chunk=chunk, backend="triton")
    assert kernels() - before <= 2


def test_more_than_2_to_the_31_elements() -> None:
    """Rows a long stride apart: offsets beyond int32 in tensors that hold little."""
    storage = torch.zeros(2**31 + 2**20, device="cuda", dtype=torch.bfloat16)
    stride = 2**31 // 255
    view = storage.as_strided((1, 1, 256, 64), (0, 0, stride // 8 * 8, 1))
    view.copy_(torch.randn(1, 1, 256, 64, device="cuda"))
    near = view.contiguous()
    far_out = chunked_attention(view, view, view, q_chunk=64, backend="triton")
    assert torch.equal(far_out, chunked_attention(near, near, near, q_chunk=64, backend="triton"))
