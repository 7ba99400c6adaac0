"""Every tile of `combiner_project` compiles within its budget, for GPUs that this machine need not have.

combiner_budget.json holds what the lowest and the newest supported Triton give; `python tests/aot/test_combiner.py`
rewrites the installed version's part, and what changed there is for the review.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton

from harness import MULTIPROCESSORS, SHARED_MEMORY, Kernel, compile_only, resources
from mirasol.kernels import combiner_project
from mirasol.kernels.combiner.configs import (
    FOLDED_TILES,
    FORWARD_TILES,
    MAX_WIDTH,
    ForwardTile,
    folded_tile,
    folds,
    forward_tile,
)
from mirasol.kernels.core.device import Target

BUDGET = Path(__file__).with_name("combiner_budget.json")
VERSION = ".".join(triton.__version__.split(".")[:2])
TARGETS = ("sm_80", "sm_90", "sm_100")
HALVES = (torch.bfloat16, torch.float16)
VARIANTS = {  # on the shape of the middle tile
    "rms": {"norm": "rms"},
    "no norm": {"norm": None},
    "uneven": {"uneven": True},
    "wide": {"d": 2048, "d_out": 4096},
    "widest": {"d": MAX_WIDTH},
}
UNALIGNED = {"d": 1000, "d_out": 1023}


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _kernels(
    target: str,
    dtype: torch.dtype,
    B: int = 4,
    *,
    T: int = 16,
    n: int = 390,
    d: int = 1024,
    d_out: int = 1024,
    norm: str | None = "layer",
    uneven: bool = False,
    frozen: tuple[str, ...] = (),
) -> list[Kernel]:
    x = _meta(dtype, B, T * n, d) if uneven else _meta(dtype, B, T, n, d)
    boundaries = torch.empty(T + 1, dtype=torch.int32, device="meta") if uneven else None
    norm_weight = None if norm is None else _meta(dtype, d)
    norm_bias = _meta(dtype, d) if norm == "layer" else None
    weight, bias = _meta(dtype, d_out, d), _meta(dtype, d_out)
    named = {"x": x, "weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name in frozen:
        named[name].requires_grad_(False)
    with compile_only(target) as kernels:
        out = combiner_project(
            x, 32, weight, bias, norm_weight, norm_bias, norm=norm, boundaries=boundaries, backend="triton"
        )
        out.sum().backward()
    folded = ["combiner_fold_kernel", "combiner_project_fwd_folded_kernel"]
    forward = folded if folds(dtype, norm or "none") else ["combiner_project_fwd_kernel"]
    assert [kernel.name for kernel in kernels] == [*forward, "combiner_project_bwd_rows_kernel"]
    return kernels


def _tiles(target: str, dtype: torch.dtype) -> tuple[ForwardTile, ...]:
    arch = int(target[3:])
    return FOLDED_TILES[arch] if folds(dtype, "layer") else FORWARD_TILES[arch, dtype.itemsize]


def _chosen(target: str, dtype: torch.dtype, B: int, T: int) -> ForwardTile:
    described = Target(int(target[3:]), "cuda", MULTIPROCESSORS[target], SHARED_MEMORY[target])
    if folds(dtype, "layer"):
        return folded_tile(B * T * 32, 1024, dtype.itemsize, True, described)
    return forward_tile(B * T * 32, 1024, dtype.itemsize, True, described)[0]


def _rows() -> Iterator[tuple[str, str, torch.dtype, dict]]:
    """Name, target, dtype and shape of everything that has a budget."""
    for target in TARGETS:
        for dtype in (*HALVES, torch.float32):
            short = str(dtype).removeprefix("torch.")
            for tile in _tiles(target, dtype):
                sizes = ((1, 1), (1, 16), (4, 16), (16, 16), (128, 16))
                B, T = next(size for size in sizes if _chosen(target, dtype, *size) == tile)
                yield f"{target} {short} {tile.rows}x{tile.columns}", target, dtype, {"B": B, "T": T}
        yield f"{target} bfloat16 unaligned", target, torch.bfloat16, UNALIGNED
    for name, variant in VARIANTS.items():
        yield f"sm_90 bfloat16 {name}", "sm_90", torch.bfloat16, variant


ROWS = list(_rows())


@pytest.mark.parametrize(("name", "target", "dtype", "shape"), ROWS, ids=[row[0] for row in ROWS])
def test_resources(name, target, dtype, shape):
    budgets = json.loads(BUDGET.read_text()).get(VERSION)
    for kernel in _kernels(target, dtype, **shape):
        found = resources(kernel)
        assert (found.spills, found.stack) == (0, 0), found
        assert found.shared <= SHARED_MEMORY[target]
        if budgets is not None:  # versions between have no reviewed figures: the hard limits hold
            assert found.registers <= budgets[name][kernel.name]["registers"]
            assert found.shared <= budgets[name][kernel.name]["shared"]
        if kernel.name.startswith("combiner_project_fwd") and dtype in HALVES:
            used = {"sm_80": found.mma, "sm_90": found.wgmma, "sm_100": found.tcgen05}
            assert used[target] > 0
            assert target == "sm_80" or found.mma == 0
            if "unaligned" not in name:  # rows and weights are loaded asynchronously
                assert not re.findall(r"tt\.load .*tensor<\d+x\d+x!tt\.ptr", kernel.compiled.asm["ttgir"])
            if "folded" in kernel.name and target == "sm_90":  # rows go from shared memory straight into the product
                left = re.findall(r"ttng.warp_group_dot %.* : (!ttg.memdesc|tensor)<", kernel.compiled.asm["ttgir"])
                assert left == ["!ttg.memdesc"]
        assert found.programs_per_multiprocessor >= 1


def test_every_tile_has_a_row():
    named = {name for name, *_ in ROWS}
    for budgets in json.loads(BUDGET.read_text()).values():
        assert named == set(budgets)
    tiles = sum(len(_tiles(target, dtype)) for target in TARGETS for dtype in (*HALVES, torch.float32))
    assert len(named) == tiles + len(TARGETS) + len(VARIANTS)


FROZEN = {
    "features": ("x",),
    "features and norm": ("x", "norm_weight", "norm_bias"),
    "head": ("weight", "bias"),
    "all but x": ("weight", "bias", "norm_weight", "norm_bias"),
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("uneven", [False, True])
def test_gradients_that_nobody_asked_for_compile_away(uneven, frozen):
    full, part = (_kernels("sm_90", torch.bfloat16, uneven=uneven, frozen=names)[-1] for names in ((), frozen))
    stores = [kernel.compiled.asm["ttgir"].count("tt.store") for kernel in (full, part)]
    assert stores[1] < stores[0]
    assert resources(part).spills == 0


def test_lengths_do_not_specialise():
    compiled: dict[str, set[str]] = {}
    for length in range(20):
        for kernel in _kernels("sm_90", torch.bfloat16, 1 + length, T=1 + 2 * length, n=33 + 7 * length):
            compiled.setdefault(kernel.name, set()).add(kernel.compiled.hash)
    assert len(compiled["combiner_project_fwd_folded_kernel"]) <= len(FOLDED_TILES[90])
    assert len(compiled["combiner_fold_kernel"]) == 1
    assert len(compiled["combiner_project_bwd_rows_kernel"]) == 1


if __name__ == "__main__":
    rewritten = {}
    for row, target, dtype, shape in ROWS:
        measured = {kernel.name: resources(kernel) for kernel in _kernels(target, dtype, **shape)}
        rewritten[row] = {
            kernel: {
                "registers": found.registers,
                "shared": found.shared,
                "occupancy": found.programs_per_multiprocessor,
            }
            for kernel, found in measured.items()
        }
        print(row, rewritten[row])
    budgets = json.loads(BUDGET.read_text()) | {VERSION: rewritten}
    BUDGET.write_text(json.dumps(dict(sorted(budgets.items())), indent=1) + "\n")
