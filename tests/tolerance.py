"""How close is close enough: the one place where tolerances live.

float64 and float32 are judged against the reference in float64, relative to the largest magnitude of the tensor. Low
precision is judged by what plain PyTorch reaches in the same dtype (the rule of FlashAttention's tests): the error
against float64 may be twice that of the plain computation, plus one rounding at the tensor's own magnitude. Both bound
the largest and the root mean square error, and nothing that is not finite passes.
"""

from __future__ import annotations

import torch

RTOL = {torch.float64: 1e-12, torch.float32: 1e-5}
LONG_SUMS = 1e-11  # float64: gradients that are sums over thousands of terms, in another order
SAME_SUMS = 1e-6  # float32: the same sums, cut into blocks elsewhere
ROUNDED_GOLDENS = 5e-5  # float32: goldens that are themselves rounded to float32 after long sums
SCAN_FLOAT32 = 5e-5  # float32: gradients that pass through several chunks
CANCELLED = 64  # times eps times the largest result: what is left of a result that vanishes in exact arithmetic
POINTWISE = {torch.float64: 1e-14, torch.float32: 1e-6}  # a product and a sum or two of what was given
RMS_SHARE = 0.5  # of the largest error that is allowed, the root mean square error may be so much


def assert_close(name: str, out: torch.Tensor, ref: torch.Tensor, *, rtol: float | None = None) -> None:
    """Errors are below `rtol` (None: that of out's dtype) times the largest magnitude of `ref`."""
    assert out.shape == ref.shape, f"{name}: shape {list(out.shape)}, expected {list(ref.shape)}"
    _assert_finite_alike(name, out, ref)
    finite = torch.isfinite(ref)
    if not finite.any():
        return
    error = (out.double() - ref.double())[finite]
    allowed = (RTOL[out.dtype] if rtol is None else rtol) * ref[finite].double().abs().max().item()
    _assert_bounded(name, error, allowed, RMS_SHARE * allowed)


def assert_within_budget(name: str, out: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """`err(out, exact) <= 2 err(plain, exact) + rounding`, for the largest and the root mean square error.

    Args:
        plain: the same computation by plain PyTorch in the dtype of `out`.
        exact: the same computation in float64.
    """
    assert out.shape == exact.shape, f"{name}: shape {list(out.shape)}, expected {list(exact.shape)}"
    _assert_finite_alike(name, out, exact)
    finite = torch.isfinite(exact)
    if not finite.any():
        return
    exact_values = exact[finite].double()
    theirs = plain.double()[finite] - exact_values
    eps = torch.finfo(out.dtype).eps
    largest = 2 * theirs.abs().max().item() + eps * exact_values.abs().max().item()
    rms = 2 * _rms(theirs) + eps * _rms(exact_values)
    _assert_bounded(name, out.double()[finite] - exact_values, largest, rms)


def _assert_bounded(name: str, error: torch.Tensor, largest: float, rms: float) -> None:
    got = error.abs().max().item()
    assert got <= largest, f"{name}: largest error {got:.3e} exceeds {largest:.3e}"
    got = _rms(error)
    assert got <= rms, f"{name}: root mean square error {got:.3e} exceeds {rms:.3e}"


def _rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def _assert_finite_alike(name: str, out: torch.Tensor, ref: torch.Tensor) -> None:
    assert not out.isnan().any(), f"{name}: NaN at {out.isnan().nonzero()[:4].tolist()}"
    infinite = ref.isinf()
    assert torch.equal(out.isinf(), infinite), f"{name}: infinities differ from the reference's"
    assert torch.equal(out[infinite].double(), ref[infinite].double()), f"{name}: signs of infinities differ"
