"""`ttm_read`, `ttm_write`, `ttm_scan`, `ttm_step`: the torch backend against the reference, invariants, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from ttm_helpers import (
    convert,
    eager_official,
    erase_add_params,
    latent_query_params,
    leaves,
    summary_params,
    token_learner_params,
)

from mirasol.kernels import (
    MeanPoolParams,
    group_tokens,
    scan_flops,
    summary_backward_flops,
    summary_flops,
    ttm_read,
    ttm_scan,
    ttm_step,
    ttm_write,
    ungroup_tokens,
)
from mirasol.kernels.ttm import reference
from mirasol.kernels.ttm.params import EraseAddParams
from mirasol.kernels.ttm.scan import choose_form
from tolerance import assert_close, assert_within_budget

VARIANTS = ["token_learner", "latent_query", "mean_pool"]
SHAPES = [  # B, s, n, r, d
    (2, 5, 7, 3, 12),
    (1, 1, 1, 1, 4),
    (3, 6, 1, 2, 10),
    (1, 1, 9, 4, 18),
    (2, 16, 32, 8, 48),
]


def tokens(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def detach(value):
    return torch.utils._pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, value)


def process(weight):
    return lambda z: torch.tanh(z @ weight) + z


def write_params(variant, d, s, n, r, positions=False, **kwargs):
    if variant == "erase_add":
        return erase_add_params(d, r, **kwargs)
    return summary_params(variant, d, s, s + n + r if positions else 0, **kwargs)


def assert_same_gradients(ours, theirs, wanted, rtol=1e-9):
    """Gradients of two results with the same random cotangents, for every leaf in `wanted`."""
    ours, theirs = list(ours), list(theirs)
    cotangents = [torch.randn_like(x) for x in theirs]
    got, expected = (
        torch.autograd.grad(results, wanted, cotangents, allow_unused=True, materialize_grads=True)
        for results in (ours, theirs)
    )
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_close(f"gradient {i} {list(b.shape)}", a, b, rtol=rtol)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("B", "s", "n", "r", "d"), SHAPES)
def test_read_matches_the_reference(B, s, n, r, d, variant, positions):
    memory, inputs = tokens(B, s, d), tokens(B, n, d)
    params = summary_params(variant, d, r, s + n if positions else 0)
    ours, expected = (ttm_read(memory, inputs, params, backend=b) for b in ("torch", "reference"))
    assert_close("read", ours, expected, rtol=1e-11)
    assert ours.is_contiguous()
    assert_same_gradients([ours], [expected], leaves(memory, inputs, params))


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("variant", [*VARIANTS, "erase_add"])
@pytest.mark.parametrize(("B", "s", "n", "r", "d"), SHAPES)
def test_write_matches_the_reference(B, s, n, r, d, variant, positions):
    memory, outputs, inputs = tokens(B, s, d), tokens(B, r, d), tokens(B, n, d)
    params = write_params(variant, d, s, n, r, positions)
    ours, expected = (ttm_write(memory, outputs, inputs, params, backend=b) for b in ("torch", "reference"))
    assert_close("write", ours, expected, rtol=1e-11)
    assert ours.is_contiguous()
    assert_same_gradients([ours], [expected], leaves(memory, outputs, inputs, params))


@pytest.mark.parametrize("form", ["parallel", "stepwise"])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize(
    ("read", "write"),
    [
        ("token_learner", "token_learner"),
        ("latent_query", "latent_query"),
        ("mean_pool", "mean_pool"),
        ("token_learner", "erase_add"),
        ("latent_query", "token_learner"),
    ],
)
def test_scan_matches_the_reference(read, write, positions, form):
    B, T, s, n, r, d = 2, 3, 4, 6, 3, 16
    memory, inputs, times, weight = tokens(B, s, d), tokens(B, T, n, d), tokens(T, d), tokens(d, d)
    read_params = summary_params(read, d, r, s + n if positions else 0)
    writing = write_params(write, d, s, n, r, positions)

    def run(**kwargs):
        return ttm_scan(
            memory, inputs, read_params, process(weight), writing, times=times, return_memories=True, **kwargs
        )

    ours, expected = run(form=form, backend="torch"), run(backend="reference")
    for name, a, b in zip(("outputs", "memories"), ours, expected, strict=True):
        assert_close(name, a, b, rtol=1e-10)
        assert a.is_contiguous()
    assert_same_gradients(ours, expected, leaves(memory, inputs, times, weight, read_params, writing), rtol=1e-8)


def test_official_erase_add_matches_the_reference():
    memory, outputs, inputs = tokens(2, 5, 8), tokens(2, 3, 8), tokens(2, 4, 8)
    params = erase_add_params(8, 3, official=True)
    ours, expected = (ttm_write(memory, outputs, inputs, params, backend=b) for b in ("torch", "reference"))
    assert_close("write", ours, expected, rtol=1e-11)
    assert_same_gradients([ours], [expected], leaves(memory, outputs, params))


def test_erase_add_form_of_neural_turing_machines():
    """A slot that selects one token, erases fully and adds nothing clears it; one that does neither keeps it."""
    memory, outputs = torch.randn(1, 3, 4), torch.randn(1, 2, 4)
    params = convert(erase_add_params(4, 2, slots=1, grad=False), torch.float32)

    def forced(erase, add):
        def constant(mlp, value):
            return mlp._replace(w2=torch.zeros_like(mlp.w2), b2=torch.full_like(mlp.b2, value))

        return params._replace(
            erase_channels=constant(params.erase_channels, erase), add_channels=constant(params.add_channels, add)
        )

    select = torch.nn.functional.layer_norm(memory, (4,), params.select_norm_weight, params.select_norm_bias, 1e-6)
    w = reference.mlp(select, params.select).softmax(dim=1)
    for erase, add, expected in ((1e4, 0.0, memory * (1 - w)), (-1e4, 0.0, memory), (-1e4, 2.0, memory + 2 * w)):
        for backend in ("torch", "reference"):
            assert_close("write", ttm_write(memory, outputs, memory, forced(erase, add), backend=backend), expected)


def test_weights_sum_to_one():
    params = token_learner_params(6, 4)
    weights = reference.token_learner_weights(tokens(2, 9, 6), params)
    assert_close("sum over tokens", weights.sum(dim=1), torch.ones(2, 4, dtype=torch.float64), rtol=1e-14)
    constant = torch.full((2, 9, 6), 1.7, dtype=torch.float64)
    for variant in ("token_learner", "mean_pool"):
        out = ttm_read(constant, constant, summary_params(variant, 6, 4), backend="torch")
        assert_close("summary of equal tokens", out, constant[:, :4], rtol=1e-14)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_order_of_tokens_within_a_source_does_not_matter(backend):
    memory, inputs, params = tokens(2, 5, 12), tokens(2, 7, 12), token_learner_params(12, 3)
    shuffled = ttm_read(memory[:, torch.randperm(5)], inputs[:, torch.randperm(7)], params, backend=backend)
    assert_close("shuffled", shuffled, ttm_read(memory, inputs, params, backend=backend), rtol=1e-12)


@pytest.mark.parametrize("form", ["parallel", "stepwise"])
@pytest.mark.parametrize("write", [*VARIANTS, "erase_add"])
def test_a_future_chunk_never_changes_an_earlier_output(write, form):
    B, T, s, n, r, d = 2, 4, 4, 6, 3, 16
    memory, inputs, weight = tokens(B, s, d), tokens(B, T, n, d), tokens(d, d)
    read_params, writing = summary_params("token_learner", d, r), write_params(write, d, s, n, r)
    changed = inputs.detach().clone()
    changed[:, 2] = torch.randn_like(changed[:, 2])

    def run(x):
        return ttm_scan(memory, x, read_params, process(weight), writing, form=form, return_memories=True)

    for before, after in zip(run(inputs), run(changed), strict=True):
        assert torch.equal(before[:, :2], after[:, :2])
        assert not torch.equal(before[:, 2], after[:, 2])


@pytest.mark.parametrize("write", [*VARIANTS, "erase_add"])
def test_steps_equal_the_scan(write):
    B, T, s, n, r, d = 2, 5, 4, 6, 3, 16
    memory, inputs, times, weight = tokens(B, s, d), tokens(B, T, n, d), tokens(T, d), tokens(d, d)
    read_params, writing = summary_params("token_learner", d, r), write_params(write, d, s, n, r)
    args = read_params, process(weight), writing
    outputs, last = ttm_scan(memory, inputs, *args, times=times)
    state = memory
    for t in range(T):
        out, state = ttm_step(state, inputs[:, t], *args, time=times[t])
        assert_close(f"output {t}", out, outputs[:, t], rtol=1e-10)
    assert_close("memory", state, last, rtol=1e-10)


def test_groups_have_memories_of_their_own():
    B, T, G, s, n, r, d = 2, 3, 2, 4, 6, 2, 8
    inputs, memory = tokens(B, T, G * n, d), tokens(B * G, s, d)
    args = summary_params("token_learner", d, r), torch.tanh, summary_params("token_learner", d, s)
    grouped, _ = ttm_scan(memory, group_tokens(inputs, G), *args)
    outputs = ungroup_tokens(grouped, G)
    assert outputs.shape == (B, T, G * r, d)
    for g in range(G):
        own, _ = ttm_scan(memory[g::G], inputs[:, :, g * n : (g + 1) * n], *args)
        assert_close(f"group {g}", outputs[:, :, g * r : (g + 1) * r], own, rtol=1e-12)
    assert torch.equal(ungroup_tokens(group_tokens(inputs, G), G), inputs)


def test_gradients_through_64_chunks_stay_finite_and_match_float64():
    B, T, s, n, r, d = 1, 64, 8, 12, 4, 32
    exact = [tokens(B, s, d), tokens(B, T, n, d), tokens(d, d), token_learner_params(d, r), token_learner_params(d, s)]
    exact[2] = (exact[2].detach() / d**0.5).requires_grad_()
    found = {}
    for dtype, form in ((torch.float64, "stepwise"), (torch.float32, "parallel"), (torch.float32, "stepwise")):
        memory, inputs, weight, read, write = [convert(v, dtype) for v in exact]
        outputs, last = ttm_scan(memory, inputs, read, process(weight), write, form=form, backend="torch")
        wanted = leaves(memory, inputs, weight, read, write)
        found[dtype, form] = torch.autograd.grad(outputs.square().sum() + last.square().sum(), wanted)
    truth = found.pop((torch.float64, "stepwise"))
    largest = max(g.abs().max().item() for g in truth)
    for grads in found.values():
        for g, t in zip(grads, truth, strict=True):
            assert torch.isfinite(g).all()
            assert (g - t).abs().max().item() < 1e-5 * max(t.abs().max().item(), 0.1 * largest)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    memory, inputs = tokens(2, 2, 4), tokens(2, 3, 4)
    params = summary_params(variant, 4, 2, 5, **({"hidden": 3} if variant == "token_learner" else {}))
    wanted = leaves(params)

    def read(memory, inputs, *_):
        return ttm_read(memory, inputs, params, backend="torch")

    assert torch.autograd.gradcheck(read, (memory, inputs, *wanted))


def test_gradcheck_of_the_parallel_scan():
    memory, inputs, weight = tokens(1, 2, 4), tokens(1, 3, 3, 4), tokens(4, 4)
    read, write = token_learner_params(4, 2, hidden=3), token_learner_params(4, 2, hidden=3)

    def run(memory, inputs, weight, *_):
        return ttm_scan(memory, inputs, read, process(weight), write, form="parallel", backend="torch")

    assert torch.autograd.gradcheck(run, (memory, inputs, weight, *leaves(read, write)))


@pytest.mark.parametrize("frozen", ["memory", "inputs", "params"])
def test_frozen_arguments_get_no_gradient_and_change_no_other(frozen):
    memory, inputs, params = tokens(2, 5, 12), tokens(2, 7, 12), token_learner_params(12, 3)
    full = torch.autograd.grad(ttm_read(memory, inputs, params).sum(), leaves(memory, inputs, params))
    parts = {"memory": memory, "inputs": inputs, "params": params}
    parts[frozen] = detach(parts[frozen])
    wanted = leaves(*parts.values())
    kept = {id(x): g for x, g in zip(leaves(memory, inputs, params), full, strict=True)}
    for x, g in zip(wanted, torch.autograd.grad(ttm_read(*parts.values()).sum(), wanted), strict=True):
        assert_close("gradient", g, kept[id(x)], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision_stays_within_the_budget_of_plain_pytorch(variant, dtype):
    B, s, n, r, d = 2, 24, 56, 8, 64
    low = [convert(v, dtype) for v in (tokens(B, s, d), tokens(B, n, d), summary_params(variant, d, r, s + n))]
    exact = [convert(v, torch.float64) for v in low]
    cotangent = torch.randn(B, r, d, dtype=torch.float64)
    results = []
    for args, backend in ((low, "torch"), (low, "reference"), (exact, "reference")):
        out = ttm_read(*args, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves(*args), cotangent.to(out.dtype))])
    largest = max(true.abs().max().item() for true in results[2])
    for i, (ours, plain, true) in enumerate(zip(*results, strict=True)):
        if true.abs().max() < 1e-9:  # a bias that the softmax forgets: nothing but rounding on either side
            assert ours.abs().max() < 2 * torch.finfo(dtype).eps * largest
            continue
        assert_within_budget(f"result {i} {list(true.shape)}", ours, plain, true)


def test_large_offsets_do_not_cancel():
    """Tokens whose mean is far larger than their spread: LayerNorm must still see the spread."""
    memory, inputs = tokens(1, 8, 64) + 300, tokens(1, 16, 64) + 300
    params = token_learner_params(64, 4)
    low = [convert(v.detach() if isinstance(v, torch.Tensor) else v, torch.float32) for v in (memory, inputs, params)]
    exact = [convert(v, torch.float64) for v in low]
    plain = ttm_read(*low, backend="reference")
    assert_within_budget("read", ttm_read(*low, backend="torch"), plain, ttm_read(*exact, backend="reference"))


def test_strides_are_taken_as_they_come():
    memory = torch.randn(5, 2, 12, dtype=torch.float64).transpose(0, 1)
    inputs = torch.randn(2, 7, 24, dtype=torch.float64)[:, :, 6:18]
    params = token_learner_params(12, 3, positions=12)
    expected = ttm_read(memory.contiguous(), inputs.contiguous(), params, backend="reference")
    assert_close("read", ttm_read(memory, inputs, params, backend="torch"), expected, rtol=1e-12)


@pytest.mark.parametrize("form", ["auto", "parallel"])
def test_autocast_gives_the_autocast_dtype(form):
    memory, inputs = tokens(2, 5, 16, dtype=torch.float32), tokens(2, 3, 7, 16, dtype=torch.float32)
    read, write = (token_learner_params(16, k, dtype=torch.float32) for k in (3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, last = ttm_scan(memory, inputs, read, torch.nn.LayerNorm(16), write, form=form)
    assert outputs.dtype == last.dtype == torch.bfloat16
    (outputs.float().sum() + last.float().sum()).backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves(memory, inputs, read, write))


@pytest.mark.parametrize(
    ("write", "dynamic", "batches"),
    [
        ("token_learner", True, (2, 3)),
        ("token_learner", False, (2,)),
        ("latent_query", False, (2,)),
        ("mean_pool", False, (2,)),
        ("erase_add", False, (2,)),
    ],
)
def test_scan_compiles_whole(write, dynamic, batches):
    T, s, n, r, d = 2, 4, 6, 3, 16
    weight, read_params, writing = tokens(d, d), token_learner_params(d, r), write_params(write, d, s, n, r)

    def run(memory, inputs, read_params, weight, writing):
        return ttm_scan(memory, inputs, read_params, lambda z: torch.tanh(z @ weight), writing, form="parallel")

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in batches:
        args = tokens(batch, s, d), tokens(batch, T, n, d), read_params, weight, writing
        ours, expected = compiled(*args), run(*args)
        for a, b in zip(ours, expected, strict=True):
            assert_close("compiled", a, b, rtol=1e-12)
        assert_same_gradients(ours, expected, leaves(*args))


def test_read_exports():
    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tensors = torch.nn.ParameterList(token_learner_params(12, 3)[:6])

        def forward(self, memory, inputs):
            return ttm_read(memory, inputs, type(token_learner_params(1, 1))(*self.tensors))

    reader, args = Reader(), (tokens(2, 5, 12, grad=False), tokens(2, 7, 12, grad=False))
    exported = torch.export.export(reader, args)
    assert_close("exported", exported.module()(*args), reader(*args), rtol=1e-12)


@pytest.mark.parametrize("form", ["parallel", "stepwise"])
def test_counted_work_is_the_formula(form):
    B, T, s, n, r, d = 2, 4, 8, 24, 4, 32
    memory, inputs = tokens(B, s, d), tokens(B, T, n, d)
    read, write = token_learner_params(d, r), token_learner_params(d, s)
    with FlopCounterMode(display=False) as forward:
        outputs, last = ttm_scan(memory, inputs, read, torch.tanh, write, form=form)
    assert forward.get_total_flops() == scan_flops(B, T, n, d, s, r)
    with FlopCounterMode(display=False) as backward:
        (outputs.sum() + last.sum()).backward()
    reading = summary_backward_flops(B, s + n, d, [64], [r])
    writing = summary_backward_flops(B, s + n + r, d, [64], [s])
    along = 2 * B * (s + n + s + n + r) * d  # the norm's mean goes through a product as one more column
    assert backward.get_total_flops() == T * (reading + writing + along)
    assert summary_flops(1, 1, d, [64, 16], [3, 2]) == 2 * (64 * d + 3 * 64 + 3 * d + 16 * d + 2 * 16 + 2 * d)


def test_official_eager_form_is_the_reference():
    """The form that benchmarks compare with computes the same thing."""
    memory, inputs, weight = tokens(2, 5, 12), tokens(2, 3, 7, 12), tokens(12, 12)
    read, write = token_learner_params(12, 3, positions=12), token_learner_params(12, 5, positions=15)
    ours = eager_official(memory, inputs, read, process(weight), write)
    expected = ttm_scan(memory, inputs, read, process(weight), write, backend="reference")
    for a, b in zip(ours, expected, strict=True):
        assert_close("official form", a, b, rtol=1e-12)


def test_choice_of_form():
    def chosen(batch, chunks, inputs, backend="torch"):
        return choose_form(torch.empty(batch, chunks, inputs, 768), 128, backend)

    assert chosen(1, 16, 448) == "stepwise"
    assert chosen(1, 16, 448, "triton") == "parallel"
    assert chosen(1, 16, 100, "triton") == "stepwise"
    assert chosen(1, 1, 448, "triton") == "stepwise"


def test_refusals_name_the_argument():
    memory, inputs = tokens(2, 5, 12), tokens(2, 7, 12)
    read, write = token_learner_params(12, 3), token_learner_params(12, 5)
    chunks = inputs[:, None]
    cases = [
        (ValueError, "inputs must have B = 2", lambda: ttm_read(memory, inputs[:1], read)),
        (ValueError, "inputs must have d = 12", lambda: ttm_read(memory, inputs[..., :8], read)),
        (ValueError, "inputs must be torch.float64", lambda: ttm_read(memory, inputs.float(), read)),
        (ValueError, "inputs must not be empty", lambda: ttm_read(memory, inputs[:, :0], read)),
        (TypeError, "memory must be a torch.Tensor", lambda: ttm_read(None, inputs, read)),
        (TypeError, "params must be one of", lambda: ttm_read(memory, inputs, (1, 2))),
        (TypeError, "params must be one of", lambda: ttm_read(memory, inputs, erase_add_params(12, 3))),
        (ValueError, "params.w1 must be", lambda: ttm_read(memory, inputs, read._replace(w1=read.w1[:, :5]))),
        (ValueError, "params.b2 must be", lambda: ttm_read(memory, inputs, read._replace(b2=read.b2[:2]))),
        (ValueError, "params.positions must be", lambda: ttm_read(memory, inputs, read._replace(positions=memory[0]))),
        (ValueError, "params.heads must divide", lambda: ttm_read(memory, inputs, latent_query_params(12, 3, heads=5))),
        (ValueError, "params.k must be at least 1", lambda: ttm_read(memory, inputs, MeanPoolParams(0))),
        (ValueError, "params must give s = 5", lambda: ttm_write(memory, inputs, inputs, read)),
        (ValueError, "params.erase_tokens.w1", lambda: ttm_write(memory, inputs, inputs, erase_add_params(12, 3))),
        (ValueError, "outputs must have B", lambda: ttm_write(memory, inputs[:1], inputs, write)),
        (ValueError, "form must be one of", lambda: ttm_scan(memory, chunks, read, torch.tanh, write, form="fast")),
        (ValueError, "times must be", lambda: ttm_scan(memory, chunks, read, torch.tanh, write, times=memory[0])),
        (ValueError, "process returns must", lambda: ttm_scan(memory, chunks, read, lambda z: z[:, :1], write)),
        (TypeError, "process must be callable", lambda: ttm_scan(memory, chunks, read, None, write)),
        (TypeError, "process returns must", lambda: ttm_scan(memory, chunks, read, lambda z: None, write)),
        (ValueError, "backend must be one of", lambda: ttm_read(memory, inputs, read, backend="cuda")),
        (ValueError, "groups must divide", lambda: group_tokens(inputs, 2)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_parameters_are_tuples_of_the_pytree():
    for params in (token_learner_params(4, 2), latent_query_params(4, 2), erase_add_params(4, 2), MeanPoolParams(2)):
        flat, spec = torch.utils._pytree.tree_flatten(params)
        assert torch.utils._pytree.tree_unflatten(flat, spec) == params
    assert isinstance(erase_add_params(4, 2), EraseAddParams)
