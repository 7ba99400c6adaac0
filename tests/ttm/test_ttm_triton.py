"""The Triton kernels of the TokenLearner summary, in the interpreter without a GPU: forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ttm_helpers import convert, leaves, token_learner_params

from mirasol.kernels import ttm_read, ttm_scan, ttm_step, ttm_write
from mirasol.kernels.core.device import INTERPRETER, Target
from mirasol.kernels.ttm import configs, ops, triton_launch
from mirasol.kernels.ttm.fold import fold
from tolerance import assert_close, assert_within_budget

HOPPER = Target(arch=90, kind="cuda", multiprocessors=132, shared_memory=232448)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="float64 kernels run in the interpreter only")


def arguments(batch, sizes, d, hidden, k, positions, carry, dtype):
    """Arguments of the operator; several entries of `hidden` and `k` are summaries side by side."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape, dtype=dtype):
        return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)

    sources = [random(batch, n, d) for n in sizes]
    sources[-1] = random(sizes[-1], batch, d + 4)[:, :, :d].transpose(0, 1)
    places = [random(n, d) for n in sizes] if positions else []
    w1 = random(sum(hidden), d, dtype=acc) / d**0.5
    w2 = [random(n, h) / h**0.5 for n, h in zip(k, hidden, strict=True)]
    carried = (random(sum(k), batch, d).transpose(0, 1), random(batch, sum(k), dtype=acc)) if carry else (None, None)
    return (
        sources,
        places,
        w1 - w1.mean(dim=-1, keepdim=True),
        random(sum(hidden), dtype=acc),
        w2,
        [random(n) for n in k],
        *carried,
    )


def to_device(params):
    return type(params)(*[None if p is None else p.detach().to(DEVICE).requires_grad_() for p in params])


CASES = [  # B, tokens of each source, d, hidden, k, positions, carry
    (2, [5], 12, [8], [3], False, False),
    (1, [1], 4, [2], [1], False, False),
    (2, [5, 20, 3], 40, [8], [3], True, True),
    (1, [33, 17], 70, [16, 8], [5, 12], False, True),
    (2, [40], 64, [64], [32], True, False),
    (1, [1, 1, 1], 33, [5], [17], True, False),
    (1, [20, 9], 24, [8], [130], True, True),
    (2, [19], 20, [8, 4], [70, 130], False, False),
    (1, [40, 30], 24, [8], [5], True, True),
]


def flatten(arguments):
    """The tensors of nested arguments, in their order."""
    for value in arguments:
        yield from flatten(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def double(value):
    """Nested arguments in float64, asking for gradients."""
    if isinstance(value, list | tuple):
        return [double(v) for v in value]
    return None if value is None else value.detach().double().requires_grad_()


def naive_summary(sources, places, w1, b1, w2, b2, carry_out, carry_lse):
    """Every score network on the normalised tokens, then as `pooled`; also the hidden layer [B, p, J]."""
    v = torch.cat([v + place for v, place in zip(sources, places, strict=True)] if places else sources, dim=1)
    normed = torch.nn.functional.layer_norm(v, v.shape[-1:], eps=1e-6)
    hidden = normed @ (w1 - w1.mean(dim=-1, keepdim=True)).T + b1  # rows have mean zero, and so have their gradients
    parts = torch.nn.functional.gelu(hidden, approximate="tanh").split([w.shape[1] for w in w2], dim=-1)
    scores = [g @ w.T + b for g, w, b in zip(parts, w2, b2, strict=True)]
    return *pooled(torch.cat(scores, dim=-1).mT, v, carry_out, carry_lse), hidden


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=needs_interpreter), torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_naive_form(case, dtype):
    args = arguments(*case, dtype)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    exact = double(args)
    expected = naive_summary(*exact)
    kept = triton_launch.summary_forward(*args)
    for name, ours, theirs in zip(("out", "lse", "hidden"), kept[:3], expected, strict=True):
        assert_close(name, ours, theirs, rtol=rtol)
    seeds = [torch.randn_like(value) for value in kept[:2]]
    gradients = triton_launch.summary_backward(*seeds, *kept, *args, [True] * len(case[1]))
    theirs = torch.autograd.grad(expected[:2], list(flatten(exact)), [seed.double() for seed in seeds])
    for i, (ours, value, argument) in enumerate(zip(gradients, theirs, flatten(args), strict=True)):
        assert ours.dtype == argument.dtype
        assert_close(f"gradient {i} {list(value.shape)}", ours, value, rtol=10 * rtol)


