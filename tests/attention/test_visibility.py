"""The rule of visibility, as numpy and as Triton run it, against the dense mask, token by token."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from attention_cases import CASES, Case, edges, random_case, rule_of
from hypothesis import given, settings
from hypothesis import strategies as st

from devices import DEVICE
from mirasol.kernels import visible_pairs
from mirasol.kernels.attention.reference import visible_mask
from mirasol.kernels.attention.triton import table
from mirasol.kernels.attention.triton.ranges import column_ranges, row_ranges, tile_of_columns, tile_of_rows
from mirasol.kernels.attention.triton.table import visibility_table
from mirasol.kernels.attention.visibility import ranges


def check_ranges(case: Case) -> None:
    dense = visible_mask(case.n_q, case.n_k, **case.layout)
    found = torch.zeros(case.n_q, case.n_k, dtype=torch.int64)
    for q0, q1, s0, s1, k0, own0, k1 in zip(*ranges(rule_of(case).read(case.n_q, case.n_k)), strict=True):
        for i in range(q0, q1):
            found[i, s0:s1] += 1
            found[i, k0 : max(k1 - (q1 - 1 - i), own0) if case.layout.get("causal") else k1] += 1
    assert torch.equal(found, dense.long())
    assert visible_pairs(case.n_q, case.n_k, **case.layout) == dense.sum()


def check_table(case: Case) -> None:
    dense = visible_mask(case.n_q, case.n_k, **case.layout)
    rows, columns = (
        visibility_table(side, case.n_q, case.n_k, rule_of(case), DEVICE).cpu() for side in ("rows", "columns")
    )
    keys, queries = torch.arange(case.n_k), torch.arange(case.n_q)[:, None]
    (s0, s1, k0, k1), (q0, q1) = rows[:, :, None], columns[:, None]
    sinks, rest = (keys >= s0) & (keys < s1), (keys >= k0) & (keys < k1)
    assert not (sinks & rest).any()
    assert torch.equal(sinks | rest, dense)
    assert torch.equal((queries >= q0) & (queries < q1), dense)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranges_and_tables_equal_the_dense_mask(case: Case) -> None:
    check_ranges(case)
    check_table(case)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_random_rules_equal_the_dense_mask(seed: int) -> None:
    case = random_case(random.Random(seed))
    check_ranges(case)
    check_table(case)


@settings(max_examples=30, deadline=None)
@given(st.integers(300, 1500), st.integers(1, 200), st.sampled_from([None, 1, 3, 40]), st.integers(0, 2), st.booleans())
def test_pairs_of_large_rules(n: int, chunk: int, window: int | None, sinks: int, causal: bool) -> None:
    rule = {"q_chunk": chunk, "window": window, "sinks": sinks if window else 0, "causal": causal}
    assert visible_pairs(n, n, **rule) == visible_mask(n, n, **rule).sum()


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


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"q_chunk": edges(0, 3, 9)}, "q_chunk must run from 0 to 10"),
        ({"q_chunk": [0, 3, 9]}, "q_chunk must run from 0 to 10"),
        ({"q_chunk": edges(0, 7, 5, 10)}, "q_chunk must never fall"),
        ({"q_chunk": 2, "cu_seqlens_q": edges(0, 4, 11)}, "cu_seqlens_q must run from 0 to 10"),
        ({"q_chunk": edges(0, 6, 10), "cu_seqlens_q": edges(0, 4, 10)}, "edge at every sequence border"),
        ({"q_chunk": edges(0, 4, 4, 10), "cu_seqlens_q": edges(0, 4, 10)}, "no empty chunk"),
        ({"q_chunk": 2, "cu_seqlens_q": edges(0, 10), "cu_seqlens_k": edges(0, 5, 10)}, "hold 2 edges"),
        ({"q_chunk": 0}, "q_chunk must be at least 1"),
        ({"q_chunk": 2, "sinks": 1}, "sinks must be 0 without a window"),
    ],
)
@pytest.mark.parametrize("backend", ["count", "torch", "triton", "reference"])
def test_rules_that_do_not_fit_are_refused_alike(rule: dict[str, Any], message: str, backend: str) -> None:
    from mirasol.kernels import chunked_attention

    x = torch.zeros(1, 1, 10, 4, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        visible_pairs(10, 10, **rule) if backend == "count" else chunked_attention(x, x, x, **rule, backend=backend)


@pytest.mark.parametrize("wrong", ["cu_seqlens_k", "k_chunk", "cu_seqlens_q", "q_chunk"])
def test_wrong_edges_on_a_device_lead_to_no_token_that_is_not_there(wrong: str) -> None:
    """Their values are not read, so the table itself must hold positions inside the tensors."""
    given_edges = {
        "q_chunk": edges(0, 4, 12),
        "k_chunk": edges(0, 4, 12),
        "cu_seqlens_q": edges(0, 12),
        "cu_seqlens_k": edges(0, 12),
    }
    given_edges[wrong] = edges(*[-5, 7, 1000][-len(given_edges[wrong]) :])
    case = Case("wrong", 12, 12, given_edges)
    for side in ("rows", "columns"):
        found = visibility_table(side, 12, 12, rule_of(case), DEVICE)
        assert int(found.min()) >= 0
        assert int(found.max()) <= 12


def test_a_table_is_kept_until_its_edges_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers of a step share it; one chunk moved, and it is made anew."""
    monkeypatch.setattr(table, "_may_keep", lambda edges, device: True)  # as on a GPU
    case = Case("uneven", 12, 12, {"q_chunk": edges(0, 4, 12)})
    rule = rule_of(case, DEVICE)
    first = visibility_table("rows", 12, 12, rule, DEVICE)
    assert visibility_table("rows", 12, 12, rule, DEVICE) is first
    assert rule.q_edges is not None
    rule.q_edges[1:2] = 6
    assert visibility_table("rows", 12, 12, rule, DEVICE)[3].tolist() == [6] * 6 + [12] * 6


