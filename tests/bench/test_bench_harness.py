"""Correctness before timing, interleaved rounds, exact peak memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.harness import Comparison, Unavailable, Variant, Verdict, against, compare, peak_memory, quantile, three_modes
from core.rows import Settings

CPU = torch.device("cpu")
QUICK = Settings(device=CPU, effort="quick")


def comparison(variants: list[Variant], judge=None, **more) -> Comparison:
    x = torch.randn(64, 64, dtype=torch.float64)
    judge = judge or against([x @ x], [(x.float() @ x.float())])
    for variant in variants:
        if variant.make is None:
            variant.make = lambda: lambda: x.float() @ x.float()
    return Comparison("s", "c", variants, judge=judge, baseline="plain", **more)


def test_a_wrong_kernel_is_refused_and_the_others_are_timed():
    def wrong():
        return lambda: torch.full((64, 64), 0.5)

    rows = {row.impl: row for row in compare(comparison([Variant("plain", None), Variant("wrong", wrong)]), QUICK)}
    assert rows["plain"].status == "ok"
    assert rows["plain"].median_ms > 0
    assert rows["plain"].speedup == 1.0
    bad = rows["wrong"]
    assert bad.status == "FAIL"
    assert "wrong result" in bad.reason
    assert (bad.median_ms, bad.speedup, bad.n) == (None, None, 0)


def test_a_slightly_wrong_kernel_is_refused_too():
    x = torch.randn(32, 32, dtype=torch.float64)
    judge = against([x], [x.float()])
    assert judge("", [x.float()]).problem == ""
    assert "exceeds" in judge("", [x.float() * (1 + 1e-3)]).problem


@pytest.mark.parametrize(
    ("outputs", "problem"),
    [
        ([torch.full((2, 2), float("nan"))], "not finite"),
        ([torch.zeros(2, 3)], "shape"),
        ([torch.zeros(2, 2), torch.zeros(1)], "2 outputs"),
    ],
)
def test_the_gate_names_the_problem(outputs, problem):
    exact = torch.zeros(2, 2, dtype=torch.float64)
    assert problem in against([exact], [exact.float()])("", outputs).problem


def test_a_result_that_is_zero_but_for_rounding_is_measured_by_the_others():
    exact = [torch.randn(8, dtype=torch.float64), 1e-17 * torch.randn(8, dtype=torch.float64)]
    judge = against(exact, [e.float() for e in exact])
    assert judge("", [exact[0].float(), torch.full((8,), 1e-7)]).problem == ""
    assert "exceeds" in judge("", [exact[0].float(), torch.full((8,), 1e-3)]).problem
    small = [exact[0], 1e-3 * exact[0]]
    assert (
        "exceeds" in against(small, [e.float() for e in small])("", [small[0].float(), 1.01 * small[1].float()]).problem
    )


def test_low_precision_may_err_twice_as_much_as_plain_pytorch():
    exact = torch.randn(64, 64, dtype=torch.float64)
    plain = exact.bfloat16()
    judge = against([exact], [plain])
    assert judge("", [plain]).problem == ""
    off = (exact + 10 * (plain.double() - exact).abs().max()).bfloat16()
    assert "exceeds" in judge("", [off]).problem


def test_failures_cost_only_their_own_row():
    def broken():
        raise RuntimeError("no kernel\nfor this")

    def missing():
        raise Unavailable("not installed")

    calls = []

    def breaks_later():
        def call():
            calls.append(1)
            if len(calls) > 2:
                raise ValueError("third time")
            return torch.zeros(1)

        return call

    variants = [
        Variant("plain", None),
        Variant("broken", broken),
        Variant("missing", missing),
        Variant("later", breaks_later, judged=False),
    ]
    rows = {row.impl: row for row in compare(comparison(variants), QUICK)}
    assert rows["plain"].status == "ok"
    assert rows["broken"].status == "FAIL"
    assert rows["broken"].reason.startswith("RuntimeError: no kernel (")
    assert (rows["missing"].status, rows["missing"].reason) == ("SKIP", "not installed")
    assert rows["later"].status == "FAIL"
    assert rows["later"].median_ms is None


def test_rounds_take_turns():
    order = []

    def variant(name):
        return Variant(name, lambda: lambda: (order.append(name), torch.full((1 << 20,), 1.0))[1])

    case = comparison([variant("plain"), variant("b"), variant("c")], judge=lambda *_: Verdict(), rounds=(3, 3, 0.0))
    rows = compare(case, QUICK)
    assert [row.n for row in rows] == [3, 3, 3]
    turns = [name for i, name in enumerate(order[6:]) if i == 0 or order[6:][i - 1] != name]
    assert turns == ["plain", "b", "c", "b", "c", "plain", "c", "plain", "b"]


def test_speedup_is_the_median_of_the_rounds_ratios(monkeypatch):
    times = {"plain": iter([4.0, 8.0, 100.0]), "ours": iter([1.0, 2.0, 50.0])}
    monkeypatch.setattr("core.harness.Clock.sample", lambda self, call, repeats: next(times[call.name]))

    def variant(name, role):
        def call():
            return torch.zeros(1)

        call.name = name
        return Variant(name, lambda: call, role=role)

    variants = [variant("plain", "peer"), variant("ours", "ours")]
    case = comparison(variants, judge=lambda *_: Verdict(), rounds=(3, 3, 0.0), flops=8_000_000, bytes=4_000_000)
    plain, ours = compare(case, QUICK)
    assert (ours.median_ms, ours.speedup, ours.against_best, ours.best_peer) == (2.0, 4.0, 4.0, "plain")
    assert (plain.median_ms, plain.speedup, plain.against_best) == (8.0, 1.0, None)
    assert ours.tflops == pytest.approx(0.004)
    assert ours.gbps == pytest.approx(2.0)


def test_peak_memory_on_the_cpu_is_exact():
    mib = 1 << 20

    def call():
        a = torch.empty(4 * mib, dtype=torch.uint8)
        b = torch.empty(2 * mib, dtype=torch.uint8)
        del a
        return torch.empty(mib, dtype=torch.uint8), b

    outputs, peak, seconds = peak_memory(call, CPU)
    assert peak == 6 * mib
    assert len(outputs) == 2
    assert seconds > 0


def test_modes_give_outputs_or_gradients():
    x = torch.randn(3, 3, requires_grad=True)
    grad = torch.randn(3, 3)
    forward, backward, both = (three_modes(lambda x: x * x, [x], grad, mode) for mode in ("fwd", "bwd", "fwd+bwd"))
    assert not forward().requires_grad
    torch.testing.assert_close(backward()[0], 2 * x * grad)
    torch.testing.assert_close(backward()[0], both()[0])


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_quantile_is_numpys(q):
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)))


def test_data_is_seeded_and_not_zero():
    a, b = (QUICK.randn(16, dtype=torch.float32, seed=1) for _ in range(2))
    assert torch.equal(a, b)
    assert (a != 0).all()
