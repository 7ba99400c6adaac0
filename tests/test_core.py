"""What operators share: checks, registration and its autograd, precision, launches."""

import contextvars

import numpy as np
import pytest
import torch

from mirasol.kernels.core.checks import expect_bool, expect_int, expect_number, expect_tensor
from mirasol.kernels.core.dispatch import autocast, choose_backend
from mirasol.kernels.core.precision import product_precision
from mirasol.kernels.core.registration import apply, differentiable_once


@pytest.mark.parametrize("given", [3, np.int64(3), np.int8(3), np.uint16(3)])
def test_integers_come_back_as_pythons(given):
    found = expect_int("n", given)
    assert found == 3
    assert type(found) is int


@pytest.mark.parametrize(
    ("check", "given", "error", "message"),
    [
        (expect_int, True, TypeError, "x must be an int, was True"),
        (expect_int, np.bool_(True), TypeError, "x must be an int, was"),
        (expect_int, 2.0, TypeError, "x must be an int, was 2.0"),
        (expect_int, np.float32(2), TypeError, "x must be an int, was"),
        (expect_int, 0, ValueError, "x must be at least 1, was 0"),
        (expect_int, torch.tensor(2), TypeError, "x must be an int, was"),
        (expect_number, float("nan"), ValueError, "x must be finite, was nan"),
        (expect_number, float("-inf"), ValueError, "x must be finite, was -inf"),
        (expect_number, "1", TypeError, "x must be a number, was '1'"),
        (expect_number, False, TypeError, "x must be a number, was False"),
        (expect_bool, None, TypeError, "x must be True or False, was None"),
        (expect_bool, 1, TypeError, "x must be True or False, was 1"),
    ],
)
def test_what_is_not_a_number_or_a_flag_is_refused(check, given, error, message):
    with pytest.raises(error, match=f"^{message}"):
        check("x", given)


def test_shapes_are_named_in_refusals():
    with pytest.raises(ValueError, match=r"x must be \[B, N\] or \[N\], was \[1, 2, 3\] float32 on cpu"):
        expect_tensor("x", torch.zeros(1, 2, 3), ("B N", "N"))


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch knows one switch only")
@pytest.mark.parametrize("switch", ["old", "new"])
def test_the_precision_of_products_follows_either_switch(switch):
    """Reading the old switch raises where the new one was set beyond what it can say."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for rounded in (True, False):
            if switch == "old":
                matmul.allow_tf32 = rounded
            else:
                matmul.fp32_precision = "tf32" if rounded else "ieee"
            assert product_precision(torch.float32) == ("tf32" if rounded else "ieee")
            assert product_precision(torch.float64) == product_precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    @differentiable_once("square")
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return grad * y, grad * x


def square(x):
    return apply("square", _Square, x, x)


def test_a_gradient_may_be_used_but_not_differentiated():
    x = torch.randn(4, requires_grad=True)
    (grad,) = torch.autograd.grad(square(x).sum(), x, create_graph=True)
    assert torch.equal(grad, 2 * x)
    with pytest.raises(NotImplementedError, match='square has no second derivative: pass backend="reference"'):
        (grad.sum() + x.sum()).backward()


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.jacfwd])
def test_transforms_are_refused(transform):
    with pytest.raises(NotImplementedError, match=r"square does not support torch.func"):
        transform(lambda x: square(x).sum())(torch.randn(4))


def test_forward_mode_is_refused():
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        square(torch.autograd.forward_ad.make_dual(torch.randn(4), torch.randn(4)))


def test_a_tensor_given_twice_compiles():
    x = torch.randn(4, requires_grad=True)
    compiled = torch.compile(square, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], 2 * x)


def test_autocast_leaves_alone_what_it_does_not_cast():
    given = torch.randn(2), torch.randn(2).double(), torch.arange(2), None, "text"
    assert all(a is b for a, b in zip(autocast(*given), given, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, double, integers, nothing, text = autocast(*given)
    assert low.dtype == torch.bfloat16
    assert (double.dtype, integers.dtype, nothing, text) == (torch.float64, torch.int64, None, "text")


def test_backends_are_chosen_or_refused():
    assert choose_backend("op", "auto", True, []) == "triton"
    assert choose_backend("op", "auto", True, ["No."]) == choose_backend("op", "auto", False, []) == "torch"
    with pytest.raises(ValueError, match=r'op cannot run with backend="triton": It cannot\. It must not\.'):
        choose_backend("op", "triton", True, ["It cannot.", "It must not."])
    with pytest.raises(ValueError, match=r"backend must be one of .*, was 'gpu'"):
        choose_backend("op", "gpu", True, [])


def test_launches_pin_what_versions_of_triton_decide_differently():
    from mirasol.kernels.core.launch import prepare

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: (grid, args, options)

    grid, args, options = prepare(Kernel(), 7, warps=4, stages=2, registers=96, BLOCK=16)("tensor", 3)
    assert grid == (7,)
    assert args == ("tensor", 3)
    assert options == {"BLOCK": 16, "num_warps": 4, "num_stages": 2, "maxnreg": 96, "enable_fp_fusion": True}
    assert "maxnreg" not in prepare(Kernel(), (2, 3), warps=4)()[2]


def test_kernels_that_need_memory_get_it_from_the_caller_or_from_torch(monkeypatch):
    import triton
    from triton.runtime import _allocation, driver

    from mirasol.kernels.core.launch import prepare

    class Driver:
        def get_active_torch_device(self):
            return torch.device("cpu")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: made.append(_allocation._allocator.get()(384, 128, None))

    made = []
    monkeypatch.setattr(driver, "_active", Driver())
    launch = prepare(Kernel(), 1, warps=4, memory=True)
    launch("tensor")
    assert made[0].numel() * made[0].element_size() == 384
    with pytest.raises(RuntimeError, match="no allocator was set"):  # of others' kernels nothing is decided
        prepare(Kernel(), 1, warps=4)("tensor")

    def in_a_context_with_an_allocator():
        triton.set_allocator(lambda size, alignment, stream: (size, alignment))
        launch("tensor")
        prepare(Kernel(), 1, warps=4)("tensor")

    contextvars.copy_context().run(in_a_context_with_an_allocator)
    assert made[1:] == [(384, 128)] * 2
