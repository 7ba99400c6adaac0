"""The compiled Combiner projection: every norm, even and uneven chunks, rows few and many."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from combiner.cases import NORM_CASES, make_case
from emulator.proof import DTYPES, TARGETS, prove

CASES: dict[str, dict[str, Any]] = {
    "layer_norm": dict(B=2, T=3, n=40, m=16, d=256, d_out=256),
    "rms_norm_odd": dict(B=1, T=2, n=30, m=7, d=128, d_out=72, norm_case=NORM_CASES[3]),
    "uneven": dict(B=2, m=5, d=100, d_out=75, edges=[0, 9, 20, 44]),
    "no_norm": dict(B=2, T=3, n=40, m=16, d=256, d_out=192, norm_case=NORM_CASES[5]),
    "many_rows": dict(B=4, T=4, n=50, m=40, d=512, d_out=512),
    "no_weights": dict(B=2, T=2, n=9, m=3, d=768, d_out=256, norm_case=NORM_CASES[1]),
    "odd_width": dict(B=1, T=2, n=9, m=3, d=1000, d_out=40, norm_case=NORM_CASES[2]),
    "uneven_rms_norm": dict(B=2, m=6, d=192, d_out=128, edges=[0, 9, 20, 44, 50], norm_case=NORM_CASES[3]),
}
QUICK = ("layer_norm", "rms_norm_odd", "uneven", "many_rows")


def check(target: str, dtype: str, name: str, multiprocessors: int = 8) -> None:
    torch.manual_seed(0)
    case = make_case(**CASES[name], dtype=torch.float64)
    names = list(case.tensors())

    def project(*args: Any) -> torch.Tensor:
        *tensors, backend = args
        return case.call(backend, **dict(zip(names, tensors, strict=True)))

    prove(
        target,
        project,
        [t.requires_grad_() for t in case.tensors().values()],
        DTYPES[dtype],
        multiprocessors=multiprocessors,
    )


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
def test_combiner(target: str, dtype: str, name: str) -> None:
    check(target, dtype, name)


@pytest.mark.slow
@pytest.mark.parametrize("multiprocessors", [2, 132])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_norm_and_size(target: str, dtype: str, name: str, multiprocessors: int) -> None:
    check(target, dtype, name, multiprocessors)


@pytest.mark.parametrize("target", TARGETS)
def test_float32(target: str) -> None:
    check(target, "fp32", "rms_norm_odd")
