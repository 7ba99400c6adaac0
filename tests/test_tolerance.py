"""What the tolerances refuse."""

import pytest
import torch

from tolerance import assert_close, assert_within_budget


@pytest.mark.parametrize("magnitude", [1e-6, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zeros_pass_for_nothing_else_at_any_magnitude(magnitude, dtype):
    if magnitude == 1e-6 and dtype == torch.float16:
        magnitude = 1e-3  # float16 holds no more of it
    exact = torch.randn(64, 64, dtype=torch.float64) * magnitude
    plain = exact.to(dtype)
    assert_within_budget("rounded", exact.to(dtype), plain, exact)
    with pytest.raises(AssertionError, match="largest error"):
        assert_within_budget("zeros", torch.zeros_like(plain), plain, exact)
    with pytest.raises(AssertionError, match="largest error"):
        assert_close("zeros", torch.zeros_like(exact), exact)


def test_errors_that_are_small_but_everywhere_are_refused():
    exact = torch.ones(1000, dtype=torch.float64)
    exact[0] = 1000.0
    plain = exact.to(torch.bfloat16)
    with pytest.raises(AssertionError, match="root mean square"):
        assert_within_budget("biased", (exact + 1.5).to(torch.bfloat16), plain, exact)
    with pytest.raises(AssertionError, match="root mean square"):
        assert_close("biased", exact + 0.9, exact, rtol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_never_passes(bad):
    exact = torch.randn(8, dtype=torch.float64)
    out = exact.to(torch.bfloat16)
    out[3] = bad
    with pytest.raises(AssertionError, match=r"NaN|infinities"):
        assert_within_budget("bad", out, exact.to(torch.bfloat16), exact)
    with pytest.raises(AssertionError, match=r"NaN|infinities"):
        assert_close("bad", out, exact, rtol=1e-2)
