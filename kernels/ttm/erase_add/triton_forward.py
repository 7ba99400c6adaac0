"""Forward kernels of the erase-add write, in the order of their launches.

1. select: LayerNorm and score network of the memory tokens; statistics of the outputs' norms on the way.
2. tokens: for some columns, both slot networks' MLPs over the r outputs, and these columns' part of the product with
   the first layer of the MLPs over channels.
3. channels: the parts added up, the rest of the MLPs over channels: erase and add vectors of every slot.
4. update: softmax over the memory tokens and the new memory, slot after slot in registers.
Slots, networks' widths and outputs are padded in registers; nothing of size s x d is written but the new memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirasol.kernels.ttm.erase_add.triton_common import LENGTHS, either, norm_statistics, normalised_columns
from mirasol.kernels.ttm.triton_common import LOG2E, dot, gelu, load_tile, pick, sigmoid, tile_of


@triton.jit(do_not_specialize=LENGTHS)
def erase_add_fwd_select_kernel(
    memory, outputs, norm_weight, norm_bias, w1, b1, w2, b2, means, rstds, hidden, scores, through,
    n_memory, n_outputs, memory_batch, outputs_batch, memory_row, outputs_row, eps,
    D: tl.constexpr, J: tl.constexpr, S: tl.constexpr,
    BP: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, BS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Statistics of BP tokens of memory or outputs; of memory tokens also hidden layer [B, s, J] and scores [B, S, s].

    One program leaves in `through` [2, J] what the norm's weight and bias become in the first layer, w1 g and
    w1 c + b1: the norm's backward needs them.
    """
    item = tl.program_id(1).to(tl.int64)
    source, first, count, before = tile_of(tl.program_id(0), n_memory, n_outputs, 0, BP, 2)
    token = first + tl.arange(0, BP)
    inside = token < count
    rows = pick(source, memory, outputs, outputs, 2) + item * pick(source, memory_batch, outputs_batch, 0, 2)
    rows = rows + (token * pick(source, memory_row, outputs_row, 0, 2))[:, None]
    mean, rstd = norm_statistics(rows, inside, eps, D, BP, BK, ACC)
    place = item * (n_memory + n_outputs) + before
    tl.store(means + place + token, mean, mask=inside)
    tl.store(rstds + place + token, rstd, mask=inside)
    j = tl.arange(0, BJ)
    bias1 = tl.load(b1 + j, mask=j < J, other=0.0).to(ACC)
    if source == 0:
        dtype = hidden.dtype.element_ty
        h = tl.zeros((BP, BJ), ACC)
        for start in tl.range(0, D, BK):
            columns = start + tl.arange(0, BK)
            own = columns < D
            v = load_tile(rows, columns, inside, D, BK).to(ACC)
            scale = tl.load(norm_weight + columns, mask=own, other=0.0).to(ACC)
            shift = tl.load(norm_bias + columns, mask=own, other=0.0).to(ACC)
            x = (v - mean[:, None]) * rstd[:, None] * scale[None, :] + shift[None, :]
            weights = tl.load(w1 + j[None, :] * D + columns[:, None], mask=(j < J)[None, :] & own[:, None], other=0.0)
            h = dot(x.to(dtype), weights, h, PRECISION)
        low = (h + bias1[None, :]).to(dtype)
        at = hidden + item * n_memory * J + token[:, None] * J + j[None, :]
        tl.store(at, low, mask=inside[:, None] & (j < J)[None, :])
        slot = tl.arange(0, BS)
        at = w2 + slot[None, :] * J + j[:, None]
        weights = tl.load(at, mask=(slot < S)[None, :] & (j < J)[:, None], other=0.0)  # [BJ, BS]
        score = dot(gelu(low.to(ACC)).to(dtype), weights, tl.zeros((BP, BS), ACC), PRECISION)
        score += tl.load(b2 + slot, mask=slot < S, other=0.0).to(ACC)[None, :]
        at = scores + item * S * n_memory + slot[None, :] * n_memory + token[:, None]
        tl.store(at, score, mask=inside[:, None] & (slot < S)[None, :])
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        slope = tl.zeros((BJ,), ACC)
        for start in tl.range(0, D, BK):
            columns = start + tl.arange(0, BK)
            own = columns < D
            scale = tl.load(norm_weight + columns, mask=own, other=0.0).to(ACC)
            shift = tl.load(norm_bias + columns, mask=own, other=0.0).to(ACC)
            weights = tl.load(w1 + j[None, :] * D + columns[:, None], mask=(j < J)[None, :] & own[:, None], other=0.0)
            slope += tl.sum(weights.to(ACC) * scale[:, None], 0)
            bias1 += tl.sum(weights.to(ACC) * shift[:, None], 0)
        tl.store(through + j, slope, mask=j < J)
        tl.store(through + J + j, bias1, mask=j < J)


