"""The time model: what doubles with what, which bound is named, and that published kernels come out as published."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.predict import H100, H200, LAUNCH, Work, imbalance, predict, residency

TILES = 64  # of keys that a program walks over
PROGRAMS = 132 * 16


def attention(width: int, *, wgmma: bool = True, specialized: bool = False, others: float = 4.5) -> Work:
    """A forward pass in tiles of 128 x 128 scores: an exponential and so many other instructions a score."""
    scores = PROGRAMS * TILES * 128 * 128
    counters = {
        "matrix_flops": 4 * scores * width,
        "wgmma_instructions": 1 if wgmma else 0,
        "bulk_bytes": PROGRAMS * TILES * 2 * 128 * width * 2,
        "distinct_read_bytes": PROGRAMS * 3 * 128 * width * 2,
        "distinct_written_bytes": PROGRAMS * 128 * width * 2,
    }
    executed = {"ex2.approx.ftz.f32": scores / 32, "fma.rn.f32": others * scores / 32}
    return Work("attention", PROGRAMS, 256, 160_000, counters, executed, 200, specialized)


def tflops(work: Work) -> float:
    return work.counters["matrix_flops"] / predict(work, H100).seconds / 1e12


@pytest.mark.parametrize(
    ("work", "published"),
    [
        (attention(128, wgmma=False), (350, 370)),  # FlashAttention-2 (FlashAttention-3's paper, figure 5, from 2k)
        (attention(128, others=6), (395, 477)),  # Triton's tutorial: the same figure, and pytorch/benchmark#2391
        (attention(128, specialized=True), (540, 756)),  # between ours and FlashAttention-4 on an H200
        (attention(64, specialized=True), (400, 500)),  # FlashAttention-3 reaches 497
    ],
)
def test_published_kernels_come_out_as_published(work, published):
    low, high = published
    assert 0.95 * low <= tflops(work) <= 1.05 * high


def test_nothing_beats_the_best_published_kernel():
    free = replace(attention(128, specialized=True, others=0), executed={})
    assert tflops(free) < 760  # FlashAttention-4's best on this chip: 756


def changed(work: Work, **factors: float) -> Work:
    return replace(work, counters=dict(work.counters) | {k: f * work.counters[k] for k, f in factors.items()})


def test_double_the_operations_double_the_products():
    work = attention(128)
    once, twice = (predict(w, H100) for w in (work, changed(work, matrix_flops=2)))
    assert twice.parts["products"] == pytest.approx(2 * once.parts["products"])
    assert twice.parts["exp2"] == once.parts["exp2"]
    assert twice.seconds > once.seconds


def copying(programs: int = 132 * 64, size: float = 1e9, **counters: float) -> Work:
    moved = {
        "distinct_read_bytes": size / 2,
        "distinct_written_bytes": size / 2,
        "load_sectors": size / 64,
        "load_requests": size / 1024,
    }
    return Work("copy", programs, 256, 0, moved | counters, {"add.f32": 1000}, 32)


def test_a_copy_is_bound_by_memory_and_gains_by_faster_memory():
    slow, fast = predict(copying(), H100), predict(copying(), H200)
    assert slow.bound == fast.bound == "DRAM"
    assert slow.seconds - LAUNCH == pytest.approx(1e9 / H100.copy)
    assert (slow.seconds - LAUNCH) / (fast.seconds - LAUNCH) == pytest.approx(H200.copy / H100.copy)


@pytest.mark.parametrize(
    ("work", "bound"),
    [
        (copying(size=1e4), "launch"),
        (copying(programs=4), "latency"),  # four multiprocessors cannot ask for enough
        (copying(load_sectors=1e9), "L2"),
        (copying(shared_load_wavefronts=1e9), "shared"),
        (attention(128), "products, then the rest"),
        (replace(changed(attention(128), bulk_bytes=0), executed={}), "products"),
        (replace(attention(128), executed={"ex2.approx.ftz.f32": 1e9}), "exp2"),
    ],
)
def test_the_bound_is_named(work, bound):
    assert predict(work, H200).bound == bound


def test_copies_of_registers_cost_nothing_and_arithmetic_does():
    work = replace(attention(128), executed={})
    assert predict(replace(work, executed={"mov.b32": 1e12}), H100) == predict(work, H100)
    assert predict(replace(work, executed={"fma.rn.f32": 1e9}), H100).parts["float32"] == pytest.approx(
        1e9 * 32 / 128 / 132 / H100.clock
    )


def test_specialised_warps_hide_more():
    assert predict(attention(128, specialized=True), H100).seconds < predict(attention(128), H100).seconds


def test_programs_spread_over_multiprocessors():
    def work(programs: int, lengths: tuple[float, ...] = ()) -> Work:
        return Work("work", programs, 128, 0, {}, lengths=lengths)

    assert imbalance(work(132), H100) == 1
    assert imbalance(work(66), H100) == 2
    assert imbalance(work(133), H100) == pytest.approx(2 * 132 / 133)
    assert imbalance(work(264, (1.0,) * 264), H100) == 1
    assert imbalance(work(133, (2.0,) + (1.0,) * 132), H100) == pytest.approx(2 * 132 / 134)


@pytest.mark.parametrize(
    ("threads", "shared", "registers", "held"),
    [(256, 114_000, 155, 1), (256, 100_000, 64, 2), (128, 0, 32, 16), (256, 0, 128, 2), (1024, 0, 0, 2)],
)
def test_programs_of_a_multiprocessor(threads, shared, registers, held):
    assert residency(Work("work", 132 * 100, threads, shared, {}, registers=registers), H100) == held
