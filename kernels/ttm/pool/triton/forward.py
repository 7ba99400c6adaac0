"""The forward kernel of pooling: under the scores of a TokenLearner, or under linear ones (without a second layer w2).

One launch, two passes. The first gives, tile by tile of the tokens, the hidden layer and the tile's softmax weights,
relative to its own highest scores; the second takes blocks of columns of the tokens, which the L2 cache then holds, and
sums them under these weights, tile by tile in order. So no sums in float32 are written and read again, and no score is
computed once more for every block of columns. Summary tokens are taken in blocks of BR rows.

Programs take turns by drawing tickets. One of the second pass waits for all of the first pass of its group of items:
those drew earlier tickets, so they run already and wait for nobody, whatever order the device starts programs in.
Atomics count programs and never add numbers: the same inputs give the same bits. A count goes back to zero by the last
program that needs it, for the next launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirasol.kernels.core.blocks import LN2, LOG2E, dot, gelu
from mirasol.kernels.ttm.pool.triton.blocks import LENGTHS, load_tokens, place_rows, tile_of, token_rows


@triton.jit
def turn(counters, groups, first, second):
    """The next program of either pass, of which a group has `first` and `second`: its group, number, and if it pools.

    A group's second pass comes after the first of the next group: so few wait, and the cache still holds the tokens.
    """
    ticket = tl.atomic_add(counters, 1)
    if ticket == tl.num_programs(0) - 1:
        tl.store(counters, 0)
    both = first + second
    group = (ticket - first) // both
    number = (ticket - first) % both
    pools = number >= first
    if ticket < first:
        group = ticket * 0
        number = ticket
    elif group == groups - 1:
        pools = ticket >= first
    elif pools:
        number -= first
    else:
        group += 1
    return group, number, pools


@triton.jit
def weigh(scores, k, tile, place, inside, weights, tops, sums, K: tl.constexpr):
    """Store the softmax weights [BP, BR] of a tile relative to the tile's highest scores, these, and their sums."""
    scores = tl.where(inside[:, None], scores * LOG2E, float("-inf"))
    top = tl.max(scores, 0)
    softmax = tl.exp2(scores - top[None, :])
    at = weights + (place * K)[:, None] + k[None, :]
    tl.store(at, softmax.to(weights.dtype.element_ty), mask=inside[:, None] & (k < K)[None, :])
    tl.store(tops + tile * K + k, top, mask=k < K)
    tl.store(sums + tile * K + k, tl.sum(softmax, 0), mask=k < K)


