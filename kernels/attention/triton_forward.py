"""Forward kernels: attention of query tiles, split over the keys where queries are few, and the combine of parts."""

from __future__ import annotations

import triton
import triton.language as tl

from mirasol.kernels.attention.triton_common import (
    LENGTHS,
    LN2,
    dot,
    full_range,
    load_rows,
    row_ranges,
    share,
    store_rows,
    tile_order,
)


@triton.jit
def _attend(
    n, limit, low, high, q, acc, m, l, k_base, v_base, stride_kn, stride_vn, scale_log2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take keys [n, n + BN), cut at `limit`, into the weighted sum acc, the maximum m (base 2) and the sum l."""
    keys = tl.arange(0, BN)
    inside = n + keys < limit
    start = n.to(tl.int64)
    k = load_rows(k_base + start * stride_kn, keys * stride_kn, inside, WIDTH, PADDED, MASKED)  # [BN, PADDED]
    s = dot(q, tl.trans(k), tl.zeros([q.shape[0], BN], dtype=acc.dtype), PRECISION)  # [BM, BN]
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
    v = load_rows(v_base + start * stride_vn, keys * stride_vn, inside, WIDTH, PADDED, MASKED)
    acc = dot(p.to(v.dtype), v, acc, PRECISION)
    return acc, m_new, l


@triton.jit(do_not_specialize=LENGTHS)
def attention_fwd_kernel(
    q, k, v, out, lse, table,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    n_q, n_k, q_chunk, k_chunk, shift, window, sinks, batch, heads_k, scale_log2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    SPLITS: tl.constexpr, CAUSAL: tl.constexpr, TABLE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [SPLITS, B, H, Nq, D] and lse [SPLITS, B, H, Nq]: attention of BM packed rows to a share of their keys.

    ALIGNED promises that the rows of a tile see the same keys and that BN divides both ranges and lies inside them: one
    loop, no mask. Otherwise only the tiles that some row does not see completely are masked.
    """
    tiles = tl.cdiv(n_q * GROUP, BM)
    bh, tile = tile_order(tl.program_id(0), tiles, batch * heads_k, 8)
    split = tl.program_id(1)
    b = (bh // heads_k).to(tl.int64)
    hk = bh % heads_k
    rows = tile * BM + tl.arange(0, BM)
    i = rows // GROUP
    heads = hk * GROUP + rows % GROUP
    inside = i < n_q
    q_base = q + b * stride_qb + hk.to(tl.int64) * GROUP * stride_qh
    q_tile = load_rows(q_base, i.to(tl.int64) * stride_qn + (rows % GROUP) * stride_qh, inside, WIDTH, PADDED, True)
    k_base = k + b * stride_kb + hk.to(tl.int64) * stride_kh
    v_base = v + b * stride_vb + hk.to(tl.int64) * stride_vh
    s0, s1, k0, k1 = row_ranges(i, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, TABLE)
    sinks_low, sinks_high = tl.min(s0, 0), tl.max(s1, 0)
    low, high = tl.min(k0, 0), tl.max(k1, 0)

    acc = tl.zeros([BM, PADDED], dtype=ACC)
    m = tl.full([BM], float("-inf"), dtype=ACC)
    l = tl.zeros([BM], dtype=ACC)
    if ALIGNED:
        in_sinks = (sinks_high - sinks_low) // BN
        first, last = share(in_sinks + (high - low) // BN, split, SPLITS)
        for t in tl.range(first, last, num_stages=STAGES):
            n = tl.where(t < in_sinks, sinks_low + t * BN, low + (t - in_sinks) * BN)
            acc, m, l = _attend(
                n, high, k0, k1, q_tile, acc, m, l, k_base, v_base, stride_kn, stride_vn, scale_log2,
                WIDTH, PADDED, BN, False, PRECISION,
            )  # fmt: skip
    else:
        begin, full = full_range(k0, k1, low, high, BN)
        first, last = share(full, split, SPLITS)
        for t in tl.range(first, last, num_stages=STAGES):
            acc, m, l = _attend(
                begin + t * BN, high, k0, k1, q_tile, acc, m, l, k_base, v_base, stride_kn, stride_vn, scale_log2,
                WIDTH, PADDED, BN, False, PRECISION,
            )  # fmt: skip
        end = begin + full * BN
        in_sinks = tl.cdiv(sinks_high - sinks_low, BN)
        left = in_sinks + tl.cdiv(begin - low, BN)
        first, last = share(left + tl.cdiv(high - end, BN), split, SPLITS)
        for t in tl.range(first, last, num_stages=1):
            of_sinks = t < in_sinks
            n = tl.where(t < left, low + (t - in_sinks) * BN, end + (t - left) * BN)
            limit = tl.where(t < left, begin, high)
            n = tl.where(of_sinks, sinks_low + t * BN, n)
            limit = tl.where(of_sinks, sinks_high, limit)
            from_, below = tl.where(of_sinks, s0, k0), tl.where(of_sinks, s1, k1)
            acc, m, l = _attend(
                n, limit, from_, below, q_tile, acc, m, l, k_base, v_base, stride_kn, stride_vn, scale_log2,
                WIDTH, PADDED, BN, True, PRECISION,
            )  # fmt: skip

    some = l > 0
    acc = acc / tl.where(some, l, 1.0)[:, None]
    result = tl.where(some, (m + tl.math.log2(tl.where(some, l, 1.0))) * LN2, float("-inf"))
    at = ((split * batch + b) * heads_k * GROUP + heads) * n_q + i
    tl.store(lse + at, result, mask=inside)
    store_rows(out, at * WIDTH, inside, acc, WIDTH, PADDED)


@triton.jit(do_not_specialize=["rows"])
def attention_combine_kernel(
    parts, part_lse, out, lse, rows, WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr
):
    """Merge parts [SPLITS, rows, D] by their lse [SPLITS, rows] into out [rows, D] and lse [rows]."""
    at = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside = at < rows
    total = rows.to(tl.int64)
    top = tl.full([BM], float("-inf"), dtype=part_lse.dtype.element_ty)
    for split in tl.range(SPLITS):
        top = tl.maximum(top, tl.load(part_lse + split * total + at, mask=inside, other=float("-inf")))
    top = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.zeros([BM, PADDED], dtype=parts.dtype.element_ty)
    weights = tl.zeros([BM], dtype=part_lse.dtype.element_ty)
    for split in tl.range(SPLITS):
        part = tl.load(part_lse + split * total + at, mask=inside, other=float("-inf"))
        weight = tl.exp(part - top)
        values = load_rows(parts, (split * total + at) * WIDTH, inside, WIDTH, PADDED, True)
        acc += values * weight[:, None]
        weights += weight
    some = weights > 0
    weights = tl.where(some, weights, 1.0)
    store_rows(out, at * WIDTH, inside, acc / weights[:, None], WIDTH, PADDED)
    tl.store(lse + at, tl.where(some, top + tl.log(weights), float("-inf")), mask=inside)
