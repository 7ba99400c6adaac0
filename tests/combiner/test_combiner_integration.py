"""Autograd, torch.func, compilation, export, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from combiner.cases import BACKENDS, EDGES, NORM_CASES, Case, make_case, run
from devices import DEVICE, ON_GPU
from mirasol.kernels import combiner_project, last_m
from tolerance import assert_close, assert_within_budget


def small(uneven: bool = False, **settings) -> Case:
    shape = {"edges": [0, 3, 5, 9]} if uneven else {"T": 3, "n": 6}
    return make_case(2, m=2, d=4, d_out=3, **shape, **settings)


def function_of(case: Case, backend: str):
    """The call as a function of its tensors, and the tensors."""
    names = list(case.tensors())
    tensors = [tensor.clone().requires_grad_() for tensor in case.tensors().values()]
    return lambda *t: case.call(backend, **dict(zip(names, t, strict=True))), tensors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("norm_case", "uneven"), [*((case, False) for case in NORM_CASES), (NORM_CASES[0], True)], ids=str
)
def test_gradcheck(norm_case, uneven, backend):
    if ON_GPU and backend == "triton":
        pytest.skip("compiled kernels have no float64")
    function, tensors = function_of(small(uneven, norm_case=norm_case, dtype=torch.float64), backend)
    torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_plain_pytorch_has_second_derivatives(backend):
    function, tensors = function_of(small(dtype=torch.float64), backend)
    torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_the_kernels_refuse_second_derivatives():
    function, tensors = function_of(small(), "triton")
    (grad,) = torch.autograd.grad(function(*tensors).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'combiner_project has no second derivative: .*"reference"'):
        grad.sum().backward()


def test_torch_func_is_refused_by_the_kernels_and_served_by_plain_pytorch():
    case = small()
    alone = [case.call("torch", x=x) for x in case.x.unsqueeze(1)]
    for backend in ("auto", "torch", "reference"):
        out = torch.func.vmap(lambda x, backend=backend: case.call(backend, x=x[None]))(case.x)
        assert_close("out", out, torch.stack(alone))
    for transform in (torch.func.vmap(lambda x: case.call("triton", x=x[None])), torch.func.grad(_total(case))):
        with pytest.raises(NotImplementedError, match=r'combiner_project does not support torch\.func .*"reference"'):
            transform(case.x)


def _total(case: Case):
    return lambda x: case.call("triton", x=x).sum()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize(
    ("backend", "compiler", "uneven"),
    [("torch", "inductor", False), ("torch", "aot_eager", True), ("triton", "aot_eager", False)],
)
def test_compiled_is_eager(backend, compiler, uneven):
    torch._dynamo.reset()
    compiled = torch.compile(combiner_project, fullgraph=True, dynamic=False, backend=compiler)
    assert_same(small(uneven), compiled, backend)


# No two sizes alike: dynamo takes equal ones for one symbol.
LENGTHS = {
    "torch": [{"B": 6, "T": 5, "n": 9}, {"B": 8, "T": 7, "n": 10}],
    "triton": [{"B": 6, "edges": EDGES}, {"B": 8, "edges": [0, 7, 17, 22, 25, 30, 41]}],
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_do_not_recompile(backend):
    torch._dynamo.reset()
    compiled = torch.compile(combiner_project, fullgraph=True, dynamic=True, backend="aot_eager")
    first, second = (make_case(m=2, d=4, d_out=3, **lengths) for lengths in LENGTHS[backend])
    assert_same(first, compiled, backend)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(second, compiled, backend)


def assert_same(case: Case, function, backend: str) -> None:
    tensors = {name: value.clone().requires_grad_() for name, value in case.tensors().items()}
    out = function(m=case.m, boundaries=case.boundaries, backend=backend, **tensors)
    grads = torch.autograd.grad(out, list(tensors.values()), case.grad)
    expected, expected_grads = run(case, backend)
    assert_close("out", out, expected)
    for name, grad in zip(tensors, grads, strict=True):
        assert_close(name, grad, expected_grads[name])


@pytest.mark.skipif(ON_GPU, reason="boundaries on a GPU are not read")
def test_bad_boundaries_are_refused_by_compiled_code():
    torch._dynamo.reset()
    case = small(uneven=True)
    bad = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    for function, arguments in (
        (last_m, {}),
        *((combiner_project, {"weight": case.parameters["weight"], "backend": backend}) for backend in BACKENDS),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        compiled(case.x, m=2, boundaries=case.boundaries, **arguments)
        with pytest.raises(ValueError, match="leave every chunk at least m = 2 tokens, was 1"):
            compiled(case.x, m=2, boundaries=bad, **arguments)


def test_compiled_last_m():
    torch._dynamo.reset()
    for case, boundaries in ((small(), None), (small(uneven=True), [0, 3, 5, 9])):
        compiled = torch.compile(last_m, fullgraph=True, backend="aot_eager")
        expected = last_m(case.x, 2, boundaries)
        assert torch.equal(compiled(case.x, 2, case.boundaries), expected)
        assert torch.equal(compiled(case.x, 2, boundaries), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_tensor_may_be_passed_twice(backend):
    torch._dynamo.reset()

    def total(x, square):
        twice = combiner_project(x, 2, square, square[0], square[0], square[0], backend=backend)
        row = square[0]
        return (twice + combiner_project(x, 2, square, row, row, row, backend=backend)).square().sum()

    x, square = torch.randn(2, 3, 6, 4, device=DEVICE), torch.randn(4, 4, device=DEVICE)
    grads = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(), square.clone().requires_grad_()]
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    for name, compiled, plain in zip(("x", "square"), grads[1], grads[0], strict=True):
        assert_close(name, compiled, plain)


class _Project(torch.nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.m = case.m
        for name, value in case.parameters.items():
            self.register_parameter(name, torch.nn.Parameter(value))

    def forward(self, x):
        return combiner_project(x, self.m, self.weight, self.bias, self.norm_weight, self.norm_bias)


def test_export():
    case = small()
    module = _Project(case)
    dims = {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    program = torch.export.export(module, (case.x,), dynamic_shapes=(dims,))
    other = make_case(4, 5, 6, 2, 4, 3)
    assert torch.equal(program.module()(other.x), module(other.x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend):
    case = small()
    _, expected = run(case, backend)
    function, tensors = function_of(case, backend)
    out = checkpoint(function, *tensors, use_reentrant=False)
    for name, grad in zip(case.tensors(), torch.autograd.grad(out, tensors, case.grad), strict=True):
        assert torch.equal(grad, expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("uneven", [False, True])
def test_autocast_takes_mixed_dtypes_and_returns_gradients_in_theirs(uneven, backend):
    dtype = torch.float16 if backend == "triton" else torch.bfloat16  # Triton's interpreter has no bfloat16
    case = make_case(2, m=8, d=64, d_out=32, **({"edges": [0, 20, 40, 55]} if uneven else {"T": 3, "n": 20}))
    tensors = {name: value.clone() for name, value in case.tensors().items()}
    for name in ("weight", "norm_bias"):
        tensors[name] = tensors[name].to(dtype)
    case = Case(tensors.pop("x"), case.m, tensors, case.norm, case.grad, case.boundaries)
    inputs = {name: value.requires_grad_() for name, value in case.tensors().items()}
    with torch.autocast(DEVICE.type, dtype):
        out = case.call(backend, **inputs)
    low, exact = case.to(dtype), case.to(torch.float64)
    plain, plain_grads = run(low, "plain")
    expected, expected_grads = run(exact, "reference")
    assert out.dtype == dtype
    assert_within_budget("out", out, plain, expected)
    grads = torch.autograd.grad(out, list(inputs.values()), case.grad.to(dtype))
    for (name, value), grad in zip(inputs.items(), grads, strict=True):
        assert grad.dtype == value.dtype
        assert_within_budget(name, grad.to(dtype), plain_grads[name], expected_grads[name])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_meta_tensors_get_shapes(backend):
    x, weight = torch.empty(2, 3, 6, 4, device="meta"), torch.empty(5, 4, device="meta", requires_grad=True)
    out = combiner_project(x, 2, weight, backend=backend)
    assert out.shape == (2, 3, 2, 5)
    out.sum().backward()
    assert weight.grad.shape == (5, 4)
    for boundaries in (torch.empty(4, dtype=torch.int32, device="meta"), [0, 6, 12, 18]):
        rows = x.flatten(1, 2)
        assert combiner_project(rows, 2, weight, boundaries=boundaries, backend=backend).shape == (2, 3, 2, 5)
        assert last_m(rows, 2, boundaries).shape == (2, 3, 2, 4)
        with pytest.raises(ValueError, match='boundaries must have values for backend="reference"'):
            combiner_project(rows, 2, weight, boundaries=boundaries, backend="reference")
