"""Every configuration of `combiner_project` compiles within its budget, for GPUs that this machine need not have.

combiner_budget.json holds what the lowest and the newest supported Triton give;
`PYTHONPATH=tests python tests/aot/test_combiner_aot.py`
rewrites the installed version's part, and what changed there is for the review.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import triton

from harness import SHARED_MEMORY, Kernel, Resources, compile_only, resources
from mirasol.kernels import combiner_project
from mirasol.kernels.combiner.triton.config import MAX_WIDTH, ForwardConfig

BUDGET = Path(__file__).with_name("combiner_budget.json")
VERSION = ".".join(triton.__version__.split(".")[:2])
TARGETS = {"sm_80": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma"}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
UNALIGNED = {"d": 1000, "d_out": 1023}
FEW, SOME, MANY = {"B": 1}, {"B": 4}, {"B": 16}
CASES = {
    "sm_80 few rows": FEW,
    "sm_80 many rows": MANY,
    "sm_80 float16": {"B": 16, "dtype": F16},
    "sm_80 float32": {"dtype": F32},
    "sm_80 unaligned": UNALIGNED,
    "sm_89 few rows": FEW,
    "sm_89 many rows": MANY,
    "sm_90 few rows": FEW,
    "sm_90 some rows": SOME,
    "sm_90 many rows": MANY,
    "sm_90 float16": {"B": 16, "dtype": F16},
    "sm_90 float32": {"dtype": F32},
    "sm_90 unaligned": UNALIGNED,
    "sm_90 rms": {"norm": "rms"},
    "sm_90 no norm": {"B": 16, "norm": None},
    "sm_90 uneven": {"uneven": True},
    "sm_90 widest": {"d": MAX_WIDTH},
    "sm_100 few rows": FEW,
    "sm_100 some rows": SOME,
    "sm_100 many rows": MANY,
    "sm_100 float16": {"B": 16, "dtype": F16},
    "sm_100 float32": {"dtype": F32},
    "sm_100 unaligned": UNALIGNED,
    "sm_120 few rows": FEW,
    "sm_120 many rows": MANY,
    "sm_120 float32": {"dtype": F32},
}


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _kernels(
    target: str, B: int = 4, T: int = 16, n: int = 390, d: int = 1024, d_out: int = 1024, *,
    dtype: torch.dtype = BF16, norm: str | None = "layer", uneven: bool = False, frozen: tuple[str, ...] = (),
) -> tuple[Kernel, Kernel]:  # fmt: skip
    x = _meta(dtype, B, T * n, d) if uneven else _meta(dtype, B, T, n, d)
    boundaries = torch.empty(T + 1, dtype=torch.int32, device="meta") if uneven else None
    norm_weight = None if norm is None else _meta(dtype, d)
    norm_bias = _meta(dtype, d) if norm == "layer" else None
    tensors = {"x": x, "weight": _meta(dtype, d_out, d), "bias": _meta(dtype, d_out)}
    tensors |= {"norm_weight": norm_weight, "norm_bias": norm_bias}
    for name in frozen:
        tensors[name].requires_grad_(False)
    with compile_only(target) as kernels:
        out = combiner_project(m=32, norm=norm, boundaries=boundaries, backend="triton", **tensors)
        out.sum().backward()
    forward, backward = kernels
    assert (forward.name, backward.name) == ("combiner_project_fwd_kernel", "combiner_project_bwd_rows_kernel")
    return forward, backward


@pytest.mark.parametrize(
    "name", [name if name[:5] in ("sm_80", "sm_90") else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_resources(name):
    target, case = name.split()[0], CASES[name]
    kernels = _kernels(target, **case)
    measured = {kernel.name: resources(kernel) for kernel in kernels}
    budgets = json.loads(BUDGET.read_text()).get(VERSION)
    for kernel, found in measured.items():
        assert (found.spills, found.stack) == (0, 0), found
        assert found.shared <= SHARED_MEMORY[target]
        assert found.programs_per_multiprocessor >= 1
        if budgets is not None:  # versions between have no reviewed figures: the hard limits hold
            assert found.registers <= budgets[name][kernel]["registers"]
            assert found.shared <= budgets[name][kernel]["shared"]
    forward = kernels[0]
    _check_product(forward, measured[forward.name], case)


def _check_product(kernel: Kernel, found: Resources, case: dict) -> None:
    """Matrix instructions, asynchronous loads, the estimate of shared memory, and no race on Hopper."""
    ttgir, itemsize = kernel.compiled.asm["ttgir"], case.get("dtype", BF16).itemsize
    sizes = (kernel.options[name] for name in ("BM", "BN", "BK", "num_warps", "num_stages"))
    assert found.shared <= ForwardConfig(*sizes).shared_memory(itemsize) + 1024
    if itemsize == 2:
        assert getattr(found, TARGETS[kernel.target]) > 0
        assert found.mma == 0 or TARGETS[kernel.target] == "mma"
    if case is not UNALIGNED:
        assert not re.findall(r"tt\.load .*tensor<\d+x\d+x!tt\.ptr", ttgir)
    if kernel.target == "sm_90" and itemsize == 2:
        # A tile in shared memory that is normalised too would be refilled while wgmma reads it (Triton issue 3106).
        left = re.findall(r"ttng.warp_group_dot %.* : (!ttg.memdesc|tensor)<", ttgir)
        assert set(left) == {"!ttg.memdesc" if case.get("norm", "layer") is None else "tensor"}


def test_every_case_has_a_budget():
    for budgets in json.loads(BUDGET.read_text()).values():
        assert set(budgets) == set(CASES)


FROZEN = {
    "features and norm": ("x", "norm_weight", "norm_bias"),
    "all but x": ("weight", "bias", "norm_weight", "norm_bias"),
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_gradients_that_nobody_asked_for_compile_away(frozen):
    full, part = (_kernels("sm_90", frozen=names)[1] for names in ((), frozen))
    stores = [kernel.compiled.asm["ttgir"].count("tt.store") for kernel in (full, part)]
    assert stores[1] < stores[0]
    assert resources(part).spills == 0


@pytest.mark.parametrize("uneven", [False, True])
def test_lengths_do_not_specialise(uneven):
    compiled: dict[str, set[str]] = {}
    for length in range(6):
        for kernel in _kernels("sm_90", 1 + length, 1 + 2 * length, 33 + 7 * length, uneven=uneven):
            compiled.setdefault(kernel.name, set()).add(kernel.compiled.hash)
    assert len(compiled["combiner_project_fwd_kernel"]) <= 3  # blocks
    assert len(compiled["combiner_project_bwd_rows_kernel"]) == 1


if __name__ == "__main__":
    rewritten = {}
    for row, case in CASES.items():
        found = {kernel.name: resources(kernel) for kernel in _kernels(row.split()[0], **case)}
        rewritten[row] = {name: {"registers": r.registers, "shared": r.shared} for name, r in found.items()}
        print(row, rewritten[row])
    budgets = json.loads(BUDGET.read_text()) | {VERSION: rewritten}
    BUDGET.write_text(json.dumps(dict(sorted(budgets.items())), indent=1) + "\n")
