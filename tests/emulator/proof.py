"""How a compiled operator is proven: results and gradients under several schedules, against the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from emulator.device import Launches, emulated
from tolerance import SCAN_FLOAT32
from ttm.ttm_helpers import assert_alike, assert_each_within_budget, convert, run

TARGETS = ("sm_80", "sm_90")
SCHEDULES: tuple[dict[str, Any], ...] = ({"seed": 0, "late": False}, {"seed": 3, "late": True})
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def prove(
    target: str, call: Callable[..., Any], args: Sequence[Any], dtype: torch.dtype, *, multiprocessors: int = 8
) -> Launches:
    """Assert that no launch has an error, that bits do not depend on schedules, and that results are right."""
    low = [convert(a, dtype) for a in args]
    found = []
    for schedule in SCHEDULES:
        with emulated(target, multiprocessors=multiprocessors, **schedule) as launches:
            found.append(run(call, low, dtype, "triton"))
        assert launches, "nothing was launched"
        assert not launches.errors, f"{schedule}:\n" + "\n".join(launches.errors)
    for i, (first, *others) in enumerate(zip(*found, strict=True)):
        for other in others:
            assert torch.equal(first, other), f"result {i} {list(first.shape)} depends on the schedule"
    exact = run(call, low, torch.float64, "reference")
    if dtype == torch.float32:
        assert_alike(found[0], [r.to(dtype) for r in exact], rtol=SCAN_FLOAT32)
    else:
        assert_each_within_budget(found[0], run(call, low, dtype, "reference"), exact)
    return launches
