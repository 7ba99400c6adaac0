"""Forward kernels of the summaries: TokenLearner, and latent queries, whose scores are LINEAR in the tokens.

Two passes over the tokens: the first layer (norm and product; with LINEAR the product alone, whose results are the
scores), then pooling with an online softmax over tokens. The second pass mostly finds the tokens in the L2 cache. The
softmax weights are never written. A carried partial is merged by the pooling kernel itself or, where the tokens are
split, together with the splits by a kernel of their own. Summary tokens are taken in blocks of BR rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirasol.kernels.ttm.triton_common import (
    LENGTHS,
    LN2,
    LOG2E,
    dot,
    gelu,
    load_b2,
    load_tokens,
    load_w2,
    pick,
    tile_of,
)


@triton.jit(do_not_specialize=LENGTHS)
def summary_hidden_fwd_kernel(
    a, b, c, places_a, places_b, places_c, w1, b1, hidden, stats,
    n_a, n_b, n_c, tokens, batch_a, batch_b, batch_c, row_a, row_b, row_c, eps,
    D: tl.constexpr, J: tl.constexpr, SOURCES: tl.constexpr, POSITIONS: tl.constexpr, LINEAR: tl.constexpr,
    BP: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden [B, p, J] = LayerNorm(v) w1^T + b1 for a tile of tokens, stats [2, B, p]: mean and 1 / deviation.

    With LINEAR hidden = v w1^T + b1 for BJ of its columns, and there are no stats.
    """
    item = tl.program_id(2).to(tl.int64)
    source, first, count, before = tile_of(tl.program_id(0), n_a, n_b, n_c, BP, SOURCES)
    token = first + tl.arange(0, BP)
    inside = token < count
    base = pick(source, a, b, c, SOURCES) + item * pick(source, batch_a, batch_b, batch_c, SOURCES)
    rows = base + (token * pick(source, row_a, row_b, row_c, SOURCES))[:, None]
    places = None
    if POSITIONS:
        places = pick(source, places_a, places_b, places_c, SOURCES) + (token * D)[:, None]
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    acc = tl.zeros((BP, BJ), ACC)
    sums = tl.zeros((BJ,), ACC)
    mean = tl.zeros((BP,), ACC)
    squares = tl.zeros((BP,), ACC)
    seen = 0.0
    for start in tl.range(0, D, BK):
        k = start + tl.arange(0, BK)
        v = load_tokens(rows, places, k, inside, D, BK)  # [BP, BK]
        weights = tl.load(w1 + j[None, :] * D + k[:, None], mask=(j < J)[None, :] & (k < D)[:, None], other=0.0)
        acc = dot(v, weights, acc, PRECISION)
        if not LINEAR:
            sums += tl.sum(weights.to(ACC), 0)
            part = tl.sum((k < D).to(ACC), 0)
            part_mean = tl.sum(v.to(ACC), 1) / part
            centred = tl.where((k < D)[None, :], v.to(ACC) - part_mean[:, None], 0.0)
            delta = part_mean - mean
            squares += tl.sum(centred * centred, 1) + delta * delta * (seen * part / (seen + part))
            mean += delta * (part / (seen + part))
            seen += part
    bias = tl.load(b1 + j, mask=j < J, other=0.0).to(ACC)
    if LINEAR:
        h = acc + bias[None, :]
    else:
        rstd = 1.0 / tl.sqrt(squares / D + eps)
        h = (acc - mean[:, None] * sums[None, :]) * rstd[:, None] + bias[None, :]
        at = stats + item * tokens + before + token
        tl.store(at, mean, mask=inside)
        tl.store(at + tl.num_programs(2) * tokens, rstd, mask=inside)
    at = hidden + (item * tokens + before) * J + token[:, None] * J + j[None, :]
    tl.store(at, h.to(hidden.dtype.element_ty), mask=inside[:, None] & (j < J)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def summary_pool_fwd_kernel(
    a, b, c, places_a, places_b, places_c, hidden, w2_a, w2_b, b2_a, b2_b, out, lse, carry_out, carry_lse,
    top_parts, sum_parts, parts,
    n_a, n_b, n_c, tokens, tiles, batch_a, batch_b, batch_c, row_a, row_b, row_c,
    carry_batch, carry_row, carry_lse_batch, carry_lse_row,
    D: tl.constexpr, J: tl.constexpr, K: tl.constexpr, JA: tl.constexpr, KA: tl.constexpr,
    SOURCES: tl.constexpr, POSITIONS: tl.constexpr, LINEAR: tl.constexpr, CARRY: tl.constexpr, SPLIT: tl.constexpr,
    BP: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows BR and columns BD of the summary over one split of the tokens: softmax statistics and weighted sum."""
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    item = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    columns = tl.program_id(0) % BLOCKS * BD + tl.arange(0, BD)
    k = tl.program_id(0) // BLOCKS * BR + tl.arange(0, BR)
    j = tl.arange(0, BJ)
    if not LINEAR:
        weights = load_w2(w2_a, w2_b, k[:, None], j[None, :], K, J, KA, JA)  # [BR, BJ]
        bias = load_b2(b2_a, b2_b, k, K, KA).to(ACC)
    top = tl.full((BR,), float("-inf"), ACC)
    total = tl.zeros((BR,), ACC)
    acc = tl.zeros((BR, BD), ACC)
    splits = tl.num_programs(1)
    for tile in tl.range(split * tiles // splits, (split + 1) * tiles // splits):
        source, first, count, before = tile_of(tile, n_a, n_b, n_c, BP, SOURCES)
        token = first + tl.arange(0, BP)
        inside = token < count
        at = hidden + (item * tokens + before) * J + token[None, :] * J
        if LINEAR:
            scores = tl.load(at + k[:, None], mask=inside[None, :] & (k < K)[:, None], other=0.0).to(ACC) * LOG2E
        else:
            h = tl.load(at + j[:, None], mask=inside[None, :] & (j < J)[:, None], other=0.0)  # [BJ, BP]
            g = gelu(h.to(ACC)).to(hidden.dtype.element_ty)
            scores = (dot(weights, g, tl.zeros((BR, BP), ACC), PRECISION) + bias[:, None]) * LOG2E
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        top = new_top
        base = pick(source, a, b, c, SOURCES) + item * pick(source, batch_a, batch_b, batch_c, SOURCES)
        rows = base + (token * pick(source, row_a, row_b, row_c, SOURCES))[:, None]
        places = None
        if POSITIONS:
            places = pick(source, places_a, places_b, places_c, SOURCES) + (token * D)[:, None]
        v = load_tokens(rows, places, columns, inside, D, BD)  # [BP, BD]
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
    kept = (k < K)[:, None] & (columns < D)[None, :]
    if SPLIT:
        row = (item * splits + split) * K + k
        tl.store(parts + row[:, None] * D + columns[None, :], acc, mask=kept)
        if tl.program_id(0) % BLOCKS == 0:
            tl.store(top_parts + row, top, mask=k < K)
            tl.store(sum_parts + row, total, mask=k < K)
    else:
        if CARRY:
            at = carry_lse + item * carry_lse_batch + k * carry_lse_row
            carried = tl.load(at, mask=k < K, other=0.0).to(ACC) * LOG2E
            new_top = tl.maximum(top, carried)
            shrink = tl.exp2(top - new_top)
            share = tl.exp2(carried - new_top)
            at = carry_out + item * carry_batch + k[:, None] * carry_row + columns[None, :]
            acc = acc * shrink[:, None] + share[:, None] * tl.load(at, mask=kept, other=0.0).to(ACC)
            total = total * shrink + share
            top = new_top
        row = item * K + k
        tl.store(out + row[:, None] * D + columns[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=kept)
        if tl.program_id(0) % BLOCKS == 0:
            tl.store(lse + row, (top + tl.log2(total)) * LN2, mask=k < K)


@triton.jit
def summary_merge_fwd_kernel(
    top_parts, sum_parts, parts, carry_out, carry_lse, out, lse,
    carry_batch, carry_row, carry_lse_batch, carry_lse_row,
    D: tl.constexpr, K: tl.constexpr, CARRY: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One row of the summary from the splits of its tokens and the carried partial."""
    item = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0)
    columns = tl.arange(0, BD)
    top = tl.load(top_parts + item * SPLITS * K + k)
    for split in tl.static_range(1, SPLITS):
        top = tl.maximum(top, tl.load(top_parts + (item * SPLITS + split) * K + k))
    if CARRY:
        carried = tl.load(carry_lse + item * carry_lse_batch + k * carry_lse_row).to(ACC) * LOG2E
        top = tl.maximum(top, carried)
    total = tl.zeros((1,), ACC)
    acc = tl.zeros((BD,), ACC)
    for split in tl.static_range(0, SPLITS):
        row = (item * SPLITS + split) * K + k
        share = tl.exp2(tl.load(top_parts + row) - top)
        total += share * tl.load(sum_parts + row)
        acc += share * tl.load(parts + row * D + columns, mask=columns < D, other=0.0)
    if CARRY:
        share = tl.exp2(carried - top)
        total += share
        at = carry_out + item * carry_batch + k * carry_row + columns
        acc += share * tl.load(at, mask=columns < D, other=0.0).to(ACC)
    row = item * K + k
    tl.store(out + row * D + columns, (acc / total).to(out.dtype.element_ty), mask=columns < D)
    tl.store(lse + row + tl.arange(0, 1), (top + tl.log2(total)) * LN2)
