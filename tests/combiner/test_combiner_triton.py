"""What only the kernels can get wrong: memory, offsets, configurations, operators; when "auto" takes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from combiner.cases import EVEN_CASE, NAMES, NORM_CASES, UNEVEN_CASE, make_case, run
from devices import DEVICE, ON_GPU, only_on_gpu
from mirasol.kernels import combiner_project
from mirasol.kernels.combiner import api, op
from mirasol.kernels.combiner.triton.config import backward_config, forward_config
from mirasol.kernels.core.device import INTERPRETER, Target


@pytest.mark.parametrize("shape", [EVEN_CASE, UNEVEN_CASE], ids=["even", "uneven"])
def test_every_element_of_every_output_is_written(shape, monkeypatch):
    case = make_case(2, **shape)
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


@pytest.mark.parametrize("edges", [[0, 1, 24], [0, 40, 60], [-9, -4, 24]], ids=str)
def test_boundaries_that_nobody_checked_reach_nothing_outside(edges):
    """On a GPU they are not read: whatever they hold, the operators stay within x and its gradient."""
    case = make_case(1, edges=[0, 12, 24], m=3, d=20, d_out=17)
    boundaries = torch.tensor(edges, dtype=torch.int32, device=DEVICE)
    wide = torch.full((3, 24, 20), float("nan"), device=DEVICE)
    wide[1] = case.x[0]
    weight, bias, norm_weight, norm_bias = case.parameters.values()
    x = wide[1:2]
    out = op.combiner_project_fwd(x, 3, weight, bias, norm_weight, norm_bias, 1e-6, "layer", boundaries)
    grad_y = torch.randn(6, 20, device=DEVICE)
    found = op.combiner_project_bwd_rows(grad_y, x, 3, norm_weight, norm_bias, 1e-6, "layer", boundaries, [True] * 3)
    assert all(tensor.isfinite().all() for tensor in (out, *found))


def test_offsets_beyond_2_to_the_31():
    x = torch.empty(3, 1, 1, 1 << 30, dtype=torch.float16, device=DEVICE)[..., :16]  # untouched pages cost nothing
    case = make_case(3, 1, 1, 1, 16, 5, dtype=torch.float16)
    expected, expected_grads = run(case, "triton")
    case.x = x.copy_(case.x)
    out, grads = run(case, "triton")
    assert torch.equal(out, expected)
    for name in NAMES:
        assert torch.equal(grads[name], expected_grads[name]), name


def test_float32_products_follow_the_precision_of_torch():
    case = make_case(2, 3, 7, 2, 8, 5)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # from here on torch refuses to read allow_tf32
        assert case.call("triton").shape == (2, 3, 2, 5)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("d", [0, 8193])
def test_a_width_beyond_the_registers_is_refused(d):
    with pytest.raises(ValueError, match=f"a width d of 1 to 8192, x has {d}"):
        combiner_project(torch.zeros(1, 1, 2, d), 1, torch.zeros(1, d), backend="triton")


@pytest.mark.skipif(ON_GPU, reason="a GPU computes in bfloat16")
def test_bfloat16_is_refused_by_the_interpreter():
    with pytest.raises(ValueError, match="interpreter does not compute in bfloat16"):
        make_case(1, 1, 3, 2, dtype=torch.bfloat16).call("triton")


@pytest.mark.parametrize(
    ("norm_case", "uneven"), [(NORM_CASES[0], True), (NORM_CASES[3], False), (NORM_CASES[5], True)], ids=str
)
def test_opcheck(norm_case, uneven):
    shape = {"edges": [0, 3, 8]} if uneven else {"T": 3, "n": 6}
    case = make_case(2, m=2, d=4, d_out=3, norm_case=norm_case, **shape)
    weight, bias, norm_weight, norm_bias = (case.parameters.get(name) for name in NAMES[1:])
    norm, x = case.norm or "none", case.x.transpose(0, 1).contiguous().transpose(0, 1)
    forward = (x, case.m, weight, bias, norm_weight, norm_bias, case.eps, norm, case.boundaries)
    torch.library.opcheck(op.combiner_project_fwd, forward)
    grad_y = torch.randn(case.grad[..., 0].numel(), 4, device=DEVICE)
    arguments = (x, case.m, norm_weight, norm_bias, case.eps, norm, case.boundaries)
    for grad, needs in ((grad_y, [True, True, norm_weight is not None]), (None, [False, True, False])):
        torch.library.opcheck(op.combiner_project_bwd_rows, (grad, *arguments, needs))
    if uneven and not ON_GPU:
        torch.library.opcheck(op.checked_boundaries, (case.boundaries, 2, 8))


def test_auto_takes_the_kernels_for_training_with_many_16_bit_rows_on_a_gpu():
    def wins(rows: int = 32, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, trained: bool = True) -> bool:
        with FakeTensorMode():
            x = torch.empty(4, 16, 390, 64, device=device, dtype=dtype, requires_grad=trained)
            return api._kernels_win(x, rows, None)

    assert wins()
    assert not wins(rows=31)
    assert not wins(device="cpu")
    assert not wins(dtype=torch.float32)
    assert not wins(trained=False)
    with torch.no_grad():
        assert not wins()


TARGETS = [
    Target(80, "cuda", 108, 166912),
    Target(89, "cuda", 128, 101376),
    Target(90, "cuda", 132, 232448),
    Target(103, "cuda", 148, 232448),
    Target(120, "cuda", 170, 101376),
    Target(0, "hip", 304, 65536),
    INTERPRETER,
]
targets = st.sampled_from(TARGETS)
sizes = st.integers(1, 1 << 20)


@settings(deadline=None)
@given(sizes, st.integers(1, 8192), st.sampled_from([2, 4]), st.booleans(), targets)
def test_forward_config_fits_the_device(rows, d_out, element_size, aligned, target):
    config = forward_config(rows, d_out, element_size, aligned, target)
    assert config.stages >= (1 if target is INTERPRETER else 2)
    assert config.shared_memory(element_size) < target.shared_memory


def test_forward_config_at_the_shapes_of_the_model():
    def blocks(target: Target) -> list[tuple[int, int]]:
        configs = [forward_config(rows, 1024, 2, True, target) for rows in (32, 512, 2048, 8192)]
        return [(config.rows, config.columns) for config in configs]

    assert blocks(TARGETS[2]) == [(64, 64), (64, 64), (128, 128), (128, 256)]
    assert blocks(TARGETS[1]) == [(64, 64), (64, 64), (128, 128), (128, 128)]


@settings(deadline=None)
@given(sizes, st.integers(1, 8192), targets)
def test_backward_config_holds_a_row_and_bounds_the_partial_sums(rows, d, target):
    block, width, programs, warps = backward_config(rows, d, target)
    assert d <= width < max(2 * d, 17)
    assert width & (width - 1) == 0
    assert 1 <= programs <= 16 // warps * target.multiprocessors
    assert 256 * warps <= max(width, 256) or target is INTERPRETER  # sums over all rows stay in registers
    assert block * width <= max(4096, 2 * width)


@only_on_gpu
def test_auto_is_the_kernels_in_training():
    case = make_case(4, 16, 60, 32, 768, 512, dtype=torch.bfloat16)
    assert torch.equal(run(case, "auto")[1]["x"], run(case, "triton")[1]["x"])


@only_on_gpu
def test_ten_runs_are_bitwise_equal():
    case = make_case(8, 16, 60, 32, 1024, 1024, dtype=torch.bfloat16)
    out, grads = run(case, "triton")
    for _ in range(9):
        again, again_grads = run(case, "triton")
        assert torch.equal(again, out)
        assert all(torch.equal(again_grads[name], grads[name]) for name in grads)


@only_on_gpu
def test_a_captured_graph_replays():
    case = make_case(1, 16, 390, 32, 768, 1024, dtype=torch.bfloat16)
    case.call("triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.call("triton")
    case.x.normal_()
    graph.replay()
    assert torch.equal(out, case.call("triton"))


@only_on_gpu
def test_sanitizer_combiner():
    """What compute-sanitizer runs in `make gpu`."""
    case = make_case(2, 3, 50, 7, 96, 80, dtype=torch.bfloat16)
    run(case, "triton")
    torch.cuda.synchronize()
