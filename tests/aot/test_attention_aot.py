"""Every attention kernel in every configuration, compiled for every target through the public function.

No spills, shared memory within the limit and the configuration's own estimate, the target's own matrix instructions,
fused multiply-adds, loads by descriptors where the configuration says so; registers and shared memory within
`attention_budget.json`, which holds what the lowest and the newest supported Triton give and is to be reviewed:
`PYTHONPATH=tests python tests/aot/test_attention_aot.py` writes the installed version's part anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from harness import SHARED_MEMORY, Kernel, Resources, compile_only, resources
from mirasol.kernels import chunked_attention
from mirasol.kernels.attention.triton.config import (
    BACKWARD_KV,
    BACKWARD_Q,
    FORWARD,
    WIDTHS,
    Config,
    shared_memory,
    specialized_warps,
)

BUDGET_FILE = Path(__file__).with_name("attention_budget.json")
VERSION = ".".join(triton.__version__.split(".")[:2])
LAYOUTS: dict[str, dict[str, Any]] = {
    "aligned": {"q_chunk": 512},
    "masked": {"q_chunk": 448, "window": 2, "sinks": 1, "causal": True},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {
    "attention_fwd_kernel": FORWARD,
    "attention_bwd_dkdv_kernel": BACKWARD_KV,
    "attention_bwd_dq_kernel": BACKWARD_Q,
}


TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def cases() -> Iterator[tuple[str, int, str, str]]:
    """(target, head width, dtype, layout) of all configurations; sm_80 has those in float32 of all NVIDIA targets."""
    for target in TARGETS:
        for width in (*WIDTHS, *((80,) if target == "gfx942" else ())):
            for dtype in DTYPES:
                if dtype == "fp32" and target not in ("sm_80", "sm_90", "gfx942"):
                    continue
                for layout in LAYOUTS:
                    yield target, width, dtype, layout


def compile_call(
    target: str, width: int, dtype: str, layout: dict[str, Any], *, heads: int = 4, n: int = 2048, n_q: int = 0
) -> list[Kernel]:
    """Kernels of one forward and backward call on meta tensors."""
    q = torch.empty(2, heads, n_q or n, width, device="meta", dtype=DTYPES[dtype], requires_grad=True)
    k, v = (torch.empty(2, 4, n, width, device="meta", dtype=DTYPES[dtype], requires_grad=True) for _ in range(2))
    with compile_only(target) as kernels:
        chunked_attention(q, k, v, **layout, backend="triton").sum().backward()
    return kernels


def check(kernel: Kernel, found: Resources) -> None:
    """What must hold of every kernel."""
    label = f"{kernel.name} on {kernel.target}: {found}"
    assert found.shared <= SHARED_MEMORY[kernel.target], label
    assert found.spills == 0, label
    assert found.stack == 0, label
    if kernel.name not in NAMES:
        return
    if kernel.options["TMA"]:
        assert found.tma_loads > 0, label
    if "fp32" in str(kernel.compiled.src.signature.get("q")):
        return  # exact products, no matrix units
    if kernel.target == "gfx942":
        assert any(op.startswith("v_mfma") for op in found.instructions), label
    if kernel.target == "sm_90":
        assert found.wgmma > 0, label
        assert found.mma == 0, label
    if kernel.target == "sm_100":
        assert found.tcgen05 > 0, label
    if kernel.target in ("sm_80", "sm_89", "sm_120"):
        assert found.mma > 0, label
    if kernel.target.startswith("sm_"):
        used = config_of(kernel)
        scores = used.block_m * used.block_n // (32 * kernel.options["num_warps"])  # a thread, scaled and shifted
        assert found.instructions["FFMA"] >= scores, label
        of_own = used.tma and not kernel.options.get("SPECIALIZE")
        if of_own or kernel.target not in ("sm_90", "sm_100"):  # by pointers these take more, and have more
            estimate = shared_memory(NAMES[kernel.name], kernel.options["PADDED"], 2, used)
            assert found.shared <= estimate, f"{label}: estimated {estimate}"


def config_of(kernel: Kernel) -> Config:
    options = kernel.options
    return Config(options["BM"], options["BN"], options["num_warps"], options["STAGES"], tma=options["TMA"])


def budget_key(target: str, width: int, dtype: str, layout: str, kernel: Kernel) -> str:
    return f"{target} {NAMES[kernel.name]} D{width} {dtype} {layout}"


def measure(case: tuple[str, int, str, str]) -> dict[str, tuple[Kernel, Resources]]:
    target, width, dtype, layout = case
    kernels = compile_call(target, width, dtype, LAYOUTS[layout])
    return {
        budget_key(target, width, dtype, layout, kernel): (kernel, resources(kernel))
        for kernel in kernels
        if kernel.name in NAMES
    }


@pytest.mark.parametrize(
    "case",
    # float16 compiles to what bfloat16 does, but for the type of its instructions
    [
        case if case[0] in ("sm_80", "sm_90") and case[2] == "bf16" else pytest.param(case, marks=pytest.mark.slow)
        for case in cases()
    ],
    ids=lambda case: "-".join(map(str, case)),
)
def test_configurations_compile_within_their_budget(case: tuple[str, int, str, str]) -> None:
    budgets = json.loads(BUDGET_FILE.read_text()).get(VERSION)
    found = measure(case)
    assert len(found) == len(NAMES)
    for key, (kernel, used) in found.items():
        expected = "none" if case[3] == "aligned" else ("edges", "all")
        assert kernel.options["MASKS"] in expected
        check(kernel, used)
        if budgets is not None:  # versions between have no reviewed figures: the hard limits above hold
            registers, shared = budgets[key]
            assert used.registers <= registers, f"{key}: {used.registers} registers, budget {registers}"
            assert used.shared <= shared, f"{key}: {used.shared} bytes of shared memory, budget {shared}"


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_hopper_specialises_warps(width: int, dtype: str) -> None:
    with specialized_warps():
        kernels = [kernel for kernel in compile_call("sm_90", width, dtype, LAYOUTS["aligned"]) if kernel.name in NAMES]
    assert len(kernels) == len(NAMES)
    for kernel in kernels:
        found = resources(kernel)
        check(kernel, found)
        own = kernel.options["BN" if kernel.name == "attention_bwd_dkdv_kernel" else "BM"]
        assert own == 128, kernel.name
        assert found.warp_specialized, kernel.name
        assert found.warps == 12, kernel.name
        assert found.registers <= 168, kernel.name
        assert found.instructions["USETMAXREG"] > 0, kernel.name
        # The compiler frees a tile after its first use, and takes a change of its shape for one.
        assert "memdesc_reshape" not in kernel.compiled.asm["ttgir"], kernel.name


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("width", [64, 80, 128])
def test_other_forms_of_the_kernels(target: str, width: int) -> None:
    """Grouped heads (4 a key head, and 3, which descriptors cannot pack), packed and uneven chunks, split keys."""
    uneven = torch.empty(3, device="meta", dtype=torch.int32)
    calls = [
        compile_call(target, width, "bf16", {"q_chunk": 448}, heads=16),
        compile_call(target, width, "bf16", {"q_chunk": 448}, heads=12),
        compile_call(target, width, "bf16", {"q_chunk": uneven, "cu_seqlens_q": torch.empty_like(uneven)}),
        compile_call(target, width, "bf16", {"q_chunk": 1}, heads=16, n=8192, n_q=1),
    ]
    names = [kernel.name for kernel in calls[-1]]
    assert "attention_fwd_combine_kernel" in names
    for kernels in calls:
        for kernel in kernels:
            check(kernel, resources(kernel))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("uneven_q", [False, True])
@pytest.mark.parametrize("uneven_k", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_tables_of_every_kind_of_edges(target: str, uneven_q: bool, uneven_k: bool, packed: bool) -> None:
    """A missing tensor is compiled away, and with it all that would read it: the interpreter does not show that."""
    edges = torch.empty(3, device="meta", dtype=torch.int32)
    layout = {"q_chunk": edges if uneven_q else 448, "k_chunk": edges if uneven_k else 448, "causal": True}
    layout |= {"cu_seqlens_q": edges} if packed else {}
    kernels = compile_call(target, 64, "bf16", layout)
    found = [kernel for kernel in kernels if kernel.name == "attention_table_kernel"]
    assert {kernel.options["ROWS"] for kernel in found} == ({True, False} if uneven_q or uneven_k or packed else set())
    for kernel in found:
        check(kernel, resources(kernel))


def test_lengths_do_not_specialise() -> None:
    """20 lengths, chunks and batches compile at most two forms of each kernel: with and without masks."""
    forms: dict[str, set[str]] = {}
    for i in range(20):
        chunk = (64, 128, 100, 448, 17)[i % 5] * (1 + i // 5)
        kernels = compile_call("sm_90", 64, "bf16", {"q_chunk": chunk}, heads=4, n=chunk * (200 + i))
        for kernel in kernels:
            forms.setdefault(kernel.name, set()).add(kernel.compiled.hash)
    assert set(forms) >= set(NAMES)
    assert max(len(hashes) for hashes in forms.values()) <= 2, {name: len(hashes) for name, hashes in forms.items()}


def test_a_growing_cache_does_not_specialise() -> None:
    forms: dict[str, set[str]] = {}
    for i in range(20):
        q, k = (torch.empty(1, 8, n, 64, device="meta", dtype=torch.bfloat16) for n in (1, 3000 + 777 * i))
        with compile_only("sm_90") as kernels:
            chunked_attention(q, k, k, q_chunk=1, k_chunk=448, backend="triton")
        for kernel in kernels:
            forms.setdefault(kernel.name, set()).add(kernel.compiled.hash)
    assert set(forms) == {"attention_fwd_kernel", "attention_fwd_combine_kernel"}
    assert max(len(hashes) for hashes in forms.values()) <= 2, {name: len(hashes) for name, hashes in forms.items()}


def write_budget() -> None:
    """Write what the installed Triton gives; to be read before it is committed."""
    rows = {}
    for case in cases():
        for key, (kernel, used) in measure(case).items():
            rows[key] = [used.registers, used.shared]
            fits = used.spills == used.stack == 0 and used.shared <= SHARED_MEMORY[kernel.target]
            if kernel.target.startswith("sm_") and case[2] != "fp32":
                fits &= used.shared <= shared_memory(NAMES[kernel.name], case[1], 2, config_of(kernel))
            sys.stdout.write(
                f"{key}: {used.registers} registers, {used.shared} bytes{'' if fits else '  DOES NOT FIT'}\n"
            )
            sys.stdout.flush()
    budgets = json.loads(BUDGET_FILE.read_text()) | {VERSION: rows}
    versions = []
    for version, found in sorted(budgets.items()):
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        versions.append(f'  "{version}": {{\n{lines}\n  }}')
    BUDGET_FILE.write_text("{\n" + ",\n".join(versions) + "\n}\n")


if __name__ == "__main__":
    write_budget()
