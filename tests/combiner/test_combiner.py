"""`combiner_project` and `last_m`: every backend against the reference, gradients asked for, layouts, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from combiner.cases import BACKENDS, EDGES, EVEN_CASE, NAMES, NORM_CASES, UNEVEN_CASE, Case, make_case, run
from devices import DEVICE, EXACT, LOW_PRECISION, ON_GPU
from mirasol.kernels import combiner_project, last_m
from mirasol.kernels.combiner import eager
from tolerance import assert_close, assert_within_budget

SHAPES = [
    UNEVEN_CASE,
    {"T": 1, "n": 18, "m": 18, "d": 40, "d_out": 33},  # more than one block every way in the interpreter
    {"T": 3, "n": 4, "m": 1, "d": 3, "d_out": 1},
]
LOW_PRECISION_SHAPES = [{"T": 4, "n": 9, "m": 4, "d": 72, "d_out": 40}]
if ON_GPU:
    LOW_PRECISION_SHAPES += [
        {"T": 16, "n": 390, "m": 32, "d": 768, "d_out": 1024},
        {"T": 64, "n": 40, "m": 32, "d": 1024, "d_out": 1024},
        {"T": 4, "n": 294, "m": 16, "d": 2048, "d_out": 4096},
        {"T": 1, "n": 33, "m": 7, "d": 1000, "d_out": 1023},
        {"edges": [0, 40, 300, 333, 900], "m": 32, "d": 1024, "d_out": 1024},
    ]


@pytest.mark.parametrize("norm_case", NORM_CASES, ids=str)
def test_reference_is_the_plain_statement(norm_case):
    case = make_case(2, 3, 7, 2, 8, 5, norm_case=norm_case, dtype=torch.float64)
    x, p = case.x, case.parameters
    expected = torch.empty(2, 3, 2, 5, dtype=torch.float64, device=DEVICE)
    for b, t, i in itertools.product(range(2), range(3), range(2)):
        row = x[b, t, 7 - 2 + i]
        if case.norm == "layer":
            row = F.layer_norm(row, (8,), p.get("norm_weight"), p.get("norm_bias"), case.eps)
        elif case.norm == "rms":
            row = F.rms_norm(row, (8,), p.get("norm_weight"), case.eps)
        expected[b, t, i] = F.linear(row, p["weight"], p.get("bias"))
    assert_close("out", case.call("reference"), expected)


def test_reference_of_uneven_chunks_is_one_chunk_at_a_time():
    case = make_case(2, edges=EDGES, m=3, d=8, d_out=5, dtype=torch.float64)
    out = case.call("reference")
    for t, (start, end) in enumerate(itertools.pairwise(EDGES)):
        alone = combiner_project(case.x[:, None, start:end], 3, **case.parameters, backend="reference")
        assert torch.equal(out[:, t], alone[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_case", NORM_CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backends_are_the_reference(shape, norm_case, backend):
    assert_like_reference(make_case(2, norm_case=norm_case, dtype=EXACT, **shape), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32(backend):
    assert_like_reference(make_case(2, 2, 9, 4, 192, 40), backend)


def assert_like_reference(case: Case, backend: str) -> None:
    out, grads = run(case, backend)
    expected, expected_grads = run(case.to(torch.float64), "reference")
    tensors = case.tensors()
    assert out.is_contiguous()
    assert_close("out", out, expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert grad.dtype == case.x.dtype
        assert grad.is_contiguous() or not tensors[name].is_contiguous()
        assert_close(name, grad, expected_grads[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_case", NORM_CASES, ids=str)
@pytest.mark.parametrize("shape", LOW_PRECISION_SHAPES, ids=str)
def test_low_precision_is_as_exact_as_plain_pytorch(shape, norm_case, dtype, backend):
    if backend == "triton" and dtype not in LOW_PRECISION:
        pytest.skip("bfloat16 is refused here, see test_bfloat16_is_refused_by_the_interpreter")
    assert_within_plain_budget(make_case(2, norm_case=norm_case, dtype=dtype, **shape), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("norm_case", [NORM_CASES[0], NORM_CASES[3]], ids=str)
def test_a_mean_of_30_deviations_does_no_harm(norm_case, dtype, backend):
    case = make_case(2, 2, 12, 8, 192, 64, norm_case=norm_case)
    case.x += 30 * torch.randn(2, 2, 12, 1, device=DEVICE).sign()
    assert_within_plain_budget(case.to(dtype), backend)


def assert_within_plain_budget(case: Case, backend: str) -> None:
    out, grads = run(case, backend)
    plain, plain_grads = run(case, "plain")
    exact, exact_grads = run(case.to(torch.float64), "reference")
    assert out.dtype == case.x.dtype
    assert_within_budget("out", out, plain, exact)
    for name, grad in grads.items():
        assert_within_budget(name, grad, plain_grads[name], exact_grads[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [EVEN_CASE, UNEVEN_CASE], ids=["even", "uneven"])
def test_only_the_last_m_are_read_and_have_a_gradient(shape, backend):
    case = make_case(2, **shape)
    kept = torch.zeros(case.x.shape[1:-1], dtype=torch.bool)
    if case.boundaries is None:
        kept[:, -case.m :] = True
    else:
        for end in EDGES[1:]:
            kept[end - case.m : end] = True
    expected, grads = run(case, backend)
    assert (grads["x"][:, ~kept] == 0).all()
    assert (grads["x"][:, kept] != 0).any(-1).all()
    case.x = _amid_nan(case.x)
    case.x[:, ~kept] = float("nan")
    case.parameters = {name: _amid_nan(value) for name, value in case.parameters.items()}
    out, again = run(case, backend)
    assert torch.equal(out, expected)
    for name in again:
        assert torch.equal(again[name], grads[name]), name


def _amid_nan(tensor: torch.Tensor) -> torch.Tensor:
    wide = F.pad(tensor, (2, 3) * tensor.ndim, value=float("nan"))
    return wide[tuple(slice(2, 2 + size) for size in tensor.shape)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_asked_for_gradients_are_computed(backend):
    case = make_case(2, 3, 7, 2, 8, 5)
    _, all_grads = run(case, backend)
    for name in NAMES:
        tensors = {key: value.detach().clone() for key, value in case.tensors().items()}
        tensors[name].requires_grad_()
        out = combiner_project(m=case.m, **tensors, backend=backend)
        with FlopCounterMode(display=False) as flops:
            out.backward(case.grad)
        assert_close(name, tensors[name].grad, all_grads[name])
        assert all(value.grad is None for key, value in tensors.items() if key != name)
        assert flops.get_total_flops() == (0 if name == "bias" else 2 * out.numel() * 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_count_the_kept_rows_only(backend):
    case = make_case(2, 3, 7, 2, 8, 5)
    products = 2 * (2 * 3 * 2) * 8 * 5
    tensors = {key: value.requires_grad_() for key, value in case.tensors().items()}
    with FlopCounterMode(display=False) as flops:
        out = combiner_project(m=2, **tensors, backend=backend)
    assert flops.get_total_flops() == products
    with FlopCounterMode(display=False) as flops:
        out.sum().backward()
    assert flops.get_total_flops() == 2 * products


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second chunk": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "inside a wider tensor": lambda x: F.pad(x, (3, 5, 1, 2))[:, :, 1:-2, 3:-5],
    "expanded": lambda x: x[:1, :1].expand(x.shape),
    "strided last dimension": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strided_x(layout, backend):
    case = make_case(2, 3, 7, 2, 8, 5)
    case.x = layout(case.x)
    assert not case.x.is_contiguous()
    assert_like_reference(case, backend)


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at every second place, NaN between them."""
    if tensor.dtype == torch.int32:
        return torch.stack([tensor, torch.full_like(tensor, 1 << 30)], -1).flatten()[::2]
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [EVEN_CASE, UNEVEN_CASE], ids=["even", "uneven"])
def test_strided_parameters_boundaries_and_gradient(shape, backend):
    case = make_case(2, **shape)
    case.parameters = {name: _strided(value) for name, value in case.parameters.items()}
    case.grad = _strided(case.grad)
    if case.boundaries is not None:
        case.boundaries = _strided(case.boundaries)
    assert_like_reference(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_parameters_and_gradient(backend):
    case = make_case(2, 3, 7, 2, 8, 5)
    case.parameters |= {name: torch.ones(1, device=DEVICE).expand(8) for name in ("norm_weight", "norm_bias")}
    case.parameters["bias"] = torch.ones(1, device=DEVICE).expand(5)
    case.grad = torch.ones((), device=DEVICE).expand(case.grad.shape)
    assert_like_reference(case, backend)


def test_a_strided_x_is_not_copied():
    x, weight = torch.randn(2, 3, 50, 16).transpose(0, 1), torch.randn(5, 16)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if tensor._base is None and tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
                    self.elements = max(self.elements, tensor.numel())
            return out

    with Largest() as largest:
        eager.combiner_project(x, 2, weight, None, None, None, 1e-6, "layer", None)
    assert 0 < largest.elements <= 2 * 3 * 2 * 16


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(("B", "T", "d_out"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty_outputs(B, T, d_out, backend):
    out, grads = run(make_case(B, T, 7, 2, 8, d_out), backend)
    assert out.shape == (B, T, 2, d_out)
    assert grads["x"].shape == (B, T, 7, 8)
    assert all((grad == 0).all() for grad in grads.values())


def test_last_m_is_a_view_of_even_chunks():
    x = torch.randn(2, 3, 7, 4)
    rows = last_m(x, 2)
    assert torch.equal(rows, x[:, :, 5:])
    assert rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_last_m_gathers_uneven_chunks():
    x = torch.randn(2, 24, 4, dtype=torch.float64, requires_grad=True)
    rows = last_m(x, 3, EDGES)
    assert rows.shape == (2, 4, 3, 4)
    for t, end in enumerate(EDGES[1:]):
        assert torch.equal(rows[:, t], x[:, end - 3 : end])
    assert torch.autograd.gradcheck(lambda x: last_m(x, 3, EDGES), x)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_boundaries_and_m_may_be_any_integers(backend):
    case = make_case(2, **UNEVEN_CASE)
    expected = case.call(backend)
    for edges in (EDGES, tuple(EDGES), [np.int64(edge) for edge in EDGES], list(np.array(EDGES, dtype=np.int32))):
        out = combiner_project(case.x, np.int64(case.m), **case.parameters, boundaries=edges, backend=backend)
        assert torch.equal(out, expected)
        assert torch.equal(last_m(case.x, np.int32(case.m), edges), last_m(case.x, case.m, case.boundaries))


EVEN, UNEVEN = torch.randn(2, 3, 7, 8), torch.randn(2, 24, 8)
REFUSALS = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
    ({"x": torch.randn(2, 7, 8)}, ValueError, r"x must be \[B, T, n, d\]"),
    ({"x": torch.ones(2, 3, 7, 8, dtype=torch.int64)}, TypeError, "x must be of dtype"),
    ({"m": 0}, ValueError, "m must be at least 1, was 0"),
    ({"m": 8}, ValueError, "m must be at most the tokens of a chunk, 7, was 8"),
    ({"m": 2.0}, TypeError, "m must be an int"),
    ({"weight": None}, TypeError, "weight must be a torch.Tensor"),
    ({"weight": torch.randn(5, 9)}, ValueError, r"weight must be \[d_out, d\] = \[5, 8\], was \[5, 9\]"),
    ({"weight": torch.randn(5, 8).double()}, ValueError, "weight must be torch.float32 like x"),
    ({"bias": torch.randn(8)}, ValueError, r"bias must be \[d_out\] = \[5\]"),
    ({"norm_weight": torch.randn(5)}, ValueError, r"norm_weight must be \[d\] = \[8\]"),
    ({"norm_bias": torch.randn(8, 1)}, ValueError, r"norm_bias must be \[d\]"),
    ({"norm": "batch"}, ValueError, "norm must be"),
    ({"norm": None, "norm_weight": torch.randn(8)}, ValueError, "norm_weight must be None without a norm"),
    ({"norm": "rms", "norm_bias": torch.randn(8)}, ValueError, "norm_bias must be None unless"),
    ({"eps": -1e-6}, ValueError, "eps must be at least 0"),
    ({"eps": float("nan")}, ValueError, "eps must be finite, was nan"),
    ({"eps": float("inf")}, ValueError, "eps must be finite, was inf"),
    ({"eps": "1e-6"}, TypeError, "eps must be a number"),
    ({"eps": torch.tensor(1e-6)}, TypeError, "eps must be a number"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ({"boundaries": torch.tensor([0, 24], dtype=torch.int32)}, ValueError, r"x must be \[B, N, d\]"),
    ({"x": UNEVEN, "boundaries": torch.tensor([0, 24])}, TypeError, "boundaries must be of dtype int32"),
    ({"x": UNEVEN, "boundaries": np.array([0, 24])}, TypeError, "boundaries must be a tensor, a list or a tuple"),
    ({"x": UNEVEN, "boundaries": [0, 24.0]}, TypeError, "boundaries must be an int, was 24.0"),
    ({"x": UNEVEN, "boundaries": torch.zeros(3, dtype=torch.int32, device="meta")}, ValueError, "be on cpu like x"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSALS, ids=[r[2] for r in REFUSALS])
def test_bad_input_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        combiner_project(**{"x": EVEN, "m": 2, "weight": torch.randn(5, 8)} | changes)


BAD_EDGES = [
    ([0], "hold at least two positions"),
    ([1, 24], "begin with 0, was 1"),
    ([0, 23], "end with the 24 tokens of x, was 23"),
    ([0, 23, 24], "leave every chunk at least m = 2 tokens, was 1"),
    ([0, 9, 8, 24], "leave every chunk at least m = 2 tokens, was -1"),
]


@pytest.mark.parametrize(("edges", "message"), BAD_EDGES, ids=str)
def test_bad_boundaries_are_refused_alike_on_every_path(edges, message):
    weight = torch.randn(5, 8)
    as_tensor = torch.tensor(edges, dtype=torch.int32)
    for boundaries in (edges, as_tensor, _strided(as_tensor)):
        with pytest.raises(ValueError, match=message):
            last_m(UNEVEN, 2, boundaries)
        for backend in ("auto", "torch", "reference", "triton"):
            with pytest.raises(ValueError, match=message):
                combiner_project(UNEVEN, 2, weight, boundaries=boundaries, backend=backend)


def test_last_m_refuses_a_short_chunk():
    with pytest.raises(ValueError, match="at most the tokens of a chunk, 7, was 8"):
        last_m(EVEN, 8)
