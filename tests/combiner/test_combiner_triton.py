"""The Triton kernels in the interpreter: parity, memory safety, operators, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from combiner.cases import NAMES, NORM_CASES, Case, make_case, run
from mirasol.kernels import combiner_project
from mirasol.kernels.combiner import ops
from mirasol.kernels.core.device import interpreted
from tolerance import assert_close, assert_within_budget

pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="tests/gpu holds these kernels' tests on a GPU"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]
EDGES = [0, 5, 8, 19, 24]
SHAPES = [
    {"T": 3, "n": 7, "m": 2, "d": 8, "d_out": 5},
    {"T": 2, "n": 20, "m": 20, "d": 40, "d_out": 33},
    {"edges": EDGES, "m": 3, "d": 20, "d_out": 17},
]


@pytest.mark.parametrize("norm_case", NORM_CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_in_float32(shape, norm_case):
    case = make_case(2, norm_case=norm_case, **shape)
    _assert_like_reference(case, 1e-6)


def test_parity_in_float64():
    for shape in SHAPES:
        _assert_like_reference(make_case(2, dtype=torch.float64, **shape), 1e-13)


def _assert_like_reference(case: Case, rtol: float) -> None:
    out, grads = run(case, "triton")
    expected, expected_grads = run(case.to(torch.float64), "reference")
    assert_close("out", out, expected, rtol=rtol)
    for name, grad in grads.items():
        assert_close(name, grad, expected_grads[name], rtol=rtol)
        assert grad.dtype == case.x.dtype
        assert grad.is_contiguous()


@pytest.mark.parametrize("norm_case", NORM_CASES, ids=str)
def test_parity_in_float16(norm_case):
    case = make_case(2, 3, 9, 4, 72, 40, norm_case=norm_case, dtype=torch.float16)
    out, grads = run(case, "triton")
    plain, plain_grads = run(case, "plain")
    exact, exact_grads = run(case.to(torch.float64), "reference")
    assert_within_budget("out", out, plain, exact)
    for name, grad in grads.items():
        assert_within_budget(name, grad, plain_grads[name], exact_grads[name])


def test_a_large_mean_does_no_harm():
    case = make_case(1, 2, 5, 2, 64, 8, norm_case=("layer", True, False, False))
    case.x += 1000
    _assert_like_reference(case, 1e-4)  # float32 itself rounds such an x to 6e-5 of its deviation


@pytest.mark.parametrize("norm_case", NORM_CASES, ids=str)
def test_gradcheck_of_the_kernels(norm_case):
    case = make_case(1, 2, 4, 2, 4, 3, norm_case=norm_case, dtype=torch.float64)
    names = list(case.tensors())
    tensors = [tensor.clone().requires_grad_() for tensor in case.tensors().values()]
    torch.autograd.gradcheck(
        lambda *t: case.call("triton", **dict(zip(names, t, strict=True))), tensors, fast_mode=True
    )


@pytest.mark.parametrize("uneven", [False, True])
def test_every_element_of_every_output_is_written(uneven, monkeypatch):
    case = make_case(2, edges=EDGES, m=3, d=20, d_out=17) if uneven else make_case(2, 3, 7, 2, 20, 17)
    expected, expected_grads = run(case, "triton")
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poison(new_empty(*a, **k)))
    assert torch.empty(1).isnan()
    assert torch.ones(1).new_empty(1).isnan()
    out, grads = run(case, "triton")
    assert torch.equal(out, expected)
    for name, grad in grads.items():
        assert torch.equal(grad, expected_grads[name]), name


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("uneven", [False, True])
def test_nothing_is_read_outside_the_inputs(uneven):
    case = make_case(2, edges=EDGES, m=3, d=20, d_out=17) if uneven else make_case(2, 3, 7, 2, 20, 17)
    expected, expected_grads = run(case, "triton")
    case.x = _amid_nan(case.x)
    case.x[..., : EDGES[1] - 3 if uneven else -2, :] = float("nan")  # tokens before the last m
    case.parameters = {name: _amid_nan(value) for name, value in case.parameters.items()}
    out, grads = run(case, "triton")
    assert torch.equal(out, expected)
    for name, grad in grads.items():
        assert torch.equal(grad, expected_grads[name]), name


def _amid_nan(tensor: torch.Tensor) -> torch.Tensor:
    wide = F.pad(tensor, (2, 3) * tensor.ndim, value=float("nan"))
    return wide[tuple(slice(2, 2 + size) for size in tensor.shape)]


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1, :1].expand(x.shape),
    "strided last dimension": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strided_inputs(layout):
    case = make_case(2, 3, 7, 2, 8, 5)
    case.x = layout(case.x)
    assert not case.x.is_contiguous()
    _assert_like_reference(case, 1e-6)


def test_a_strided_gradient():
    case = make_case(2, 3, 7, 2, 8, 5)
    case.grad = torch.ones(()).expand(case.grad.shape)
    _assert_like_reference(case, 1e-6)


def test_empty_batch():
    out, grads = run(make_case(0, 3, 7, 2, 8, 5), "triton")
    assert out.shape == (0, 3, 2, 5)
    assert torch.equal(grads["weight"], torch.zeros(5, 8))
    assert grads["x"].shape == (0, 3, 7, 8)


def test_only_asked_for_gradients_are_computed():
    case = make_case(2, 3, 7, 2, 8, 5)
    _, all_grads = run(case, "triton")
    for name in NAMES:
        tensors = {key: value.detach().clone() for key, value in case.tensors().items()}
        tensors[name].requires_grad_()
        out = combiner_project(m=case.m, **tensors, backend="triton")
        with FlopCounterMode(display=False) as flops:
            out.backward(case.grad)
        assert torch.equal(tensors[name].grad, all_grads[name])
        assert all(value.grad is None for key, value in tensors.items() if key != name)
        assert flops.get_total_flops() == (0 if name == "bias" else 2 * out.numel() * 8)


def test_flops_are_those_of_the_torch_backend():
    case = make_case(2, 3, 7, 2, 8, 5)
    counts = []
    for backend in ("torch", "triton"):
        with FlopCounterMode(display=False) as flops:
            run(case, backend)
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * (2 * 3 * 2) * 8 * 5


@pytest.mark.parametrize("norm_case", [NORM_CASES[0], NORM_CASES[3], NORM_CASES[5]], ids=str)
@pytest.mark.parametrize("uneven", [False, True])
def test_opcheck(norm_case, uneven):
    shape = {"edges": EDGES} if uneven else {"T": 3, "n": 6}
    case = make_case(2, m=2, d=4, d_out=3, norm_case=norm_case, **shape)
    weight, bias, norm_weight, norm_bias = (case.parameters.get(name) for name in NAMES[1:])
    norm = case.norm or "none"
    for x in (case.x, case.x.transpose(0, 1).contiguous().transpose(0, 1))[: 1 if uneven else 2]:
        forward = (x, case.m, weight, bias, norm_weight, norm_bias, case.eps, norm, case.boundaries)
        torch.library.opcheck(ops.combiner_project_fwd, forward)
        _, mean, rstd = ops.combiner_project_fwd(*forward)
        needs = [True, True, True, norm_weight is not None, norm_bias is not None]
        for asked in (needs, [False] * 5):
            backward = (case.grad, x, mean, rstd, case.m, weight, norm_weight, norm_bias, norm, case.boundaries, asked)
            torch.library.opcheck(ops.combiner_project_bwd, backward)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("uneven", [False, True])
def test_compiled_is_eager(uneven, dynamic):
    torch._dynamo.reset()
    case = make_case(1, edges=EDGES, m=2, d=4, d_out=3) if uneven else make_case(2, 3, 6, 2, 4, 3)
    compiled = torch.compile(combiner_project, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    tensors = {name: value.clone().requires_grad_() for name, value in case.tensors().items()}
    out = compiled(m=case.m, boundaries=case.boundaries, backend="triton", **tensors)
    grads = torch.autograd.grad(out, list(tensors.values()), case.grad)
    expected, expected_grads = run(case, "triton")
    assert torch.equal(out, expected)
    for name, grad in zip(tensors, grads, strict=True):
        assert torch.equal(grad, expected_grads[name])


def test_bfloat16_is_refused_by_the_interpreter():
    with pytest.raises(ValueError, match="interpreter does not compute in bfloat16"):
        make_case(1, 1, 3, 2, dtype=torch.bfloat16).call("triton")


def test_a_width_beyond_the_registers_is_refused():
    with pytest.raises(ValueError, match="a width d of at most 8192, x has 8193"):
        make_case(1, 1, 2, 1, 8193, 1).call("triton")
