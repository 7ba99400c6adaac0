"""What a tile sees, told by its first and last token, against what each of its tokens sees."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from mirasol.kernels.attention.triton_common import column_ranges, row_ranges, tile_of_columns, tile_of_rows
from mirasol.kernels.core.device import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="a property of the arithmetic, shown in the interpreter")


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


@settings(max_examples=300)
@given(st.data(), st.booleans())
def test_two_tokens_tell_what_a_tile_sees(data: st.DataObject, causal: bool) -> None:
    n_q, n_k = (data.draw(st.integers(1, 80)) for _ in range(2))
    q_chunk, k_chunk = (data.draw(st.integers(1, n)) for n in (n_q, n_k))
    chunks_q, chunks_k = -(-n_q // q_chunk), -(-n_k // k_chunk)
    window, sinks = data.draw(st.integers(1, chunks_k)), data.draw(st.integers(0, chunks_k))
    block = data.draw(st.sampled_from([4, 16, 32]))
    row, column = (data.draw(st.integers(0, (n - 1) // block)) * block for n in (n_q, n_k))
    found = torch.full((20,), -1, dtype=torch.int32)
    shift = chunks_k - chunks_q
    _tiles_kernel[(1,)](
        found, found, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, row, column, BLOCK=block, CAUSAL=causal
    )
    assert found[:10].tolist() == found[10:].tolist()