def naive_linear_summary(sources, places, queries, shift, carry_out, carry_lse):
    """`pooled` with the scores v Qf^T + shift."""
    v = torch.cat([v + place for v, place in zip(sources, places, strict=True)] if places else sources, dim=1)
    return pooled(torch.einsum("bpd,kd->bkp", v, queries.to(v.dtype)) + shift[:, None], v, carry_out, carry_lse)


def pooled(scores, v, carry_out, carry_lse):
    """Softmax of scores [B, k, p] over tokens, and the weighted mean of v; a carry is one more token, with its lse."""
    if carry_out is None:
        return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)
    weights = torch.cat([scores, carry_lse[..., None]], dim=-1).softmax(dim=-1)
    out = weights[..., :-1] @ v + weights[..., -1:] * carry_out
    return out, torch.logaddexp(scores.logsumexp(dim=-1), carry_lse)


LINEAR_CASES = [  # B, tokens of each source, d, rows, positions, carry
    (2, [5], 12, 3, False, False),
    (1, [33, 17], 70, 12, False, True),
    (2, [5, 20, 3], 40, 70, True, True),
    (1, [1, 1, 1], 33, 17, True, False),
    (1, [20, 9], 24, 130, True, True),
    (1, [64], 20, 6, False, True),
]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=needs_interpreter), torch.float32])
@pytest.mark.parametrize("case", LINEAR_CASES)
def test_linear_scores_equal_the_naive_form(case, dtype):
    batch, sizes, d, rows, positions, carry = case
    sources, places, queries, shift, _, _, carry_out, carry_lse = arguments(
        batch, sizes, d, [rows], [rows], positions, carry, dtype
    )
    tensors = [*sources, *places, queries, shift, *([carry_out, carry_lse] if carry else [])]
    for tensor in tensors:
        tensor.requires_grad_()
    expected = naive_linear_summary(sources, places, queries, shift, carry_out, carry_lse)
    ours = ops.summary(sources, places, queries, shift, [], [], carry_out, carry_lse)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    seeds = [torch.randn_like(value) for value in expected]
    grads = [torch.autograd.grad(values, tensors, seeds) for values in (ours, expected)]
    for name, a, b in zip(("out", "lse"), ours, expected, strict=True):
        assert_close(name, a, b, rtol=rtol)
    for i, (a, b) in enumerate(zip(*grads, strict=True)):
        assert_close(f"gradient {i} {list(b.shape)}", a, b, rtol=10 * rtol)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=needs_interpreter), torch.float32])
def test_folding_in_one_kernel_equals_the_formula(dtype):
    params = to_device(convert(token_learner_params(37, 3, hidden=5), dtype))
    wanted, results = leaves(params)[:4], []
    for backend in ("triton", "torch"):
        folded = fold(params, backend)
        grads = torch.autograd.grad(folded.w1.sin().sum() + folded.b1.cos().sum(), wanted)
        results.append([*folded, *grads])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_close(f"result {i} {list(b.shape)}", a, b, rtol=1e-12 if dtype == torch.float64 else 1e-5)
    detached = [p.detach() for p in params[:4]]
    torch.library.opcheck(ops.ttm_fold, detached)
    torch.library.opcheck(ops.ttm_fold_backward, [*ops.ttm_fold(*detached), *detached[:3]])


