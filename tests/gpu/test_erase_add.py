"""The erase-add kernels on a GPU: parity in 16 bits and in float32, determinism, graphs."""

from __future__ import annotations

import pytest
import torch

from mirasol.kernels import EraseAddParams, MlpParams, TokenLearnerParams, ttm_scan, ttm_write
from mirasol.kernels.ttm.erase_add.records import flatten, unflatten
from tolerance import assert_within_budget

pytestmark = pytest.mark.gpu
SHAPES = [  # B, s, r, S, d, hidden
    (4, 96, 32, 8, 768, 64),
    (2, 512, 128, 16, 2048, 64),
    (1, 130, 5, 3, 100, 33),
    (1, 17, 16, 1, 1024, 64),
]


def random(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, device="cuda") * scale + shift


def parameters(d: int, r: int, slots: int, hidden: int, *, official: bool = False) -> EraseAddParams:
    def mlp(inside: int, outside: int) -> MlpParams:
        shapes = ((hidden, inside), (hidden,), (outside, hidden), (outside,))
        return MlpParams(*[random(*shape, scale=shape[-1] ** -0.5) for shape in shapes])

    def norm() -> tuple[torch.Tensor, torch.Tensor]:
        return random(d, scale=0.2, shift=1.0), random(d, scale=0.2)

    erase, add = ((*norm(), mlp(r, slots), mlp(d, d)) for _ in range(2))
    return EraseAddParams(*norm(), mlp(d, slots), *erase, *add, official=official)


def convert(values, dtype):
    return [v.detach().to(dtype).requires_grad_() for v in values]


def write(values, official, backend):
    memory, outputs, *flat = values
    return ttm_write(memory, outputs, outputs, unflatten(flat, official), backend=backend)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("B", "s", "r", "S", "d", "hidden"), SHAPES)
def test_forward_and_every_gradient(B, s, r, S, d, hidden, dtype, official):
    values = [random(B, s, d), random(B, r, d), *flatten(parameters(d, r, S, hidden))]
    low = convert(values, dtype)
    exact = convert(low, torch.float64)
    cotangent = torch.randn(B, s, d, device="cuda", dtype=torch.float64)
    found = []
    for given, backend in ((low, "triton"), (low, "reference"), (exact, "reference")):
        out = write(given, official, backend)
        found.append([out, *torch.autograd.grad(out, given, cotangent.to(out.dtype))])
    largest = max(true.abs().max().item() for true in found[2][1:])
    for i, (ours, plain, true) in enumerate(zip(*found, strict=True)):
        if true.abs().max() < 1e-8 * largest:  # a bias that the softmax forgets
            assert ours.abs().max() < 4 * torch.finfo(dtype).eps * largest
        else:
            assert_within_budget(f"result {i} {list(true.shape)}", ours, plain, true)


def test_backward_repeats_to_the_bit():
    values = [random(4, 96, 768), random(4, 32, 768), *flatten(parameters(768, 32, 8, 64))]
    low = convert(values, torch.bfloat16)
    runs = [torch.autograd.grad(write(low, False, "triton").float().sin().sum(), low) for _ in range(10)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_scan_is_captured_by_a_cuda_graph():
    B, T, s, n, r, d, hidden = 1, 8, 96, 390, 32, 768, 64
    memory, inputs = (random(*shape).bfloat16() for shape in ((B, s, d), (B, T, n, d)))
    shapes = ((d,), (d,), (hidden, d), (hidden,), (r, hidden), (r,))
    read = TokenLearnerParams(*[random(*shape, scale=shape[-1] ** -0.5).bfloat16() for shape in shapes])
    writing = unflatten([p.bfloat16() for p in flatten(parameters(d, r, 8, hidden))], False)

    def run():
        with torch.no_grad():
            return ttm_scan(memory, inputs, read, torch.tanh, writing, backend="triton")

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    inputs.normal_()
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        assert torch.equal(a, b)
