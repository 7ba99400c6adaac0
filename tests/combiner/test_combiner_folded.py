"""The form that folds the norm into the projection: the kernels in the interpreter, its numerics in bfloat16.

The interpreter does not compute in bfloat16, the one dtype that folds, so here the kernels fold in the others.
"""

from __future__ import annotations

import pytest
import torch

from combiner.cases import NORM_CASES, Case, make_case, run
from mirasol.kernels.combiner import triton_forward
from mirasol.kernels.combiner.configs import folds
from mirasol.kernels.core.device import interpreted
from tolerance import assert_close, assert_within_budget

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]
in_interpreter = pytest.mark.skipif(not interpreted(), reason="tests/gpu holds these kernels' tests on a GPU")
NORMED = [case for case in NORM_CASES if case[0] is not None]
SHAPES = [
    {"T": 3, "n": 7, "m": 2, "d": 8, "d_out": 5},
    {"T": 2, "n": 20, "m": 20, "d": 64, "d_out": 33},
    {"edges": [0, 5, 8, 19, 24], "m": 3, "d": 20, "d_out": 17},
]


@pytest.fixture
def folding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_forward, "folds", lambda dtype, norm: norm != "none")


def test_only_bfloat16_with_a_norm_folds() -> None:
    assert [dtype for dtype in (torch.float16, torch.bfloat16, torch.float32) if folds(dtype, "layer")] == [
        torch.bfloat16
    ]
    assert not folds(torch.bfloat16, "none")


@in_interpreter
@pytest.mark.parametrize("norm_case", NORMED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(folding: None, shape: dict, norm_case: tuple) -> None:
    for dtype, rtol in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        case = make_case(2, norm_case=norm_case, dtype=dtype, **shape)
        out, grads = run(case, "triton")
        expected, expected_grads = run(case.to(torch.float64), "reference")
        assert_close("out", out, expected, rtol=rtol)
        for name, grad in grads.items():
            assert_close(name, grad, expected_grads[name], rtol=rtol)


@in_interpreter
def test_statistics_are_those_of_the_rows(folding: None) -> None:
    case = make_case(2, 3, 7, 2, 40, 5, dtype=torch.float64)
    weight, bias, norm_weight, norm_bias = case.parameters.values()
    arguments = (case.x, case.m, weight, bias, norm_weight, norm_bias, case.eps, "layer", None)
    _, mean, rstd = triton_forward.forward(*arguments)
    rows = case.x[:, :, -case.m :]
    assert_close("mean", mean, rows.mean(-1), rtol=1e-13)
    assert_close("rstd", rstd, (rows.var(-1, correction=0) + case.eps).rsqrt(), rtol=1e-13)


@in_interpreter
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_memory_is_read_inside_and_written_whole(folding: None, shape: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(2, **shape)
    expected = case.call("triton")
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        made = new_empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for name, value in case.parameters.items():
        wide = torch.nn.functional.pad(value, (2, 3) * value.ndim, value=float("nan"))
        case.parameters[name] = wide[tuple(slice(2, 2 + size) for size in value.shape)]
    assert torch.equal(case.call("triton"), expected)


def awkward(kind: str, dtype: torch.dtype) -> Case:
    """Rows whose mean is 30 deviations from 0, or weights of magnitudes from 1e-2 to 1e2."""
    case = make_case(2, 2, 12, 8, 192, 64)
    if kind == "large mean":
        case.x += 30 * torch.randn(2, 2, 12, 1).sign()
    else:
        case.parameters["norm_weight"] *= 10 ** torch.empty(192).uniform_(-2, 2)
        case.parameters["weight"] *= 10 ** torch.empty(64, 192).uniform_(-2, 2)
    return case.to(dtype)


@in_interpreter
@pytest.mark.parametrize("kind", ["large mean", "mixed magnitudes"])
def test_awkward_rows_in_float16(folding: None, kind: str) -> None:
    case = awkward(kind, torch.float16)
    exact = case.to(torch.float64).call("reference")
    assert_within_budget("out", case.call("triton"), case.call("plain"), exact)


@pytest.mark.parametrize("kind", ["large mean", "mixed magnitudes"])
@pytest.mark.parametrize("seed", range(5))
def test_awkward_rows_in_bfloat16(kind: str, seed: int) -> None:
    """The kernel's arithmetic in plain PyTorch: products of bfloat16, sums and statistics in float32."""
    torch.manual_seed(seed)
    case = awkward(kind, torch.bfloat16)
    weight, bias, norm_weight, norm_bias = (value.float() for value in case.parameters.values())
    rows = case.x[:, :, -case.m :].float()
    folded = (weight * norm_weight).bfloat16().float()
    shifted = rows - rows[..., :1]
    off = shifted.mean(-1, keepdim=True)
    mean = rows[..., :1] + off
    rstd = (shifted.square().mean(-1, keepdim=True) - off.square() + case.eps).rsqrt()
    out = rstd * (rows @ folded.T - mean * folded.sum(1)) + (weight @ norm_bias + bias)
    exact = case.to(torch.float64).call("reference")
    assert_within_budget("out", out.bfloat16(), case.call("plain"), exact)