@triton.jit(do_not_specialize=[*LENGTHS, "groups", "members"])
def pool_fwd_kernel(
    a, b, c, positions, w1, b1, w1_sums, w2, b2, hidden, stats, weights, tops, sums, out, lse, carry_out, carry_lse,
    counters, n_a, n_b, n_c, tokens, tiles, items, groups, members, batch_a, batch_b, batch_c, row_a, row_b, row_c,
    carry_batch, carry_row, carry_lse_batch, carry_lse_row, eps,
    D: tl.constexpr, J: tl.constexpr, K: tl.constexpr, SOURCES: tl.constexpr, LINEAR: tl.constexpr,
    BP: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both passes over `items` items, `members` of them a group; an item that is not there leaves no trace.

    First: hidden [B, p, J] = LayerNorm(v) w1^T + b1 for a tile of tokens, stats [2, B p]: mean and 1 / deviation, both
    None where backward won't ask for them; and the tile's softmax weights. With LINEAR BJ columns of the hidden layer,
    which is v w1^T + b1, are the scores, and there are no stats.
    Second: rows BR and columns BD of the summary, merged with what is carried.
    """
    LAYERS: tl.constexpr = (J + BJ - 1) // BJ if LINEAR else 1
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    ROWS: tl.constexpr = (K + BR - 1) // BR
    first, second = members * tiles * LAYERS, members * BLOCKS * ROWS
    group, number, pools = turn(counters, groups, first, second)
    done = counters + 1 + group
    if pools:
        while tl.atomic_add(done, 0) < first:
            pass
        item = (group * members + number // (BLOCKS * ROWS)).to(tl.int64)
        if item < items:
            columns = number % BLOCKS * BD + tl.arange(0, BD)
            k = number // BLOCKS % ROWS * BR + tl.arange(0, BR)
            row = tl.minimum(k, K - 1)
            kept = (k < K)[:, None] & (columns < D)[None, :]
            top = tl.full((BR,), float("-inf"), ACC)
            total = tl.zeros((BR,), ACC)
            for start in tl.range(0, tiles, 16):
                tile = start + tl.arange(0, 16)
                part = ((item * tiles + tile) * K)[:, None] + row[None, :]
                tile_tops = tl.load(tops + part, mask=(tile < tiles)[:, None], other=float("-inf"))
                tile_sums = tl.load(sums + part, mask=(tile < tiles)[:, None], other=0.0)
                new_top = tl.maximum(top, tl.max(tile_tops, 0))
                total = total * tl.exp2(top - new_top) + tl.sum(tile_sums * tl.exp2(tile_tops - new_top[None, :]), 0)
                top = new_top
            if carry_out is None:
                norm = top + tl.log2(total)
                acc = tl.zeros((BR, BD), ACC)
            else:
                carried = tl.load(carry_lse + item * carry_lse_batch + row * carry_lse_row).to(ACC) * LOG2E
                new_top = tl.maximum(top, carried)
                norm = new_top + tl.log2(total * tl.exp2(top - new_top) + tl.exp2(carried - new_top))
                at = carry_out + item * carry_batch + row.to(tl.int64)[:, None] * carry_row + columns[None, :]
                acc = tl.load(at, mask=kept, other=0.0).to(ACC) * tl.exp2(carried - norm)[:, None]
            for tile in tl.range(0, tiles):
                source, token, inside, before = tile_of(tile, n_a, n_b, n_c, BP, SOURCES)
                own = weights + ((item * tokens + before + token) * K)[None, :] + k[:, None]
                softmax = tl.load(own, mask=inside[None, :] & (k < K)[:, None], other=0.0)  # [BR, BP]
                rows = token_rows(source, item, token, a, b, c, batch_a, batch_b, batch_c, row_a, row_b, row_c, SOURCES)
                places = place_rows(positions, before + token, D)
                v = load_tokens(rows, places, columns, inside, D, BD)  # [BP, BD]
                share = tl.exp2(tl.load(tops + (item * tiles + tile) * K + row) - norm)
                acc += share[:, None] * dot(softmax, v, tl.zeros((BR, BD), ACC), PRECISION)
            at = out + ((item * K + k) * D)[:, None] + columns[None, :]
            tl.store(at, acc.to(out.dtype.element_ty), mask=kept)
            if number % BLOCKS == 0:
                tl.store(lse + item * K + k, norm * LN2, mask=k < K)
        if tl.atomic_add(done, 1) == first + second - 1:
            tl.store(done, 0)
    else:
        item = (group * members + number // (tiles * LAYERS)).to(tl.int64)
        if item < items:
            source, token, inside, before = tile_of(number % tiles, n_a, n_b, n_c, BP, SOURCES)
            rows = token_rows(source, item, token, a, b, c, batch_a, batch_b, batch_c, row_a, row_b, row_c, SOURCES)
            places = place_rows(positions, before + token, D)
            j = number // tiles % LAYERS * BJ + tl.arange(0, BJ)
            acc = tl.zeros((BP, BJ), ACC)
            v = load_tokens(rows, places, tl.arange(0, BK), inside, D, BK)  # [BP, BK]
            # Sums and squares of eight neighbours, which one thread holds, around the mean of the first channels,
            # which lies within sqrt(D / BK) deviations of that of all: no large mean can harm.
            pivot = tl.sum(tl.sum(tl.reshape(v.to(ACC), (BP, BK // 8, 8)), 2), 1) / (D if D < BK else BK)
            sums_8 = tl.zeros((BP, BK // 8), ACC)
            squares_8 = tl.zeros((BP, BK // 8), ACC)
            for start in tl.range(0, D, BK, num_stages=2):
                columns = start + tl.arange(0, BK)
                ahead = load_tokens(rows, places, columns + BK, inside & (start + BK < D), D, BK)
                mask = (j < J)[None, :] & (columns < D)[:, None]
                layer = tl.load(w1 + j[None, :] * D + columns[:, None], mask=mask, other=0.0)
                acc = dot(v, layer, acc, PRECISION)
                if not LINEAR:
                    apart = v.to(ACC) - pivot[:, None]
                    if D % BK != 0:
                        apart = tl.where((columns < D)[None, :], apart, 0.0)
                    apart = tl.reshape(apart, (BP, BK // 8, 8))
                    sums_8 += tl.sum(apart, 2)
                    squares_8 += tl.sum(apart * apart, 2)
                v = ahead
            bias = tl.load(b1 + j, mask=j < J, other=0.0).to(ACC)
            place = item * tokens + before + token
            if LINEAR:
                acc += bias[None, :]
            else:
                shift = tl.sum(sums_8, 1) / D
                mean = pivot + shift
                rstd = 1.0 / tl.sqrt(tl.sum(squares_8, 1) / D - shift * shift + eps)
                if stats is not None:
                    tl.store(stats + place, mean, mask=inside)
                    tl.store(stats + items.to(tl.int64) * tokens + place, rstd, mask=inside)
                row_sums = tl.load(w1_sums + j, mask=j < J, other=0.0)
                acc = (acc - mean[:, None] * row_sums[None, :]) * rstd[:, None] + bias[None, :]
            h = acc.to(w1.dtype.element_ty)
            if hidden is not None:
                tl.store(hidden + (place * J)[:, None] + j[None, :], h, mask=inside[:, None] & (j < J)[None, :])
            tile = item * tiles + number % tiles
            if LINEAR:
                weigh(h.to(ACC), j, tile, place, inside, weights, tops, sums, K)
            else:
                g = gelu(h.to(ACC)).to(h.dtype)
                for start in tl.range(0, K, BR):
                    k = start + tl.arange(0, BR)
                    mask_2 = (k < K)[None, :] & (j < J)[:, None]
                    layer_2 = tl.load(w2 + k[None, :] * J + j[:, None], mask=mask_2, other=0.0)  # [BJ, BR]
                    bias_2 = tl.load(b2 + k, mask=k < K, other=0.0).to(ACC)
                    scores = dot(g, layer_2, tl.zeros((BP, BR), ACC), PRECISION) + bias_2[None, :]
                    weigh(scores, k, tile, place, inside, weights, tops, sums, K)
        tl.debug_barrier()  # all of the program's stores come before it is counted
        tl.atomic_add(done, 1)
