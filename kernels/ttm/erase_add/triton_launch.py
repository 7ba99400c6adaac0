"""Launches of the erase-add kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from mirasol.kernels.core.device import interpreted, on_device, target
from mirasol.kernels.core.precision import accumulate_dtype
from mirasol.kernels.ttm.configs import Tile, splits
from mirasol.kernels.ttm.erase_add.configs import Sides, Tiles, Widths, sides, tiles, widths_of
from mirasol.kernels.ttm.erase_add.records import Records, unflatten
from mirasol.kernels.ttm.erase_add.triton_backward import (
    erase_add_bwd_channels_kernel,
    erase_add_bwd_normed_kernel,
    erase_add_bwd_outputs_kernel,
    erase_add_bwd_scores_kernel,
    erase_add_bwd_select_kernel,
    erase_add_bwd_sums_kernel,
    erase_add_bwd_tokens_kernel,
    erase_add_bwd_update_kernel,
)
from mirasol.kernels.ttm.erase_add.triton_forward import (
    erase_add_fwd_channels_kernel,
    erase_add_fwd_select_kernel,
    erase_add_fwd_tokens_kernel,
    erase_add_fwd_update_kernel,
)
from mirasol.kernels.ttm.params import EraseAddParams
from mirasol.kernels.ttm.reference import NORM_EPS


@dataclass(frozen=True)
class Call:
    """One call's tensors as the kernels take them."""

    memory: torch.Tensor  # [B, s, d]
    outputs: torch.Tensor  # [B, r, d]
    params: EraseAddParams
    widths: Widths
    sides: Sides
    tiles: Tiles

    @staticmethod
    def of(memory: torch.Tensor, outputs: torch.Tensor, flat: Sequence[torch.Tensor], official: bool) -> Call:
        """Strides are taken as they are; a last dimension that is not contiguous costs a copy of that tensor."""
        params = unflatten([p.contiguous() for p in flat], official)
        widths = widths_of(params)
        side = sides(widths, memory.element_size(), target(memory.device))
        return Call(
            memory if memory.stride(-1) == 1 else memory.contiguous(),
            outputs if outputs.stride(-1) == 1 else outputs.contiguous(),
            params,
            widths,
            side,
            tiles(side, memory.element_size(), target(memory.device)),
        )

    @property
    def batch(self) -> int:
        return self.memory.shape[0]

    @property
    def lengths(self) -> tuple[int, int]:
        """s, r."""
        return self.memory.shape[1], self.outputs.shape[1]

    def blocks(self, tile: Tile) -> int:
        return triton.cdiv(self.widths.d, tile.columns)

    def splits(self, programs: int, work: int) -> int:
        return splits(programs, work, target(self.memory.device))

    def empty(self, *shape: int) -> torch.Tensor:
        """New memory in the precision of sums."""
        return self.memory.new_empty(shape, dtype=accumulate_dtype(self.memory.dtype))

    def both(self, part: str, *fields: str) -> list[torch.Tensor]:
        """Parameters of the erase and of the add network in turn: part "tokens", "channels" or "norm"."""
        found = []
        for field in fields:
            for network in ("erase", "add"):
                if part == "norm":
                    found.append(getattr(self.params, f"{network}_norm_{field}"))
                else:
                    found.append(getattr(getattr(self.params, f"{network}_{part}"), field))
        return found

    def hidden(self, part: str) -> dict[str, int]:
        """Hidden units of the erase and of the add network: "tokens" (J) or "channels" (H)."""
        letter = {"tokens": "J", "channels": "H"}[part]
        w1 = self.both(part, "w1")
        return {f"{letter}_E": w1[0].shape[0], f"{letter}_A": w1[1].shape[0]}

    def constants(self, tile: Tile, *, product: bool = True) -> dict[str, Any]:
        """What every kernel is compiled for."""
        acc = tl.float64 if accumulate_dtype(self.memory.dtype) == torch.float64 else tl.float32
        found = dict(D=self.widths.d, ACC=acc, num_warps=tile.warps, num_stages=tile.stages)
        if product:
            found["PRECISION"] = "tf32" if torch.backends.cuda.matmul.allow_tf32 and not interpreted() else "ieee"
            if target(self.memory.device).kind == "cuda":
                found["maxnreg"] = 255  # unasked, ptxas takes fewer and spills what the outer loops hold
        return found


