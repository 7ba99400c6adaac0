"""`ttm_read`, `ttm_write`, `ttm_scan`, `ttm_step`: the torch backend against the reference, invariants, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from ttm_helpers import (
    assert_alike,
    assert_within_plain,
    convert,
    eager_official,
    erase_add_params,
    latent_query_params,
    leaves,
    random,
    summary_params,
    token_learner_params,
    with_gradients,
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
from mirasol.kernels.ttm.recurrence import choose_form
from tolerance import LONG_SUMS, assert_close, assert_within_budget

BACKENDS = ("torch", "reference")
VARIANTS = ["token_learner", "latent_query", "mean_pool"]
SHAPES = [  # B, s, n, r, d
    (2, 5, 7, 3, 12),
    (1, 1, 1, 1, 4),
    (3, 6, 1, 2, 10),
    (1, 1, 9, 4, 18),
    (2, 16, 32, 8, 48),
]


def detach(value):
    return torch.utils._pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, value)


def process(weight):
    return lambda z: torch.tanh(z @ weight) + z


def write_params(variant, d, s, n, r, positions=False, **kwargs):
    if variant == "erase_add":
        return erase_add_params(d, r, **kwargs)
    return summary_params(variant, d, s, s + n + r if positions else 0, **kwargs)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("B", "s", "n", "r", "d"), SHAPES)
def test_read_matches_the_reference(B, s, n, r, d, variant, positions):
    memory, inputs = random(B, s, d), random(B, n, d)
    params = summary_params(variant, d, r, s + n if positions else 0)
    ours, expected = (ttm_read(memory, inputs, params, backend=b) for b in ("torch", "reference"))
    assert ours.is_contiguous()
    wanted = leaves(memory, inputs, params)
    assert_alike(with_gradients(ours, wanted), with_gradients(expected, wanted), LONG_SUMS)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("variant", [*VARIANTS, "erase_add"])
@pytest.mark.parametrize(("B", "s", "n", "r", "d"), SHAPES)
def test_write_matches_the_reference(B, s, n, r, d, variant, positions):
    memory, outputs, inputs = random(B, s, d), random(B, r, d), random(B, n, d)
    params = write_params(variant, d, s, n, r, positions)
    ours, expected = (ttm_write(memory, outputs, inputs, params, backend=b) for b in ("torch", "reference"))
    assert ours.is_contiguous()
    wanted = leaves(memory, outputs, params, *([] if variant == "erase_add" else [inputs]))
    assert_alike(with_gradients(ours, wanted), with_gradients(expected, wanted), LONG_SUMS)


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
    memory, inputs, times, weight = random(B, s, d), random(B, T, n, d), random(T, d), random(d, d)
    read_params = summary_params(read, d, r, s + n if positions else 0)
    writing = write_params(write, d, s, n, r, positions)

    def run(**kwargs):
        return ttm_scan(
            memory, inputs, read_params, process(weight), writing, times=times, return_memories=True, **kwargs
        )

    ours, expected = run(form=form, backend="torch"), run(backend="reference")
    assert all(result.is_contiguous() for result in ours)
    wanted = leaves(memory, inputs, times, weight, read_params, writing)
    assert_alike(with_gradients(ours, wanted), with_gradients(expected, wanted), LONG_SUMS)


def test_official_erase_add_matches_the_reference():
    memory, outputs, inputs = random(2, 5, 8), random(2, 3, 8), random(2, 4, 8)
    params = erase_add_params(8, 3, official=True)
    ours, expected = (ttm_write(memory, outputs, inputs, params, backend=b) for b in ("torch", "reference"))
    wanted = leaves(memory, outputs, params)
    assert_alike(with_gradients(ours, wanted), with_gradients(expected, wanted), LONG_SUMS)


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
    weights = reference.token_learner_weights(random(2, 9, 6), params)
    assert_close("sum over tokens", weights.sum(dim=1), torch.ones(2, 4, dtype=torch.float64))
    constant = torch.full((2, 9, 6), 1.7, dtype=torch.float64)
    for variant in ("token_learner", "mean_pool"):
        out = ttm_read(constant, constant, summary_params(variant, 6, 4), backend="torch")
        assert_close("summary of equal tokens", out, constant[:, :4])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_order_of_tokens_within_a_source_does_not_matter(backend):
    memory, inputs, params = random(2, 5, 12), random(2, 7, 12), token_learner_params(12, 3)
    shuffled = ttm_read(memory[:, torch.randperm(5)], inputs[:, torch.randperm(7)], params, backend=backend)
    assert_close("shuffled", shuffled, ttm_read(memory, inputs, params, backend=backend))


@pytest.mark.parametrize("form", ["parallel", "stepwise"])
@pytest.mark.parametrize("write", [*VARIANTS, "erase_add"])
def test_a_future_chunk_never_changes_an_earlier_output(write, form):
    B, T, s, n, r, d = 2, 4, 4, 6, 3, 16
    memory, inputs, weight = random(B, s, d), random(B, T, n, d), random(d, d)
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
    memory, inputs, times, weight = random(B, s, d), random(B, T, n, d), random(T, d), random(d, d)
    read_params, writing = summary_params("token_learner", d, r), write_params(write, d, s, n, r)
    args = read_params, process(weight), writing
    outputs, last = ttm_scan(memory, inputs, *args, times=times)
    state = memory
    for t in range(T):
        out, state = ttm_step(state, inputs[:, t], *args, time=times[t])
        assert_close(f"output {t}", out, outputs[:, t], rtol=LONG_SUMS)
    assert_close("memory", state, last, rtol=LONG_SUMS)


def test_groups_have_memories_of_their_own():
    B, T, G, s, n, r, d = 2, 3, 2, 4, 6, 2, 8
    inputs, memory = random(B, T, G * n, d), random(B * G, s, d)
    args = summary_params("token_learner", d, r), torch.tanh, summary_params("token_learner", d, s)
    grouped, _ = ttm_scan(memory, group_tokens(inputs, G), *args)
    outputs = ungroup_tokens(grouped, G)
    assert outputs.shape == (B, T, G * r, d)
    for g in range(G):
        own, _ = ttm_scan(memory[g::G], inputs[:, :, g * n : (g + 1) * n], *args)
        assert_close(f"group {g}", outputs[:, :, g * r : (g + 1) * r], own)
    assert torch.equal(ungroup_tokens(group_tokens(inputs, G), G), inputs)


def test_gradients_through_64_chunks_stay_finite_and_match_float64():
    B, T, s, n, r, d = 1, 64, 8, 12, 4, 32
    exact = [random(B, s, d), random(B, T, n, d), random(d, d), token_learner_params(d, r), token_learner_params(d, s)]
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
    memory, inputs = random(2, 2, 4), random(2, 3, 4)
    params = summary_params(variant, 4, 2, 5, **({"hidden": 3} if variant == "token_learner" else {}))
    wanted = leaves(params)

    def read(memory, inputs, *_):
        return ttm_read(memory, inputs, params, backend="torch")

    assert torch.autograd.gradcheck(read, (memory, inputs, *wanted))


def test_gradcheck_of_the_parallel_scan():
    memory, inputs, weight = random(1, 2, 4), random(1, 3, 3, 4), random(4, 4)
    read, write = token_learner_params(4, 2, hidden=3), token_learner_params(4, 2, hidden=3)

    def run(memory, inputs, weight, *_):
        return ttm_scan(memory, inputs, read, process(weight), write, form="parallel", backend="torch")

    assert torch.autograd.gradcheck(run, (memory, inputs, weight, *leaves(read, write)))


@pytest.mark.parametrize("frozen", ["memory", "inputs", "params"])
def test_frozen_arguments_get_no_gradient_and_change_no_other(frozen):
    memory, inputs, params = random(2, 5, 12), random(2, 7, 12), token_learner_params(12, 3)
    full = torch.autograd.grad(ttm_read(memory, inputs, params).sum(), leaves(memory, inputs, params))
    parts = {"memory": memory, "inputs": inputs, "params": params}
    parts[frozen] = detach(parts[frozen])
    wanted = leaves(*parts.values())
    kept = {id(x): g for x, g in zip(leaves(memory, inputs, params), full, strict=True)}
    for x, g in zip(wanted, torch.autograd.grad(ttm_read(*parts.values()).sum(), wanted), strict=True):
        assert_close("gradient", g, kept[id(x)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision_stays_within_the_budget_of_plain_pytorch(variant, dtype):
    B, s, n, r, d = 2, 24, 56, 8, 64
    args = random(B, s, d), random(B, n, d), summary_params(variant, d, r, s + n)
    assert_within_plain(lambda *a: ttm_read(*a[:3], backend=a[3]), args, dtype, "torch")


def test_large_offsets_do_not_cancel():
    """Tokens whose mean is far larger than their spread: LayerNorm must still see the spread."""
    memory, inputs = random(1, 8, 64) + 300, random(1, 16, 64) + 300
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
    assert_close("read", ttm_read(memory, inputs, params, backend="torch"), expected)


@pytest.mark.parametrize("form", ["auto", "parallel"])
def test_autocast_gives_the_autocast_dtype(form):
    memory, inputs = random(2, 5, 16, dtype=torch.float32), random(2, 3, 7, 16, dtype=torch.float32)
    read, write = (token_learner_params(16, k, dtype=torch.float32) for k in (3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, last = ttm_scan(memory, inputs, read, torch.nn.LayerNorm(16), write, form=form)
    assert outputs.dtype == last.dtype == torch.bfloat16
    (outputs.float().sum() + last.float().sum()).backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves(memory, inputs, read, write))


@pytest.mark.parametrize(
    ("write", "dynamic", "batches"),
    [("token_learner", True, (2, 3)), ("latent_query", False, (2,)), ("erase_add", False, (2,))],
)
@pytest.mark.slow
def test_scan_compiles_whole(write, dynamic, batches):
    T, s, n, r, d = 2, 4, 6, 3, 16
    weight, read_params, writing = random(d, d), token_learner_params(d, r), write_params(write, d, s, n, r)

    def run(memory, inputs, read_params, weight, writing):
        return ttm_scan(memory, inputs, read_params, lambda z: torch.tanh(z @ weight), writing, form="parallel")

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for batch in batches:
        args = random(batch, s, d), random(batch, T, n, d), read_params, weight, writing
        if dynamic:
            for tensor in args[:2]:
                torch._dynamo.mark_dynamic(tensor, 0)
        ours, expected = compiled(*args), run(*args)
        wanted = leaves(*args)
        assert_alike(with_gradients(ours, wanted), with_gradients(expected, wanted), LONG_SUMS)


def test_read_exports():
    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tensors = torch.nn.ParameterList(token_learner_params(12, 3)[:6])

        def forward(self, memory, inputs):
            return ttm_read(memory, inputs, type(token_learner_params(1, 1))(*self.tensors))

    reader, args = Reader(), (random(2, 5, 12, grad=False), random(2, 7, 12, grad=False))
    exported = torch.export.export(reader, args)
    assert_close("exported", exported.module()(*args), reader(*args))


@pytest.mark.parametrize("form", ["parallel", "stepwise"])
def test_counted_work_is_the_formula(form):
    B, T, s, n, r, d = 2, 4, 8, 24, 4, 32
    memory, inputs = random(B, s, d), random(B, T, n, d)
    read, write = token_learner_params(d, r), token_learner_params(d, s)
    with FlopCounterMode(display=False) as forward:
        outputs, last = ttm_scan(memory, inputs, read, torch.tanh, write, form=form)
    assert forward.get_total_flops() == scan_flops(B, T, n, d, s, r)
    with FlopCounterMode(display=False) as backward:
        (outputs.sum() + last.sum()).backward()
    reading = summary_backward_flops(B, s + n, d, 64, r)
    writing = summary_backward_flops(B, s + n + r, d, 64, s)
    assert backward.get_total_flops() == T * (reading + writing)
    assert summary_flops(1, 1, d, 64, 3) == 2 * (64 * d + 3 * 64 + 3 * d)


def test_official_eager_form_is_the_reference():
    """The form that benchmarks compare with computes the same thing."""
    memory, inputs, weight = random(2, 5, 12), random(2, 3, 7, 12), random(12, 12)
    read, write = token_learner_params(12, 3, positions=12), token_learner_params(12, 5, positions=15)
    ours = eager_official(memory, inputs, read, process(weight), write)
    expected = ttm_scan(memory, inputs, read, process(weight), write, backend="reference")
    for a, b in zip(ours, expected, strict=True):
        assert_close("official form", a, b)


def test_choice_of_form():
    def chosen(batch, chunks, inputs, backend="torch"):
        return choose_form(torch.empty(batch, chunks, inputs, 768), 128, backend)

    assert chosen(1, 16, 448) == "stepwise"
    assert chosen(1, 16, 448, "triton") == "parallel"
    assert chosen(1, 16, 100, "triton") == "stepwise"
    assert chosen(1, 1, 448, "triton") == "stepwise"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch's own, at the first jvp
@pytest.mark.parametrize("variant", [*VARIANTS, "erase_add"])
def test_transforms_of_torch_func_run_the_formula(variant):
    memory, outputs, inputs = random(2, 4, 8, grad=False), random(2, 3, 8, grad=False), random(2, 5, 8, grad=False)
    params = write_params(variant, 8, 4, 5, 3, True, grad=False)

    def write(memory, backend="torch"):
        return ttm_write(memory, outputs, inputs, params, backend=backend)

    many = torch.stack([memory, memory + 1])
    assert_close("vmap", torch.func.vmap(write)(many), torch.stack([write(m) for m in many]))
    grads = [torch.func.grad(lambda m, b=b: write(m, b).sin().sum())(memory) for b in ("torch", "reference")]
    assert_close("grad", *grads)
    tangents = [torch.func.jvp(lambda m, b=b: write(m, b), (memory,), (memory,))[1] for b in ("torch", "reference")]
    assert_close("jvp", *tangents)


def test_second_derivatives_are_refused_in_a_sentence():
    memory, inputs, params = random(1, 3, 8), random(1, 4, 8), token_learner_params(8, 2)
    (grad,) = torch.autograd.grad(ttm_read(memory, inputs, params).sum(), memory, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'ttm_scan .*no second derivative.*backend="reference"'):
        grad.square().sum().backward()


def test_the_same_tensor_may_be_memory_inputs_and_outputs():
    memory, params = random(1, 3, 8), token_learner_params(8, 3)
    found = [with_gradients(ttm_write(memory, memory, memory, params, backend=b), [memory]) for b in BACKENDS]
    assert_alike(*found, LONG_SUMS)


def test_autocast_takes_mixed_dtypes():
    memory, inputs = random(1, 3, 8, dtype=torch.float32), random(1, 2, 4, 8, dtype=torch.bfloat16)
    read, write = (token_learner_params(8, k, dtype=torch.float32) for k in (2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, last = ttm_scan(memory, inputs, read, lambda z: z.float(), write)
    assert outputs.dtype == last.dtype == torch.bfloat16


def test_integers_of_numpy_are_taken():
    memory, inputs = random(1, 3, 8), random(1, 4, 8)
    queries = latent_query_params(8, 2)
    for params, same in (
        (MeanPoolParams(np.int64(2)), MeanPoolParams(2)),
        (queries._replace(heads=np.int32(2)), queries),
    ):
        assert torch.equal(ttm_read(memory, inputs, params), ttm_read(memory, inputs, same))
    assert torch.equal(group_tokens(inputs[:, None], np.int64(2)), group_tokens(inputs[:, None], 2))


def test_refusals_name_the_argument():
    memory, inputs = random(2, 5, 12), random(2, 7, 12)
    read, write = token_learner_params(12, 3), token_learner_params(12, 5)
    chunks, slots = inputs[:, None], erase_add_params(12, 7)._replace
    half = slots().select._replace(w2=None)
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
        (TypeError, "groups must be an int", lambda: group_tokens(inputs, 1.0)),
        (TypeError, "params.k must be an int", lambda: ttm_read(memory, inputs, MeanPoolParams(2.0))),
        (ValueError, "memory must not be empty", lambda: ttm_read(memory[:0], inputs[:0], read)),
        (ValueError, "outputs must not be empty", lambda: ttm_write(memory, inputs[:, :0], inputs, write)),
        (ValueError, "inputs must not be empty", lambda: ttm_scan(memory, chunks[:, :0], read, torch.tanh, write)),
        (ValueError, "params.w2 must not be empty", lambda: ttm_read(memory, inputs, read._replace(w2=read.w2[:0]))),
        (TypeError, "params.w1 must be a torch.Tensor", lambda: ttm_read(memory, inputs, read._replace(w1=None))),
        (TypeError, "params.select must be MlpParams", lambda: ttm_write(memory, inputs, inputs, slots(select=None))),
        (TypeError, "params.select.w2 must be a torch", lambda: ttm_write(memory, inputs, inputs, slots(select=half))),
        (TypeError, "params.official must be True", lambda: ttm_write(memory, inputs, inputs, slots(official=1))),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_parameters_are_tuples_of_the_pytree():
    for params in (token_learner_params(4, 2), latent_query_params(4, 2), erase_add_params(4, 2), MeanPoolParams(2)):
        flat, spec = torch.utils._pytree.tree_flatten(params)
        assert torch.utils._pytree.tree_unflatten(flat, spec) == params
    assert isinstance(erase_add_params(4, 2), EraseAddParams)
