"""Compiled attention: every configuration, all rules, odd shapes, through the real host code."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from emulator.proof import DTYPES, TARGETS, prove
from mirasol.kernels import chunked_attention
from mirasol.kernels.attention.triton.config import specialized_warps


class Case(NamedTuple):
    n_q: int
    n_k: int
    layout: dict[str, Any]
    heads: tuple[int, int] = (2, 2)  # of queries and keys
    batch: int = 1
    heads_inside: bool = False  # [B, N, H, D] in memory
    lse: bool = False  # its gradient too
    multiprocessors: int = 8


def edges(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


ALIGNED, MASKED = "aligned", "window_sinks_causal"
CASES = {
    ALIGNED: Case(256, 256, {"q_chunk": 128}),
    MASKED: Case(330, 330, {"q_chunk": 50, "window": 2, "sinks": 1, "causal": True}),
    "aligned_grouped": Case(256, 256, {"q_chunk": 128}, heads=(4, 2), batch=2, heads_inside=True),
    "aligned_window": Case(512, 512, {"q_chunk": 128, "window": 2, "sinks": 1}),
    "odd": Case(300, 300, {"q_chunk": 70}, lse=True),
    "window_sinks": Case(330, 330, {"q_chunk": 48, "window": 2, "sinks": 1}),
    "last_rows": Case(130, 390, {"q_chunk": 32, "k_chunk": 96}, heads=(4, 2)),
    "causal": Case(257, 257, {"q_chunk": 1}, heads=(4, 1)),
    "uneven": Case(200, 200, {"q_chunk": edges(0, 33, 100, 164, 200), "window": 2, "sinks": 1}),
    "packed": Case(300, 300, {"q_chunk": 40, "cu_seqlens_q": edges(0, 17, 150, 300), "causal": True}, heads=(4, 2)),
    "decode": Case(3, 1100, {"q_chunk": 1, "k_chunk": 100}, heads=(4, 2), heads_inside=True, multiprocessors=132),
    "group_of_three": Case(190, 190, {"q_chunk": 64}, heads=(6, 2)),
    "blind_rows": Case(90, 200, {"q_chunk": 30, "k_chunk": 100}),
}


def check(target: str, width: int, dtype: str, case: Case) -> list[dict[str, Any]]:
    """The case proven; what the kernels that walk over blocks were launched with."""
    torch.manual_seed(0)

    def tensor(heads: int, n: int) -> torch.Tensor:
        shape = (case.batch, n, heads, width) if case.heads_inside else (case.batch, heads, n, width)
        made = torch.randn(shape, dtype=torch.float64)
        return (made.transpose(1, 2) if case.heads_inside else made).requires_grad_()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> Any:
        return chunked_attention(q, k, v, **case.layout, return_lse=case.lse, backend=backend)

    tensors = [tensor(case.heads[0], case.n_q), *(tensor(case.heads[1], case.n_k) for _ in range(2))]
    launches = prove(target, attend, tensors, DTYPES[dtype], multiprocessors=case.multiprocessors)
    return [launch.options for launch in launches if "MASKS" in launch.options]


@pytest.mark.parametrize("name", [ALIGNED, MASKED])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration(target: str, dtype: str, width: int, name: str) -> None:
    masks = {options["MASKS"] for options in check(target, width, dtype, CASES[name])}
    assert masks == {"none"} if name == ALIGNED else "none" not in masks


@pytest.mark.parametrize("name", [name for name in CASES if name not in (ALIGNED, MASKED)])
@pytest.mark.parametrize("target", TARGETS)
def test_every_rule(target: str, name: str) -> None:
    check(target, 64, "bf16", CASES[name])


@pytest.mark.parametrize("name", ["aligned", "aligned_window"])
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("width", [64, 128])
def test_specialized_warps(width: int, dtype: str, name: str) -> None:
    with specialized_warps():
        launched = check("sm_90", width, dtype, CASES[name])
    assert [options["SPECIALIZE"] for options in launched] == [True, True, True], "forward, dk and dv, dq"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_rule_in_every_configuration(target: str, dtype: str, width: int, name: str) -> None:
    check(target, width, dtype, CASES[name])


@pytest.mark.parametrize("name", [ALIGNED, MASKED])
@pytest.mark.parametrize("width", [64, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", TARGETS)
def test_float32(target: str, width: int, name: str) -> None:
    check(target, width, "fp32", CASES[name])