@dataclass(frozen=True)
class Saved:
    """What backward needs of forward, in the order in which the operator returns it.

    weights [B, S, s], slots [2, B, S, d] (erase after the sigmoid, add), inner [2, B, H, S] the hidden layers over
    channels, means and rstds [B, s + r] and through [2, J] in the precision of sums; hidden [B, s, J] and mixed
    [2, B, S, d], between the MLPs of a network, in the dtype of the tokens.
    """

    weights: torch.Tensor
    slots: torch.Tensor
    inner: torch.Tensor
    means: torch.Tensor
    rstds: torch.Tensor
    through: torch.Tensor
    hidden: torch.Tensor
    mixed: torch.Tensor


def forward(
    memory: torch.Tensor, outputs: torch.Tensor, flat: Sequence[torch.Tensor], official: bool
) -> tuple[torch.Tensor, ...]:
    """The new memory [B, s, d] and the tensors of `Saved`."""
    call = Call.of(memory, outputs, flat, official)
    with on_device(call.memory):
        means, rstds, through, hidden, scores = _select(call)
        mixed, parts = _tokens(call, means, rstds)
        inner, slots = _channels(call, parts)
        out, weights = _update(call, scores, slots)
    return out, weights, slots, inner, means, rstds, through, hidden, mixed


def _select(call: Call) -> tuple[torch.Tensor, ...]:
    (s, r), select, tile = call.lengths, call.params.select, call.tiles.select
    j, slots = call.widths.select, call.widths.slots
    means, rstds = call.empty(call.batch, s + r), call.empty(call.batch, s + r)
    through, scores = call.empty(2, j), call.empty(call.batch, slots, s)
    hidden = call.memory.new_empty(call.batch, s, j)
    memory, outputs = call.memory, call.outputs
    erase_add_fwd_select_kernel[(triton.cdiv(s, tile.tokens) + triton.cdiv(r, tile.tokens), call.batch)](
        memory, outputs, call.params.select_norm_weight, call.params.select_norm_bias, *select,
        means, rstds, hidden, scores, through,
        s, r, memory.stride(0), outputs.stride(0), memory.stride(1), outputs.stride(1), NORM_EPS,
        J=j, S=slots, BP=tile.tokens, BK=tile.columns, BJ=call.sides.select, BS=call.sides.slots,
        **call.constants(tile),
    )  # fmt: skip
    return means, rstds, through, hidden, scores


