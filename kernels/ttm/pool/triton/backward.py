"""Backward kernels of pooling: under the scores of a TokenLearner, or under linear ones (without a second layer w2).

Weights are computed again from the saved hidden layer (of linear scores: the saved scores). The gradients of the scores
and of the hidden layer come first, tile by tile; from these the gradients of the tokens and, summed over tokens in a
fixed order, split by split, those of the layers. Summary tokens are taken in blocks of BR rows. Nothing is added
atomically: the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirasol.kernels.core.blocks import LOG2E, dot, dot_of_registers, gelu, gelu_slope
from mirasol.kernels.ttm.pool.triton.blocks import LENGTHS, load_tokens, pick, place_rows, tile_of, token_rows


@triton.jit
def pool_bwd_rows_kernel(
    grad_out, grad_lse, out, lse, carry_out, carry_lse, delta, grad_carry_out, grad_carry_lse,
    carry_batch, carry_row, carry_lse_batch, carry_lse_row,
    D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """delta = dout . out - dlse, and the gradients of the carried partial, for one row of the summary."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    own = columns < D
    dout = tl.load(grad_out + row * D + columns, mask=own, other=0.0).to(ACC)
    value = tl.load(out + row * D + columns, mask=own, other=0.0).to(ACC)
    shift = tl.sum(dout * value, 0) - tl.load(grad_lse + row)
    tl.store(delta + row, shift)
    if carry_out is not None:
        item, k = row // K, row % K
        share = tl.exp(tl.load(carry_lse + item * carry_lse_batch + k * carry_lse_row).to(ACC) - tl.load(lse + row))
        at = carry_out + item * carry_batch + k * carry_row + columns
        carried = tl.load(at, mask=own, other=0.0).to(ACC)
        tl.store(grad_carry_out + row * D + columns, (share * dout).to(grad_carry_out.dtype.element_ty), mask=own)
        pull = share * (tl.sum(dout * carried, 0) - shift)
        tl.store(grad_carry_lse + row, pull.to(grad_carry_lse.dtype.element_ty))


