"""The pooling kernels compiled through the public functions: no spills, shared memory, matrix units, budget.

Registers and shared memory stay within `ttm_budget.json`, which holds what each reviewed version of Triton gives and is
to be read when changed: `PYTHONPATH=tests python tests/aot/test_ttm_aot.py` writes the installed version's part anew.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton

from harness import SHARED_MEMORY, Kernel, Resources, compile_only, resources
from mirasol.kernels import LatentQueryParams, TokenLearnerParams, ttm_read, ttm_scan, ttm_write
from mirasol.kernels.ttm.latent_query import pooled_rows

BUDGET_FILE = Path(__file__).with_name("ttm_budget.json")
VERSION = ".".join(triton.__version__.split(".")[:2])
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRODUCTS = {
    "pool_fwd_kernel",
    "pool_bwd_scores_kernel",
    "pool_bwd_hidden_kernel",
    "pool_bwd_tokens_kernel",
    "pool_bwd_w1_kernel",
    "pool_bwd_w2_kernel",
}
LAYER_TWO = {"pool_bwd_hidden_kernel", "pool_bwd_w2_kernel"}  # what linear scores do not have
SHAPING = ("D", "J", "K", "SOURCES", "LINEAR")
OPTIONAL = ("positions", "carry_out")


@dataclass(frozen=True)
class Case:
    """Calls ("read", "write", "scan", "latent") on one target, forward and backward."""

    target: str
    dtype: str
    calls: str
    d: int
    n: int
    s: int
    r: int
    positions: bool = False
    hidden: int = 64

    def __str__(self) -> str:
        places = "-positions" if self.positions else ""
        wide = f"-hidden{self.hidden}" if self.hidden != 64 else ""
        calls = self.calls.replace(" ", "+")
        return f"{self.target}-{self.dtype}-{calls}-d{self.d}-s{self.s}-r{self.r}{wide}{places}"


CASES = [  # every target, dtype, width, memory size and read size
    Case("sm_90", "bf16", "read write", 768, 448, 96, 32),
    Case("sm_90", "bf16", "scan", 1024, 1176, 512, 64, hidden=128),
    Case("sm_90", "fp16", "latent", 2048, 294, 128, 16, positions=True),
    Case("sm_90", "fp32", "write", 768, 448, 128, 16),
    Case("sm_80", "bf16", "scan", 768, 448, 96, 32),
    Case("sm_80", "fp16", "write", 2048, 294, 512, 16, positions=True, hidden=128),
    Case("sm_80", "fp32", "read", 1024, 448, 512, 64),
    Case("sm_100", "bf16", "scan", 1024, 390, 512, 64, hidden=128),
    Case("sm_100", "fp16", "latent", 768, 448, 96, 32, positions=True),
]


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)


def learner(d: int, k: int, positions: int, dtype: torch.dtype, hidden: int = 64) -> TokenLearnerParams:
    shapes = ((d,), (d,), (hidden, d), (hidden,), (k, hidden), (k,))
    place = empty(positions, d, dtype=dtype) if positions else None
    return TokenLearnerParams(*[empty(*shape, dtype=dtype) for shape in shapes], place)


def latent(d: int, k: int, positions: int, dtype: torch.dtype, heads: int = 8) -> LatentQueryParams:
    tensors = [empty(k, d, dtype=dtype)]
    for _ in range(4):
        tensors += [empty(d, d, dtype=dtype), empty(d, dtype=dtype)]
    return LatentQueryParams(*tensors, heads=heads, positions=empty(positions, d, dtype=dtype) if positions else None)


def compiled(case: Case) -> list[Kernel]:
    """The kernels that the calls launch, each specialisation once."""
    B, T, dtype, d, n, s, r = 4, 2, DTYPES[case.dtype], case.d, case.n, case.s, case.r
    memory, inputs, outputs = (empty(B, p, d, dtype=dtype) for p in (s, n, r))
    places = case.positions
    read, write = (learner(d, k, p * places, dtype, case.hidden) for k, p in ((r, s + n), (s, s + n + r)))
    with compile_only(case.target) as kernels:
        if "read" in case.calls:
            ttm_read(memory, inputs, read, backend="triton").sum().backward()
        if "write" in case.calls:
            ttm_write(memory, outputs, inputs, write, backend="triton").sum().backward()
        if "scan" in case.calls:
            chunks = empty(B, T, n, d, dtype=dtype)
            found, last = ttm_scan(memory, chunks, read, torch.tanh, write, form="parallel", backend="triton")
            (found.sum() + last.sum()).backward()
        if "latent" in case.calls:
            queries = latent(d, 16, (s + n) * places, dtype)
            assert pooled_rows(queries, "triton") is not None
            ttm_read(memory, inputs, queries, backend="triton").sum().backward()
    unique = {(k.name, k.compiled.hash): k for k in kernels}
    return list(unique.values())


def key_of(kernel: Kernel, dtype: str) -> str:
    shape = " ".join(f"{name}{int(kernel.options[name])}" for name in SHAPING if name in kernel.options)
    shape += "".join(f" no {name}" for name in OPTIONAL if name in kernel.options)  # given, it is a tensor
    return f"{kernel.target} {dtype} {kernel.name.removesuffix('_kernel')} {shape}"


def measure(case: Case) -> dict[str, list[tuple[Kernel, Resources]]]:
    """By key; kernels that differ in how their arguments divide share one."""
    found: dict[str, list[tuple[Kernel, Resources]]] = {}
    for kernel in compiled(case):
        found.setdefault(key_of(kernel, case.dtype), []).append((kernel, resources(kernel)))
    return found


def check(kernel: Kernel, found: Resources, dtype: str) -> None:
    """What must hold of every kernel."""
    where = f"{kernel.name} {kernel.options}"
    assert found.spills == 0, f"{where}: {found.spills} spills"
    assert found.stack == 0, f"{where}: {found.stack} bytes of stack"
    assert found.shared <= SHARED_MEMORY[kernel.target], f"{where}: {found.shared} bytes of shared memory"
    if kernel.name not in PRODUCTS or dtype == "fp32":
        return
    units = {"sm_80": found.mma, "sm_90": found.wgmma, "sm_100": found.tcgen05 + found.mma}
    assert units[kernel.target] > 0, f"{where}: no matrix instructions"
    if kernel.target == "sm_90":
        assert found.mma == 0, f"{where}: {found.mma} products on the older matrix instructions"


@pytest.mark.parametrize(
    "case",
    [case if case.target in ("sm_80", "sm_90") else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_kernels_compile_within_their_budget(case: Case) -> None:
    budgets = json.loads(BUDGET_FILE.read_text()).get(VERSION)
    found = measure(case)
    names = {kernel.name for same in found.values() for kernel, _ in same}
    learns = any(call in case.calls for call in ("read", "write", "scan"))
    assert names >= (PRODUCTS if learns else PRODUCTS - LAYER_TWO)
    assert {"pool_bwd_rows_kernel", "pool_bwd_sums_kernel"} <= names
    assert ({"fold_fwd_kernel", "fold_bwd_kernel"} <= names) == learns
    for key, same in found.items():
        for kernel, used in same:
            check(kernel, used, case.dtype)
            if budgets is not None:  # other versions of Triton have no reviewed figures: the hard limits above hold
                registers, shared = budgets[key]
                assert used.registers <= registers, f"{key}: {used.registers} registers, budget {registers}"
                assert used.shared <= shared, f"{key}: {used.shared} bytes of shared memory, budget {shared}"


def test_more_rows_than_the_kernels_hold_run_as_products() -> None:
    memory, inputs = empty(2, 96, 768, dtype=torch.bfloat16), empty(2, 448, 768, dtype=torch.bfloat16)
    for k, launched in ((96, True), (128, False)):
        with compile_only("sm_90") as kernels:
            ttm_read(memory, inputs, latent(768, k, 0, torch.bfloat16), backend="triton").sum().backward()
        assert bool(kernels) == launched, "768 rows of heads times queries are no more work than projecting first"


@pytest.mark.parametrize("target", ["sm_89", "sm_120"])
def test_the_widest_write_fits_a_small_shared_memory(target: str) -> None:
    memory, inputs, outputs = (empty(2, p, 2048, dtype=torch.bfloat16) for p in (512, 448, 64))
    with compile_only(target) as kernels, torch.no_grad():
        ttm_write(memory, outputs, inputs, learner(2048, 512, 0, torch.bfloat16, 128), backend="triton")
    found = {kernel.name: resources(kernel) for kernel in kernels}["pool_fwd_kernel"]
    assert found.spills == 0
    assert found.shared <= SHARED_MEMORY[target]


def test_no_tile_is_refilled_while_wgmma_reads_it() -> None:
    """Every product of the forward kernel ends in its step: what it reads from shared memory may be copied to then.

    In the form without a backward, which keeps no hidden layer.
    """
    memory, inputs = empty(2, 96, 768, dtype=torch.bfloat16), empty(2, 448, 768, dtype=torch.bfloat16)
    with compile_only("sm_90") as kernels, torch.no_grad():
        ttm_read(memory, inputs, learner(768, 32, 0, torch.bfloat16), backend="triton")
    (kernel,) = (kernel for kernel in kernels if kernel.name == "pool_fwd_kernel")
    check(kernel, resources(kernel), "bf16")
    code = kernel.compiled.asm["ttgir"]
    asynchronous = len(re.findall(r"warp_group_dot .*isAsync = true", code))
    pending = re.findall(r"warp_group_dot_wait .*pendings = (\d+)", code)
    assert len(pending) >= asynchronous > 0
    assert set(pending) == {"0"}


def test_lengths_and_splits_compile_nothing_new() -> None:
    forms: dict[str, set[str]] = {}
    read = learner(768, 32, 0, torch.bfloat16)
    for batch, n in ((2, 17), (1, 294), (3, 448), (8, 449), (2, 667), (2, 1176)):
        memory, inputs = (empty(batch, p, 768, dtype=torch.bfloat16) for p in (96, n))
        with compile_only("sm_90") as kernels:
            ttm_read(memory, inputs, read, backend="triton").sum().backward()
        for kernel in kernels:
            forms.setdefault(kernel.name, set()).add(kernel.compiled.hash)
    assert set(forms) >= PRODUCTS
    for name in PRODUCTS:
        assert len(forms[name]) == 1, f"{name}: {len(forms[name])} forms"


def write_budget() -> None:
    """Write what the installed Triton gives; to be read before it is committed."""
    budgets = json.loads(BUDGET_FILE.read_text()) if BUDGET_FILE.exists() else {}
    rows: dict[str, list[int]] = {}
    for case in CASES:
        for key, same in measure(case).items():
            used = [resource for _, resource in same]
            worst = [max(found.registers for found in used), max(found.shared for found in used)]
            rows[key] = [max(pair) for pair in zip(worst, rows.get(key, worst), strict=True)]
            note = "  DOES NOT FIT" if any(found.spills or found.stack for found in used) else ""
            sys.stdout.write(f"{key}: {rows[key][0]} registers, {rows[key][1]} bytes{note}\n")
            sys.stdout.flush()
    budgets[VERSION] = dict(sorted(rows.items()))
    parts = []
    for version, kept in sorted(budgets.items()):
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items())
        parts.append(f'  "{version}": {{\n{lines}\n  }}')
    BUDGET_FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    write_budget()
