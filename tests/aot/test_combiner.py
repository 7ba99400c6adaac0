"""Every tile of `combiner_project` compiles within its budget, for GPUs that this machine need not have.

`python tests/aot/test_combiner.py` rewrites combiner_budget.json; what changed there is for the review.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness import MULTIPROCESSORS, SHARED_MEMORY, Kernel, compile_only, resources
from mirasol.kernels import combiner_project
from mirasol.kernels.combiner.configs import FORWARD_TILES, MAX_WIDTH, ForwardTile, forward_tile
from mirasol.kernels.core.device import Target

BUDGET = Path(__file__).with_name("combiner_budget.json")
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
    assert [kernel.name for kernel in kernels] == ["combiner_project_fwd_kernel", "combiner_project_bwd_rows_kernel"]
    return kernels


def _chosen(target: str, dtype: torch.dtype, B: int) -> ForwardTile:
    described = Target(int(target[3:]), "cuda", MULTIPROCESSORS[target], SHARED_MEMORY[target])
    return forward_tile(B * 16 * 32, 1024, dtype.itemsize, True, described)[0]


def _rows() -> Iterator[tuple[str, str, torch.dtype, dict]]:
    """Name, target, dtype and shape of everything that has a budget."""
    for target in TARGETS:
        for dtype in (*HALVES, torch.float32):
            short = str(dtype).removeprefix("torch.")
            for tile in FORWARD_TILES[int(target[3:]), dtype.itemsize]:
                B = next(B for B in (1, 4, 16, 128) if _chosen(target, dtype, B) == tile)
                yield f"{target} {short} {tile.rows}x{tile.columns}", target, dtype, {"B": B}
        yield f"{target} bfloat16 unaligned", target, torch.bfloat16, UNALIGNED
    for name, variant in VARIANTS.items():
        yield f"sm_90 bfloat16 {name}", "sm_90", torch.bfloat16, variant


ROWS = list(_rows())


@pytest.mark.parametrize(("name", "target", "dtype", "shape"), ROWS, ids=[row[0] for row in ROWS])
def test_resources(name, target, dtype, shape):
    budget = json.loads(BUDGET.read_text())[name]
    for kernel in _kernels(target, dtype, **shape):
        found = resources(kernel)
        assert (found.spills, found.stack) == (0, 0), found
        assert found.shared <= SHARED_MEMORY[target]
        assert found.registers <= budget[kernel.name]["registers"]
        assert found.shared <= budget[kernel.name]["shared"]
        if kernel.name.endswith("fwd_kernel") and dtype in HALVES:
            used = {"sm_80": found.mma, "sm_90": found.wgmma, "sm_100": found.tcgen05}
            assert used[target] > 0
            assert target == "sm_80" or found.mma == 0
            if "unaligned" not in name:  # all but the bias and the boundaries is loaded asynchronously
                assert kernel.compiled.asm["ttgir"].count("tt.load") == (2 if shape.get("uneven") else 1)
        assert found.programs_per_multiprocessor >= 1


def test_every_tile_has_a_row():
    named = {name for name, *_ in ROWS}
    assert named == set(json.loads(BUDGET.read_text()))
    tiles = sum(
        len(FORWARD_TILES[int(target[3:]), size]) * (2 if size == 2 else 1) for target in TARGETS for size in (2, 4)
    )
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
    full, part = (_kernels("sm_90", torch.bfloat16, uneven=uneven, frozen=names)[1] for names in ((), frozen))
    stores = [kernel.compiled.asm["ttgir"].count("tt.store") for kernel in (full, part)]
    assert stores[1] < stores[0]
    assert resources(part).spills == 0


def test_lengths_do_not_specialise():
    compiled: dict[str, set[str]] = {}
    for length in range(20):
        for kernel in _kernels("sm_90", torch.bfloat16, 1 + length, T=1 + 2 * length, n=33 + 7 * length):
            compiled.setdefault(kernel.name, set()).add(kernel.compiled.hash)
    assert len(compiled["combiner_project_fwd_kernel"]) <= len(FORWARD_TILES[90, 2])
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
    BUDGET.write_text(json.dumps(rewritten, indent=1) + "\n")
