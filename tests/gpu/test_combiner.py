"""`combiner_project` on a GPU: parity in 16 bits, determinism, graphs, large tensors."""

from __future__ import annotations

import pytest
import torch

from combiner.cases import NORM_CASES, Case, make_case, run
from mirasol.kernels import combiner_project
from tolerance import assert_close, assert_within_budget

pytestmark = pytest.mark.gpu
SHAPES = [
    {"T": 16, "n": 390, "m": 32, "d": 768, "d_out": 1024},
    {"T": 4, "n": 294, "m": 16, "d": 2048, "d_out": 4096},
    {"T": 1, "n": 33, "m": 7, "d": 1000, "d_out": 1023},
    {"edges": [0, 40, 300, 333, 900], "m": 32, "d": 1024, "d_out": 1024},
]


def _on_gpu(case: Case, dtype: torch.dtype) -> Case:
    return case.to(dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_case", NORM_CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_in_16_bits(shape, norm_case, dtype):
    case = _on_gpu(make_case(4, norm_case=norm_case, **shape), dtype)
    out, grads = run(case, "triton")
    plain, plain_grads = run(case, "plain")
    exact, exact_grads = run(case.to(torch.float64), "reference")
    assert_within_budget("out", out, plain, exact)
    for name, grad in grads.items():
        assert_within_budget(name, grad, plain_grads[name], exact_grads[name])


@pytest.mark.parametrize("norm_case", NORM_CASES[:4], ids=str)
def test_a_mean_of_30_deviations(norm_case):
    case = make_case(4, 4, 40, 32, 1024, 1024, norm_case=norm_case)
    case.x += 30 * torch.randn(*case.x.shape[:-1], 1).sign()
    case = _on_gpu(case, torch.bfloat16)
    out, grads = run(case, "triton")
    plain, plain_grads = run(case, "plain")
    exact, exact_grads = run(case.to(torch.float64), "reference")
    assert_within_budget("out", out, plain, exact)
    for name, grad in grads.items():
        assert_within_budget(name, grad, plain_grads[name], exact_grads[name])


@pytest.mark.parametrize("B", [1, 6, 32])
def test_parity_of_every_tile(B):
    case = _on_gpu(make_case(B, 16, 40, 32, 1024, 1024), torch.bfloat16)
    out, _ = run(case, "triton")
    plain, _ = run(case, "plain")
    exact, _ = run(case.to(torch.float64), "reference")
    assert_within_budget("out", out, plain, exact)


@pytest.mark.parametrize("norm_case", NORM_CASES, ids=str)
def test_parity_in_float32(norm_case):
    case = _on_gpu(make_case(2, 8, 50, 32, 768, 512, norm_case=norm_case), torch.float32)
    out, grads = run(case, "triton")
    expected, expected_grads = run(case.to(torch.float64), "reference")
    assert_close("out", out, expected)
    for name, grad in grads.items():
        assert_close(name, grad, expected_grads[name])


def test_auto_takes_the_kernels_in_16_bits():
    case = _on_gpu(make_case(2, 8, 50, 32, 768, 512), torch.bfloat16)
    assert torch.equal(case.call("auto"), case.call("triton"))


def test_ten_runs_are_bitwise_equal():
    case = _on_gpu(make_case(8, 16, 60, 32, 1024, 1024), torch.bfloat16)
    out, grads = run(case, "triton")
    for _ in range(9):
        again, again_grads = run(case, "triton")
        assert torch.equal(again, out)
        assert all(torch.equal(again_grads[name], grads[name]) for name in grads)


def test_tokens_before_the_last_m_are_not_read():
    case = _on_gpu(make_case(4, 16, 390, 32, 1024, 1024), torch.bfloat16)
    out, grads = run(case, "triton")
    case.x[:, :, :-32] = float("nan")
    again, again_grads = run(case, "triton")
    assert torch.equal(again, out)
    assert all(torch.equal(again_grads[name], grads[name]) for name in grads)


def test_a_captured_graph_replays():
    case = _on_gpu(make_case(1, 16, 390, 32, 768, 1024), torch.bfloat16)
    case.call("triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.call("triton")
    case.x.normal_()
    graph.replay()
    assert torch.equal(out, case.call("triton"))


def test_offsets_beyond_2_to_the_31():
    x = torch.zeros(3, 1, 1, 1 << 30, dtype=torch.bfloat16, device="cuda")[..., :64]
    x.normal_()
    weight = torch.randn(64, 64, dtype=torch.bfloat16, device="cuda")
    out = combiner_project(x, 1, weight, backend="triton")
    assert torch.equal(out, combiner_project(x.contiguous(), 1, weight, backend="triton"))