@triton.jit(do_not_specialize=LENGTHS)
def erase_add_fwd_tokens_kernel(
    outputs, means, rstds,
    norm_weight_e, norm_weight_a, norm_bias_e, norm_bias_a, w1_e, w1_a, b1_e, b1_a, w2_e, w2_a, b2_e, b2_a,
    channels_e, channels_a, mixed, parts,
    n_memory, outputs_batch, outputs_row,
    D: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    J_E: tl.constexpr, J_A: tl.constexpr, H_E: tl.constexpr, H_A: tl.constexpr, H: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BJ: tl.constexpr, BS: tl.constexpr, BH: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BD columns of one network's MLP over tokens: mixed [2, B, S, d]; parts [2, B, blocks, H, S] of the next layer."""
    item = tl.program_id(2).to(tl.int64)
    network = tl.program_id(1)
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    row, j, slot, h = tl.arange(0, BR), tl.arange(0, BJ), tl.arange(0, BS), tl.arange(0, BH)
    own, own_slot = columns < D, slot < S
    width = either(network, J_E, J_A)
    own_j, own_h = j < width, h < either(network, H_E, H_A)
    dtype = mixed.dtype.element_ty
    x = normalised_columns(outputs, means, rstds, columns, row, item, outputs_batch, outputs_row, n_memory, D, R, ACC)
    scale = tl.load(pick(network, norm_weight_e, norm_weight_a, norm_weight_a, 2) + columns, mask=own, other=0.0)
    shift = tl.load(pick(network, norm_bias_e, norm_bias_a, norm_bias_a, 2) + columns, mask=own, other=0.0)
    x = x * scale.to(ACC)[:, None] + shift.to(ACC)[:, None]
    at = pick(network, w1_e, w1_a, w1_a, 2) + j[None, :] * R + row[:, None]
    weights = tl.load(at, mask=own_j[None, :] & (row < R)[:, None], other=0.0)  # [BR, BJ]
    inner = dot(x.to(dtype), weights, tl.zeros((BD, BJ), ACC), PRECISION)
    inner += tl.load(pick(network, b1_e, b1_a, b1_a, 2) + j, mask=own_j, other=0.0).to(ACC)[None, :]
    at = pick(network, w2_e, w2_a, w2_a, 2) + slot[None, :] * width + j[:, None]
    weights = tl.load(at, mask=own_slot[None, :] & own_j[:, None], other=0.0)  # [BJ, BS]
    y = dot(gelu(inner).to(dtype), weights, tl.zeros((BD, BS), ACC), PRECISION)
    y += tl.load(pick(network, b2_e, b2_a, b2_a, 2) + slot, mask=own_slot, other=0.0).to(ACC)[None, :]
    low = tl.where(own[:, None], y, 0.0).to(dtype)
    line = network * tl.num_programs(2) + item
    at = mixed + line * S * D + slot[None, :] * D + columns[:, None]
    tl.store(at, low, mask=own_slot[None, :] & own[:, None])
    at = pick(network, channels_e, channels_a, channels_a, 2) + h[:, None] * D + columns[None, :]
    weights = tl.load(at, mask=own_h[:, None] & own[None, :], other=0.0)  # [BH, BD]
    part = dot(weights, low, tl.zeros((BH, BS), ACC), PRECISION)
    at = parts + (line * tl.num_programs(0) + tl.program_id(0)) * H * S + h[:, None] * S + slot[None, :]
    tl.store(at, part, mask=own_h[:, None] & own_slot[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def erase_add_fwd_channels_kernel(
    parts, b1_e, b1_a, w2_e, w2_a, b2_e, b2_a, inner, slots, blocks,
    D: tl.constexpr, S: tl.constexpr, H_E: tl.constexpr, H_A: tl.constexpr, H: tl.constexpr,
    OFFICIAL: tl.constexpr,
    BD: tl.constexpr, BS: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Hidden layer inner [2, B, H, S] of an MLP over channels, and BD columns of its result: slots [2, B, S, d]."""
    item = tl.program_id(2).to(tl.int64)
    network = tl.program_id(1)
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    slot, h = tl.arange(0, BS), tl.arange(0, BH)
    own, own_slot = columns < D, slot < S
    width = either(network, H_E, H_A)
    own_h = h < width
    kept = own_h[:, None] & own_slot[None, :]
    line = network * tl.num_programs(2) + item
    total = tl.zeros((BH, BS), ACC)
    for block in tl.range(0, blocks):
        at = parts + (line * blocks + block) * H * S + h[:, None] * S + slot[None, :]
        total += tl.load(at, mask=kept, other=0.0)
    total += tl.load(pick(network, b1_e, b1_a, b1_a, 2) + h, mask=own_h, other=0.0).to(ACC)[:, None]
    if tl.program_id(0) == 0:
        tl.store(
            inner + line * H * S + h[:, None] * S + slot[None, :], total, mask=(h < H)[:, None] & own_slot[None, :]
        )
    w2 = pick(network, w2_e, w2_a, w2_a, 2)
    weights = tl.load(w2 + columns[:, None] * width + h[None, :], mask=own[:, None] & own_h[None, :], other=0.0)
    vectors = dot(weights, gelu(total).to(weights.dtype), tl.zeros((BD, BS), ACC), PRECISION)
    vectors += tl.load(pick(network, b2_e, b2_a, b2_a, 2) + columns, mask=own, other=0.0).to(ACC)[:, None]
    if not OFFICIAL:
        vectors = tl.where(network == 0, sigmoid(vectors), vectors)
    at = slots + line * S * D + slot[None, :] * D + columns[:, None]
    tl.store(at, vectors, mask=own[:, None] & own_slot[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def erase_add_fwd_update_kernel(
    memory, scores, slots, weights, out, n_memory, tiles, items, memory_batch, memory_row,
    D: tl.constexpr, S: tl.constexpr, SPLITS: tl.constexpr, OFFICIAL: tl.constexpr,
    BP: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BD columns of the new memory for one split of its tokens; the softmax weights [B, S, s] on the way."""
    item = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    own = columns < D
    lane = tl.arange(0, BS)
    slot = tl.minimum(lane, S - 1)
    top = tl.full((BS,), float("-inf"), ACC)
    total = tl.zeros((BS,), ACC)
    for start in tl.range(0, n_memory, BN):
        token = start + tl.arange(0, BN)
        at = scores + item * S * n_memory + slot[:, None] * n_memory + token[None, :]
        score = tl.load(at, mask=(token < n_memory)[None, :], other=float("-inf")) * LOG2E
        new_top = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(score - new_top[:, None]), 1)
        top = new_top
    lse = top + tl.log2(total)
    for tile in tl.range(split * tiles // SPLITS, (split + 1) * tiles // SPLITS):
        token = tile * BP + tl.arange(0, BP)
        inside = token < n_memory
        at = memory + item * memory_batch + (token * memory_row)[:, None] + columns[None, :]
        kept = tl.load(at, mask=inside[:, None] & own[None, :], other=0.0).to(ACC)
        added = tl.zeros((BP, BD), ACC)
        for i in tl.range(0, S):
            line = item * S + i
            score = tl.load(scores + line * n_memory + token, mask=inside, other=0.0) * LOG2E
            w = tl.exp2(score - tl.sum(tl.where(lane == i, lse, 0.0), 0))
            if tl.program_id(0) == 0:
                tl.store(weights + line * n_memory + token, w, mask=inside)
            e = tl.load(slots + line * D + columns, mask=own, other=0.0)
            a = tl.load(slots + (items * S + line) * D + columns, mask=own, other=0.0)
            kept *= 1.0 - w[:, None] * e[None, :]
            added += w[:, None] * a[None, :]
        if OFFICIAL:
            added = 1.0 - added / S
        at = out + item * n_memory * D + token[:, None] * D + columns[None, :]
        tl.store(at, (kept + added).to(out.dtype.element_ty), mask=inside[:, None] & own[None, :])
