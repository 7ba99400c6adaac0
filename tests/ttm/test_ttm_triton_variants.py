"""Latent-query and mean summaries through Triton kernels, in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import test_ttm_goldens as goldens
import torch
from ttm_helpers import convert, latent_query_params, leaves, summary_params, token_learner_params

from mirasol.kernels import MeanPoolParams, ttm_read, ttm_scan, ttm_step, ttm_write
from mirasol.kernels.ttm import latent_query, ops
from mirasol.kernels.ttm.summaries import partial_size
from tolerance import assert_close, assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="float64 kernels run in the interpreter only")
DTYPES = [pytest.param(torch.float64, marks=needs_interpreter), torch.float32]
KINDS = ["pooled", "attended", "mean"]


def on_device(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to(DEVICE).requires_grad_(value.requires_grad)
    return type(value)(*map(on_device, value)) if isinstance(value, tuple) else value


def tokens(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)


def params_of(kind, d, k, positions=0, dtype=torch.float64):
    """Latent queries of few rows (k heads < d), which are pooled first, or of many, which are projected first."""
    if kind == "mean":
        return on_device(summary_params("mean", d, k, positions, dtype=dtype))
    divisors = [h for h in range(1, d + 1) if d % h == 0]
    heads = max(h for h in divisors if h * k < d) if kind == "pooled" else min(h for h in divisors if h * k >= d)
    return on_device(latent_query_params(d, k, positions=positions, heads=heads, dtype=dtype))


def compare(call, wanted, rtol, backends=("triton", "reference")):
    """`call(backend)` gives a list of results; they and all gradients agree."""
    found = []
    for backend in backends:
        results = call(backend)
        grads = torch.autograd.grad(sum(r.sin().sum() for r in results), wanted)
        found.append([*results, *grads])
    largest = max(b.abs().max().item() for b in found[1])
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        allowed = rtol * max(b.abs().max().item(), 0.05 * largest)
        assert a.shape == b.shape
        assert (a - b).abs().max().item() <= allowed, f"result {i} {list(b.shape)}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_read_and_write_equal_the_reference(kind, positions, dtype):
    B, s, n, r, d = 2, 7, 21, 3, 20
    memory, outputs, inputs = (tokens(B, p, d, dtype=dtype) for p in (s, r, n))
    strided = tokens(n, B, d + 4, dtype=dtype)
    rtol = 1e-11 if dtype == torch.float64 else 2e-5
    read = params_of(kind, d, r, positions * (s + n), dtype)
    compare(
        lambda backend: [ttm_read(memory, strided[..., :d].transpose(0, 1), read, backend=backend)],
        leaves(memory, strided, read),
        rtol,
    )
    write = params_of(kind, d, s, positions * (s + n + r), dtype)
    compare(
        lambda backend: [ttm_write(memory, outputs, inputs, write, backend=backend)],
        leaves(memory, outputs, inputs, write),
        rtol,
    )


@pytest.mark.parametrize("k", [1, 4, 28, 40, 61])
def test_means_over_any_windows(k):
    """Windows that divide the tokens, overlap by one, or repeat tokens where there are more windows than tokens."""
    memory, inputs, params = tokens(1, 9, 17), tokens(1, 19, 17), MeanPoolParams(k)
    compare(lambda backend: [ttm_read(memory, inputs, params, backend=backend)], [memory, inputs], 1e-12)


@pytest.mark.parametrize("form", ["parallel", "stepwise"])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scan_and_steps(kind, positions, form):
    B, T, s, n, r, d = 1, 2, 5, 18, 3, 12
    memory, inputs = tokens(B, s, d), tokens(B, T, n, d)
    read, write = params_of(kind, d, r, (s + n) * positions), params_of(kind, d, s, (s + n + r) * positions)

    def scan(backend):
        used = form if backend == "triton" else "auto"
        return list(ttm_scan(memory, inputs, read, torch.tanh, write, form=used, backend=backend))

    compare(scan, leaves(memory, inputs, read, write), 1e-11)
    state = memory
    for t, expected in enumerate(scan("reference")[0].unbind(1)):
        out, state = ttm_step(state, inputs[:, t], read, torch.tanh, write, backend="triton")
        assert_close(f"output {t}", out, expected, rtol=1e-11)


def test_variants_mix():
    memory, inputs = tokens(1, 4, 12), tokens(1, 2, 9, 12)
    read, write = params_of("pooled", 12, 3), on_device(token_learner_params(12, 4, hidden=4))
    compare(
        lambda backend: list(ttm_scan(memory, inputs, read, torch.tanh, write, backend=backend)),
        leaves(memory, inputs, read, write),
        1e-11,
    )


@needs_interpreter
@pytest.mark.parametrize("name", ["latent_query", "tokenlearner_pos"])
def test_matches_the_official_code(name):
    goldens.test_matches_the_official_code(name, "triton", "parallel")


def test_opcheck():
    sources, places = [tokens(2, 4, 8), tokens(2, 5, 8)], [tokens(4, 8), tokens(5, 8)]
    rows, shift = tokens(3, 8), tokens(3)
    carry_out, carry_lse = tokens(2, 3, 8), tokens(2, 3)
    args = [[t.detach() for t in ts] for ts in (sources, places)]
    linear = (*args, rows.detach(), shift.detach(), [], [], carry_out.detach(), carry_lse.detach())
    torch.library.opcheck(ops.ttm_summary, linear)
    saved = ops.ttm_summary(*linear)
    seeds = torch.randn_like(saved[0]), torch.randn_like(saved[1])
    torch.library.opcheck(ops.ttm_summary_backward, (*seeds, *saved, *linear, [True, False]))
    torch.library.opcheck(ops.ttm_mean, (*args, carry_out.detach(), [3, 7], 12, 3))
    torch.library.opcheck(ops.ttm_mean_backward, (carry_out.detach(), [4, 5], [3, 7], 12, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind):
    memory, inputs, params = tokens(1, 3, 12), tokens(1, 5, 12), params_of(kind, 12, 2, positions=8)

    def read(backend):
        torch._dynamo.reset()
        call = ttm_read if backend == "called" else torch.compile(ttm_read, fullgraph=True, backend="aot_eager")
        return [call(memory, inputs, params, backend="triton")]

    compare(read, leaves(memory, inputs, params), 1e-12, backends=("compiled", "called"))


@needs_interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    memory, inputs, params = tokens(1, 2, 6), tokens(1, 3, 6), params_of(kind, 6, 2, positions=5)

    def read(memory, inputs, *_):
        return ttm_read(memory, inputs, params, backend="triton")

    assert torch.autograd.gradcheck(read, (memory, inputs, *leaves(params)), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_around_the_tokens_and_nothing_left_unwritten(kind, monkeypatch):
    """Sources lie in NaN, fresh memory holds NaN, and the same inputs give the same bits."""
    B, s, n, d, k = 2, 5, 18, 20, 3
    around = torch.full((B, s + n + 8, d + 8), float("nan"), device=DEVICE)
    memory, inputs = around[:, 2 : 2 + s, 4 : 4 + d], around[:, 4 + s : 4 + s + n, 4 : 4 + d]
    memory.normal_()
    inputs.normal_()
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
    params, inputs = params_of(kind, d, k, dtype=torch.float32), inputs.requires_grad_()
    runs = []
    for _ in range(2):
        out = ttm_read(memory, inputs, params, backend="triton")
        runs.append([out, *torch.autograd.grad(out.sum(), leaves(inputs, params))])
    for first, second in zip(*runs, strict=True):
        assert torch.isfinite(first).all()
        assert torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_float16_stays_within_the_budget_of_plain_pytorch(kind):
    B, s, n, r, d = 1, 24, 40, 8, 32
    low = [convert(v, torch.float16) for v in (tokens(B, s, d), tokens(B, n, d), params_of(kind, d, r, s + n))]
    exact = [convert(v, torch.float64) for v in low]
    cotangent = torch.randn(B, r, d, dtype=torch.float64, device=DEVICE)
    results = []
    for args, backend in ((low, "triton"), (low, "reference"), (exact, "reference")):
        out = ttm_read(*args, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves(*args), cotangent.to(out.dtype))])
    largest = max(true.abs().max().item() for true in results[2])
    for i, (ours, plain, true) in enumerate(zip(*results, strict=True)):
        if true.abs().max() < 1e-9:  # the key bias, which the softmax forgets: nothing but rounding on either side
            assert ours.abs().max() < 4 * torch.finfo(torch.float16).eps * largest
        else:
            assert_within_budget(f"result {i} {list(true.shape)}", ours, plain, true)


def test_the_form_suits_the_shape_and_refusals_say_why():
    pooled, attended = latent_query_params(12, 2, heads=2), latent_query_params(12, 6, heads=2)
    assert isinstance(latent_query.latent_query(pooled, [5], "triton"), latent_query.ByPooling)
    assert isinstance(latent_query.latent_query(attended, [5], "triton"), latent_query.ByAttention)
    assert [partial_size(pooled, backend) for backend in ("triton", "torch")] == [4, 2]
    memory = torch.randn(1, 300, 300, device=DEVICE)
    wide = on_device(latent_query_params(300, 300, heads=1, dtype=torch.float32))
    with pytest.raises(ValueError, match="heads of at most 256 channels, these have 300"):
        ttm_write(memory, memory, memory, wide, backend="triton")
