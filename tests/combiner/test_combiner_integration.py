"""Autograd, compilation, export, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from combiner.cases import NORM_CASES, Case, make_case, run
from mirasol.kernels import combiner_project, last_m
from tolerance import assert_close, assert_within_budget

EDGES = [0, 5, 8, 19, 24]


def _cases(dtype: torch.dtype = torch.float32) -> list[Case]:
    cases = [make_case(2, 3, 6, 2, 4, 3, norm_case=norm_case, dtype=dtype) for norm_case in NORM_CASES]
    return [*cases, make_case(1, edges=EDGES, m=2, d=4, d_out=3, dtype=dtype)]


@pytest.mark.parametrize("case", _cases(torch.float64), ids=lambda c: f"{c.norm}-{list(c.parameters)}")
def test_gradcheck(case):
    names = list(case.tensors())
    tensors = [tensor.clone().requires_grad_() for tensor in case.tensors().values()]
    torch.autograd.gradcheck(lambda *t: case.call("torch", **dict(zip(names, t, strict=True))), tensors)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_is_eager(backend):
    for case in (make_case(2, 3, 6, 2, 4, 3), make_case(1, edges=EDGES, m=2, d=4, d_out=3)):
        compiled = torch.compile(combiner_project, fullgraph=True, dynamic=False, backend=backend)
        _assert_same(case, compiled)


def test_lengths_do_not_recompile():
    torch._dynamo.reset()
    compiled = torch.compile(combiner_project, fullgraph=True, dynamic=True, backend="aot_eager")
    _assert_same(make_case(6, 5, 9, 2, 4, 3), compiled)  # no two sizes alike: dynamo takes equal ones for one symbol
    with torch.compiler.set_stance("fail_on_recompile"):
        for B, T, n in ((8, 7, 10), (5, 6, 12), (7, 9, 30)):
            _assert_same(make_case(B, T, n, 2, 4, 3), compiled)


def test_compiled_last_m():
    for case in (make_case(2, 3, 6, 2, 4, 3), make_case(1, edges=EDGES, m=2, d=4, d_out=3)):
        compiled = torch.compile(last_m, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(case.x, 2, case.boundaries), last_m(case.x, 2, case.boundaries))


def _assert_same(case: Case, function) -> None:
    tensors = {name: value.clone().requires_grad_() for name, value in case.tensors().items()}
    out = function(m=case.m, boundaries=case.boundaries, **tensors)
    grads = torch.autograd.grad(out, list(tensors.values()), case.grad)
    expected, expected_grads = run(case, "torch")
    assert_close("out", out, expected, rtol=1e-6)
    for name, grad in zip(tensors, grads, strict=True):
        assert_close(name, grad, expected_grads[name], rtol=1e-6)


class _Project(torch.nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.m = case.m
        for name, value in case.parameters.items():
            self.register_parameter(name, torch.nn.Parameter(value))

    def forward(self, x):
        return combiner_project(x, self.m, self.weight, self.bias, self.norm_weight, self.norm_bias)


def test_export():
    case = make_case(2, 3, 6, 2, 4, 3)
    module = _Project(case)
    dims = {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    program = torch.export.export(module, (case.x,), dynamic_shapes=(dims,))
    other = make_case(4, 5, 6, 2, 4, 3)
    assert torch.equal(program.module()(other.x), module(other.x))


def test_activation_checkpointing():
    case = make_case(2, 3, 6, 2, 4, 3)
    _, expected = run(case, "torch")
    tensors = {name: value.clone().requires_grad_() for name, value in case.tensors().items()}
    out = checkpoint(lambda: case.call("torch", **tensors), use_reentrant=False)
    for name, grad in zip(tensors, torch.autograd.grad(out, list(tensors.values()), case.grad), strict=True):
        assert torch.equal(grad, expected[name])


@pytest.mark.parametrize("uneven", [False, True])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_theirs(uneven):
    shape = {"edges": [0, 20, 40, 55], "T": 3} if uneven else {"T": 3, "n": 20}
    case = make_case(2, m=8, d=64, d_out=32, **shape)
    tensors = {name: value.clone().requires_grad_() for name, value in case.tensors().items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = case.call("torch", **tensors)
        plain = case.call("plain")
    exact, exact_grads = run(case.to(torch.float64), "reference")
    assert out.dtype == torch.bfloat16
    assert_within_budget("out", out, plain, exact)
    grads = torch.autograd.grad(out, list(tensors.values()), case.grad.bfloat16())
    for name, grad in zip(tensors, grads, strict=True):
        assert grad.dtype == torch.float32
        assert_close(name, grad, exact_grads[name], rtol=2e-2)


def test_meta_and_fake_tensors_get_shapes():
    x, weight = torch.empty(2, 3, 6, 4, device="meta"), torch.empty(5, 4, device="meta", requires_grad=True)
    out = combiner_project(x, 2, weight)
    assert out.shape == (2, 3, 2, 5)
    out.sum().backward()
    assert weight.grad.shape == (5, 4)
    boundaries = torch.empty(4, dtype=torch.int32, device="meta")
    assert combiner_project(x.flatten(1, 2), 2, weight, boundaries=boundaries).shape == (2, 3, 2, 5)