def _tokens(call: Call, means: torch.Tensor, rstds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The MLPs over tokens, and the parts of the product with the next layer [2, B, blocks, H, S]."""
    (s, r), tile, side, w = call.lengths, call.tiles.tokens, call.sides, call.widths
    blocks = call.blocks(tile)
    mixed = call.memory.new_empty(2, call.batch, w.slots, w.d)
    parts = call.empty(2, call.batch, blocks, w.channels, w.slots)
    erase_add_fwd_tokens_kernel[(blocks, 2, call.batch)](
        call.outputs, means, rstds, *call.both("norm", "weight", "bias"), *call.both("tokens", "w1", "b1", "w2", "b2"),
        *call.both("channels", "w1"), mixed, parts, s, call.outputs.stride(0), call.outputs.stride(1),
        R=r, S=w.slots, H=w.channels, **call.hidden("tokens"), **call.hidden("channels"),
        BD=tile.columns, BR=side.read, BJ=side.tokens, BS=side.slots, BH=side.channels,
        **call.constants(tile),
    )  # fmt: skip
    return mixed, parts


def _channels(call: Call, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tile, w = call.tiles.channels, call.widths
    inner = call.empty(2, call.batch, w.channels, w.slots)
    slots = call.empty(2, call.batch, w.slots, w.d)
    erase_add_fwd_channels_kernel[(call.blocks(tile), 2, call.batch)](
        parts, *call.both("channels", "b1", "w2", "b2"), inner, slots, parts.shape[2],
        S=w.slots, H=w.channels, **call.hidden("channels"), OFFICIAL=call.params.official,
        BD=tile.columns, BS=call.sides.slots, BH=call.sides.channels, **call.constants(tile),
    )  # fmt: skip
    return inner, slots


def _update(call: Call, scores: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tile, s, blocks = call.tiles.update, call.lengths[0], call.blocks(call.tiles.update)
    steps = triton.cdiv(s, tile.tokens)
    parts = call.splits(blocks * call.batch, steps)
    out, weights = call.memory.new_empty(call.memory.shape), torch.empty_like(scores)
    erase_add_fwd_update_kernel[(blocks, parts, call.batch)](
        call.memory, scores, slots, weights, out, s, steps, call.batch, call.memory.stride(0), call.memory.stride(1),
        S=call.widths.slots, SPLITS=parts, OFFICIAL=call.params.official, BP=tile.tokens, BD=tile.columns,
        BN=128, BS=triton.next_power_of_2(call.widths.slots), **call.constants(tile, product=False),
    )  # fmt: skip
    return out, weights


def backward(
    grad_out: torch.Tensor,
    saved: Sequence[torch.Tensor],
    memory: torch.Tensor,
    outputs: torch.Tensor,
    flat: Sequence[torch.Tensor],
    official: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of memory and outputs, and those of all parameters as `Records` lay them out."""
    call, kept = Call.of(memory, outputs, flat, official), Saved(*saved)
    with on_device(call.memory):
        found = _update_backward(call, kept, grad_out.contiguous())
        records = Records(call.widths)
        by_split, grad_mixed = _channels_backward(call, kept, found, records)
        by_program, grad_outputs = _tokens_backward(call, kept, grad_mixed, by_split, records)
        select = _select_backward(call, kept, found, records)
        grads = _sums(call, select, by_split, by_program)
    return found.grad_memory, grad_outputs, grads


@dataclass(frozen=True)
class Updated:
    """What the update's backward leaves for the others, see its kernel."""

    grad_memory: torch.Tensor
    weight_parts: torch.Tensor
    slot_parts: torch.Tensor
    products: torch.Tensor
    parts: torch.Tensor


def _update_backward(call: Call, kept: Saved, grad_out: torch.Tensor) -> Updated:
    tile, w, s, batch = call.tiles.update_back, call.widths, call.lengths[0], call.batch
    blocks, steps = call.blocks(tile), triton.cdiv(s, tile.tokens)
    groups = triton.cdiv(w.slots, call.sides.group)
    parts = call.splits(blocks * groups * batch, steps)
    found = Updated(
        call.memory.new_empty(call.memory.shape),
        call.empty(batch, blocks, w.slots, s),
        call.empty(parts, 2, batch, w.slots, w.d),
        call.empty(batch, parts * blocks, w.slots),
        call.empty(2, batch, parts * blocks, w.channels, w.slots),
    )
    erase_add_bwd_update_kernel[(blocks * groups, parts, batch)](
        grad_out, call.memory, kept.weights, kept.slots, *call.both("channels", "w2"),
        found.grad_memory, found.weight_parts, found.slot_parts, found.products, found.parts,
        s, steps, batch, call.memory.stride(0), call.memory.stride(1),
        S=w.slots, H=w.channels, **call.hidden("channels"), BLOCKS=blocks, SPLITS=parts,
        GROUPS=groups, GROUP=call.sides.group, OFFICIAL=call.params.official, BP=tile.tokens, BD=tile.columns,
        BS=call.sides.slots, BH=call.sides.channels, **call.constants(tile),
    )  # fmt: skip
    return found


def _channels_backward(call: Call, kept: Saved, found: Updated, records: Records) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the parameters over channels [splits, 2, record], and the gradient of `mixed`."""
    tile, w, batch = call.tiles.channels_back, call.widths, call.batch
    blocks = call.blocks(tile)
    parts = call.splits(2 * blocks, batch)
    sums = call.empty(parts, 2, records.by_split)
    grad_mixed = torch.empty_like(kept.mixed)
    erase_add_bwd_channels_kernel[(blocks, 2, parts)](
        found.parts, found.slot_parts, kept.inner, kept.mixed, *call.both("channels", "w1", "w2"), grad_mixed, sums,
        batch, found.parts.shape[2], found.slot_parts.shape[0],
        S=w.slots, H=w.channels, **call.hidden("channels"), SPLITS=parts, RECORD=records.by_split,
        BD=tile.columns, BS=call.sides.slots, BH=call.sides.channels, **call.constants(tile),
    )  # fmt: skip
    return sums, grad_mixed


def _tokens_backward(
    call: Call, kept: Saved, grad_mixed: torch.Tensor, by_split: torch.Tensor, records: Records
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the parameters over tokens [splits blocks, 2, record] and the gradient of the outputs.

    Those of the norms go into `by_split`, behind those over channels.
    """
    tile, w, batch, (s, r) = call.tiles.tokens_back, call.widths, call.batch, call.lengths
    blocks, parts, outputs = call.blocks(tile), by_split.shape[0], call.outputs
    sums = call.empty(parts * blocks, 2, records.by_program)
    grad_hidden, grad_normed = outputs.new_empty(2, batch, w.tokens, w.d), outputs.new_empty(2, batch, r, w.d)
    first = (r + 1) * w.tokens  # numbers of w1 and b1, with which a record begins
    shared = dict(R=r, J=w.tokens, **call.hidden("tokens"), SPLITS=parts, RECORD=records.by_program)
    shared |= dict(BD=tile.columns, BR=call.sides.read, BJ=call.sides.tokens, **call.constants(tile))
    lengths = s, batch, outputs.stride(0), outputs.stride(1)
    erase_add_bwd_tokens_kernel[(blocks, 2, parts)](
        outputs, kept.means, kept.rstds, grad_mixed, *call.both("norm", "weight", "bias"),
        *call.both("tokens", "w1", "b1", "w2"), grad_hidden, sums[..., first:], *lengths,
        S=w.slots, BS=call.sides.slots, **shared,
    )  # fmt: skip
    erase_add_bwd_normed_kernel[(blocks, 2, parts)](
        outputs, kept.means, kept.rstds, grad_hidden, *call.both("norm", "weight", "bias"), *call.both("tokens", "w1"),
        grad_normed, by_split[..., records.channels :], sums, *lengths, NORM_RECORD=records.by_split, **shared,
    )  # fmt: skip
    grad_outputs = outputs.new_empty(outputs.shape)
    erase_add_bwd_outputs_kernel[(r, batch)](
        outputs, kept.means, kept.rstds, grad_normed, *call.both("norm", "weight"), grad_outputs, *lengths, R=r,
        BD=triton.next_power_of_2(w.d), **call.constants(call.tiles.rows, product=False),
    )  # fmt: skip
    return sums, grad_outputs


def _select_backward(call: Call, kept: Saved, found: Updated, records: Records) -> torch.Tensor:
    """Sums of the selecting network's parameters [splits, record]; adds to the memory's gradient."""
    tile, w, batch, (s, r) = call.tiles.select_back, call.widths, call.batch, call.lengths
    blocks, steps, params = call.blocks(tile), triton.cdiv(s, tile.tokens), call.params
    parts = call.splits(blocks, batch)
    token_parts = call.splits(blocks * parts, steps)
    by_item = dict(J=w.select, SPLITS=parts, TOKEN_SPLITS=token_parts, RECORD=records.select)
    by_item["BJ"] = call.sides.select
    sums = call.empty(parts * token_parts, records.select)
    first = w.select * (w.d + 1)  # numbers of w1 and b1, with which a record begins
    grad_hidden, pulls = torch.empty_like(kept.hidden), call.empty(batch, 2, s)
    scores = call.tiles.scores_back
    erase_add_bwd_scores_kernel[(token_parts, parts)](
        kept.hidden, kept.weights, found.weight_parts, found.products, params.select.w2, kept.through,
        grad_hidden, pulls, sums[:, first:],
        s, triton.cdiv(s, scores.tokens), batch, found.weight_parts.shape[1], found.products.shape[1],
        S=w.slots, BP=scores.tokens, BS=call.sides.slots, **by_item, **call.constants(scores),
    )  # fmt: skip
    erase_add_bwd_select_kernel[(blocks, token_parts, parts)](
        call.memory, kept.means, kept.rstds, grad_hidden, pulls, params.select_norm_weight, params.select_norm_bias,
        params.select.w1, found.grad_memory, sums, sums[:, records.select - 2 * w.d :],
        s, r, steps, batch, call.memory.stride(0), call.memory.stride(1),
        BP=tile.tokens, BD=tile.columns, **by_item, **call.constants(tile),
    )  # fmt: skip
    return sums


def _sums(call: Call, *sums: torch.Tensor) -> torch.Tensor:
    """The flat gradient of all parameters in their dtype."""
    lengths = [part[0].numel() for part in sums]
    tile = call.tiles.sums
    grads = call.memory.new_empty(sum(lengths))
    erase_add_bwd_sums_kernel[(sum(triton.cdiv(length, tile.columns) for length in lengths),)](
        *sums, grads, *lengths, *(part.shape[0] for part in sums), BLOCK=tile.columns, PARTS=tile.tokens,
        ACC=call.constants(tile)["ACC"], num_warps=tile.warps,
    )  # fmt: skip
    return grads
