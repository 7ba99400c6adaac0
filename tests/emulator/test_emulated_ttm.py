"""Compiled pooling kernels of the Token Turing Machine: reads, writes and scans, narrow and wide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from emulator.proof import DTYPES, TARGETS, prove
from mirasol.kernels import ttm_read, ttm_scan, ttm_write
from ttm.ttm_helpers import erase_add_params, random, summary_params

Made = tuple[Callable[..., Any], list[Any]]


def read(kind: str = "token_learner", *, B=2, s=24, n=70, d=128, k=16, positions=False, **kwargs: Any) -> Made:
    params = summary_params(kind, d, k, (s + n) * positions, **kwargs)
    return lambda m, x, p, backend: ttm_read(m, x, p, backend=backend), [random(B, s, d), random(B, n, d), params]


def write(kind: str = "token_learner", *, s=24, n=70, r=8, d=128, positions=False, **kwargs: Any) -> Made:
    params = summary_params(kind, d, s, (s + n + r) * positions, **kwargs)
    tensors = [random(2, length, d) for length in (s, r, n)]
    return lambda m, z, x, p, backend: ttm_write(m, z, x, p, backend=backend), [*tensors, params]


def scan(kind: str = "token_learner", *, form="parallel", positions=False, erase_add=False, **kwargs: Any) -> Made:
    s, n, r, d = 24, 50, 8, 128
    of_write = erase_add_params(d, r) if erase_add else summary_params(kind, d, s, (s + n + r) * positions, **kwargs)
    args = [random(2, s, d), random(2, 3, n, d), summary_params(kind, d, r, (s + n) * positions, **kwargs), of_write]

    def call(m: torch.Tensor, x: torch.Tensor, p: Any, w: Any, backend: str) -> Any:
        return ttm_scan(m, x, p, torch.tanh, w, form=form, backend=backend)

    return call, args


CASES: dict[str, Callable[[], Made]] = {
    "read": read,
    "read_positions": lambda: read(positions=True, n=61, d=192, k=5),
    "read_split": lambda: read(B=1, s=96, n=390, d=256, k=32),
    "write": write,
    "write_odd": lambda: write(s=130, n=33, r=5, d=100, positions=True),
    "write_large": lambda: write(s=512, n=40, r=16),
    "latent_query": lambda: read("latent_query", heads=4, k=8),
    "latent_query_positions": lambda: read("latent_query", heads=2, k=96, positions=True),
    "scan": scan,
    "scan_stepwise": lambda: scan(form="stepwise", positions=True),
    "scan_latent_query": lambda: scan("latent_query", heads=4),
    "scan_erase_add": lambda: scan(erase_add=True),
}
QUICK = ("read_positions", "read_split", "write_odd", "latent_query", "scan")


def check(target: str, dtype: str, name: str) -> None:
    torch.manual_seed(0)
    call, args = CASES[name]()
    prove(target, call, args, DTYPES[dtype], multiprocessors=132 if name == "read_split" else 8)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
def test_ttm(target: str, dtype: str, name: str) -> None:
    check(target, dtype, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_kind(target: str, dtype: str, name: str) -> None:
    check(target, dtype, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["read_positions", "write_odd"])
@pytest.mark.parametrize("target", TARGETS)
def test_float32(target: str, name: str) -> None:
    check(target, "fp32", name)
