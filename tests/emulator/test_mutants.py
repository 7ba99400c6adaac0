"""What the emulator must notice: kernels of ours with one thing taken away, and two that Triton compiles to races."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from aot.hazardous import launch_product_and_sums, launch_product_of_sum
from emulator.device import Launches, emulated
from mirasol.kernels import chunked_attention, combiner_project, ttm_read
from tolerance import assert_close
from ttm.ttm_helpers import token_learner_params

Call = Callable[[], torch.Tensor]


def attention() -> torch.Tensor:
    q, k, v = (torch.randn(1, 2, 300, 64, dtype=torch.bfloat16) for _ in range(3))
    return chunked_attention(q, k, v, q_chunk=70, backend="triton")


def combiner() -> torch.Tensor:
    x, weight = torch.randn(2, 3, 20, 256, dtype=torch.bfloat16), torch.randn(72, 256, dtype=torch.bfloat16)
    return combiner_project(x, 7, weight, backend="triton")


def read() -> torch.Tensor:
    memory, tokens = torch.randn(1, 24, 128, dtype=torch.bfloat16), torch.randn(1, 70, 128, dtype=torch.bfloat16)
    return ttm_read(memory, tokens, token_learner_params(128, 16, dtype=torch.bfloat16), backend="triton")


def without(pattern: str, replacement: str = "", count: int = 0) -> Callable[[str], str]:
    """PTX in which what matches is replaced, everywhere or the first `count` times; there must be such a thing."""

    def mutate(ptx: str) -> str:
        changed, found = re.subn(pattern, replacement, ptx, count=count)
        return changed if found else ptx

    return mutate


MUTANTS: dict[str, tuple[str, Call, Callable[[str], str]]] = {
    "attention stores without a mask": ("sm_80", attention, without(r"@%p\d+ (st\.global)", r"\1")),
    "attention loads without a mask": ("sm_80", attention, without(r"(cp\.async\.c[ag]\S+ [^;]*), %r\d+;", r"\1;")),
    "attention without a mask of scores": (
        "sm_90",
        attention,
        without(r"(selp\.f32[^;]*)0fFF800000", r"\g<1>0f00000000"),
    ),
    "attention without barriers": ("sm_80", attention, without(r"bar\.sync\s+0;")),
    "attention without waiting for copies": ("sm_80", attention, without(r"cp\.async\.wait_group\s+\d+;")),
    "attention waits for one copy less": ("sm_80", attention, without(r"wait_group\s+0;", "wait_group 1;")),
    "attention without waiting for bulk copies": ("sm_90", attention, without(r"@!complete bra\S* \w+;")),
    "attention without waiting for wgmma": ("sm_90", attention, without(r"wgmma\.wait_group\S*\s+\d+;")),
    "attention without fences of the proxy": ("sm_90", attention, without(r"fence\.proxy\.async\S*;")),
    "attention expects fewer bytes": ("sm_90", attention, without(r"(expect_tx\S* _, \[%r\d+\], )16384", r"\g<1>8192")),
    "combiner without barriers": ("sm_90", combiner, without(r"bar\.sync\s+0;")),
    "combiner without waiting for copies": ("sm_90", combiner, without(r"cp\.async\.wait_group\s+\d+;")),
    "combiner loads without a mask": ("sm_80", combiner, without(r"(cp\.async\.c[ag]\S+ [^;]*), %r\d+;", r"\1;")),
    "read without barriers": ("sm_80", read, without(r"bar\.sync\s+0;")),
    "read without waiting for copies": ("sm_90", read, without(r"cp\.async\.wait_group\s+\d+;")),
    "read without waiting for wgmma": ("sm_90", read, without(r"wgmma\.wait_group\S*\s+\d+;")),
}


def run(target: str, call: Call, **options: Any) -> tuple[torch.Tensor, Launches]:
    torch.manual_seed(0)
    with torch.no_grad(), emulated(target, seed=1, **options) as launches:
        return call(), launches


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    target, call, mutate = MUTANTS[name]
    applied = []

    def noted(ptx: str) -> str:
        applied.append(mutate(ptx) != ptx)
        return mutate(ptx)

    right, launches = run(target, call)
    assert not launches.errors
    wrong, launches = run(target, call, late=True, mutate=noted)
    assert any(applied), "nothing was taken away"
    assert launches.errors or not torch.equal(right, wrong)


@pytest.mark.parametrize("late", [False, True])
def test_a_tile_that_wgmma_still_reads_is_refilled(late: bool) -> None:
    x = torch.randn(64, 512, dtype=torch.bfloat16)
    _, launches = run("sm_90", lambda: launch_product_and_sums(x, x), late=late)
    assert "while a wgmma still reads it" in launches.errors[0]
    _, launches = run("sm_80", lambda: launch_product_and_sums(x, x), late=late)
    assert not launches.errors


@pytest.mark.parametrize("late", [False, True])
def test_registers_that_wgmma_still_reads_are_written(late: bool) -> None:
    x = torch.randn(64, 512, dtype=torch.bfloat16)
    found, launches = run("sm_90", lambda: launch_product_of_sum(x, x), late=late)
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8):
        assert "registers of A are written" in launches.errors[0]
    else:
        assert not launches.errors
        assert_close("product", found, (2 * x).double() @ x.double().T)
