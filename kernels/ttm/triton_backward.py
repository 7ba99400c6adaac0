"""Backward kernels of the TokenLearner summary.

Scores and weights are computed again from the saved hidden layer. One kernel finds, tile by tile, the gradients of
scores and hidden layer; from these come the gradients of the tokens and, summed over tokens in a fixed order, split by
split, those of the weights. Nothing is added atomically: the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirasol.kernels.ttm.triton_common import (
    LENGTHS,
    LOG2E,
    dot,
    gelu,
    gelu_slope,
    load_b2,
    load_tokens,
    load_w2,
    pick,
    tile_of,
)


@triton.jit
def summary_bwd_rows_kernel(
    grad_out, grad_lse, out, lse, carry_out, carry_lse, delta, grad_carry_out, grad_carry_lse,
    carry_batch, carry_row, carry_lse_batch, carry_lse_row,
    D: tl.constexpr, K: tl.constexpr, CARRY: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """delta = dout . out - dlse, and the gradients of the carried partial, for one row of the summary."""
    item = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0)
    columns = tl.arange(0, BD)
    row = item * K + k
    own = columns < D
    dout = tl.load(grad_out + row * D + columns, mask=own, other=0.0).to(ACC)
    value = tl.load(out + row * D + columns, mask=own, other=0.0).to(ACC)
    shift = tl.sum(dout * value, 0) - tl.load(grad_lse + row)
    tl.store(delta + row, shift)
    if CARRY:
        share = tl.exp(tl.load(carry_lse + item * carry_lse_batch + k * carry_lse_row).to(ACC) - tl.load(lse + row))
        at = carry_out + item * carry_batch + k * carry_row + columns
        carried = tl.load(at, mask=own, other=0.0).to(ACC)
        grad = (share * dout).to(grad_carry_out.dtype.element_ty)
        tl.store(grad_carry_out + row * D + columns, grad, mask=own)
        tl.store(
            grad_carry_lse + row, (share * (tl.sum(dout * carried, 0) - shift)).to(grad_carry_lse.dtype.element_ty)
        )


@triton.jit(do_not_specialize=LENGTHS)
def summary_bwd_scores_kernel(
    a, b, c, places_a, places_b, places_c, hidden, b1, w2_a, w2_b, b2_a, b2_b, grad_out, lse, delta,
    weights, grad_scores, grad_hidden, means, tilts, sums_b1, sums_b2,
    n_a, n_b, n_c, tokens, tiles, batch_a, batch_b, batch_c, row_a, row_b, row_c, eps,
    D: tl.constexpr, J: tl.constexpr, K: tl.constexpr, JA: tl.constexpr, KA: tl.constexpr,
    SOURCES: tl.constexpr, POSITIONS: tl.constexpr,
    BP: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For one tile of tokens: softmax weights, gradients of scores and of the hidden layer (times 1 / deviation).

    Also the norm's mean and its pull along the normalised token, and the tile's part of both biases' gradients.
    """
    item = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    source, first, count, before = tile_of(tile, n_a, n_b, n_c, BP, SOURCES)
    token = first + tl.arange(0, BP)
    inside = token < count
    rows = pick(source, a, b, c, SOURCES) + item * pick(source, batch_a, batch_b, batch_c, SOURCES)
    rows = rows + (token * pick(source, row_a, row_b, row_c, SOURCES))[:, None]
    places = None
    if POSITIONS:
        places = pick(source, places_a, places_b, places_c, SOURCES) + (token * D)[:, None]
    j, k = tl.arange(0, BJ), tl.arange(0, BR)
    own_j, own_k = j < J, k < K
    dtype = hidden.dtype.element_ty

    reach = tl.zeros((BP, BR), ACC)
    mean = tl.zeros((BP,), ACC)
    squares = tl.zeros((BP,), ACC)
    seen = 0.0
    for start in tl.range(0, D, BK):
        columns = start + tl.arange(0, BK)
        own = columns < D
        v = load_tokens(rows, places, columns, inside, D, BK)  # [BP, BK]
        at = grad_out + item * K * D + k[None, :] * D + columns[:, None]
        dout = tl.load(at, mask=own_k[None, :] & own[:, None], other=0.0)  # [BK, BR]
        reach = dot(v, dout, reach, PRECISION)
        part = tl.sum(own.to(ACC), 0)
        part_mean = tl.sum(v.to(ACC), 1) / part
        centred = tl.where(own[None, :], v.to(ACC) - part_mean[:, None], 0.0)
        step = part_mean - mean
        squares += tl.sum(centred * centred, 1) + step * step * (seen * part / (seen + part))
        mean += step * (part / (seen + part))
        seen += part
    rstd = 1.0 / tl.sqrt(squares / D + eps)

    place = (item * tokens + before + token)[:, None]
    h = tl.load(hidden + place * J + j[None, :], mask=inside[:, None] & own_j[None, :], other=0.0).to(ACC)
    weights2 = load_w2(w2_a, w2_b, k[None, :], j[:, None], K, J, KA, JA)  # [BJ, BR]
    scores = dot(gelu(h).to(dtype), weights2, tl.zeros((BP, BR), ACC), PRECISION)
    shift = load_b2(b2_a, b2_b, k, K, KA).to(ACC) - tl.load(lse + item * K + k, mask=own_k, other=0.0).to(ACC)
    softmax = tl.exp2((scores + shift[None, :]) * LOG2E)
    kept = inside[:, None] & own_k[None, :]
    softmax = tl.where(kept, softmax, 0.0)
    tl.store(weights + place * K + k[None, :], softmax.to(dtype), mask=kept)
    ds = softmax * (reach - tl.load(delta + item * K + k, mask=own_k, other=0.0).to(ACC)[None, :])
    tl.store(grad_scores + place * K + k[None, :], ds.to(dtype), mask=kept)
    dg = dot(ds.to(dtype), tl.trans(weights2), tl.zeros((BP, BJ), ACC), PRECISION)
    # loaded again: kept over the products above it would spill
    h = tl.load(hidden + place * J + j[None, :], mask=inside[:, None] & own_j[None, :], other=0.0).to(ACC)
    dh = dg * gelu_slope(h)
    low_dh = (dh * rstd[:, None]).to(dtype)
    tl.store(grad_hidden + place * J + j[None, :], low_dh, mask=inside[:, None] & own_j[None, :])
    bias1 = tl.load(b1 + j, mask=own_j, other=0.0).to(ACC)
    tilt = rstd * rstd * tl.sum(dh * (h - bias1[None, :]), 1) / D
    tl.store(tilts + item * tokens + before + token, tilt, mask=inside)
    tl.store(means + item * tokens + before + token, mean, mask=inside)
    sums = item * tiles + tile
    tl.store(sums_b1 + sums * J + j, tl.sum(dh, 0), mask=own_j)
    tl.store(sums_b2 + sums * K + k, tl.sum(ds, 0), mask=own_k)


