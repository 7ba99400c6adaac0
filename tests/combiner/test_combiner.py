"""`combiner_project` and `last_m`: the reference, the torch backend, the operators and the refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from combiner.cases import NAMES, NORM_CASES, Case, make_case, run
from mirasol.kernels import combiner_project, last_m
from mirasol.kernels.combiner import eager
from tolerance import assert_close, assert_within_budget

SHAPES = [
    # B, T, n, m, d, d_out
    (2, 3, 7, 2, 8, 5),
    (1, 1, 4, 4, 33, 1),
    (3, 2, 5, 1, 3, 17),
    (1, 4, 9, 3, 40, 24),
]
EDGES = [0, 5, 8, 19, 24]


@pytest.mark.parametrize("norm_case", NORM_CASES, ids=str)
def test_reference_is_the_plain_statement(norm_case):
    case = make_case(2, 3, 7, 2, 8, 5, norm_case=norm_case, dtype=torch.float64)
    x, p = case.x, case.parameters
    expected = torch.empty(2, 3, 2, 5, dtype=torch.float64)
    for b in range(2):
        for t in range(3):
            for i in range(2):
                row = x[b, t, 7 - 2 + i]
                if case.norm == "layer":
                    row = F.layer_norm(row, (8,), p.get("norm_weight"), p.get("norm_bias"), case.eps)
                elif case.norm == "rms":
                    row = F.rms_norm(row, (8,), p.get("norm_weight"), case.eps)
                expected[b, t, i] = F.linear(row, p["weight"], p.get("bias"))
    assert_close("out", case.call("reference"), expected, rtol=1e-13)


def test_reference_of_uneven_chunks_is_one_chunk_at_a_time():
    case = make_case(2, edges=EDGES, m=3, d=8, d_out=5, dtype=torch.float64)
    out = case.call("reference")
    for t, (start, end) in enumerate(itertools.pairwise(EDGES)):
        alone = combiner_project(case.x[:, None, start:end], 3, **case.parameters, backend="reference")
        assert torch.equal(out[:, t], alone[:, 0])


@pytest.mark.parametrize("norm_case", NORM_CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_backend_in_float64(shape, norm_case):
    case = make_case(*shape, norm_case=norm_case, dtype=torch.float64)
    _assert_backends_agree(case, rtol=1e-11)


@pytest.mark.parametrize("norm_case", NORM_CASES, ids=str)
def test_torch_backend_of_uneven_chunks(norm_case):
    case = make_case(2, edges=EDGES, m=3, d=8, d_out=5, norm_case=norm_case, dtype=torch.float64)
    _assert_backends_agree(case, rtol=1e-11)


def test_torch_backend_in_float32():
    _assert_backends_agree(make_case(2, 3, 20, 8, 192, 96), rtol=1e-5)


def _assert_backends_agree(case: Case, rtol: float) -> None:
    out, grads = run(case, "torch")
    expected, expected_grads = run(case, "reference")
    assert_close("out", out, expected, rtol=rtol)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert_close(name, grad, expected_grads[name], rtol=rtol)
        assert grad.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_case", NORM_CASES, ids=str)
def test_low_precision_is_as_exact_as_plain_pytorch(dtype, norm_case):
    case = make_case(2, 4, 20, 8, 128, 64, norm_case=norm_case, dtype=dtype)
    out, grads = run(case, "torch")
    plain, plain_grads = run(case, "plain")
    exact, exact_grads = run(case.to(torch.float64), "reference")
    assert out.dtype == dtype
    assert_within_budget("out", out, plain, exact)
    for name, grad in grads.items():
        assert_within_budget(name, grad, plain_grads[name], exact_grads[name])


def test_gradient_of_x_is_zero_outside_the_last_m():
    for case in (make_case(2, 3, 7, 2, 8, 5), make_case(2, edges=EDGES, m=3, d=8, d_out=5)):
        _, grads = run(case, "torch")
        kept = torch.zeros(grads["x"].shape[1:-1], dtype=torch.bool)
        if case.boundaries is None:
            kept[:, -2:] = True
        else:
            for end in EDGES[1:]:
                kept[end - 3 : end] = True
        assert torch.equal(grads["x"][:, ~kept], torch.zeros_like(grads["x"][:, ~kept]))
        assert (grads["x"][:, kept] != 0).any(-1).all()


def test_unread_tokens_may_hold_anything():
    case = make_case(2, 3, 7, 2, 8, 5)
    expected = case.call("torch")
    case.x[:, :, :-2] = float("nan")
    assert torch.equal(case.call("torch"), expected)


def test_a_chunk_ignores_the_others():
    case = make_case(2, 3, 7, 2, 8, 5)
    before = case.call("torch")
    case.x[:, 1] += 1
    after = case.call("torch")
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.equal(before[:, 1], after[:, 1])


def test_only_asked_for_gradients_are_computed():
    case = make_case(2, 3, 7, 2, 8, 5)
    _, all_grads = run(case, "torch")
    for name in NAMES:
        tensors = {key: value.detach().clone() for key, value in case.tensors().items()}
        tensors[name].requires_grad_()
        out = combiner_project(m=case.m, **tensors, backend="torch")
        with FlopCounterMode(display=False) as flops:
            out.backward(case.grad)
        assert_close(name, tensors[name].grad, all_grads[name])
        assert all(value.grad is None for key, value in tensors.items() if key != name)
        assert flops.get_total_flops() == (0 if name == "bias" else 2 * out.numel() * 8)


def test_flops_count_the_kept_rows_only():
    case = make_case(2, 3, 7, 2, 8, 5)
    products = 2 * (2 * 3 * 2) * 8 * 5
    tensors = {key: value.requires_grad_() for key, value in case.tensors().items()}
    with FlopCounterMode(display=False) as flops:
        out = combiner_project(m=2, **tensors, backend="torch")
    assert flops.get_total_flops() == products
    with FlopCounterMode(display=False) as flops:
        out.sum().backward()
    assert flops.get_total_flops() == 2 * products


STRIDED = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second chunk": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "inside a wider tensor": lambda x: F.pad(x, (3, 5, 1, 2))[:, :, 1:-2, 3:-5],
    "strided last dimension": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("layout", STRIDED.values(), ids=STRIDED)
def test_strided_inputs(layout):
    case = make_case(2, 3, 7, 2, 8, 5)
    expected, expected_grads = run(case, "torch")
    case.x = layout(case.x)
    assert not case.x.is_contiguous()
    out, grads = run(case, "torch")
    assert torch.equal(out, expected)
    assert out.is_contiguous()
    for name in NAMES:
        assert_close(name, grads[name], expected_grads[name])


def test_a_strided_x_is_not_copied():
    x = torch.randn(2, 3, 50, 16).transpose(0, 1)
    weight = torch.randn(5, 16)

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


def test_empty_batch():
    case = make_case(0, 3, 7, 2, 8, 5)
    out, grads = run(case, "torch")
    assert out.shape == (0, 3, 2, 5)
    assert torch.equal(grads["weight"], torch.zeros(5, 8))


def test_last_m_is_a_view_of_even_chunks():
    x = torch.randn(2, 3, 7, 4)
    rows = last_m(x, 2)
    assert torch.equal(rows, x[:, :, 5:])
    assert rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_last_m_gathers_uneven_chunks():
    x = torch.randn(2, 24, 4, dtype=torch.float64, requires_grad=True)
    boundaries = torch.tensor(EDGES, dtype=torch.int32)
    rows = last_m(x, 3, boundaries)
    assert rows.shape == (2, 4, 3, 4)
    for t, end in enumerate(EDGES[1:]):
        assert torch.equal(rows[:, t], x[:, end - 3 : end])
    assert torch.autograd.gradcheck(lambda x: last_m(x, 3, boundaries), x)


def _defaults() -> dict:
    return {"x": torch.randn(2, 3, 7, 8), "m": 2, "weight": torch.randn(5, 8)}


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
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ({"boundaries": torch.tensor([0, 24], dtype=torch.int32)}, ValueError, r"x must be \[B, N, d\]"),
    ({"x": UNEVEN, "boundaries": torch.tensor([0, 24])}, TypeError, "boundaries must be of dtype int32"),
    ({"x": UNEVEN, "boundaries": [0, 24]}, TypeError, "boundaries must be a torch.Tensor"),
    ({"x": UNEVEN, "boundaries": torch.zeros(1, dtype=torch.int32)}, ValueError, "at least two positions"),
    ({"x": UNEVEN, "boundaries": torch.tensor([1, 24], dtype=torch.int32)}, ValueError, "begin with 0, was 1"),
    ({"x": UNEVEN, "boundaries": torch.tensor([0, 23], dtype=torch.int32)}, ValueError, "end with the 24 tokens of x"),
    ({"x": UNEVEN, "boundaries": torch.tensor([0, 23, 24], dtype=torch.int32)}, ValueError, "at least m = 2 .*, was 1"),
    ({"x": UNEVEN, "boundaries": torch.tensor([0, 9, 8, 24], dtype=torch.int32)}, ValueError, "at least m = 2"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSALS, ids=[r[2] for r in REFUSALS])
def test_bad_input_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        combiner_project(**_defaults() | changes)


def test_last_m_refuses_a_short_chunk():
    with pytest.raises(ValueError, match="at most the tokens of a chunk, 7, was 8"):
        last_m(EVEN, 8)
    with pytest.raises(ValueError, match="at least m = 3 tokens, was 2"):
        last_m(UNEVEN, 3, torch.tensor([0, 2, 24], dtype=torch.int32))
