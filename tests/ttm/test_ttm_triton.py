"""The pooling kernels and the summaries that they serve: compiled on a GPU, in Triton's interpreter without one."""

from __future__ import annotations

import pytest
import test_ttm_goldens as goldens
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ttm_helpers import (
    assert_alike,
    assert_within_plain,
    convert,
    erase_add_params,
    latent_query_params,
    leaves,
    random,
    summary_params,
    token_learner_params,
    with_gradients,
)

from devices import DEVICE, EXACT, LOW_PRECISION, ON_GPU, only_on_gpu
from mirasol.kernels import ttm_read, ttm_scan, ttm_step, ttm_write
from mirasol.kernels.core.device import INTERPRETER, Target
from mirasol.kernels.ttm.latent_query import pooled_rows
from mirasol.kernels.ttm.pool import eager, op
from mirasol.kernels.ttm.pool.triton import config
from mirasol.kernels.ttm.recurrence import carried_rows
from tolerance import LONG_SUMS, SCAN_FLOAT32, assert_close, assert_within_budget

HOPPER = Target(arch=90, kind="cuda", multiprocessors=132, shared_memory=232448)
RTOL = LONG_SUMS if torch.float64 == EXACT else None
KINDS = ["token_learner", "latent_query", "mean"]
needs_interpreter = pytest.mark.skipif(ON_GPU, reason="float64 kernels run in the interpreter only")


def here(*values, dtype=EXACT):
    """Detached copies on the device that the kernels run on."""
    return convert(values, dtype, DEVICE)


def params_of(kind, d, k, positions=0):
    small = {"token_learner": dict(hidden=8), "latent_query": dict(heads=2)}
    return summary_params(kind, d, k, positions, **small.get(kind, {}))


CASES = [  # B, tokens of each source, d, hidden (None: linear scores), k, positions, carry
    (2, [5], 12, 8, 3, False, False),
    (1, [1], 4, 2, 1, False, False),
    (2, [5, 20, 3], 40, 8, 3, True, True),
    (1, [33, 17], 70, 24, 17, False, True),
    (2, [40], 64, 64, 32, True, False),
    (1, [1, 1, 1], 33, 5, 17, True, False),
    (1, [20, 9], 24, 8, 130, True, True),
    (1, [33, 17], 70, None, 12, False, True),
    (2, [5, 20, 3], 40, None, 70, True, True),
    (1, [1, 1, 1], 33, None, 17, True, False),
    (1, [20, 9], 24, None, 130, True, True),
]


