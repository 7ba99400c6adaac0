"""The erase-add kernels compiled through the public functions: no spills, shared memory, matrix units."""

from __future__ import annotations

import pytest
import torch

from harness import SHARED_MEMORY, Kernel, compile_only, resources
from mirasol.kernels import EraseAddParams, MlpParams, ttm_write

PRODUCTS = {
    "erase_add_fwd_select_kernel",
    "erase_add_fwd_tokens_kernel",
    "erase_add_fwd_channels_kernel",
    "erase_add_bwd_update_kernel",
    "erase_add_bwd_channels_kernel",
    "erase_add_bwd_tokens_kernel",
    "erase_add_bwd_normed_kernel",
    "erase_add_bwd_scores_kernel",
    "erase_add_bwd_select_kernel",
}
OTHERS = {"erase_add_fwd_update_kernel", "erase_add_bwd_outputs_kernel", "erase_add_bwd_sums_kernel"}
CASES = [  # target, B, s, r, S, d, hidden, dtype
    ("sm_90", 32, 96, 32, 8, 768, 64, torch.bfloat16),
    ("sm_90", 2, 96, 128, 3, 1024, 64, torch.float32),
    ("sm_80", 1, 512, 128, 16, 2048, 33, torch.float16),
    ("sm_100", 2, 96, 128, 16, 1024, 64, torch.bfloat16),
]


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)


def parameters(d: int, r: int, slots: int, hidden: int, dtype: torch.dtype, official: bool = False) -> EraseAddParams:
    def mlp(inside: int, outside: int) -> MlpParams:
        shapes = ((hidden, inside), (hidden,), (outside, hidden), (outside,))
        return MlpParams(*[empty(*shape, dtype=dtype) for shape in shapes])

    def network() -> tuple[torch.Tensor, torch.Tensor, MlpParams, MlpParams]:
        return empty(d, dtype=dtype), empty(d, dtype=dtype), mlp(r, slots), mlp(d, d)

    scores = empty(d, dtype=dtype), empty(d, dtype=dtype), mlp(d, slots)
    return EraseAddParams(*scores, *network(), *network(), official=official)


def compiled(
    target: str, batch: int, s: int, r: int, slots: int, d: int, hidden: int, dtype: torch.dtype
) -> list[Kernel]:
    """Forward and backward of a write."""
    memory, outputs = empty(batch, s, d, dtype=dtype), empty(batch, r, d, dtype=dtype)
    params = parameters(d, r, slots, hidden, dtype)
    with compile_only(target) as kernels:
        ttm_write(memory, outputs, outputs, params, backend="triton").sum().backward()
    return kernels


@pytest.mark.parametrize(("target", "batch", "s", "r", "slots", "d", "hidden", "dtype"), CASES)
def test_kernels_fit(target, batch, s, r, slots, d, hidden, dtype):
    kernels = compiled(target, batch, s, r, slots, d, hidden, dtype)
    assert {k.name for k in kernels} == PRODUCTS | OTHERS
    for kernel in kernels:
        found = resources(kernel)
        where = f"{kernel.name} {kernel.options}"
        assert found.spills == 0, f"{where}: {found.spills} spills"
        assert found.stack == 0, f"{where}: {found.stack} bytes of stack"
        assert found.shared <= SHARED_MEMORY[target], f"{where}: {found.shared} bytes of shared memory"
        if kernel.name in PRODUCTS and dtype != torch.float32:
            units = {"sm_80": found.mma, "sm_90": found.wgmma, "sm_100": found.tcgen05 + found.mma}
            assert units[target] > 0, f"{where}: no matrix instructions"
            if target == "sm_90":
                assert found.mma == 0, f"{where}: {found.mma} products on the older matrix instructions"


def test_one_call_is_four_launches_and_eight_backward():
    names = [k.name for k in compiled("sm_90", 32, 96, 32, 8, 768, 64, torch.bfloat16)]
    assert len(names) == len(set(names)) == 12
    assert [name.split("_")[2] for name in names] == ["fwd"] * 4 + ["bwd"] * 8


def test_lengths_compile_nothing_new():
    """Once the batch alone fills the device, memory of any length runs through the same kernels."""
    names = []
    for s in (17, 96, 97, 130, 448, 512):
        names += [(k.name, k.compiled.hash) for k in compiled("sm_90", 32, s, 32, 8, 768, 64, torch.bfloat16)]
    for name in PRODUCTS | OTHERS:
        assert len({h for kind, h in names if kind == name}) == 1, name
