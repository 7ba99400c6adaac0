"""Forward kernels: attention of query tiles, split over the keys where queries are few, and the combine of parts."""

from __future__ import annotations

import triton
import triton.language as tl

from mirasol.kernels.attention.triton.blocks import (
    LENGTHS,
    full_range,
    halved_row,
    head,
    load_keys,
    load_packed,
    load_rows,
    packed_offsets,
    share,
    store_rows,
    tile_order,
)
from mirasol.kernels.attention.triton.ranges import row_ranges, tile_of_rows
from mirasol.kernels.core.blocks import LN2, dot


@triton.jit
def _attend(
    n, limit, low, high, q, acc, m, l, k, v, b, hk, stride_kn, stride_vn, scale_log2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take keys [n, n + BN), cut at `limit`, into the weighted sum acc, the maximum m (base 2) and the sum l."""
    keys = tl.arange(0, BN)
    inside = n + keys < limit
    k_tile = load_keys(k, b, hk, n, stride_kn, inside, WIDTH, PADDED, BN, MASKED, TMA)
    s = dot(q, tl.trans(k_tile), tl.zeros([q.shape[0], BN], dtype=acc.dtype), PRECISION)  # [BM, BN]
    if MASKED:
        seen = inside[None, :] & ((n + keys)[None, :] >= low[:, None]) & ((n + keys)[None, :] < high[:, None])
        s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    top = m_new
    if MASKED:
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.math.exp2(s * scale_log2 - top[:, None])
    alpha = tl.math.exp2(m - top)
    l = l * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    v_tile = load_keys(v, b, hk, n, stride_vn, inside, WIDTH, PADDED, BN, MASKED, TMA)
    acc = dot(p.to(v_tile.dtype), v_tile, acc, PRECISION)
    return acc, m_new, l


@triton.jit(do_not_specialize=LENGTHS)
def attention_fwd_kernel(
    q, k, v, out, lse, table,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    n_q, n_k, q_chunk, k_chunk, shift, window, sinks, batch, heads_k, scale_log2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, TABLE: tl.constexpr, MASKS: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """out [splits, B, H, Nq, D] and lse [splits, B, H, Nq]: attention of BM packed rows to a share of their keys.

    MASKS "none" promises that the rows of a tile see the same keys and that BN divides both their ranges: one loop, no
    mask. "edges" masks only the tiles that some row does not see completely; "all" masks every tile in one loop, for
    heads so wide that two loops would not fit into the registers.

    SPECIALIZE ("none" only, heads not grouped): one group of warps loads, two more take half of the rows each.
    """
    tiles = tl.cdiv(n_q * GROUP, BM)
    bh, tile = tile_order(tl.program_id(0), tiles, batch * heads_k, 8)
    split = tl.program_id(1)
    b, hk = bh // heads_k, bh % heads_k
    rows = tile * BM + tl.arange(0, BM)
    i, g = rows // GROUP, rows % GROUP
    inside = i < n_q
    if not TMA:
        k, v = head(k, b, hk, stride_kb, stride_kh), head(v, b, hk, stride_vb, stride_vh)
    q = head(q, b, hk * GROUP, stride_qb, stride_qh)
    if SPECIALIZE:  # by a descriptor made here, whose tile alone the compiler halves
        r = halved_row(tile, BM)
        q_tile = tl.make_tensor_descriptor(q, [n_q, WIDTH], [stride_qn, 1], [BM, PADDED]).load([r, 0])
    else:  # by pointers, as a descriptor's tile would be held in registers
        q_tile = load_packed(q, b, hk, tile * BM, stride_qh, stride_qn, inside, WIDTH, PADDED, BM, GROUP, True, False)
    sinks_low, sinks_high, low, high, begin, end = tile_of_rows(
        tile * BM // GROUP, (tile * BM + BM - 1) // GROUP,
        table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, TABLE,
    )  # fmt: skip

    acc = tl.zeros([BM, PADDED], dtype=ACC)
    m = tl.full([BM], float("-inf"), dtype=ACC)
    l = tl.zeros([BM], dtype=ACC)
    if MASKS == "none":
        in_sinks = (sinks_high - sinks_low) // BN
        first, last = share(in_sinks + (high - low) // BN)
        for t in tl.range(first, last, num_stages=STAGES, warp_specialize=SPECIALIZE):
            n = tl.where(t < in_sinks, sinks_low + t * BN, low + (t - in_sinks) * BN)
            acc, m, l = _attend(
                n, high, low, high, q_tile, acc, m, l, k, v, b, hk, stride_kn, stride_vn,
                scale_log2, WIDTH, PADDED, BN, False, TMA, PRECISION,
            )  # fmt: skip
    else:
        begin, full = full_range(begin, end, high, BN, MASKS)
        first, last = share(full)
        for t in tl.range(first, last, num_stages=STAGES):
            acc, m, l = _attend(
                begin + t * BN, high, low, high, q_tile, acc, m, l, k, v, b, hk, stride_kn, stride_vn,
                scale_log2, WIDTH, PADDED, BN, False, TMA, PRECISION,
            )  # fmt: skip
        # Only now, so that these vectors take no registers from the loop above.
        s0, s1, k0, k1 = row_ranges(i, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, TABLE)
        end = begin + full * BN
        in_sinks = tl.cdiv(sinks_high - sinks_low, BN)
        left = in_sinks + tl.cdiv(begin - low, BN)
        first, last = share(left + tl.cdiv(high - end, BN))
        for t in tl.range(first, last, num_stages=STAGES if MASKS == "all" else 1):
            of_sinks = t < in_sinks
            n = tl.where(t < left, low + (t - in_sinks) * BN, end + (t - left) * BN)
            limit = tl.where(t < left, begin, high)
            n = tl.where(of_sinks, sinks_low + t * BN, n)
            limit = tl.where(of_sinks, sinks_high, limit)
            from_, below = tl.where(of_sinks, s0, k0), tl.where(of_sinks, s1, k1)
            acc, m, l = _attend(
                n, limit, from_, below, q_tile, acc, m, l, k, v, b, hk, stride_kn, stride_vn,
                scale_log2, WIDTH, PADDED, BN, True, TMA, PRECISION,
            )  # fmt: skip

    some = l > 0
    acc = acc / tl.where(some, l, 1.0)[:, None]
    result = tl.where(some, (m + tl.math.log2(tl.where(some, l, 1.0))) * LN2, float("-inf"))
    item = split * batch + b  # of the parts
    at = ((item * heads_k + hk).to(tl.int64) * GROUP + g) * n_q + i
    tl.store(lse + at, result, mask=inside)
    out = head(out, item, hk * GROUP, stride_ob, stride_oh)
    store_rows(out, packed_offsets(rows, stride_oh, stride_on, GROUP), inside, acc, WIDTH, PADDED)


@triton.jit(do_not_specialize=["rows", "splits", "heads", "n_q"])
def attention_fwd_combine_kernel(
    parts, part_lse, out, lse, stride_ob, stride_oh, stride_on, rows, splits, heads, n_q,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Merge parts [splits, B, H, Nq, D] by their lse [splits, B, H, Nq], BM of the B H Nq rows at a time."""
    at = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside = at < rows
    total = rows.to(tl.int64)
    top = tl.full([BM], float("-inf"), dtype=part_lse.dtype.element_ty)
    for split in tl.range(splits):
        top = tl.maximum(top, tl.load(part_lse + split * total + at, mask=inside, other=float("-inf")))
    top = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.zeros([BM, PADDED], dtype=parts.dtype.element_ty)
    weights = tl.zeros([BM], dtype=part_lse.dtype.element_ty)
    for split in tl.range(splits):
        part = tl.load(part_lse + split * total + at, mask=inside, other=float("-inf"))
        weight = tl.exp(part - top)
        values = load_rows(parts, (split * total + at) * WIDTH, inside, WIDTH, PADDED, True)
        acc += values * weight[:, None]
        weights += weight
    some = weights > 0
    weights = tl.where(some, weights, 1.0)
    offsets = at // (heads * n_q) * stride_ob + at // n_q % heads * stride_oh + at % n_q * stride_on
    store_rows(out, offsets, inside, acc / weights[:, None], WIDTH, PADDED)
    tl.store(lse + at, tl.where(some, top + tl.log(weights), float("-inf")), mask=inside)