def arguments(batch, sizes, d, hidden, k, positions, carry, dtype=EXACT):
    """Arguments of the operator. No tensor is contiguous whose strides it may choose."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def strided(*shape, dtype=dtype):
        return torch.randn(*shape[::-1], dtype=torch.float64).to(DEVICE, dtype).permute(*reversed(range(len(shape))))

    sources = [torch.randn(n, batch, d + 4).to(DEVICE, dtype)[:, :, :d].transpose(0, 1) for n in sizes]
    places = strided(sum(sizes), d) if positions else None
    j = k if hidden is None else hidden
    w1 = strided(j, d) / d**0.5
    second = (None, None) if hidden is None else (strided(k, j) / j**0.5, strided(2 * k)[::2])
    carried = (torch.randn(k, batch, d).to(DEVICE, dtype).transpose(0, 1), strided(batch, k, dtype=acc))
    w1 = w1 if hidden is None else w1 - w1.mean(dim=-1, keepdim=True)
    return sources, places, w1, strided(2 * j, dtype=acc)[::2], *second, *(carried if carry else (None, None))


def beside(args):
    """What the rows of w1 sum to, counters, and that backward follows."""
    counters = torch.zeros(config.COUNTERS, dtype=torch.int32, device=DEVICE)
    return args[2].sum(dim=1, dtype=args[3].dtype), counters, True


def naive(sources, places, w1, b1, w2, b2, carry_out, carry_lse):
    """out, lse and the hidden layer, from scores of the normalised tokens; a carry is one more token, with its lse."""
    v = torch.cat(sources, dim=1)
    v = v if places is None else v + places
    if w2 is None:
        hidden = v @ w1.T + b1
        scores = hidden.mT
    else:
        normed = torch.nn.functional.layer_norm(v, v.shape[-1:], eps=1e-6)
        hidden = normed @ (w1 - w1.mean(dim=-1, keepdim=True)).T + b1  # rows have mean zero, and so their gradients
        scores = (torch.nn.functional.gelu(hidden, approximate="tanh") @ w2.T + b2).mT
    if carry_out is None:
        return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1), hidden
    weights = torch.cat([scores, carry_lse[..., None]], dim=-1).softmax(dim=-1)
    out = weights[..., :-1] @ v + weights[..., -1:] * carry_out
    return out, torch.logaddexp(scores.logsumexp(dim=-1), carry_lse), hidden


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_naive_form(case):
    args = arguments(*case)
    tensors = [*args[0], *(t for t in args[1:] if t is not None)]
    exact = [t.double().requires_grad_() for t in tensors]
    taken = iter(exact)
    nested = [next(taken) for _ in args[0]], *(None if t is None else next(taken) for t in args[1:])
    *expected, hidden = naive(*nested)
    *kept, saved_hidden, stats = op.ttm_pool(*args, *beside(args))
    assert_close("hidden", saved_hidden, hidden, rtol=RTOL)
    seeds = [torch.randn_like(value) for value in kept]
    grads = op.ttm_pool_backward(*seeds, *kept, saved_hidden, stats, *args, [True] * len(args[0]))
    theirs = torch.autograd.grad(expected, exact, [seed.double() for seed in seeds], allow_unused=True)
    found = zip([*kept, *grads], [*expected, *theirs], strict=True)
    for i, (a, b) in enumerate(found):
        assert_close(f"result {i} {list(b.shape)}", a, b, rtol=RTOL)
    again = op.ttm_pool_backward(*seeds, *kept, saved_hidden, stats, *args, [True] * len(args[0]))
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True)), "not the same bits"


@pytest.mark.parametrize("hidden", [8, None])
def test_groups_of_items_take_turns(hidden, monkeypatch):
    """Also where the last group lacks items. Counters end at zero, and without a backward nothing is kept for it."""
    from mirasol.kernels.ttm.pool.triton import host

    args = arguments(5, [20, 3], 40, hidden, 20, False, True)
    one_group = op.ttm_pool(*args, *beside(args))
    for members in (1, 2, 3):
        monkeypatch.setattr(host, "group", lambda *_, members=members: members)
        sums, counters, _ = beside(args)
        out, lse, hidden_layer, stats = op.ttm_pool(*args, sums, counters, False)
        assert torch.equal(out, one_group[0])
        assert torch.equal(lse, one_group[1])
        assert not counters.any()
        assert hidden_layer.numel() == stats.numel() == 0


def test_statistics_stand_a_mean_far_from_zero():
    args = arguments(1, [40], 70, 8, 3, False, False, torch.float32)
    args[0][0].add_(1000)
    stats = op.ttm_pool(*args, *beside(args))[3]
    exact = args[0][0].double()
    assert_close("mean", stats[0], exact.mean(dim=2))
    assert_close("1 / deviation", stats[1], (exact.var(dim=2, correction=0) + 1e-6).rsqrt())


@pytest.mark.parametrize("case", [(2, [4, 5], 8, 6, 3, True, True), (2, [4, 5], 8, None, 3, False, False)])
def test_opcheck(case):
    args = arguments(*case, torch.float32)
    torch.library.opcheck(op.ttm_pool, (*args, *beside(args)))
    saved = op.ttm_pool(*args, *beside(args))
    seeds = torch.randn_like(saved[0]), torch.randn_like(saved[1])
    torch.library.opcheck(op.ttm_pool_backward, (*seeds, *saved, *args, [True, False]))


def test_unwanted_source_gradients_are_not_computed():
    args = arguments(2, [5, 6, 7], 16, 4, 3, False, False)
    saved = op.ttm_pool(*args, *beside(args))
    seeds = torch.randn_like(saved[0]), torch.randn_like(saved[1])
    everything = op.ttm_pool_backward(*seeds, *saved, *args, [True, True, True])
    some = op.ttm_pool_backward(*seeds, *saved, *args, [False, True, False])
    for ours, theirs in zip(some, [everything[1], *everything[3:]], strict=True):
        assert torch.equal(ours, theirs)


def test_folding_in_one_kernel_equals_the_formula():
    (params,) = here(token_learner_params(37, 3, hidden=5))
    params = params._replace(w1=params.w1.detach().T.contiguous().T.requires_grad_())
    wanted, found = leaves(params)[:4], []
    for w1, b1 in (op.fold(params)[:2], eager.fold(params)):
        centred = w1 - w1.mean(dim=1, keepdim=True)  # and so its gradient's rows
        found.append(with_gradients([centred, b1], wanted))
    assert_alike(*found, RTOL)
    detached = [p.detach() for p in params[:4]]
    torch.library.opcheck(op.ttm_fold, detached)
    torch.library.opcheck(op.ttm_fold_backward, [*op.ttm_fold(*detached)[:2], *detached[:3]])


def test_first_layers_are_cast_and_folded_once(monkeypatch):
    """Not again for every chunk."""
    (memory, inputs, read, write) = here(
        random(1, 5, 16), random(1, 4, 9, 16), params_of("token_learner", 16, 3), params_of("token_learner", 16, 5),
        dtype=torch.float16,
    )  # fmt: skip
    called: list[str] = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Calls():
        ttm_scan(memory, inputs, read, torch.tanh, write, form="parallel", backend="triton")
    assert called.count("mirasol::ttm_fold") == 2
    assert called.count("mirasol::ttm_pool") == 2 + 2 * 4
    assert not any("_to_copy" in name for name in called)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_read_and_write_equal_the_reference(kind, positions):
    B, s, n, r, d = 2, 7, 21, 3, 20
    read, write = params_of(kind, d, r, positions * (s + n)), params_of(kind, d, s, positions * (s + n + r))
    memory, outputs, apart, read, write = here(
        random(B, s, d), random(B, r, d), random(n, B, d + 4), read, write
    )  # fmt: skip
    inputs = apart[..., :d].transpose(0, 1)
    for call, wanted in (
        (lambda b: ttm_read(memory, inputs, read, backend=b), leaves(memory, apart, read)),
        (lambda b: ttm_write(memory, outputs, inputs, write, backend=b), leaves(memory, outputs, apart, write)),
    ):
        ours, expected = (with_gradients(call(b), wanted) for b in ("triton", "reference"))
        assert ours[0].is_contiguous()
        assert_alike(ours, expected, RTOL)


SCANS = [("token_learner", "token_learner"), ("latent_query", "latent_query"), ("mean", "mean"),
         ("latent_query", "token_learner"), ("token_learner", "erase_add")]  # fmt: skip


@pytest.mark.parametrize("form", ["parallel", "stepwise"])
@pytest.mark.parametrize(("reads", "writes"), SCANS)
def test_scan_and_steps(reads, writes, form):
    """With positions in the parallel form, without in the other."""
    B, T, s, n, r, d = 1, 2, 5, 18, 3, 12
    placed = form == "parallel"
    read = params_of(reads, d, r, (s + n) * placed)
    write = erase_add_params(d, r) if writes == "erase_add" else params_of(writes, d, s, (s + n + r) * placed)
    memory, inputs, read, write = here(random(B, s, d), random(B, T, n, d), read, write)

    def scan(backend, form):
        return ttm_scan(memory, inputs, read, torch.tanh, write, form=form, return_memories=True, backend=backend)

    wanted = leaves(memory, inputs, read, write)
    expected = scan("reference", "auto")
    assert_alike(
        with_gradients(scan("triton", form), wanted), with_gradients(expected, wanted), RTOL or SCAN_FLOAT32
    )  # fmt: skip
    state = memory
    for t in range(T):
        out, state = ttm_step(state, inputs[:, t], read, torch.tanh, write, backend="triton")
        assert_close(f"output {t}", out, expected[0][:, t], rtol=RTOL)
        assert_close(f"memory {t}", state, expected[1][:, t], rtol=RTOL)


def test_float32_stays_near_the_reference():
    args = here(random(1, 17, 40), random(1, 50, 40), token_learner_params(40, 9, positions=67), dtype=torch.float32)
    found = [with_gradients(ttm_read(*args, backend=b), leaves(*args)) for b in ("triton", "reference")]
    assert_alike(*found, SCAN_FLOAT32)


@needs_interpreter
@pytest.mark.parametrize("name", ["latent_query", pytest.param("tokenlearner_pos", marks=pytest.mark.slow)])
def test_matches_the_official_code(name):
    goldens.test_matches_the_official_code(name, "triton", "parallel")


@needs_interpreter
@pytest.mark.parametrize("kind", KINDS[:2])
def test_gradcheck(kind):
    memory, outputs, inputs = (random(1, n, 6) for n in (2, 2, 3))
    params = params_of(kind, 6, 2, positions=7)

    def write(memory, outputs, inputs, *_):
        return ttm_write(memory, outputs, inputs, params, backend="triton")

    assert torch.autograd.gradcheck(write, (memory, outputs, inputs, *leaves(params)), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_compiles_whole_with_the_same_tensor_twice(kind):
    memory, params = here(random(1, 3, 12), params_of(kind, 12, 2, positions=6))

    def read(memory, inputs, params):
        return ttm_read(memory, inputs, params, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    wanted = leaves(memory, params)
    found = [with_gradients(call(memory, memory, params), wanted) for call in (compiled, read)]
    assert_alike(*found, RTOL)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_around_the_tokens_and_nothing_left_unwritten(kind, monkeypatch):
    """Sources lie in NaN, and fresh memory holds NaN, or counts of ten thousand."""
    B, s, n, d, k = 2, 5, 18, 20, 3
    around = torch.full((B, s + n + 8, d + 8), float("nan"), device=DEVICE)
    memory, inputs = around[:, 2 : 2 + s, 4 : 4 + d], around[:, 4 + s : 4 + s + n, 4 : 4 + d]
    memory.normal_()
    inputs.normal_()
    (params,) = here(params_of(kind, d, k), dtype=torch.float32)
    new_empty, inputs = torch.Tensor.new_empty, inputs.requires_grad_()

    def filled(*args, **kwargs):
        found = new_empty(*args, **kwargs)
        return found.fill_(torch.nan if found.is_floating_point() else 10_000)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    for found in with_gradients(ttm_read(memory, inputs, params, backend="triton"), leaves(inputs, params)):
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_stay_within_the_budget_of_plain_pytorch(kind, dtype):
    args = here(random(1, 24, 64), random(1, 40, 64), params_of(kind, 64, 8, 64))
    assert_within_plain(lambda *a: ttm_read(*a[:3], backend=a[3]), args, dtype, "triton")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch's own, at the first jvp
def test_transforms_and_second_derivatives_are_refused_in_a_sentence():
    memory, inputs, params = here(random(1, 3, 12), random(1, 4, 12), params_of("token_learner", 12, 2))

    def read(memory):
        return ttm_read(memory, inputs, params, backend="triton").sum()

    for call in (
        lambda: torch.func.grad(read)(memory),
        lambda: torch.func.vmap(read)(memory[None]),
        lambda: torch.func.jvp(read, (memory,), (memory,)),
    ):
        with pytest.raises(NotImplementedError, match=r'ttm_scan .*torch.func.*backend="reference"'):
            call()
    (grad,) = torch.autograd.grad(read(memory), memory, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"ttm_scan .*no second derivative"):
        grad.sum().backward()


def test_the_choice_is_seen_and_refusals_say_why():
    memory = torch.randn(1, 4, 8, device=DEVICE)
    wide = convert(token_learner_params(8, 1025), torch.float32, DEVICE)
    with pytest.raises(ValueError, match="at most 1024 summary tokens, there are 1025"):
        ttm_read(memory, memory, wide, backend="triton")
    if not ON_GPU:
        with pytest.raises(ValueError, match="bfloat16"):
            ttm_read(*convert((memory, memory, token_learner_params(8, 2)), torch.bfloat16), backend="triton")
    few, many = latent_query_params(12, 2, heads=2), latent_query_params(12, 30, heads=2)
    assert [pooled_rows(few, "triton"), pooled_rows(many, "triton"), pooled_rows(few, "torch")] == [4, None, None]
    assert [carried_rows(few, backend) for backend in ("triton", "torch")] == [4, 2]


@pytest.mark.parametrize("writes", ["latent_query", "erase_add"])
def test_what_the_kernels_do_not_hold_runs_in_pytorch_beside_them(writes):
    s, d = 70, 12  # 140 rows of heads times queries: more work than projecting first
    write = erase_add_params(d, 3) if writes == "erase_add" else latent_query_params(d, s, heads=2)
    args = here(random(1, s, d), random(1, 2, 9, d), params_of("token_learner", d, 3), write)
    found = [
        with_gradients(ttm_scan(*args[:3], torch.tanh, args[3], form="parallel", backend=b), leaves(*args))
        for b in ("triton", "reference")
    ]
    assert_alike(*found, RTOL or SCAN_FLOAT32)


@given(st.integers(1, 1024), st.integers(1, 128), st.integers(1, 2048), st.sampled_from([2, 4]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_blocks_cover_the_shape(k, hidden, d, itemsize, linear):
    for target in (HOPPER, INTERPRETER):
        found = config.config(k, k if linear else hidden, d, itemsize, target, linear=linear)
        assert found.rows & (found.rows - 1) == 0
        assert found.rows <= 128
        assert linear or found.hidden >= hidden
        for block in (found.pool, found.scores, found.grad_hidden, found.tokens, found.weights):
            assert block.tokens & (block.tokens - 1) == 0
            assert block.columns & (block.columns - 1) == 0


@given(st.integers(1, 10000), st.integers(1, 10000))
def test_splits_leave_no_part_without_work(programs, work):
    parts = config.splits(programs, work, HOPPER)
    assert 1 <= parts <= min(work, 64)
    assert parts & (parts - 1) == 0
    assert parts == 1 or programs * parts // 2 < config.WAVES * HOPPER.multiprocessors


@given(st.integers(1, 5000), st.integers(1, 200))
def test_groups_hold_all_items_and_have_a_counter_each(batch, tiles):
    members = config.group(batch, tiles, HOPPER)
    groups = -(-batch // members)
    assert 1 <= members <= batch
    assert groups < config.COUNTERS
    assert groups * members - batch < groups, "programs for items that are not there"
    assert members * tiles < config.WAVES * HOPPER.multiprocessors + tiles or groups > (config.COUNTERS - 1) // 2


def on_gpu(*values, dtype=torch.bfloat16):
    return convert(values, dtype, DEVICE)


@only_on_gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("kind", [*KINDS, "many queries"])
@pytest.mark.parametrize(
    ("B", "s", "n", "r", "d"),
    [(4, 96, 448, 32, 768), (2, 96, 1176, 64, 1024), (2, 128, 294, 16, 2048), (1, 512, 448, 64, 768)],
)
def test_read_and_write_of_real_sizes_in_16_bits(B, s, n, r, d, kind, dtype):
    heads = {"many queries": dict(heads=16), "latent_query": dict(heads=8)}.get(kind, {})
    variant = "latent_query" if kind == "many queries" else kind
    memory, outputs, inputs = on_gpu(random(B, s, d), random(B, r, d), random(B, n, d), dtype=torch.float64)
    read, write = (summary_params(variant, d, k, p, **heads) for k, p in ((r, s + n), (s, s + n + r)))
    read, write = on_gpu(read, write, dtype=torch.float64)
    assert_within_plain(lambda *a: ttm_read(*a[:3], backend=a[3]), (memory, inputs, read), dtype, "triton")
    assert_within_plain(lambda *a: ttm_write(*a[:4], backend=a[4]), (memory, outputs, inputs, write), dtype, "triton")


@only_on_gpu
@pytest.mark.parametrize("form", ["parallel", "stepwise"])
def test_scan_of_real_size_in_bfloat16(form):
    B, T, s, n, r, d = 2, 4, 96, 390, 32, 768
    args = random(B, s, d), random(B, T, n, d), token_learner_params(d, r), token_learner_params(d, s)
    args = on_gpu(*args, dtype=torch.float64)

    def call(memory, inputs, read, write, backend):
        return ttm_scan(memory, inputs, read, torch.tanh, write, form=form, backend=backend)

    assert_within_plain(call, args, torch.bfloat16, "triton")


@only_on_gpu
@pytest.mark.parametrize("writes", ["token_learner", "erase_add"])
def test_scan_is_captured_by_a_cuda_graph(writes):
    s, r, d = 96, 32, 768
    write = erase_add_params(d, r) if writes == "erase_add" else token_learner_params(d, s)
    memory, inputs, read, write = on_gpu(random(1, s, d), random(1, 8, 390, d), token_learner_params(d, r), write)

    def run():
        with torch.no_grad():
            return ttm_scan(memory, inputs, read, torch.tanh, write, backend="triton")

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        inputs.normal_()
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        assert torch.equal(a, b)


@only_on_gpu
def test_memory_of_a_stream_does_not_grow():
    s, n, r, d = 96, 390, 32, 768
    state, read, write = on_gpu(random(1, s, d), token_learner_params(d, r), token_learner_params(d, s))
    peaks = []
    with torch.no_grad():
        for _ in range(200):
            torch.cuda.reset_peak_memory_stats()
            chunk = torch.randn(1, n, d, device=DEVICE, dtype=torch.bfloat16)
            _, state = ttm_step(state, chunk, read, torch.tanh, write)
            peaks.append(torch.cuda.max_memory_allocated())
    assert torch.isfinite(state).all()
    assert max(peaks[10:]) <= 1.1 * peaks[10]


@only_on_gpu
@pytest.mark.parametrize("long", [False, True])
def test_more_than_two_to_the_31_elements(long):
    """The last tokens of a storage that is that large, by its batch or by the tokens of one item, are read there."""
    d, batch, n = 2048, *((1, 1_100_000) if long else (4200, 256))
    inputs = torch.zeros(batch, n, d, device=DEVICE, dtype=torch.bfloat16)
    memory = torch.randn(1, 16, d, device=DEVICE, dtype=torch.bfloat16).expand(batch, -1, -1)
    inputs[-1:, -64:].normal_()
    (read,) = on_gpu(token_learner_params(d, 16))
    with torch.no_grad():
        out = ttm_read(memory, inputs, read, backend="triton")[-1:]
        low, exact = ((memory[-1:], inputs[-1:], read), convert((memory[-1:], inputs[-1:], read), torch.float32))
        plain, true = (ttm_read(*args, backend="reference") for args in (low, exact))
    assert_within_budget("last item", out, plain, true)


@only_on_gpu
def test_more_items_than_a_second_grid_axis_holds():
    memory, inputs, read = on_gpu(random(70_000, 1, 16), random(70_000, 2, 16), token_learner_params(16, 1))
    found = with_gradients(ttm_read(memory, inputs, read, backend="triton"), leaves(memory, inputs, read))
    assert all(torch.isfinite(result).all() for result in found)


@only_on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sanitizer_ttm(dtype):
    """What compute-sanitizer runs in `make gpu`."""
    d, s, r = 96, 9, 5
    read, write = token_learner_params(d, r, positions=s + 33), latent_query_params(d, s, heads=2)
    memory, inputs, read, write = on_gpu(random(2, s, d), random(2, 3, 33, d), read, write, dtype=dtype)
    outputs, last = ttm_scan(memory, inputs, read, torch.tanh, write, form="parallel", backend="triton")
    (outputs.float().sum() + last.float().sum()).backward()
    torch.cuda.synchronize()


def test_read_and_write_of_a_chunk_are_one_launch_each(monkeypatch):
    from mirasol.kernels.ttm.pool.triton import fold, host

    launched = []
    for module in (fold, host):
        launch = module.launch

        def counted(kernel, *args, launch=launch, **kwargs):
            launched.append(kernel.fn.__name__)
            return launch(kernel, *args, **kwargs)

        monkeypatch.setattr(module, "launch", counted)
    chunks = 3
    args = here(random(1, 5, 12), random(1, chunks, 9, 12), *(params_of("token_learner", 12, k) for k in (3, 5)))
    for form, folded_and_partial in (("parallel", 2 + 2), ("stepwise", 2)):
        launched.clear()
        ttm_scan(*args[:3], torch.tanh, args[3], form=form, backend="triton")
        assert len(launched) == folded_and_partial + 2 * chunks
    launched.clear()
    read = latent_query_params(12, 2, heads=2)
    ttm_read(args[0], args[1][:, 0], *here(read), backend="triton")
    assert launched == ["pool_fwd_kernel"]


def test_grids_hold_any_batch(monkeypatch):
    """Only split counts, of at most 64, lie on a grid's second axis, which holds 65,535."""
    from mirasol.kernels.ttm.pool.triton import fold, host

    grids = []
    for module in (fold, host):
        monkeypatch.setattr(module, "launch", lambda kernel, programs, *args, **kwargs: grids.append(programs))
    memory, inputs, params = here(random(70_000, 1, 4), random(70_000, 1, 4), params_of("token_learner", 4, 1))
    with_gradients(ttm_read(memory, inputs, params, backend="triton"), leaves(memory, inputs, params))
    assert len(grids) > 8
    assert any(programs >= 70_000 for programs in grids if isinstance(programs, int))
    assert all(isinstance(programs, int) or programs[1] <= 64 for programs in grids)
