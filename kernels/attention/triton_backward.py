"""Backward kernels: row sums, then dk and dv, then dq. No atomics: every sum has one owner and one order."""

from __future__ import annotations

import triton
import triton.language as tl

from mirasol.kernels.attention.triton_common import (
    LENGTHS,
    LOG2E,
    column_ranges,
    dot,
    full_range,
    load_rows,
    row_ranges,
    store_rows,
    tile_order,
)


@triton.jit(do_not_specialize=["heads", "n_q"])
def attention_bwd_delta_kernel(
    grad, out, grad_lse, lse, delta, stride_gb, stride_gh, stride_gn, heads, n_q,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, HAS_LSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """delta [B, H, Nq] = sum(grad * out) - grad_lse: what every score's gradient is lessened by."""
    bh = tl.program_id(1)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = i < n_q
    base = grad + (bh // heads).to(tl.int64) * stride_gb + (bh % heads).to(tl.int64) * stride_gh
    at = bh.to(tl.int64) * n_q + i
    d_out = load_rows(base, i.to(tl.int64) * stride_gn, inside, WIDTH, PADDED, True).to(ACC)
    total = tl.sum(d_out * load_rows(out, at * WIDTH, inside, WIDTH, PADDED, True).to(ACC), 1)
    if HAS_LSE:
        seeing = tl.load(lse + at, mask=inside, other=0.0) > float("-inf")  # rows that see nothing have no gradient
        total -= tl.load(grad_lse + at, mask=inside & seeing, other=0.0)
    tl.store(delta + at, total, mask=inside)


@triton.jit
def _gather(
    r, limit, low, high, k_tile, v_tile, dk, dv, q_base, g_base, lse_base, delta_base,
    stride_qh, stride_qn, stride_gh, stride_gn, n_q, scale_log2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the packed rows [r, r + BM), cut at `limit`, to dk and dv of a tile of keys seen by rows [low, high)."""
    rows = r + tl.arange(0, BM)
    inside = rows < limit
    first = r // GROUP
    i, g = rows // GROUP - first, rows % GROUP
    start = first.to(tl.int64)
    q = load_rows(q_base + start * stride_qn, i * stride_qn + g * stride_qh, inside, WIDTH, PADDED, MASKED)
    grad = load_rows(g_base + start * stride_gn, i * stride_gn + g * stride_gh, inside, WIDTH, PADDED, MASKED)
    at = g * n_q + first + i
    if MASKED:
        lse = tl.load(lse_base + at, mask=inside, other=0.0)
        delta = tl.load(delta_base + at, mask=inside, other=0.0)
    else:
        lse = tl.load(lse_base + at)
        delta = tl.load(delta_base + at)
    zeros = tl.zeros([k_tile.shape[0], BM], dtype=dk.dtype)
    s = dot(k_tile, tl.trans(q), zeros, PRECISION)  # [BN, BM]
    p = tl.math.exp2(s * scale_log2 - (lse * LOG2E)[None, :])
    if MASKED:
        seen = inside[None, :] & (rows[None, :] >= low[:, None]) & (rows[None, :] < high[:, None])
        p = tl.where(seen, p, 0.0)
    dv = dot(p.to(grad.dtype), grad, dv, PRECISION)
    dp = dot(v_tile, tl.trans(grad), zeros, PRECISION)
    ds = p * (dp - delta[None, :])
    dk = dot(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def attention_bwd_dkdv_kernel(
    q, k, v, grad, lse, delta, dk, dv, table,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn,
    n_q, n_k, q_chunk, k_chunk, shift, window, sinks, batch, heads_k, scale, scale_log2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, TABLE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, Hkv, Nk, D]: one program owns BN keys and walks over the packed rows that see them."""
    bh = tl.program_id(0) % (batch * heads_k)
    tile = tl.program_id(0) // (batch * heads_k)  # the first keys are seen by most rows
    b, hk = (bh // heads_k).to(tl.int64), (bh % heads_k).to(tl.int64)
    keys = tile * BN + tl.arange(0, BN)
    inside = keys < n_k
    start = (tile * BN).to(tl.int64)
    local = tl.arange(0, BN)
    k_tile = load_rows(
        k + b * stride_kb + hk * stride_kh + start * stride_kn, local * stride_kn, inside, WIDTH, PADDED, True
    )
    v_tile = load_rows(
        v + b * stride_vb + hk * stride_vh + start * stride_vn, local * stride_vn, inside, WIDTH, PADDED, True
    )
    q0, q1 = column_ranges(keys, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, TABLE)
    q0, q1 = q0 * GROUP, q1 * GROUP
    low, high = tl.min(q0, 0), tl.max(q1, 0)
    q_base = q + b * stride_qb + hk * GROUP * stride_qh
    g_base = grad + b * stride_gb + hk * GROUP * stride_gh
    lse_base = lse + (b * heads_k + hk) * GROUP * n_q
    delta_base = delta + (b * heads_k + hk) * GROUP * n_q

    dk_sum = tl.zeros([BN, PADDED], dtype=ACC)
    dv_sum = tl.zeros([BN, PADDED], dtype=ACC)
    begin, full = full_range(q0, q1, low, high, BM)
    for t in tl.range(0, full, num_stages=STAGES):
        dk_sum, dv_sum = _gather(
            begin + t * BM, high, q0, q1, k_tile, v_tile, dk_sum, dv_sum, q_base, g_base, lse_base, delta_base,
            stride_qh, stride_qn, stride_gh, stride_gn, n_q, scale_log2, WIDTH, PADDED, BM, GROUP, False, PRECISION,
        )  # fmt: skip
    if not ALIGNED:
        end = begin + full * BM
        left = tl.cdiv(begin - low, BM)
        for t in tl.range(0, left + tl.cdiv(high - end, BM), num_stages=1):
            r = tl.where(t < left, low + t * BM, end + (t - left) * BM)
            limit = tl.where(t < left, begin, high)
            dk_sum, dv_sum = _gather(
                r, limit, q0, q1, k_tile, v_tile, dk_sum, dv_sum, q_base, g_base, lse_base, delta_base,
                stride_qh, stride_qn, stride_gh, stride_gn, n_q, scale_log2, WIDTH, PADDED, BM, GROUP, True, PRECISION,
            )  # fmt: skip
    offset = ((b * heads_k + hk) * n_k + start) * WIDTH
    store_rows(dk + offset, local * WIDTH, inside, dk_sum * scale, WIDTH, PADDED)
    store_rows(dv + offset, local * WIDTH, inside, dv_sum, WIDTH, PADDED)


@triton.jit
def _scatter(
    n, limit, low, high, q, grad, lse, delta, dq, k_base, v_base, stride_kn, stride_vn, scale_log2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add keys [n, n + BN), cut at `limit`, to dq of a tile of rows that see keys [low, high)."""
    keys = tl.arange(0, BN)
    inside = n + keys < limit
    start = n.to(tl.int64)
    k = load_rows(k_base + start * stride_kn, keys * stride_kn, inside, WIDTH, PADDED, MASKED)
    v = load_rows(v_base + start * stride_vn, keys * stride_vn, inside, WIDTH, PADDED, MASKED)
    zeros = tl.zeros([q.shape[0], BN], dtype=dq.dtype)
    s = dot(q, tl.trans(k), zeros, PRECISION)
    p = tl.math.exp2(s * scale_log2 - lse[:, None])
    if MASKED:
        seen = inside[None, :] & ((n + keys)[None, :] >= low[:, None]) & ((n + keys)[None, :] < high[:, None])
        p = tl.where(seen, p, 0.0)
    dp = dot(grad, tl.trans(v), zeros, PRECISION)
    ds = p * (dp - delta[:, None])
    return dot(ds.to(k.dtype), k, dq, PRECISION)


@triton.jit(do_not_specialize=LENGTHS)
def attention_bwd_dq_kernel(
    q, k, v, grad, lse, delta, dq, table,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn,
    n_q, n_k, q_chunk, k_chunk, shift, window, sinks, batch, heads_k, scale, scale_log2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, TABLE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dq [B, H, Nq, D]: one program owns BM packed rows and walks over the keys that they see."""
    tiles = tl.cdiv(n_q * GROUP, BM)
    bh, tile = tile_order(tl.program_id(0), tiles, batch * heads_k, 8)
    b, hk = (bh // heads_k).to(tl.int64), (bh % heads_k).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    i, g = rows // GROUP, rows % GROUP
    inside = i < n_q
    at_q = i.to(tl.int64) * stride_qn + g * stride_qh
    at_g = i.to(tl.int64) * stride_gn + g * stride_gh
    q_tile = load_rows(q + b * stride_qb + hk * GROUP * stride_qh, at_q, inside, WIDTH, PADDED, True)
    g_tile = load_rows(grad + b * stride_gb + hk * GROUP * stride_gh, at_g, inside, WIDTH, PADDED, True)
    at = ((b * heads_k + hk) * GROUP + g) * n_q + i
    lse_rows = tl.load(lse + at, mask=inside, other=0.0) * LOG2E
    delta_rows = tl.load(delta + at, mask=inside, other=0.0)
    k_base = k + b * stride_kb + hk * stride_kh
    v_base = v + b * stride_vb + hk * stride_vh
    s0, s1, k0, k1 = row_ranges(i, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, TABLE)
    sinks_low, sinks_high = tl.min(s0, 0), tl.max(s1, 0)
    low, high = tl.min(k0, 0), tl.max(k1, 0)

    dq_sum = tl.zeros([BM, PADDED], dtype=ACC)
    if ALIGNED:
        in_sinks = (sinks_high - sinks_low) // BN
        for t in tl.range(0, in_sinks + (high - low) // BN, num_stages=STAGES):
            n = tl.where(t < in_sinks, sinks_low + t * BN, low + (t - in_sinks) * BN)
            dq_sum = _scatter(
                n, high, k0, k1, q_tile, g_tile, lse_rows, delta_rows, dq_sum, k_base, v_base, stride_kn, stride_vn,
                scale_log2, WIDTH, PADDED, BN, False, PRECISION,
            )  # fmt: skip
    else:
        begin, full = full_range(k0, k1, low, high, BN)
        for t in tl.range(0, full, num_stages=STAGES):
            dq_sum = _scatter(
                begin + t * BN, high, k0, k1, q_tile, g_tile, lse_rows, delta_rows, dq_sum, k_base, v_base, stride_kn,
                stride_vn, scale_log2, WIDTH, PADDED, BN, False, PRECISION,
            )  # fmt: skip
        end = begin + full * BN
        in_sinks = tl.cdiv(sinks_high - sinks_low, BN)
        left = in_sinks + tl.cdiv(begin - low, BN)
        for t in tl.range(0, left + tl.cdiv(high - end, BN), num_stages=1):
            of_sinks = t < in_sinks
            n = tl.where(t < left, low + (t - in_sinks) * BN, end + (t - left) * BN)
            limit = tl.where(t < left, begin, high)
            n = tl.where(of_sinks, sinks_low + t * BN, n)
            limit = tl.where(of_sinks, sinks_high, limit)
            from_, below = tl.where(of_sinks, s0, k0), tl.where(of_sinks, s1, k1)
            dq_sum = _scatter(
                n, limit, from_, below, q_tile, g_tile, lse_rows, delta_rows, dq_sum, k_base, v_base, stride_kn,
                stride_vn, scale_log2, WIDTH, PADDED, BN, True, PRECISION,
            )  # fmt: skip
    store_rows(dq, at * WIDTH, inside, dq_sum * scale, WIDTH, PADDED)
