"""The integer arithmetic of visibility against the dense mask, token by token."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, edges, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from mirasol.kernels import visible_pairs
from mirasol.kernels.attention.layout import Layout, make_layout, runs
from mirasol.kernels.attention.plan import additive_mask, plan
from mirasol.kernels.attention.reference import visible_mask
from mirasol.kernels.attention.tables import visibility_tables


def layout_of(case: Case) -> Layout:
    names = ("q_chunk", "k_chunk", "window", "sinks", "causal", "cu_seqlens_q", "cu_seqlens_k")
    defaults: dict[str, Any] = {"sinks": 0, "causal": False}
    return make_layout(case.n_q, case.n_k, *(case.layout.get(name, defaults.get(name)) for name in names))


def mask_of_runs(case: Case) -> torch.Tensor:
    mask = torch.zeros(case.n_q, case.n_k, dtype=torch.int64)
    for run in runs(layout_of(case)):
        for i in range(run.q0, run.q1):
            mask[i, run.s0 : run.s1] += 1
            mask[i, run.k0 : run.k1 - (run.q1 - 1 - i if run.causal else 0)] += 1
    return mask


def mask_of_plan(case: Case, most_rows: int | None) -> torch.Tensor:
    mask = torch.zeros(case.n_q, case.n_k, dtype=torch.int64)
    for block in plan(layout_of(case), most_rows):
        rows = block.q1 - block.q0
        assert most_rows is None or rows <= max(most_rows, 256)
        for call in block.calls:
            seen = torch.ones(rows, call.k1 - call.k0, dtype=torch.int64)
            if call.causal:
                assert rows == call.k1 - call.k0
                seen = seen.tril()
            if call.rows:
                seen = (additive_mask(call.rows, call.k1 - call.k0, torch.float32, torch.device("cpu")) == 0).long()
            mask[block.q0 : block.q1, call.k0 : call.k1] += seen
    return mask


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_runs_and_plan_equal_the_dense_mask(case: Case) -> None:
    dense = visible_mask(case.n_q, case.n_k, **case.layout).long()
    assert torch.equal(mask_of_runs(case), dense)
    assert torch.equal(mask_of_plan(case, None), dense)
    assert torch.equal(mask_of_plan(case, 6), dense)
    assert visible_pairs(case.n_q, case.n_k, **case.layout) == dense.sum()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([None, 5, 16]))
def test_random_layouts_equal_the_dense_mask(seed: int, most_rows: int | None) -> None:
    case = random_case(random.Random(seed))
    dense = visible_mask(case.n_q, case.n_k, **case.layout).long()
    assert torch.equal(mask_of_runs(case), dense)
    assert torch.equal(mask_of_plan(case, most_rows), dense)
    assert visible_pairs(case.n_q, case.n_k, **case.layout) == dense.sum()


@settings(max_examples=30, deadline=None)
@given(st.integers(300, 1500), st.integers(1, 200), st.sampled_from([None, 1, 3, 40]), st.integers(0, 2), st.booleans())
def test_large_layouts_equal_the_dense_mask(n: int, chunk: int, window: int | None, sinks: int, causal: bool) -> None:
    case = Case("large", n, n, {"q_chunk": chunk, "window": window, "sinks": sinks, "causal": causal})
    dense = visible_mask(n, n, **case.layout).long()
    assert torch.equal(mask_of_plan(case, None), dense)
    assert visible_pairs(n, n, **case.layout) == dense.sum()


def test_chunks_are_aligned_at_the_end() -> None:
    mask = visible_mask(3, 10, q_chunk=2, k_chunk=4)  # query chunks {0, 1} {2}; key chunks {0..3} {4..7} {8, 9}
    assert mask[0].tolist() == mask[1].tolist() == [True] * 8 + [False] * 2
    assert mask[2].all()


def test_causal_is_aligned_at_the_end_of_the_chunk() -> None:
    mask = visible_mask(2, 5, q_chunk=2, k_chunk=5, causal=True)
    assert mask.tolist() == [[True] * 4 + [False], [True] * 5]


@pytest.mark.parametrize("chunk", [1, 3, 8, 30])
def test_equal_chunks_and_causal_never_see_the_future(chunk: int) -> None:
    mask = visible_mask(30, 30, q_chunk=chunk, causal=True)
    assert torch.equal(mask, torch.ones_like(mask).tril())


def test_token_causal_is_one_run_and_one_call() -> None:
    layout = layout_of(Case("causal", 5000, 5000, {"q_chunk": 1}))
    assert len(runs(layout)) == 1
    assert [len(block.calls) for block in plan(layout)] == [1]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"q_chunk": edges(0, 3, 9)}, "q_chunk must run from 0 to 10"),
        ({"q_chunk": edges(0, 7, 5, 10)}, "q_chunk must never fall"),
        ({"q_chunk": 2, "cu_seqlens_q": edges(0, 4, 11)}, "cu_seqlens_q must run from 0 to 10"),
        ({"q_chunk": edges(0, 6, 10), "cu_seqlens_q": edges(0, 4, 10)}, "edge at every sequence border"),
        ({"q_chunk": edges(0, 4, 4, 10), "cu_seqlens_q": edges(0, 4, 10)}, "no empty chunk"),
        ({"q_chunk": 2, "cu_seqlens_q": edges(0, 10), "cu_seqlens_k": edges(0, 5, 10)}, "hold 2 edges"),
    ],
)
def test_edges_that_do_not_fit_are_refused(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visible_pairs(10, 10, **layout)


def tables_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    def split(name: str) -> tuple[int, torch.Tensor | None]:
        given = case.layout.get(name)
        chunk = case.layout["q_chunk"] if given is None else given
        return (0, chunk) if isinstance(chunk, torch.Tensor) else (chunk, None)

    (q_chunk, q_edges), (k_chunk, k_edges) = split("q_chunk"), split("k_chunk")
    cu_q = case.layout.get("cu_seqlens_q")
    cu_k = case.layout.get("cu_seqlens_k", cu_q)
    rule = case.layout.get("window"), case.layout.get("sinks", 0), case.layout.get("causal", False)
    sizes = (case.n_q, case.n_k, q_chunk, k_chunk)
    return visibility_tables(*sizes, q_edges, k_edges, cu_q, cu_k, *rule, torch.device("cpu"))


def check_tables(case: Case) -> None:
    dense = visible_mask(case.n_q, case.n_k, **case.layout)
    rows, columns = tables_of(case)
    keys, queries = torch.arange(case.n_k), torch.arange(case.n_q)[:, None]
    (s0, s1, k0, k1), (q0, q1) = rows[:, :, None], columns[:, None]
    sinks, rest = (keys >= s0) & (keys < s1), (keys >= k0) & (keys < k1)
    assert not (sinks & rest).any()
    assert torch.equal(sinks | rest, dense)
    assert torch.equal((queries >= q0) & (queries < q1), dense)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tables_equal_the_dense_mask(case: Case) -> None:
    check_tables(case)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_tables_of_random_layouts_equal_the_dense_mask(seed: int) -> None:
    check_tables(random_case(random.Random(seed)))
