"""What compiled kernels move and execute: counted, not timed, so it holds on every machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from emulator.counted import counted
from emulator.device import Launches, emulated
from emulator.machine import Counters
from emulator.proof import TARGETS
from mirasol.kernels import chunked_attention, combiner_project, ttm_read, ttm_scan, ttm_write
from ttm.ttm_helpers import token_learner_params

CONFLICTS = 1.3  # wavefronts of shared memory, as a multiple of those without bank conflicts
NEGLIGIBLE = 1000  # wavefronts of a launch: sums of a bias over a few hundred tiles, by a handful of programs
ACCESSES = ("shared_load", "shared_store", "ldmatrix")
D, S, R, N = 768, 96, 32, 390


def values(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)


def attend(width: int, chunk: int) -> Tensor:
    q, k, v = (values(1, 2, 3 * chunk, width) for _ in range(3))
    return chunked_attention(q, k, v, q_chunk=chunk, backend="triton")


def project() -> Tensor:
    parameters = (values(D, D), *(values(D) for _ in range(3)))
    return combiner_project(values(1, 4, 40, D), 32, *parameters, backend="triton")


def read() -> Tensor:
    params = token_learner_params(D, R, dtype=torch.bfloat16)
    return ttm_read(values(1, S, D), values(1, N, D), params, backend="triton")


def write() -> Tensor:
    params = token_learner_params(D, S, dtype=torch.bfloat16)
    return ttm_write(values(1, S, D), values(1, R, D), values(1, N, D), params, backend="triton")


CASES: dict[str, Callable[[], Tensor]] = {
    "combiner_project": project,
    "ttm_read": read,
    "ttm_write": write,
    "attention of 64, aligned": lambda: attend(64, 256),
    "attention of 64, masked": lambda: attend(64, 170),
    "attention of 128, aligned": lambda: attend(128, 256),
    "attention of 128, masked": lambda: attend(128, 170),
}


@cache
def count(target: str, name: str) -> Launches:
    """Launches of forward and backward."""
    multiprocessors = 1 if "attention" in name else 132  # so few queries would else be split over their keys
    with emulated(target, multiprocessors=multiprocessors, count=True, check=False) as launches:
        out = CASES[name]()
        out.backward(torch.ones_like(out))
    assert any("_bwd_" in launch.name for launch in launches)
    return launches


def conflicts(counters: Counters) -> dict[str, float]:
    """By the kind of access: how many times the wavefronts without bank conflicts."""
    found = {}
    for name in ACCESSES:
        ideal = getattr(counters, f"{name}_ideal")
        found[name] = getattr(counters, f"{name}_wavefronts") / ideal if ideal > NEGLIGIBLE else 1.0
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_has_few_bank_conflicts(target: str, name: str) -> None:
    found = {launch.name: conflicts(launch.counters) for launch in count(target, name)}
    assert all(times <= CONFLICTS for kinds in found.values() for times in kinds.values()), found


@pytest.mark.parametrize("name", [name for name in CASES if "attention" in name])
@pytest.mark.parametrize("target", TARGETS)
def test_attention_loads_and_stores_whole_sectors(target: str, name: str) -> None:
    for launch in count(target, name):
        n = launch.counters
        assert n.store_sectors * 32 <= 1.01 * n.store_bytes, launch.name
        assert n.load_sectors * 32 <= 1.01 * n.load_bytes, launch.name
        if n.copy_bytes > n.distinct_read_bytes:  # else they are the rows' sums, a few words a tile
            assert n.copy_sectors * 32 <= 1.1 * n.copy_bytes, launch.name


@pytest.mark.parametrize("target", TARGETS)
def test_a_read_takes_its_tokens_from_memory_once(target: str) -> None:
    tokens = (S + N) * D * 2
    with torch.no_grad(), emulated(target, multiprocessors=132, count=True, check=False) as launches:
        read()
    (forward,) = (launch.counters for launch in launches if launch.name == "pool_fwd_kernel")
    assert forward.distinct_written_bytes < 0.1e6
    # Parameters are 0.1 MB; what the second pass reads of the first is 0.04 MB and never leaves the cache.
    assert forward.distinct_read_bytes < 1.2 * tokens


def test_launches_of_a_chunk() -> None:
    learners = [token_learner_params(D, k, dtype=torch.bfloat16) for k in (R, S)]
    with torch.no_grad(), emulated("sm_90", multiprocessors=132) as launches:
        chunks = values(1, 3, 40, D)
        ttm_scan(values(1, S, D), chunks, learners[0], torch.tanh, learners[1], backend="triton")
    names = [launch.name for launch in launches]
    assert names.count("pool_fwd_kernel") == 2 * chunks.shape[1], names


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_what_a_path_executes_and_moves(target: str, name: str, figures) -> None:
    figures(f"emulated {target}: {name}", counted(count(target, name)))
