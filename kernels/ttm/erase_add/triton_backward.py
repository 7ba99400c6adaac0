"""Backward kernels of the erase-add write, in the order of their launches.

1. update: gradients of memory (its direct part), weights and slot vectors. The factors of the other slots are
   multiplied up, before and after a slot, never divided out: a factor may be zero.
2. channels, 3. tokens, 4. normed: back through both slot networks. 5. outputs: through their norms.
6. scores: through softmax and second layer of the score network. 7. select: through its first layer and norm.
8. sums: what was split, added up.
Sums over programs go through memory in a fixed order. Nothing is added atomically: the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirasol.kernels.ttm.erase_add.triton_common import LENGTHS, append, either, erased, normalised_columns
from mirasol.kernels.ttm.triton_common import dot, gelu, gelu_slope, load_tile, pick, tile_of


@triton.jit(do_not_specialize=LENGTHS)
def erase_add_bwd_update_kernel(
    grad_out, memory, weights, slots, channels_e, channels_a, grad_memory, weight_parts, slot_parts, products, parts,
    n_memory, tiles, items, memory_batch, memory_row,
    D: tl.constexpr, S: tl.constexpr, H_E: tl.constexpr, H_A: tl.constexpr, H: tl.constexpr,
    BLOCKS: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, OFFICIAL: tl.constexpr,
    BP: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Everything about GROUP slots, for BD columns and one split of the tokens.

    weight_parts [B, blocks, S, s]: columns' part of dw. slot_parts [splits, 2, B, S, d]: of erase, before the sigmoid,
    and add vectors. products [B, splits blocks, S]: sum of e de + a da, which over all columns is sum_s w dw. parts
    [2, B, splits blocks, H, S]: these columns' part of the gradient of the hidden layers over channels.
    """
    item = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    block = tl.program_id(0) // GROUPS
    first = (tl.program_id(0) % GROUPS) * GROUP
    columns = block * BD + tl.arange(0, BD)
    own = columns < D
    share = -S if OFFICIAL else 1  # of a slot in the sum that is added: one, or of a mean that is subtracted
    e, a, grad_e, grad_a = (), (), (), ()
    for i in tl.static_range(GROUP):
        vector = slots + (item * S + first + i) * D + columns
        exists = own & (first + i < S)
        e = append(e, tl.load(vector, mask=exists, other=0.0))
        a = append(a, tl.load(vector + items * S * D, mask=exists, other=0.0) / share)
        grad_e = append(grad_e, tl.zeros((BP, BD), ACC))
        grad_a = append(grad_a, tl.zeros((BP, BD), ACC))
    for tile in tl.range(split * tiles // SPLITS, (split + 1) * tiles // SPLITS):
        token = tile * BP + tl.arange(0, BP)
        inside = token < n_memory
        mask = inside[:, None] & own[None, :]
        place = token[:, None] * D + columns[None, :]
        grad = tl.load(grad_out + item * n_memory * D + place, mask=mask, other=0.0).to(ACC)
        at = memory + item * memory_batch + (token * memory_row)[:, None] + columns[None, :]
        pulled = grad * tl.load(at, mask=mask, other=0.0).to(ACC)
        kept = tl.full((BP, BD), 1.0, ACC)
        for j in tl.range(0, first):
            kept *= 1.0 - erased(weights, slots, j, token, inside, columns, items, item, n_memory, S, D)
        for j in tl.range(first + GROUP, S):
            kept *= 1.0 - erased(weights, slots, j, token, inside, columns, items, item, n_memory, S, D)
        w, before = (), ()
        for i in tl.static_range(GROUP):
            at = weights + (item * S + first + i) * n_memory + token
            w = append(w, tl.load(at, mask=inside & (first + i < S), other=0.0))
            before = append(before, kept)
            kept *= 1.0 - w[i][:, None] * e[i][None, :]
        if first == 0:
            tl.store(
                grad_memory + item * n_memory * D + place, (grad * kept).to(grad_memory.dtype.element_ty), mask=mask
            )
        after = pulled
        new_e, new_a = (), ()
        for i in tl.static_range(GROUP - 1, -1, -1):
            grad_erased = before[i] * after
            after *= 1.0 - w[i][:, None] * e[i][None, :]
            new_e = append(new_e, grad_e[i] + w[i][:, None] * grad_erased)
            new_a = append(new_a, grad_a[i] + w[i][:, None] * grad)
            grad_w = tl.sum(grad * a[i][None, :] - grad_erased * e[i][None, :], 1)
            at = weight_parts + ((item * BLOCKS + block) * S + first + i) * n_memory + token
            tl.store(at, grad_w, mask=inside & (first + i < S))
        grad_e, grad_a = new_e[::-1], new_a[::-1]

    lane, h = tl.arange(0, BS), tl.arange(0, BH)
    part = split * BLOCKS + block
    all_e, all_a = tl.zeros((BD, BS), ACC), tl.zeros((BD, BS), ACC)
    for i in tl.static_range(GROUP):
        line = item * S + first + i
        total_e, total_a = -tl.sum(grad_e[i], 0), tl.sum(grad_a[i], 0)
        product = tl.sum(e[i] * total_e + a[i] * total_a, 0)
        if not OFFICIAL:
            total_e *= e[i] * (1.0 - e[i])
        total_a /= share
        if first + i < S:
            tl.store(products + (item * SPLITS * BLOCKS + part) * S + first + i, product)
            vector = slot_parts + (split * 2 * items * S + line) * D + columns
            tl.store(vector, total_e, mask=own)
            tl.store(vector + items * S * D, total_a, mask=own)
        all_e = tl.where((lane == i)[None, :], total_e[:, None], all_e)
        all_a = tl.where((lane == i)[None, :], total_a[:, None], all_a)
    for network in tl.static_range(2):
        width = H_E if network == 0 else H_A
        vectors = all_e if network == 0 else all_a
        at = (channels_e if network == 0 else channels_a) + columns[None, :] * width + h[:, None]
        layer = tl.load(at, mask=(h < width)[:, None] & own[None, :], other=0.0)  # [BH, BD]
        result = dot(layer, vectors.to(layer.dtype), tl.zeros((BH, BS), ACC), PRECISION)
        line = ((network * items + item) * SPLITS * BLOCKS + part) * H
        at = parts + line * S + h[:, None] * S + (first + lane)[None, :]
        tl.store(at, result, mask=(h < width)[:, None] & (lane < tl.minimum(GROUP, S - first))[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def erase_add_bwd_channels_kernel(
    parts, slot_parts, inner, mixed, w1_e, w1_a, w2_e, w2_a, grad_mixed, sums, items, blocks, splits,
    D: tl.constexpr, S: tl.constexpr, H_E: tl.constexpr, H_A: tl.constexpr, H: tl.constexpr,
    SPLITS: tl.constexpr, RECORD: tl.constexpr,
    BD: tl.constexpr, BS: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through one network's MLP over channels for BD columns, over one split of the batch.

    sums [splits, 2, RECORD] begins with the gradients of w1 [H, d], b1 [H], w2 [d, H], b2 [d].
    """
    split, network = tl.program_id(2).to(tl.int64), tl.program_id(1)
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    slot, h = tl.arange(0, BS), tl.arange(0, BH)
    own, own_slot = columns < D, slot < S
    width = either(network, H_E, H_A)
    own_h = h < width
    dtype = mixed.dtype.element_ty
    w1 = pick(network, w1_e, w1_a, w1_a, 2)
    w1 = tl.load(w1 + h[None, :] * D + columns[:, None], mask=own_h[None, :] & own[:, None], other=0.0)  # [BD, BH]
    grad_w1, grad_w2 = tl.zeros((BH, BD), ACC), tl.zeros((BD, BH), ACC)
    grad_b1, grad_b2 = tl.zeros((BH,), ACC), tl.zeros((BD,), ACC)
    for item in tl.range(split * items // SPLITS, (split + 1) * items // SPLITS):
        line = network * items + item
        kept = own_h[:, None] & own_slot[None, :]
        grad_h = tl.zeros((BH, BS), ACC)
        for block in tl.range(0, blocks):
            at = parts + (line * blocks + block) * H * S + h[:, None] * S + slot[None, :]
            grad_h += tl.load(at, mask=kept, other=0.0)
        hidden = tl.load(inner + line * H * S + h[:, None] * S + slot[None, :], mask=kept, other=0.0)
        grad_h *= gelu_slope(hidden)
        active = gelu(hidden).to(dtype)
        place = slot[None, :] * D + columns[:, None]
        mask = own[:, None] & own_slot[None, :]
        grad = tl.zeros((BD, BS), ACC)
        for part in tl.range(0, splits):
            at = slot_parts + (part * 2 * items + line) * S * D + place
            grad += tl.load(at, mask=mask, other=0.0)
        y = tl.load(mixed + line * S * D + place, mask=mask, other=0.0)  # [BD, BS]
        low = grad_h.to(dtype)
        grad_w2 = dot(grad.to(dtype), tl.trans(active), grad_w2, PRECISION)
        grad_w1 = dot(low, tl.trans(y), grad_w1, PRECISION)
        grad_y = dot(w1, low, tl.zeros((BD, BS), ACC), PRECISION)
        tl.store(grad_mixed + line * S * D + place, grad_y.to(dtype), mask=mask)
        grad_b2 += tl.sum(grad, 1)
        grad_b1 += tl.sum(grad_h, 1)
    at = sums + (split * 2 + network) * RECORD
    mask = (h < H)[:, None] & own[None, :]
    tl.store(at + h[:, None] * D + columns[None, :], grad_w1, mask=mask)
    tl.store(at + H * D + H + columns[:, None] * H + h[None, :], grad_w2, mask=tl.trans(mask))
    tl.store(at + 2 * H * D + H + columns, grad_b2, mask=own)
    if tl.program_id(0) == 0:
        tl.store(at + H * D + h, grad_b1, mask=h < H)


@triton.jit(do_not_specialize=LENGTHS)
def erase_add_bwd_tokens_kernel(
    outputs, means, rstds, grad_mixed,
    norm_weight_e, norm_weight_a, norm_bias_e, norm_bias_a, w1_e, w1_a, b1_e, b1_a, w2_e, w2_a, grad_hidden, sums,
    n_memory, items, outputs_batch, outputs_row,
    D: tl.constexpr, R: tl.constexpr, S: tl.constexpr, J_E: tl.constexpr, J_A: tl.constexpr, J: tl.constexpr,
    SPLITS: tl.constexpr, RECORD: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BJ: tl.constexpr, BS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through the second layer of one network's MLP over tokens for BD columns, over one split of the batch.

    Leaves the gradient of the hidden layer [2, B, J, d]. sums [splits blocks, 2, RECORD] begins with the gradients of
    w2 [S, J], b2 [S].
    """
    split, network = tl.program_id(2).to(tl.int64), tl.program_id(1)
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    row, j, slot = tl.arange(0, BR), tl.arange(0, BJ), tl.arange(0, BS)
    own, own_slot = columns < D, slot < S
    width = either(network, J_E, J_A)
    own_j = j < width
    dtype = grad_mixed.dtype.element_ty
    scale = tl.load(pick(network, norm_weight_e, norm_weight_a, norm_weight_a, 2) + columns, mask=own, other=0.0)
    shift = tl.load(pick(network, norm_bias_e, norm_bias_a, norm_bias_a, 2) + columns, mask=own, other=0.0)
    layer = pick(network, w1_e, w1_a, w1_a, 2) + j[None, :] * R + row[:, None]
    w1 = tl.load(layer, mask=own_j[None, :] & (row < R)[:, None], other=0.0)  # [BR, BJ]
    b1 = tl.load(pick(network, b1_e, b1_a, b1_a, 2) + j, mask=own_j, other=0.0).to(ACC)
    layer = pick(network, w2_e, w2_a, w2_a, 2) + slot[:, None] * width + j[None, :]
    w2 = tl.load(layer, mask=own_slot[:, None] & own_j[None, :], other=0.0)  # [BS, BJ]
    grad_w2, grad_b2 = tl.zeros((BS, BJ), ACC), tl.zeros((BS,), ACC)
    for item in tl.range(split * items // SPLITS, (split + 1) * items // SPLITS):
        line = network * items + item
        x = normalised_columns(
            outputs, means, rstds, columns, row, item, outputs_batch, outputs_row, n_memory, D, R, ACC
        )
        low = (x * scale.to(ACC)[:, None] + shift.to(ACC)[:, None]).to(dtype)  # [BD, BR]
        hidden = dot(low, w1, tl.zeros((BD, BJ), ACC), PRECISION) + b1[None, :]
        at = grad_mixed + line * S * D + slot[None, :] * D + columns[:, None]
        grad_y = tl.load(at, mask=own_slot[None, :] & own[:, None], other=0.0)  # [BD, BS]
        grad_w2 = dot(tl.trans(grad_y), gelu(hidden).to(dtype), grad_w2, PRECISION)
        grad_b2 += tl.sum(grad_y.to(ACC), 0)
        grad_h = dot(grad_y, w2, tl.zeros((BD, BJ), ACC), PRECISION) * gelu_slope(hidden)
        at = grad_hidden + line * J * D + j[None, :] * D + columns[:, None]
        tl.store(at, grad_h.to(dtype), mask=(j < J)[None, :] & own[:, None])
    at = sums + ((split * tl.num_programs(0) + tl.program_id(0)) * 2 + network) * RECORD
    tl.store(at + slot[:, None] * J + j[None, :], grad_w2, mask=own_slot[:, None] & (j < J)[None, :])
    tl.store(at + S * J + slot, grad_b2, mask=own_slot)


@triton.jit(do_not_specialize=LENGTHS)
def erase_add_bwd_normed_kernel(
    outputs, means, rstds, grad_hidden, norm_weight_e, norm_weight_a, norm_bias_e, norm_bias_a, w1_e, w1_a,
    grad_normed, norm_sums, sums,
    n_memory, items, outputs_batch, outputs_row,
    D: tl.constexpr, R: tl.constexpr, J_E: tl.constexpr, J_A: tl.constexpr, J: tl.constexpr,
    SPLITS: tl.constexpr, NORM_RECORD: tl.constexpr, RECORD: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BJ: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through the first layer of one network's MLP over tokens for BD columns, over one split of the batch.

    grad_normed [2, B, r, d] is the gradient of the normalised outputs. norm_sums [splits, 2, NORM_RECORD] begins with
    the gradients of the norm's weight and bias, sums [splits blocks, 2, RECORD] with those of w1 [J, r], b1 [J].
    """
    split, network = tl.program_id(2).to(tl.int64), tl.program_id(1)
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    row, j = tl.arange(0, BR), tl.arange(0, BJ)
    own, own_row = columns < D, row < R
    own_j = j < either(network, J_E, J_A)
    dtype = grad_hidden.dtype.element_ty
    scale = tl.load(pick(network, norm_weight_e, norm_weight_a, norm_weight_a, 2) + columns, mask=own, other=0.0)
    shift = tl.load(pick(network, norm_bias_e, norm_bias_a, norm_bias_a, 2) + columns, mask=own, other=0.0)
    layer = pick(network, w1_e, w1_a, w1_a, 2) + j[:, None] * R + row[None, :]
    w1 = tl.load(layer, mask=own_j[:, None] & own_row[None, :], other=0.0)  # [BJ, BR]
    grad_w1, grad_b1 = tl.zeros((BJ, BR), ACC), tl.zeros((BJ,), ACC)
    grad_scale, grad_shift = tl.zeros((BD,), ACC), tl.zeros((BD,), ACC)
    for item in tl.range(split * items // SPLITS, (split + 1) * items // SPLITS):
        line = network * items + item
        at = grad_hidden + line * J * D + j[:, None] * D + columns[None, :]
        grad_h = tl.load(at, mask=own_j[:, None] & own[None, :], other=0.0)  # [BJ, BD]
        grad_b1 += tl.sum(grad_h.to(ACC), 1)
        x = normalised_columns(
            outputs, means, rstds, columns, row, item, outputs_batch, outputs_row, n_memory, D, R, ACC
        )
        low = (x * scale.to(ACC)[:, None] + shift.to(ACC)[:, None]).to(dtype)  # [BD, BR]
        grad_w1 = dot(grad_h, low, grad_w1, PRECISION)
        grad_x = dot(tl.trans(grad_h), w1, tl.zeros((BD, BR), ACC), PRECISION)
        grad_shift += tl.sum(grad_x, 1)
        grad_scale += tl.sum(grad_x * x, 1)
        at = grad_normed + line * R * D + row[None, :] * D + columns[:, None]
        tl.store(at, grad_x.to(dtype), mask=own_row[None, :] & own[:, None])
    at = norm_sums + (split * 2 + network) * NORM_RECORD + columns
    tl.store(at, grad_scale, mask=own)
    tl.store(at + D, grad_shift, mask=own)
    at = sums + ((split * tl.num_programs(0) + tl.program_id(0)) * 2 + network) * RECORD
    tl.store(at + j[:, None] * R + row[None, :], grad_w1, mask=(j < J)[:, None] & own_row[None, :])
    tl.store(at + J * R + j, grad_b1, mask=j < J)


@triton.jit(do_not_specialize=LENGTHS)
def erase_add_bwd_outputs_kernel(
    outputs, means, rstds, grad_normed, norm_weight_e, norm_weight_a, grad_outputs,
    n_memory, items, outputs_batch, outputs_row,
    D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One row of the outputs: back through the norms of both networks, which share x."""
    item = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0)
    columns = tl.arange(0, BD)
    own = columns < D
    place = item * (n_memory + R) + n_memory + row
    rstd = tl.load(rstds + place)
    v = tl.load(outputs + item * outputs_batch + row * outputs_row + columns, mask=own, other=0.0).to(ACC)
    x = (v - tl.load(means + place)) * rstd
    grad = tl.zeros((BD,), ACC)
    for network in tl.static_range(2):
        scale = tl.load((norm_weight_e if network == 0 else norm_weight_a) + columns, mask=own, other=0.0).to(ACC)
        at = grad_normed + ((network * items + item) * R + row) * D + columns
        grad += scale * tl.load(at, mask=own, other=0.0).to(ACC)
    grad = rstd * (grad - tl.sum(grad, 0) / D - x * (tl.sum(grad * x, 0) / D))
    at = grad_outputs + (item * R + row) * D + columns
    tl.store(at, grad.to(grad_outputs.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=LENGTHS)
def erase_add_bwd_scores_kernel(
    hidden, weights, weight_parts, products, w2, through, grad_hidden, pulls, sums,
    n_memory, tiles, items, blocks, parts,
    D: tl.constexpr, J: tl.constexpr, S: tl.constexpr,
    SPLITS: tl.constexpr, TOKEN_SPLITS: tl.constexpr, RECORD: tl.constexpr,
    BP: tl.constexpr, BJ: tl.constexpr, BS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through softmax and second layer of the score network, for a split of the batch and one of the tokens.

    Leaves the gradient of the hidden layer [B, s, J] and pulls [B, 2, s]: the means over the channels of the gradient
    of x, plain and times x, which the norm takes off. sums [splits, RECORD] begins with the gradients of w2 [S, J],
    b2 [S].
    """
    split, token_split = tl.program_id(1).to(tl.int64), tl.program_id(0)
    j, slot = tl.arange(0, BJ), tl.arange(0, BS)
    own_j, own_slot = j < J, slot < S
    dtype = hidden.dtype.element_ty
    w2 = tl.load(w2 + slot[:, None] * J + j[None, :], mask=own_slot[:, None] & own_j[None, :], other=0.0)  # [BS, BJ]
    grad_w2, grad_b2 = tl.zeros((BS, BJ), ACC), tl.zeros((BS,), ACC)
    for item in tl.range(split * items // SPLITS, (split + 1) * items // SPLITS):
        delta = tl.zeros((BS,), ACC)
        for part in tl.range(0, parts):
            delta += tl.load(products + (item * parts + part) * S + slot, mask=own_slot, other=0.0)
        for tile in tl.range(token_split * tiles // TOKEN_SPLITS, (token_split + 1) * tiles // TOKEN_SPLITS):
            token = tile * BP + tl.arange(0, BP)
            inside = token < n_memory
            kept = inside[:, None] & own_slot[None, :]
            place = slot[None, :] * n_memory + token[:, None]
            grad_w = tl.zeros((BP, BS), ACC)
            for block in tl.range(0, blocks):
                at = weight_parts + (item * blocks + block) * S * n_memory + place
                grad_w += tl.load(at, mask=kept, other=0.0)
            w = tl.load(weights + item * S * n_memory + place, mask=kept, other=0.0)
            grad_scores = w * (grad_w - delta[None, :])
            grad_b2 += tl.sum(grad_scores, 0)
            low = grad_scores.to(dtype)
            place_j = token[:, None] * J + j[None, :]
            own = inside[:, None] & own_j[None, :]
            h = tl.load(hidden + item * n_memory * J + place_j, mask=own, other=0.0).to(ACC)
            grad_w2 = dot(tl.trans(low), gelu(h).to(dtype), grad_w2, PRECISION)
            grad_h = dot(low, w2, tl.zeros((BP, BJ), ACC), PRECISION) * gelu_slope(h)
            tl.store(grad_hidden + item * n_memory * J + place_j, grad_h.to(dtype), mask=own)
            # loaded again: kept over the products above it would spill
            h = tl.load(hidden + item * n_memory * J + place_j, mask=own, other=0.0).to(ACC)
            slope = tl.load(through + j, mask=own_j, other=0.0)
            level = tl.load(through + J + j, mask=own_j, other=0.0)
            pull = pulls + item * 2 * n_memory + token
            tl.store(pull, tl.sum(grad_h * slope[None, :], 1) / D, mask=inside)
            tl.store(pull + n_memory, tl.sum(grad_h * (h - level[None, :]), 1) / D, mask=inside)
    at = sums + (split * TOKEN_SPLITS + token_split) * RECORD
    tl.store(at + slot[:, None] * J + j[None, :], grad_w2, mask=own_slot[:, None] & own_j[None, :])
    tl.store(at + S * J + slot, grad_b2, mask=own_slot)


@triton.jit(do_not_specialize=LENGTHS)
def erase_add_bwd_select_kernel(
    memory, means, rstds, grad_hidden, pulls, norm_weight, norm_bias, w1, grad_memory, sums, norm_sums,
    n_memory, n_outputs, tiles, items, memory_batch, memory_row,
    D: tl.constexpr, J: tl.constexpr, SPLITS: tl.constexpr, TOKEN_SPLITS: tl.constexpr, RECORD: tl.constexpr,
    BP: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through first layer and norm of the memory, for BD columns, a split of the batch and one of its tokens.

    Adds to grad_memory [B, s, d]. sums [splits, RECORD] begins with the gradients of w1 [J, d], b1 [J], norm_sums with
    those of the norm's weight and bias [d].
    """
    split, token_split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    j = tl.arange(0, BJ)
    own, own_j = columns < D, j < J
    dtype = grad_hidden.dtype.element_ty
    w1 = tl.load(w1 + j[:, None] * D + columns[None, :], mask=own_j[:, None] & own[None, :], other=0.0)  # [BJ, BD]
    grad_w1, grad_b1 = tl.zeros((BJ, BD), ACC), tl.zeros((BJ,), ACC)
    grad_scale, grad_shift = tl.zeros((BD,), ACC), tl.zeros((BD,), ACC)
    for item in tl.range(split * items // SPLITS, (split + 1) * items // SPLITS):
        for tile in tl.range(token_split * tiles // TOKEN_SPLITS, (token_split + 1) * tiles // TOKEN_SPLITS):
            token = tile * BP + tl.arange(0, BP)
            inside = token < n_memory
            place = item * (n_memory + n_outputs)
            mean = tl.load(means + place + token, mask=inside, other=0.0)
            rstd = tl.load(rstds + place + token, mask=inside, other=0.0)
            rows = memory + item * memory_batch + (token * memory_row)[:, None]
            x = (load_tile(rows, columns, inside, D, BD).to(ACC) - mean[:, None]) * rstd[:, None]
            scale = tl.load(norm_weight + columns, mask=own, other=0.0).to(ACC)
            shift = tl.load(norm_bias + columns, mask=own, other=0.0).to(ACC)
            normed = (x * scale[None, :] + shift[None, :]).to(dtype)
            at = grad_hidden + item * n_memory * J + token[:, None] * J + j[None, :]
            grad_h = tl.load(at, mask=inside[:, None] & own_j[None, :], other=0.0)  # [BP, BJ]
            grad_b1 += tl.sum(grad_h.to(ACC), 0)
            grad_w1 = dot(tl.trans(grad_h), normed, grad_w1, PRECISION)
            grad_x = dot(grad_h, w1, tl.zeros((BP, BD), ACC), PRECISION)
            grad_shift += tl.sum(grad_x, 0)
            grad_scale += tl.sum(grad_x * x, 0)
            pull = tl.load(pulls + item * 2 * n_memory + token, mask=inside, other=0.0)
            tilt = tl.load(pulls + item * 2 * n_memory + n_memory + token, mask=inside, other=0.0)
            grad_x = rstd[:, None] * (grad_x * scale[None, :] - pull[:, None] - x * tilt[:, None])
            target = grad_memory + item * n_memory * D + token[:, None] * D + columns[None, :]
            mask = inside[:, None] & own[None, :]
            grad_x += tl.load(target, mask=mask, other=0.0).to(ACC)
            tl.store(target, grad_x.to(grad_memory.dtype.element_ty), mask=mask)
    record = (split * TOKEN_SPLITS + token_split) * RECORD
    tl.store(sums + record + j[:, None] * D + columns[None, :], grad_w1, mask=own_j[:, None] & own[None, :])
    if tl.program_id(0) == 0:
        tl.store(sums + record + J * D + j, grad_b1, mask=own_j)
    tl.store(norm_sums + record + columns, grad_scale, mask=own)
    tl.store(norm_sums + record + D + columns, grad_shift, mask=own)


@triton.jit(do_not_specialize=LENGTHS)
def erase_add_bwd_sums_kernel(
    select, by_split, by_program, out, n_select, n_split, n_program, parts_select, parts_split, parts_program,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of the flat gradient of all parameters: records of three kinds, each added up over its parts."""
    source, first, count, before = tile_of(tl.program_id(0), n_select, n_split, n_program, BLOCK, 3)
    parts = pick(source, parts_select, parts_split, parts_program, 3)
    place = first + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    for start in tl.range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        at = pick(source, select, by_split, by_program, 3) + part[:, None].to(tl.int64) * count + place[None, :]
        total += tl.sum(tl.load(at, mask=(part < parts)[:, None] & (place < count)[None, :], other=0.0), 0)
    tl.store(out + before + place, total.to(out.dtype.element_ty), mask=place < count)
