"""Backward kernels: row sums, then dk and dv, then dq. No atomics: every sum has one owner and one order."""

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
    store_rows,
    tile_order,
)
from mirasol.kernels.attention.triton.ranges import column_ranges, row_ranges, tile_of_columns, tile_of_rows
from mirasol.kernels.core.blocks import LOG2E, dot


@triton.jit(do_not_specialize=["rows", "heads", "n_q"])
def attention_bwd_delta_kernel(
    grad, out, grad_lse, lse, delta, stride_gb, stride_gh, stride_gn, stride_ob, stride_oh, stride_on, rows, heads, n_q,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """delta [B, H, Nq] = sum(grad * out) - grad_lse, what every score's gradient is lessened by."""
    at = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside = at < rows
    b, h, i = at // (heads * n_q), at // n_q % heads, at % n_q
    offsets = b * stride_gb + h * stride_gh + i * stride_gn
    d_out = load_rows(grad, offsets, inside, WIDTH, PADDED, True).to(ACC)
    offsets = b * stride_ob + h * stride_oh + i * stride_on
    total = tl.sum(d_out * load_rows(out, offsets, inside, WIDTH, PADDED, True).to(ACC), 1)
    if grad_lse is not None:
        seeing = tl.load(lse + at, mask=inside, other=0.0) > float("-inf")  # rows that see nothing have no gradient
        total -= tl.load(grad_lse + at, mask=inside & seeing, other=0.0)
    tl.store(delta + at, total, mask=inside)


@triton.jit
def _gather(
    r, limit, low, high, k_tile, v_tile, dk, dv, q, grad, lse, delta, b, hk,
    stride_qh, stride_qn, stride_gh, stride_gn, n_q, scale_log2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the packed rows [r, r + BM), cut at `limit`, to dk and dv of a tile of keys seen by rows [low, high)."""
    rows = r + tl.arange(0, BM)
    inside = rows < limit
    q_tile = load_packed(q, b, hk, r, stride_qh, stride_qn, inside, WIDTH, PADDED, BM, GROUP, MASKED, TMA)
    g_tile = load_packed(grad, b, hk, r, stride_gh, stride_gn, inside, WIDTH, PADDED, BM, GROUP, MASKED, TMA)
    if GROUP == 1:  # only a scalar changes from tile to tile, which leaves lanes fewer addresses to keep
        lse, delta, at = lse + r, delta + r, tl.arange(0, BM)
    else:
        at = (rows % GROUP) * n_q + rows // GROUP
    if MASKED:
        lse_rows = tl.load(lse + at, mask=inside, other=0.0)
        delta_rows = tl.load(delta + at, mask=inside, other=0.0)
    else:
        lse_rows = tl.load(lse + at)
        delta_rows = tl.load(delta + at)
    zeros = tl.zeros([k_tile.shape[0], BM], dtype=dk.dtype)
    s = dot(k_tile, tl.trans(q_tile), zeros, PRECISION)  # [BN, BM]
    p = tl.math.exp2(s * scale_log2 - (lse_rows * LOG2E)[None, :])
    if MASKED:
        seen = inside[None, :] & (rows[None, :] >= low[:, None]) & (rows[None, :] < high[:, None])
        p = tl.where(seen, p, 0.0)
    dv = dot(p.to(g_tile.dtype), g_tile, dv, PRECISION)
    dp = dot(v_tile, tl.trans(g_tile), zeros, PRECISION)
    ds = p * (dp - delta_rows[None, :])
    dk = dot(ds.to(q_tile.dtype), q_tile, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def attention_bwd_dkdv_kernel(
    q, k, v, grad, lse, delta, dk, dv, table,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    n_q, n_k, q_chunk, k_chunk, shift, window, sinks, batch, heads_k, scale, scale_log2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, TABLE: tl.constexpr, MASKS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, Hkv, Nk, D]: one program owns BN keys and walks over the packed rows that see them.

    SPECIALIZE: as in `attention_fwd_kernel`, the keys in halves.
    """
    bh = tl.program_id(0) % (batch * heads_k)
    tile = tl.program_id(0) // (batch * heads_k)  # the first keys are seen by most rows
    b, hk = bh // heads_k, bh % heads_k
    n = tile * BN
    keys = n + tl.arange(0, BN)
    inside = keys < n_k
    if SPECIALIZE or not TMA:
        k, v = head(k, b, hk, stride_kb, stride_kh), head(v, b, hk, stride_vb, stride_vh)
    if SPECIALIZE:
        r = halved_row(tile, BN)
        k_tile = tl.make_tensor_descriptor(k, [n_k, WIDTH], [stride_kn, 1], [BN, PADDED]).load([r, 0])
        v_tile = tl.make_tensor_descriptor(v, [n_k, WIDTH], [stride_vn, 1], [BN, PADDED]).load([r, 0])
    else:
        k_tile = load_keys(k, b, hk, n, stride_kn, inside, WIDTH, PADDED, BN, True, TMA)
        v_tile = load_keys(v, b, hk, n, stride_vn, inside, WIDTH, PADDED, BN, True, TMA)
    low, high, begin, end = tile_of_columns(
        n, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, BN, CAUSAL, TABLE
    )
    low, high, begin, end = low * GROUP, high * GROUP, begin * GROUP, end * GROUP
    if not TMA:
        q, grad = head(q, b, hk * GROUP, stride_qb, stride_qh), head(grad, b, hk * GROUP, stride_gb, stride_gh)
    first_row = bh.to(tl.int64) * GROUP * n_q
    lse += first_row
    delta += first_row

    dk_sum = tl.zeros([BN, PADDED], dtype=ACC)
    dv_sum = tl.zeros([BN, PADDED], dtype=ACC)
    begin, full = full_range(begin, end, high, BM, MASKS)
    for t in tl.range(0, full, num_stages=STAGES, warp_specialize=SPECIALIZE):
        dk_sum, dv_sum = _gather(
            begin + t * BM, high, low, high, k_tile, v_tile, dk_sum, dv_sum, q, grad, lse, delta, b, hk,
            stride_qh, stride_qn, stride_gh, stride_gn, n_q, scale_log2,
            WIDTH, PADDED, BM, GROUP, False, TMA, PRECISION,
        )  # fmt: skip
    if MASKS != "none":
        q0, q1 = column_ranges(keys, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, TABLE)
        q0, q1 = q0 * GROUP, q1 * GROUP
        end = begin + full * BM
        left = tl.cdiv(begin - low, BM)
        for t in tl.range(0, left + tl.cdiv(high - end, BM), num_stages=STAGES if MASKS == "all" else 1):
            r = tl.where(t < left, low + t * BM, end + (t - left) * BM)
            limit = tl.where(t < left, begin, high)
            dk_sum, dv_sum = _gather(
                r, limit, q0, q1, k_tile, v_tile, dk_sum, dv_sum, q, grad, lse, delta, b, hk,
                stride_qh, stride_qn, stride_gh, stride_gn, n_q, scale_log2,
                WIDTH, PADDED, BM, GROUP, True, TMA, PRECISION,
            )  # fmt: skip
    dk, dv = head(dk, b, hk, stride_dkb, stride_dkh), head(dv, b, hk, stride_dvb, stride_dvh)
    store_rows(dk, keys.to(tl.int64) * stride_dkn, inside, dk_sum * scale, WIDTH, PADDED)
    store_rows(dv, keys.to(tl.int64) * stride_dvn, inside, dv_sum, WIDTH, PADDED)


@triton.jit
def _scatter(
    n, limit, low, high, q, grad, lse, delta, dq, k, v, b, hk, stride_kn, stride_vn, scale_log2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add keys [n, n + BN), cut at `limit`, to dq of a tile of rows that see keys [low, high)."""
    keys = tl.arange(0, BN)
    inside = n + keys < limit
    k_tile = load_keys(k, b, hk, n, stride_kn, inside, WIDTH, PADDED, BN, MASKED, TMA)
    v_tile = load_keys(v, b, hk, n, stride_vn, inside, WIDTH, PADDED, BN, MASKED, TMA)
    zeros = tl.zeros([q.shape[0], BN], dtype=dq.dtype)
    s = dot(q, tl.trans(k_tile), zeros, PRECISION)
    p = tl.math.exp2(s * scale_log2 - lse[:, None])
    if MASKED:
        seen = inside[None, :] & ((n + keys)[None, :] >= low[:, None]) & ((n + keys)[None, :] < high[:, None])
        p = tl.where(seen, p, 0.0)
    dp = dot(grad, tl.trans(v_tile), zeros, PRECISION)
    ds = p * (dp - delta[:, None])
    return dot(ds.to(k_tile.dtype), k_tile, dq, PRECISION)


@triton.jit(do_not_specialize=LENGTHS)
def attention_bwd_dq_kernel(
    q, k, v, grad, lse, delta, dq, table,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn, stride_dqb, stride_dqh, stride_dqn,
    n_q, n_k, q_chunk, k_chunk, shift, window, sinks, batch, heads_k, scale, scale_log2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, TABLE: tl.constexpr, MASKS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """dq [B, H, Nq, D]: one program owns BM packed rows and walks over the keys that they see.

    SPECIALIZE: as in `attention_fwd_kernel`; what a row has one of is halved only when loaded by descriptors, too.
    """
    tiles = tl.cdiv(n_q * GROUP, BM)
    bh, tile = tile_order(tl.program_id(0), tiles, batch * heads_k, 8)
    b, hk = bh // heads_k, bh % heads_k
    rows = tile * BM + tl.arange(0, BM)
    i, g = rows // GROUP, rows % GROUP
    inside = i < n_q
    q, grad = head(q, b, hk * GROUP, stride_qb, stride_qh), head(grad, b, hk * GROUP, stride_gb, stride_gh)
    if not TMA:
        k, v = head(k, b, hk, stride_kb, stride_kh), head(v, b, hk, stride_vb, stride_vh)
    first_row = bh.to(tl.int64) * GROUP * n_q
    lse += first_row
    delta += first_row
    if SPECIALIZE:
        r = halved_row(tile, BM)
        q_tile = tl.make_tensor_descriptor(q, [n_q, WIDTH], [stride_qn, 1], [BM, PADDED]).load([r, 0])
        g_tile = tl.make_tensor_descriptor(grad, [n_q, WIDTH], [stride_gn, 1], [BM, PADDED]).load([r, 0])
        lse_rows = tl.make_tensor_descriptor(lse, [n_q], [1], [BM]).load([r])
        delta_rows = tl.make_tensor_descriptor(delta, [n_q], [1], [BM]).load([r])
    else:  # by pointers, as a descriptor's tile would be held in registers
        q_tile = load_packed(q, b, hk, tile * BM, stride_qh, stride_qn, inside, WIDTH, PADDED, BM, GROUP, True, False)
        g_tile = load_packed(
            grad, b, hk, tile * BM, stride_gh, stride_gn, inside, WIDTH, PADDED, BM, GROUP, True, False
        )
        lse_rows = tl.load(lse + g * n_q + i, mask=inside, other=0.0)
        delta_rows = tl.load(delta + g * n_q + i, mask=inside, other=0.0)
    lse_rows *= LOG2E
    sinks_low, sinks_high, low, high, begin, end = tile_of_rows(
        tile * BM // GROUP, (tile * BM + BM - 1) // GROUP,
        table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, TABLE,
    )  # fmt: skip

    dq_sum = tl.zeros([BM, PADDED], dtype=ACC)
    if MASKS == "none":
        in_sinks = (sinks_high - sinks_low) // BN
        for t in tl.range(0, in_sinks + (high - low) // BN, num_stages=STAGES, warp_specialize=SPECIALIZE):
            n = tl.where(t < in_sinks, sinks_low + t * BN, low + (t - in_sinks) * BN)
            dq_sum = _scatter(
                n, high, low, high, q_tile, g_tile, lse_rows, delta_rows, dq_sum, k, v, b, hk,
                stride_kn, stride_vn, scale_log2, WIDTH, PADDED, BN, False, TMA, PRECISION,
            )  # fmt: skip
    else:
        begin, full = full_range(begin, end, high, BN, MASKS)
        for t in tl.range(0, full, num_stages=STAGES):
            dq_sum = _scatter(
                begin + t * BN, high, low, high, q_tile, g_tile, lse_rows, delta_rows, dq_sum, k, v, b, hk,
                stride_kn, stride_vn, scale_log2, WIDTH, PADDED, BN, False, TMA, PRECISION,
            )  # fmt: skip
        # Only now, so that these vectors take no registers from the loop above.
        s0, s1, k0, k1 = row_ranges(i, table, n_q, n_k, q_chunk, k_chunk, shift, window, sinks, CAUSAL, TABLE)
        end = begin + full * BN
        in_sinks = tl.cdiv(sinks_high - sinks_low, BN)
        left = in_sinks + tl.cdiv(begin - low, BN)
        for t in tl.range(0, left + tl.cdiv(high - end, BN), num_stages=STAGES if MASKS == "all" else 1):
            of_sinks = t < in_sinks
            n = tl.where(t < left, low + (t - in_sinks) * BN, end + (t - left) * BN)
            limit = tl.where(t < left, begin, high)
            n = tl.where(of_sinks, sinks_low + t * BN, n)
            limit = tl.where(of_sinks, sinks_high, limit)
            from_, below = tl.where(of_sinks, s0, k0), tl.where(of_sinks, s1, k1)
            dq_sum = _scatter(
                n, limit, from_, below, q_tile, g_tile, lse_rows, delta_rows, dq_sum, k, v, b, hk,
                stride_kn, stride_vn, scale_log2, WIDTH, PADDED, BN, True, TMA, PRECISION,
            )  # fmt: skip
    dq = head(dq, b, hk * GROUP, stride_dqb, stride_dqh)
    store_rows(dq, packed_offsets(rows, stride_dqh, stride_dqn, GROUP), inside, dq_sum * scale, WIDTH, PADDED)