@triton.jit(do_not_specialize=LENGTHS)
def summary_bwd_tokens_kernel(
    a, b, c, places_a, places_b, places_c, w1, grad_out, weights, grad_hidden, means, tilts, grad_a, grad_b, grad_c,
    n_a, n_b, n_c, tokens, batch_a, batch_b, batch_c, row_a, row_b, row_c,
    D: tl.constexpr, J: tl.constexpr, K: tl.constexpr, SOURCES: tl.constexpr, POSITIONS: tl.constexpr,
    WANT_A: tl.constexpr, WANT_B: tl.constexpr, WANT_C: tl.constexpr,
    BP: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv = A dout + (dh / deviation) w1 - tilt (v - mean) for BD columns of one tile of tokens."""
    item = tl.program_id(2).to(tl.int64)
    source, first, count, before = tile_of(tl.program_id(0), n_a, n_b, n_c, BP, SOURCES)
    if pick(source, WANT_A, WANT_B, WANT_C, SOURCES):
        token = first + tl.arange(0, BP)
        inside = token < count
        columns = tl.program_id(1) * BD + tl.arange(0, BD)
        own = columns < D
        j, k = tl.arange(0, BJ), tl.arange(0, BR)
        place = item * tokens + before + token
        at = weights + place[:, None] * K + k[None, :]
        softmax = tl.load(at, mask=inside[:, None] & (k < K)[None, :], other=0.0)  # [BP, BR]
        at = grad_out + item * K * D + k[:, None] * D + columns[None, :]
        dout = tl.load(at, mask=(k < K)[:, None] & own[None, :], other=0.0)  # [BR, BD]
        dv = dot(softmax, dout, tl.zeros((BP, BD), ACC), PRECISION)
        at = grad_hidden + place[:, None] * J + j[None, :]
        dh = tl.load(at, mask=inside[:, None] & (j < J)[None, :], other=0.0)  # [BP, BJ]
        at = w1 + j[:, None] * D + columns[None, :]
        dv = dot(dh, tl.load(at, mask=(j < J)[:, None] & own[None, :], other=0.0), dv, PRECISION)
        rows = pick(source, a, b, c, SOURCES) + item * pick(source, batch_a, batch_b, batch_c, SOURCES)
        rows = rows + (token * pick(source, row_a, row_b, row_c, SOURCES))[:, None]
        places = None
        if POSITIONS:
            places = pick(source, places_a, places_b, places_c, SOURCES) + (token * D)[:, None]
        v = load_tokens(rows, places, columns, inside, D, BD).to(ACC)
        mean = tl.load(means + place, mask=inside, other=0.0)
        tilt = tl.load(tilts + place, mask=inside, other=0.0)
        dv -= tilt[:, None] * (v - mean[:, None])
        target = pick(source, grad_a, grad_b, grad_c, SOURCES) + (item * count + token)[:, None] * D
        tl.store(target + columns[None, :], dv.to(target.dtype.element_ty), mask=inside[:, None] & own[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def summary_bwd_w1_kernel(
    a, b, c, places_a, places_b, places_c, grad_hidden, parts,
    n_a, n_b, n_c, tokens, tiles, items, batch_a, batch_b, batch_c, row_a, row_b, row_c,
    D: tl.constexpr, J: tl.constexpr, SOURCES: tl.constexpr, POSITIONS: tl.constexpr, SPLITS: tl.constexpr,
    BP: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns BD of dw1 = sum over tokens of (dh / deviation) v, over one split of all tiles of the batch."""
    split = tl.program_id(1)
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    j = tl.arange(0, BJ)
    acc = tl.zeros((BJ, BD), ACC)
    for index in tl.range(split * items // SPLITS, (split + 1) * items // SPLITS):
        item = (index // tiles).to(tl.int64)
        source, first, count, before = tile_of(index % tiles, n_a, n_b, n_c, BP, SOURCES)
        token = first + tl.arange(0, BP)
        inside = token < count
        at = grad_hidden + (item * tokens + before + token)[None, :] * J + j[:, None]
        dh = tl.load(at, mask=inside[None, :] & (j < J)[:, None], other=0.0)  # [BJ, BP]
        base = pick(source, a, b, c, SOURCES) + item * pick(source, batch_a, batch_b, batch_c, SOURCES)
        rows = base + (token * pick(source, row_a, row_b, row_c, SOURCES))[:, None]
        places = None
        if POSITIONS:
            places = pick(source, places_a, places_b, places_c, SOURCES) + (token * D)[:, None]
        acc = dot(dh, load_tokens(rows, places, columns, inside, D, BD), acc, PRECISION)
    at = parts + (split.to(tl.int64) * J + j)[:, None] * D + columns[None, :]
    tl.store(at, acc, mask=(j < J)[:, None] & (columns < D)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def summary_bwd_w2_kernel(
    hidden, grad_scores, parts, items,
    J: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr,
    BP: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw2 = sum over tokens of ds gelu(h), over one split of the `items` tokens of the batch."""
    split = tl.program_id(0).to(tl.int64)
    j, k = tl.arange(0, BJ), tl.arange(0, BR)
    blocks = tl.cdiv(items, BP)
    acc = tl.zeros((BR, BJ), ACC)
    for block in tl.range(split * blocks // SPLITS, (split + 1) * blocks // SPLITS):
        token = block * BP + tl.arange(0, BP)
        inside = token < items
        at = grad_scores + token[None, :] * K + k[:, None]
        ds = tl.load(at, mask=inside[None, :] & (k < K)[:, None], other=0.0)  # [BR, BP]
        at = hidden + token[:, None] * J + j[None, :]
        h = tl.load(at, mask=inside[:, None] & (j < J)[None, :], other=0.0)
        acc = dot(ds, gelu(h.to(ACC)).to(hidden.dtype.element_ty), acc, PRECISION)
    at = parts + (split * K + k)[:, None] * J + j[None, :]
    tl.store(at, acc, mask=(k < K)[:, None] & (j < J)[None, :])
