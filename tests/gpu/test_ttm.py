"""The Token Turing Machine's kernels on a GPU: parity in 16 bits, determinism, graphs, streaming, large batches."""

from __future__ import annotations

import pytest
import torch

from mirasol.kernels import (
    LatentQueryParams,
    MeanPoolParams,
    TokenLearnerParams,
    ttm_read,
    ttm_scan,
    ttm_step,
    ttm_write,
)
from tolerance import assert_within_budget

pytestmark = pytest.mark.gpu
SHAPES = [  # B, s, n, r, d
    (4, 96, 448, 32, 768),
    (2, 96, 1176, 64, 1024),
    (2, 128, 294, 16, 2048),
    (1, 512, 448, 64, 768),
    (1, 7, 33, 5, 100),
]


def learner(d, k, *, positions=0, hidden=64):
    shapes = ((d,), (d,), (hidden, d), (hidden,), (k, hidden), (k,))
    tensors = [torch.randn(shape, device="cuda") / shape[-1] ** 0.5 for shape in shapes]
    tensors[0] = tensors[0] + 1
    place = torch.randn(positions, d, device="cuda") if positions else None
    return TokenLearnerParams(*tensors, place)


def latent_queries(d, k, heads, positions):
    shapes = ((k, d), *((d, d), (d,)) * 4)
    tensors = [torch.randn(shape, device="cuda") / shape[-1] ** 0.5 for shape in shapes]
    tensors[0] = tensors[0] * d**0.5
    return LatentQueryParams(*tensors, heads, torch.randn(positions, d, device="cuda"))


def convert(value, dtype):
    if isinstance(value, tuple):
        return type(value)(*[convert(v, dtype) for v in value])
    return value.detach().to(dtype).requires_grad_() if isinstance(value, torch.Tensor) else value


def leaves(*values):
    flat = [t for value in values for t in (value if isinstance(value, tuple) else (value,))]
    return [t for t in flat if isinstance(t, torch.Tensor)]


def judge(call, args, dtype):
    """`call(args, backend)` gives a tuple of results; they and their gradients are within plain PyTorch's budget."""
    low = [convert(a, dtype) for a in args]
    exact = [convert(a, torch.float64) for a in low]
    found = []
    for given, backend in ((low, "triton"), (low, "reference"), (exact, "reference")):
        torch.manual_seed(1)
        results = call(given, backend)
        loss = sum((r.double() * torch.randn(r.shape, device="cuda").double()).sum() for r in results)
        found.append([*results, *torch.autograd.grad(loss, leaves(*given))])
    largest = max(true.abs().max().item() for true in found[2][len(results) :])
    for i, (ours, plain, true) in enumerate(zip(*found, strict=True)):
        if true.abs().max() < 1e-8 * largest:  # a bias that the softmax forgets
            assert ours.abs().max() < 4 * torch.finfo(dtype).eps * largest
        else:
            assert_within_budget(f"result {i} {list(true.shape)}", ours, plain, true)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "s", "n", "r", "d"), SHAPES)
def test_read_and_write_in_16_bits(B, s, n, r, d, dtype, positions):
    memory, inputs, outputs = (torch.randn(B, p, d, device="cuda") for p in (s, n, r))
    read = learner(d, r, positions=(s + n) * positions)
    judge(lambda a, backend: (ttm_read(*a, backend=backend),), [memory, inputs, read], dtype)
    write = learner(d, s, positions=(s + n + r) * positions)
    judge(lambda a, backend: (ttm_write(*a, backend=backend),), [memory, outputs, inputs, write], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "heads"), [(16, 8), (32, 12), (96, 12), (None, None)])
def test_other_summaries_in_16_bits(k, heads, dtype):
    """Latent queries that pool tokens (heads k < d) or attend to projected ones, and means (no heads)."""
    B, s, n, d = 2, 96, 448, 768
    memory, inputs = (torch.randn(B, p, d, device="cuda") for p in (s, n))
    read = MeanPoolParams(32, torch.randn(s + n, d, device="cuda"))
    if heads is not None:
        read = latent_queries(d, k, heads, s + n)
    judge(lambda a, backend: (ttm_read(*a, backend=backend),), [memory, inputs, read], dtype)


@pytest.mark.parametrize("form", ["parallel", "stepwise"])
def test_scan_in_bfloat16(form):
    B, T, s, n, r, d = 2, 4, 96, 390, 32, 768
    args = [torch.randn(B, s, d, device="cuda"), torch.randn(B, T, n, d, device="cuda"), learner(d, r), learner(d, s)]

    def call(a, backend):
        return ttm_scan(a[0], a[1], a[2], torch.tanh, a[3], form=form, backend=backend)

    judge(call, args, torch.bfloat16)


def test_backward_repeats_to_the_bit():
    args = [torch.randn(4, 96, 768, device="cuda"), torch.randn(4, 448, 768, device="cuda"), learner(768, 32)]
    low = [convert(a, torch.bfloat16) for a in args]
    runs = [torch.autograd.grad(ttm_read(*low, backend="triton").float().sin().sum(), leaves(*low)) for _ in range(10)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("form", ["parallel", "stepwise"])
def test_scan_is_captured_by_a_cuda_graph(form):
    B, T, s, n, r, d = 1, 8, 96, 390, 32, 768
    memory, inputs = (torch.randn(*x, device="cuda", dtype=torch.bfloat16) for x in ((B, s, d), (B, T, n, d)))
    read, write = convert(learner(d, r), torch.bfloat16), convert(learner(d, s), torch.bfloat16)

    def run():
        with torch.no_grad():
            return ttm_scan(memory, inputs, read, torch.tanh, write, form=form, backend="triton")

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    inputs.normal_()
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        assert torch.equal(a, b)


def test_memory_of_a_stream_does_not_grow():
    s, n, r, d = 96, 390, 32, 768
    read, write = convert(learner(d, r), torch.bfloat16), convert(learner(d, s), torch.bfloat16)
    state, peaks = torch.zeros(1, s, d, device="cuda", dtype=torch.bfloat16), []
    with torch.no_grad():
        for _ in range(200):
            torch.cuda.reset_peak_memory_stats()
            chunk = torch.randn(1, n, d, device="cuda", dtype=torch.bfloat16)
            _, state = ttm_step(state, chunk, read, torch.tanh, write)
            peaks.append(torch.cuda.max_memory_allocated())
    assert torch.isfinite(state).all()
    assert max(peaks[10:]) <= 1.1 * peaks[10]


def test_more_than_two_to_the_31_elements():
    """The last item of a batch whose storage is that large is read where it lies."""
    d, n = 2048, 256
    inputs = torch.zeros(4200, n, d, device="cuda", dtype=torch.bfloat16)
    memory = torch.randn(1, 96, d, device="cuda", dtype=torch.bfloat16).expand(4200, -1, -1)
    inputs[-1].normal_()
    read = convert(learner(d, 16), torch.bfloat16)
    with torch.no_grad():
        out = ttm_read(memory, inputs, read, backend="triton")
        alone = ttm_read(memory[-1:], inputs[-1:], read, backend="reference")
    assert (out[-1:].float() - alone.float()).abs().max() < 0.05 * alone.float().abs().max()
