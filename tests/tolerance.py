"""How close is close enough: the one place where tolerances live.

Low precision is judged by what plain PyTorch reaches in the same dtype (the rule of FlashAttention's tests): the error
against float64 may be twice that of the plain computation plus the rounding of one add at that magnitude.
"""

from __future__ import annotations

import torch


def assert_close(name: str, out: torch.Tensor, ref: torch.Tensor, *, rtol: float = 1e-5) -> None:
    """The largest difference from `ref` is below `rtol` times the largest magnitude of `ref` (or of 1e-3)."""
    assert out.shape == ref.shape, f"{name}: shape {list(out.shape)}, expected {list(ref.shape)}"
    _assert_finite_alike(name, out, ref)
    finite = torch.isfinite(ref)
    if not finite.any():
        return
    error = (out.double() - ref.double())[finite].abs().max().item()
    scale = max(ref[finite].abs().max().item(), 1e-3)
    assert error <= rtol * scale, f"{name}: error {error:.3e} exceeds {rtol:g} x {scale:.3e}"


def assert_within_budget(name: str, out: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """`err(out, exact) <= 2 err(plain, exact) + rounding`, for the largest and for the mean error.

    Args:
        plain: the same computation by plain PyTorch in the dtype of `out`.
        exact: the same computation in float64.
    """
    assert out.shape == exact.shape, f"{name}: shape {list(out.shape)}, expected {list(exact.shape)}"
    _assert_finite_alike(name, out, exact)
    finite = torch.isfinite(exact)
    if not finite.any():
        return
    ours = (out.double() - exact)[finite].abs()
    theirs = (plain.double() - exact)[finite].abs()
    lowered = exact[finite].to(out.dtype)
    rounding = 2 * ((lowered + 0.3 - 0.3).double() - lowered.double()).abs().max().item()
    for kind, got, allowed in (
        ("largest", ours.max().item(), 2 * theirs.max().item() + rounding),
        ("mean", ours.mean().item(), 2 * theirs.mean().item() + rounding),
    ):
        assert got <= allowed, f"{name}: {kind} error {got:.3e} exceeds the budget {allowed:.3e}"


def _assert_finite_alike(name: str, out: torch.Tensor, ref: torch.Tensor) -> None:
    assert not out.isnan().any(), f"{name}: NaN at {out.isnan().nonzero()[:4].tolist()}"
    infinite = ref.isinf()
    assert torch.equal(out.isinf(), infinite), f"{name}: infinities differ from the reference's"
    assert torch.equal(out[infinite].double(), ref[infinite].double()), f"{name}: signs of infinities differ"