@triton.jit(do_not_specialize=LENGTHS)
def pool_bwd_scores_kernel(
    a, b, c, positions, hidden, w2, b2, grad_out, lse, delta, weights, grad_scores, sums,
    n_a, n_b, n_c, tokens, tiles, batch_a, batch_b, batch_c, row_a, row_b, row_c,
    D: tl.constexpr, J: tl.constexpr, K: tl.constexpr, SOURCES: tl.constexpr, LINEAR: tl.constexpr,
    BP: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """For one tile of tokens and BR summary tokens: A = exp(S - lse), dS = A (v dout - delta), the tile's sum of dS."""
    ROWS: tl.constexpr = (K + BR - 1) // BR
    program = tl.program_id(0)
    tile = program % tiles
    item = (program // tiles // ROWS).to(tl.int64)
    source, token, inside, before = tile_of(tile, n_a, n_b, n_c, BP, SOURCES)
    rows = token_rows(source, item, token, a, b, c, batch_a, batch_b, batch_c, row_a, row_b, row_c, SOURCES)
    places = place_rows(positions, before + token, D)
    k = program // tiles % ROWS * BR + tl.arange(0, BR)
    own = k < K
    reach = tl.zeros((BP, BR), ACC)
    for start in tl.range(0, D, BK):
        columns = start + tl.arange(0, BK)
        v = load_tokens(rows, places, columns, inside, D, BK)  # [BP, BK]
        at = grad_out + item * K * D + k[None, :] * D + columns[:, None]
        dout = tl.load(at, mask=own[None, :] & (columns < D)[:, None], other=0.0)  # [BK, BR]
        reach = dot_of_registers(v, dout, reach, PRECISION, WAIT)
    place = (item * tokens + before + token)[:, None]
    kept = inside[:, None] & own[None, :]
    shift = -tl.load(lse + item * K + k, mask=own, other=0.0).to(ACC)
    if LINEAR:
        scores = tl.load(hidden + place * K + k[None, :], mask=kept, other=0.0).to(ACC)
    else:
        j = tl.arange(0, BJ)
        h = tl.load(hidden + place * J + j[None, :], mask=inside[:, None] & (j < J)[None, :], other=0.0)
        g = gelu(h.to(ACC)).to(h.dtype)
        layer = tl.load(w2 + k[None, :] * J + j[:, None], mask=own[None, :] & (j < J)[:, None], other=0.0)  # [BJ, BR]
        scores = dot(g, layer, tl.zeros((BP, BR), ACC), PRECISION)
        shift += tl.load(b2 + k, mask=own, other=0.0).to(ACC)
    softmax = tl.where(kept, tl.exp2((scores + shift[None, :]) * LOG2E), 0.0)
    tl.store(weights + place * K + k[None, :], softmax.to(weights.dtype.element_ty), mask=kept)
    ds = softmax * (reach - tl.load(delta + item * K + k, mask=own, other=0.0).to(ACC)[None, :])
    tl.store(grad_scores + place * K + k[None, :], ds.to(weights.dtype.element_ty), mask=kept)
    tl.store(sums + (item * tiles + tile) * K + k, tl.sum(ds, 0), mask=own)


@triton.jit(do_not_specialize=LENGTHS)
def pool_bwd_hidden_kernel(
    hidden, stats, b1, w2, grad_scores, grad_hidden, tilts, sums, items,
    D: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
    BP: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For BP of the `items` tokens of the batch: dh = (dS w2) gelu'(h), stored times 1 / deviation, and its sum.

    Also the pull of the norm along the normalised token: tilt = dh . (h - b1) / (d deviation^2).
    """
    token = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    inside = token < items
    j = tl.arange(0, BJ)
    dg = tl.zeros((BP, BJ), ACC)
    for start in tl.range(0, K, BR):
        k = start + tl.arange(0, BR)
        at = grad_scores + token[:, None] * K + k[None, :]
        ds = tl.load(at, mask=inside[:, None] & (k < K)[None, :], other=0.0)  # [BP, BR]
        layer = tl.load(w2 + k[:, None] * J + j[None, :], mask=(k < K)[:, None] & (j < J)[None, :], other=0.0)
        dg = dot(ds, layer, dg, PRECISION)
    kept = inside[:, None] & (j < J)[None, :]
    h = tl.load(hidden + token[:, None] * J + j[None, :], mask=kept, other=0.0).to(ACC)
    dh = dg * gelu_slope(h)
    rstd = tl.load(stats + items + token, mask=inside, other=0.0)
    tl.store(grad_hidden + token[:, None] * J + j[None, :], (dh * rstd[:, None]).to(hidden.dtype.element_ty), mask=kept)
    bias = tl.load(b1 + j, mask=j < J, other=0.0).to(ACC)
    tilt = rstd * rstd * tl.sum(dh * (h - bias[None, :]), 1) / D
    tl.store(tilts + token, tilt, mask=inside)
    # Each warp its own sum, of the rows that it holds: across warps, lanes of eight columns would meet in one bank.
    parts = tl.sum(tl.sum(tl.reshape(dh, (BP // 16, 4, 4, BJ)), 2), 0)
    part = tl.program_id(0).to(tl.int64) * 4 + tl.arange(0, 4)
    tl.store(sums + (part * J)[:, None] + j[None, :], parts, mask=(j < J)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def pool_bwd_tokens_kernel(
    a, b, c, positions, w1, grad_out, weights, grad_hidden, stats, tilts, grad_a, grad_b, grad_c,
    n_a, n_b, n_c, tokens, tiles, batch_a, batch_b, batch_c, row_a, row_b, row_c,
    D: tl.constexpr, J: tl.constexpr, K: tl.constexpr, SOURCES: tl.constexpr,
    LINEAR: tl.constexpr, WANT_A: tl.constexpr, WANT_B: tl.constexpr, WANT_C: tl.constexpr,
    BP: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv = A dout + (dh / deviation) w1 - tilt (v - mean) for BD columns of one tile of tokens.

    With LINEAR dv = A dout + dS w1, where grad_hidden holds dS.
    """
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    item = (program // tiles // BLOCKS).to(tl.int64)
    source, token, inside, before = tile_of(program % tiles, n_a, n_b, n_c, BP, SOURCES)
    if pick(source, WANT_A, WANT_B, WANT_C, SOURCES):
        columns = program // tiles % BLOCKS * BD + tl.arange(0, BD)
        own = columns < D
        place = item * tokens + before + token
        dv = tl.zeros((BP, BD), ACC)
        for start in tl.range(0, K, BR):
            k = start + tl.arange(0, BR)
            kept, own_w = inside[:, None] & (k < K)[None, :], (k < K)[:, None] & own[None, :]
            softmax = tl.load(weights + place[:, None] * K + k[None, :], mask=kept, other=0.0)  # [BP, BR]
            dout = tl.load(grad_out + item * K * D + k[:, None] * D + columns[None, :], mask=own_w, other=0.0)
            dv = dot(softmax, dout, dv, PRECISION)
            if LINEAR:
                ds = tl.load(grad_hidden + place[:, None] * K + k[None, :], mask=kept, other=0.0)
                dv = dot(ds, tl.load(w1 + k[:, None] * D + columns[None, :], mask=own_w, other=0.0), dv, PRECISION)
        if not LINEAR:
            j = tl.arange(0, BJ)
            at = grad_hidden + place[:, None] * J + j[None, :]
            dh = tl.load(at, mask=inside[:, None] & (j < J)[None, :], other=0.0)  # [BP, BJ]
            at = w1 + j[:, None] * D + columns[None, :]
            dv = dot(dh, tl.load(at, mask=(j < J)[:, None] & own[None, :], other=0.0), dv, PRECISION)
            rows = token_rows(source, item, token, a, b, c, batch_a, batch_b, batch_c, row_a, row_b, row_c, SOURCES)
            v = load_tokens(rows, place_rows(positions, before + token, D), columns, inside, D, BD).to(ACC)
            mean = tl.load(stats + place, mask=inside, other=0.0)
            tilt = tl.load(tilts + place, mask=inside, other=0.0)
            dv -= tilt[:, None] * (v - mean[:, None])
        count = pick(source, n_a, n_b, n_c, SOURCES)
        target = pick(source, grad_a, grad_b, grad_c, SOURCES) + (item * count + token)[:, None] * D
        tl.store(target + columns[None, :], dv.to(target.dtype.element_ty), mask=inside[:, None] & own[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def pool_bwd_w1_kernel(
    a, b, c, positions, grad_hidden, parts,
    n_a, n_b, n_c, tokens, tiles, items, batch_a, batch_b, batch_c, row_a, row_b, row_c,
    D: tl.constexpr, J: tl.constexpr, SOURCES: tl.constexpr,
    BP: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows BJ, columns BD of dw1 = sum over tokens of (dh / deviation) v, over one split of all tiles of the batch."""
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    split, splits = tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(0) % BLOCKS * BD + tl.arange(0, BD)
    j = tl.program_id(0) // BLOCKS * BJ + tl.arange(0, BJ)
    acc = tl.zeros((BJ, BD), ACC)
    for index in tl.range(split * items // splits, (split + 1) * items // splits):
        item = (index // tiles).to(tl.int64)
        source, token, inside, before = tile_of(index % tiles, n_a, n_b, n_c, BP, SOURCES)
        at = grad_hidden + ((item * tokens + before + token) * J)[None, :] + j[:, None]
        dh = tl.load(at, mask=inside[None, :] & (j < J)[:, None], other=0.0)  # [BJ, BP]
        rows = token_rows(source, item, token, a, b, c, batch_a, batch_b, batch_c, row_a, row_b, row_c, SOURCES)
        v = load_tokens(rows, place_rows(positions, before + token, D), columns, inside, D, BD)
        acc = dot(dh, v, acc, PRECISION)
    at = parts + (split * J + j)[:, None] * D + columns[None, :]
    tl.store(at, acc, mask=(j < J)[:, None] & (columns < D)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def pool_bwd_w2_kernel(
    hidden, grad_scores, parts, items,
    J: tl.constexpr, K: tl.constexpr,
    BP: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows BR of dw2 = sum over tokens of ds gelu(h), over one split of the `items` tokens of the batch."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    j, k = tl.arange(0, BJ), tl.program_id(0) * BR + tl.arange(0, BR)
    blocks = tl.cdiv(items, BP)
    acc = tl.zeros((BR, BJ), ACC)
    for block in tl.range(split * blocks // splits, (split + 1) * blocks // splits):
        token = block * BP + tl.arange(0, BP).to(tl.int64)
        inside = token < items
        at = grad_scores + token[None, :] * K + k[:, None]
        ds = tl.load(at, mask=inside[None, :] & (k < K)[:, None], other=0.0)  # [BR, BP]
        at = hidden + token[:, None] * J + j[None, :]
        h = tl.load(at, mask=inside[:, None] & (j < J)[None, :], other=0.0)
        acc = dot(ds, gelu(h.to(ACC)).to(hidden.dtype.element_ty), acc, PRECISION)
    at = parts + (split * K + k)[:, None] * J + j[None, :]
    tl.store(at, acc, mask=(k < K)[:, None] & (j < J)[None, :])


@triton.jit
def sum_of_rows(parts, count, first, WIDTH: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr):
    """[BD] columns from `first` on of the sum of `count` rows of `parts`, always in the same order."""
    columns = first + tl.arange(0, BD)
    total = tl.zeros((BD,), ACC)
    for start in tl.range(0, count, BN):
        row = start + tl.arange(0, BN)
        at = parts + row[:, None].to(tl.int64) * WIDTH + columns[None, :]
        total += tl.sum(tl.load(at, mask=(row < count)[:, None] & (columns < WIDTH)[None, :], other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["splits_w1", "splits_w2", "count_b1", "count_b2"])
def pool_bwd_sums_kernel(
    parts_w1, parts_w2, parts_b1, parts_b2, grad_w1, grad_b1, grad_w2, grad_b2,
    splits_w1, splits_w2, count_b1, count_b2,
    D: tl.constexpr, J: tl.constexpr, K: tl.constexpr, LINEAR: tl.constexpr,
    BD: tl.constexpr, BJ: tl.constexpr, BB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of the layers from the parts that the kernels before left: a row of w1 or w2, or BB numbers of a bias.

    Rows of the gradient of w1 are centred, as rows of w1 have mean zero whatever the tokens' means are.
    """
    BLOCKS: tl.constexpr = (J + BB - 1) // BB
    program = tl.program_id(0)
    if program < J:
        columns = tl.arange(0, BD)
        total = tl.zeros((BD,), ACC)
        for split in tl.range(0, splits_w1):
            total += tl.load(parts_w1 + (split * J + program) * D + columns, mask=columns < D, other=0.0)
        if not LINEAR:
            total -= tl.sum(total, 0) / D
        tl.store(grad_w1 + program * D + columns, total.to(grad_w1.dtype.element_ty), mask=columns < D)
    elif program < J + BLOCKS:
        first = (program - J) * BB
        b = first + tl.arange(0, BB)
        bias = sum_of_rows(parts_b1, count_b1, first, J, 64, BB, ACC)
        tl.store(grad_b1 + b, bias.to(grad_b1.dtype.element_ty), mask=b < J)
    elif not LINEAR:
        if program < J + BLOCKS + K:
            k = program - J - BLOCKS
            j = tl.arange(0, BJ)
            row = tl.zeros((BJ,), ACC)
            for split in tl.range(0, splits_w2):
                row += tl.load(parts_w2 + (split * K + k) * J + j, mask=j < J, other=0.0)
            tl.store(grad_w2 + k * J + j, row.to(grad_w2.dtype.element_ty), mask=j < J)
        else:
            first_2 = (program - J - BLOCKS - K) * BB
            b2 = first_2 + tl.arange(0, BB)
            bias_2 = sum_of_rows(parts_b2, count_b2, first_2, K, 64, BB, ACC)
            tl.store(grad_b2 + b2, bias_2.to(grad_b2.dtype.element_ty), mask=b2 < K)