@triton.jit
def _tiles_kernel(
    out, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, row, column,
    BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    tokens = tl.arange(0, BLOCK)
    s0, s1, low, high, begin, end = tile_of_rows(
        row, row + BLOCK - 1, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, False
    )
    tl.store(out + 0, s0)
    tl.store(out + 1, s1)
    tl.store(out + 2, low)
    tl.store(out + 3, high)
    tl.store(out + 4, begin)
    tl.store(out + 5, end)
    s0, s1, k0, k1 = row_ranges(row + tokens, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, False)
    tl.store(out + 10, tl.min(s0, 0))
    tl.store(out + 11, tl.max(s1, 0))
    tl.store(out + 12, tl.min(k0, 0))
    tl.store(out + 13, tl.max(k1, 0))
    tl.store(out + 14, tl.max(k0, 0))
    tl.store(out + 15, tl.min(k1, 0))
    low, high, begin, end = tile_of_columns(
        column, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, BLOCK, CAUSAL, False
    )
    tl.store(out + 6, low)
    tl.store(out + 7, high)
    tl.store(out + 8, begin)
    tl.store(out + 9, end)
    q0, q1 = column_ranges(column + tokens, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, False)
    tl.store(out + 16, tl.min(q0, 0))
    tl.store(out + 17, tl.max(q1, 0))
    tl.store(out + 18, tl.max(q0, 0))
    tl.store(out + 19, tl.min(q1, 0))


@settings(max_examples=80, deadline=None)
@given(st.data(), st.booleans())
def test_two_tokens_tell_what_a_tile_sees(data: st.DataObject, causal: bool) -> None:
    n_q, n_k = (data.draw(st.integers(1, 80)) for _ in range(2))
    q_chunk, k_chunk = (data.draw(st.integers(1, n)) for n in (n_q, n_k))
    chunks_q, chunks_k = -(-n_q // q_chunk), -(-n_k // k_chunk)
    window, sinks = data.draw(st.integers(1, chunks_k)), data.draw(st.integers(0, chunks_k))
    block = data.draw(st.sampled_from([4, 16, 32]))
    row, column = (data.draw(st.integers(0, (n - 1) // block)) * block for n in (n_q, n_k))
    found = torch.full((20,), -1, dtype=torch.int32, device=DEVICE)
    shift = chunks_k - chunks_q
    _tiles_kernel[(1,)](
        found, found, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, row, column, BLOCK=block, CAUSAL=causal
    )
    assert found[:10].tolist() == found[10:].tolist()
