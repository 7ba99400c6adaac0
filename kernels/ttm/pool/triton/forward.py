"""Forward kernels of pooling: under the scores of a TokenLearner, or under linear ones (without a second layer w2).

Two passes over the tokens: the first layer (norm and product; of linear scores the product alone, whose results are the
scores), then pooling with an online softmax over tokens. The second pass mostly finds the tokens in the L2 cache. The
softmax weights are never written. A carried partial is merged by the pooling kernel itself or, where the tokens are
split, together with the splits by a kernel of their own. Summary tokens are taken in blocks of BR rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirasol.kernels.core.blocks import LN2, LOG2E, dot, gelu, welford
from mirasol.kernels.ttm.pool.triton.blocks import LENGTHS, load_block, load_tokens, place_rows, tile_of, token_rows


@triton.jit(do_not_specialize=LENGTHS)
def pool_fwd_hidden_kernel(
    a, b, c, positions, w1, b1, hidden, stats,
    n_a, n_b, n_c, tokens, tiles, items, batch_a, batch_b, batch_c, row_a, row_b, row_c, eps,
    D: tl.constexpr, J: tl.constexpr, SOURCES: tl.constexpr, LINEAR: tl.constexpr,
    BP: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden [B, p, J] = LayerNorm(v) w1^T + b1 for a tile of tokens, stats [2, B p]: mean and 1 / deviation.

    With LINEAR hidden = v w1^T + b1 for BJ of its columns, and there are no stats.
    """
    BLOCKS: tl.constexpr = (J + BJ - 1) // BJ
    program = tl.program_id(0)
    item = (program // tiles // BLOCKS).to(tl.int64)
    source, token, inside, before = tile_of(program % tiles, n_a, n_b, n_c, BP, SOURCES)
    rows = token_rows(source, item, token, a, b, c, batch_a, batch_b, batch_c, row_a, row_b, row_c, SOURCES)
    places = place_rows(positions, before + token, D)
    j = program // tiles % BLOCKS * BJ + tl.arange(0, BJ)
    acc = tl.zeros((BP, BJ), ACC)
    sums = tl.zeros((BJ,), ACC)
    mean = tl.zeros((BP,), ACC)
    squares = tl.zeros((BP,), ACC)
    seen = 0.0
    for start in tl.range(0, D, BK):
        k = start + tl.arange(0, BK)
        v = load_tokens(rows, places, k, inside, D, BK)  # [BP, BK]
        at = w1 + j[None, :] * D + k[:, None]
        mask = (j < J)[None, :] & (k < D)[:, None]
        acc = dot(v, tl.load(at, mask=mask, other=0.0), acc, PRECISION)
        if not LINEAR:
            # Loaded again, and so that the compiler does not merge the loads: it gives a tile that wgmma still reads a
            # buffer of its own only where nothing but the product uses it.
            if positions is None:
                v = load_block(rows, k, inside, D, BK, KEEP=True)
            sums += tl.sum(tl.load(at, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC), 0)
            mean, squares, seen = welford(v.to(ACC), k < D, mean, squares, seen)
    bias = tl.load(b1 + j, mask=j < J, other=0.0).to(ACC)
    place = item * tokens + before + token
    if LINEAR:
        h = acc + bias[None, :]
    else:
        rstd = 1.0 / tl.sqrt(squares / D + eps)
        h = (acc - mean[:, None] * sums[None, :]) * rstd[:, None] + bias[None, :]
        tl.store(stats + place, mean, mask=inside)
        tl.store(stats + items + place, rstd, mask=inside)
    at = hidden + (place * J)[:, None] + j[None, :]
    tl.store(at, h.to(hidden.dtype.element_ty), mask=inside[:, None] & (j < J)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def pool_fwd_kernel(
    a, b, c, positions, hidden, w2, b2, out, lse, carry_out, carry_lse, top_parts, sum_parts, parts,
    n_a, n_b, n_c, tokens, tiles, batch_a, batch_b, batch_c, row_a, row_b, row_c,
    carry_batch, carry_row, carry_lse_batch, carry_lse_row,
    D: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
    SOURCES: tl.constexpr, LINEAR: tl.constexpr, SPLIT: tl.constexpr,
    BP: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows BR and columns BD of the summary over one split of the tokens: softmax statistics and weighted sum."""
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    ROWS: tl.constexpr = (K + BR - 1) // BR
    program = tl.program_id(0)
    item = (program // (BLOCKS * ROWS)).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    columns = program % BLOCKS * BD + tl.arange(0, BD)
    k = program // BLOCKS % ROWS * BR + tl.arange(0, BR)
    j = tl.arange(0, BJ)
    if not LINEAR:
        weights = tl.load(w2 + k[:, None] * J + j[None, :], mask=(k < K)[:, None] & (j < J)[None, :], other=0.0)
        bias = tl.load(b2 + k, mask=k < K, other=0.0).to(ACC)
    top = tl.full((BR,), float("-inf"), ACC)
    total = tl.zeros((BR,), ACC)
    acc = tl.zeros((BR, BD), ACC)
    for tile in tl.range(split * tiles // splits, (split + 1) * tiles // splits):
        source, token, inside, before = tile_of(tile, n_a, n_b, n_c, BP, SOURCES)
        at = hidden + ((item * tokens + before + token) * J)[None, :]
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
        rows = token_rows(source, item, token, a, b, c, batch_a, batch_b, batch_c, row_a, row_b, row_c, SOURCES)
        v = load_tokens(rows, place_rows(positions, before + token, D), columns, inside, D, BD)  # [BP, BD]
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
    kept = (k < K)[:, None] & (columns < D)[None, :]
    if SPLIT:
        row = (item * splits + split) * K + k
        tl.store(parts + row[:, None] * D + columns[None, :], acc, mask=kept)
        if program % BLOCKS == 0:
            tl.store(top_parts + row, top, mask=k < K)
            tl.store(sum_parts + row, total, mask=k < K)
    else:
        if carry_out is not None:
            at = carry_lse + item * carry_lse_batch + k * carry_lse_row
            carried = tl.load(at, mask=k < K, other=0.0).to(ACC) * LOG2E
            new_top = tl.maximum(top, carried)
            shrink = tl.exp2(top - new_top)
            share = tl.exp2(carried - new_top)
            at = carry_out + item * carry_batch + k.to(tl.int64)[:, None] * carry_row + columns[None, :]
            acc = acc * shrink[:, None] + share[:, None] * tl.load(at, mask=kept, other=0.0).to(ACC)
            total = total * shrink + share
            top = new_top
        row = item * K + k
        tl.store(out + row[:, None] * D + columns[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=kept)
        if program % BLOCKS == 0:
            tl.store(lse + row, (top + tl.log2(total)) * LN2, mask=k < K)


@triton.jit
def pool_fwd_merge_kernel(
    top_parts, sum_parts, parts, carry_out, carry_lse, out, lse,
    carry_batch, carry_row, carry_lse_batch, carry_lse_row,
    D: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One row of the summary from the splits of its tokens and the carried partial."""
    row = tl.program_id(0).to(tl.int64)
    item, k = row // K, row % K
    columns = tl.arange(0, BD)
    first = item * SPLITS * K + k  # its first split, the next K rows on
    top = tl.load(top_parts + first)
    for split in tl.static_range(1, SPLITS):
        top = tl.maximum(top, tl.load(top_parts + first + split * K))
    if carry_out is not None:
        carried = tl.load(carry_lse + item * carry_lse_batch + k * carry_lse_row).to(ACC) * LOG2E
        top = tl.maximum(top, carried)
    total = tl.zeros((1,), ACC)
    acc = tl.zeros((BD,), ACC)
    for split in tl.static_range(0, SPLITS):
        part = first + split * K
        share = tl.exp2(tl.load(top_parts + part) - top)
        total += share * tl.load(sum_parts + part)
        acc += share * tl.load(parts + part * D + columns, mask=columns < D, other=0.0)
    if carry_out is not None:
        share = tl.exp2(carried - top)
        total += share
        at = carry_out + item * carry_batch + k * carry_row + columns
        acc += share * tl.load(at, mask=columns < D, other=0.0).to(ACC)
    tl.store(out + row * D + columns, (acc / total).to(out.dtype.element_ty), mask=columns < D)
    tl.store(lse + row + tl.arange(0, 1), (top + tl.log2(total)) * LN2)