def test_unwanted_source_gradients_are_not_computed():
    args = arguments(2, [5, 6, 7], 16, [4], [3], False, False, torch.float32)
    saved = triton_launch.summary_forward(*args)
    seeds = torch.randn_like(saved[0]), torch.randn_like(saved[1])
    everything = triton_launch.summary_backward(*seeds, *saved, *args, [True, True, True])
    some = triton_launch.summary_backward(*seeds, *saved, *args, [False, True, False])
    for ours, theirs in zip(some, [everything[1], *everything[3:]], strict=True):
        assert torch.equal(ours, theirs)


def test_backward_is_bitwise_deterministic():
    args = arguments(2, [40, 9], 32, [8], [5], True, True, torch.float32)
    saved = triton_launch.summary_forward(*args)
    seeds = torch.randn_like(saved[0]), torch.randn_like(saved[1])
    first, second = (triton_launch.summary_backward(*seeds, *saved, *args, [True, True]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_is_read_around_the_tokens_and_nothing_left_unwritten(monkeypatch):
    """Sources lie in NaN, and fresh memory holds NaN."""
    B, s, n, d, k = 2, 5, 18, 20, 3
    around = torch.full((B, s + n + 8, d + 8), float("nan"), device=DEVICE)
    memory, inputs = around[:, 2 : 2 + s, 4 : 4 + d], around[:, 4 + s : 4 + s + n, 4 : 4 + d]
    memory.normal_()
    inputs.normal_()
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
    params = convert(token_learner_params(d, k), torch.float32)
    params = to_device(params)
    inputs = inputs.requires_grad_()
    out = ttm_read(memory, inputs, params, backend="triton")
    for grad in (out, *torch.autograd.grad(out.sum(), [inputs, *leaves(params)])):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("carry", [False, True])
def test_opcheck(carry):
    args = arguments(2, [4, 5], 8, [2, 4], [1, 2], True, carry, torch.float32)
    torch.library.opcheck(torch.ops.mirasol.ttm_summary.default, args)
    saved = torch.ops.mirasol.ttm_summary.default(*args)
    seeds = torch.randn_like(saved[0]), torch.randn_like(saved[1])
    backward = torch.ops.mirasol.ttm_summary_backward.default
    torch.library.opcheck(backward, (*seeds, *saved, *args, [True, False]))


def test_compiles_whole():
    memory, inputs = torch.randn(1, 3, 16, device=DEVICE), torch.randn(1, 5, 16, device=DEVICE, requires_grad=True)
    params = to_device(token_learner_params(16, 2, hidden=4, dtype=torch.float32))

    def read(memory, inputs, params):
        return ttm_read(memory, inputs, params, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(memory, inputs, params), read(memory, inputs, params)
    assert_close("compiled", ours, expected)
    wanted = leaves(inputs, params)[:-1]  # without b2, whose gradient is nothing but rounding
    pairs = zip(torch.autograd.grad(ours.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True)
    for a, b in pairs:
        assert_close("gradient", a, b)


@needs_interpreter
def test_gradcheck():
    memory, inputs, outputs = (torch.randn(1, n, 5, dtype=torch.float64, requires_grad=True) for n in (2, 3, 2))
    params = token_learner_params(5, 2, positions=7, hidden=3)

    def write(memory, outputs, inputs, *_):
        return ttm_write(memory, outputs, inputs, params, backend="triton")

    assert torch.autograd.gradcheck(write, (memory, outputs, inputs, *leaves(params)), fast_mode=True)


@pytest.mark.parametrize("positions", [False, True])
def test_scan_and_steps_through_the_kernels(positions):
    B, T, s, n, r, d = 1, 2, 5, 18, 3, 24
    memory, inputs = torch.randn(B, s, d, device=DEVICE), torch.randn(B, T, n, d, device=DEVICE)
    read = token_learner_params(d, r, positions=(s + n) * positions, hidden=8, dtype=torch.float32)
    write = token_learner_params(d, s, positions=(s + n + r) * positions, hidden=8, dtype=torch.float32)
    read, write = (
        type(p)(*[t if t is None else t.detach().to(DEVICE).requires_grad_() for t in p]) for p in (read, write)
    )
    inputs.requires_grad_()
    results = []
    for backend, form in (("triton", "parallel"), ("triton", "stepwise"), ("reference", "auto")):
        outputs, last = ttm_scan(memory, inputs, read, torch.tanh, write, form=form, backend=backend)
        wanted = leaves(inputs, read, write)
        results.append([outputs, last, *torch.autograd.grad(outputs.sin().sum() + last.sin().sum(), wanted)])
    largest = max(b.abs().max().item() for b in results[2])
    for ours in results[:2]:
        for i, (a, b) in enumerate(zip(ours, results[2], strict=True)):
            allowed = 2e-5 * max(b.abs().max().item(), 0.05 * largest)
            assert (a - b).abs().max().item() <= allowed, f"result {i} {list(b.shape)}"
    state = memory
    for t in range(T):
        out, state = ttm_step(state, inputs[:, t], read, torch.tanh, write, backend="triton")
        assert_close(f"output {t}", out, results[2][0][:, t])
    assert_close("memory", state, results[2][1])


@pytest.mark.parametrize("dtype", [torch.float16])
def test_low_precision_stays_within_the_budget_of_plain_pytorch(dtype):
    B, s, n, r, d = 1, 24, 40, 8, 64
    memory, inputs = torch.randn(B, s, d, requires_grad=True), torch.randn(B, n, d, requires_grad=True)
    low = [convert(v, dtype) for v in (memory, inputs, token_learner_params(d, r, positions=s + n))]
    exact = [convert(v, torch.float64) for v in low]
    cotangent = torch.randn(B, r, d, dtype=torch.float64)
    results = []
    for args, backend in ((low, "triton"), (low, "reference"), (exact, "reference")):
        out = ttm_read(*args, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves(*args), cotangent.to(out.dtype))])
    largest = max(true.abs().max().item() for true in results[2])
    for i, (ours, plain, true) in enumerate(zip(*results, strict=True)):
        if true.abs().max() < 1e-9:  # a bias that the softmax forgets: nothing but rounding on either side
            assert ours.abs().max() < 2 * torch.finfo(dtype).eps * largest
        else:
            assert_within_budget(f"result {i} {list(true.shape)}", ours, plain, true)


def test_the_choice_is_seen_and_refusals_say_why():
    memory = torch.randn(1, 4, 8)
    wide = token_learner_params(8, 1025, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"at most 1024 summary tokens, there are 1025"):
        ttm_read(memory, memory, wide, backend="triton")
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="bfloat16"):
            ttm_read(
                memory.bfloat16(),
                memory.bfloat16(),
                convert(token_learner_params(8, 2), torch.bfloat16),
                backend="triton",
            )


@given(st.integers(1, 1024), st.integers(1, 128), st.integers(1, 2048), st.sampled_from([2, 4]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_tiles_cover_the_shape(k, hidden, d, itemsize, linear):
    for target in (HOPPER, INTERPRETER):
        tiles = configs.tiles(k, k if linear else hidden, d, itemsize, target, linear=linear)
        assert tiles.rows & (tiles.rows - 1) == 0
        assert tiles.rows <= 128
        assert linear or tiles.hidden >= hidden
        for tile in (tiles.hidden_layer, tiles.pool, tiles.scores, tiles.grad_hidden, tiles.tokens, tiles.weights):
            assert tile.tokens & (tile.tokens - 1) == 0
            assert tile.columns & (tile.columns - 1) == 0


@given(st.integers(1, 10000), st.integers(1, 10000))
def test_splits_leave_no_part_without_work(programs, work):
    parts = configs.splits(programs, work, HOPPER)
    assert 1 <= parts <= min(work, 64)
    assert parts & (parts - 1) == 0
    assert parts == 1 or programs * parts // 2 < configs.WAVES * HOPPER.multiprocessors


@given(st.integers(1, 10000), st.integers(1, 10000))
def test_parts_to_pool_run_at_the_same_time(programs, work):
    parts = configs.pool_splits(programs, work, HOPPER)
    assert parts == 1 or (parts <= work and parts * programs <= HOPPER.multiprocessors)
