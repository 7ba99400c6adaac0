"""How eager code covers the visible pairs: rectangles, squares that are causal, and few small masks.

A block is a range of query rows whose result is merged from the calls that cover its keys. Rows of one chunk are a
block of their own unless they are few; neighbouring small runs are taken together, up to `GROUP_ROWS` rows, and only
what is not visible to all of them needs a mask.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from mirasol.kernels.attention.layout import Layout, Run, runs

GROUP_ROWS = 256  # rows taken together where chunks are short
SHORT_ROWS = 16  # runs of fewer rows are taken together, unless the caller says otherwise


class Call(NamedTuple):
    """One attention of the block's rows to keys [k0, k1): unmasked, causal (square), or under the mask of `rows`.

    `rows` holds the runs of the block relative to its first row and to k0; empty if no mask is needed.
    """

    k0: int
    k1: int
    causal: bool
    rows: tuple[Run, ...]


class Block(NamedTuple):
    """Query rows [q0, q1) and the calls that cover what they see; every row sees something in some call."""

    q0: int
    q1: int
    calls: tuple[Call, ...]


@lru_cache(maxsize=256)
def plan(layout: Layout, most_rows: int | None = None, short_rows: int | None = None) -> tuple[Block, ...]:
    """Blocks that cover all visible pairs of a layout exactly once; rows that see nothing are left out.

    Args:
        most_rows: split blocks to at most so many rows (for backends that write scores out).
        short_rows: runs of fewer rows are taken together; None means `SHORT_ROWS`.
    """
    short_rows = SHORT_ROWS if short_rows is None else short_rows
    seeing = [run for run in runs(layout) if run.s1 > run.s0 or run.k1 > run.k0]
    if most_rows is not None:
        seeing = [part for run in seeing for part in _split(run, most_rows)]
    blocks: list[Block] = []
    group: list[Run] = []
    for run in seeing:
        if group and not _joins(group, run, short_rows):
            blocks.append(_block(group))
            group = []
        group.append(run)
    if group:
        blocks.append(_block(group))
    return tuple(blocks)


def _split(run: Run, most_rows: int) -> list[Run]:
    parts = []
    for q0 in range(run.q0, run.q1, most_rows):
        q1 = min(q0 + most_rows, run.q1)
        k1 = run.k1 - (run.q1 - q1) if run.causal else run.k1
        parts.append(run._replace(q0=q0, q1=q1, k1=k1, causal=run.causal and q1 - q0 > 1))
    return parts


def _joins(group: list[Run], run: Run, short_rows: int) -> bool:
    last, rows = group[-1], run.q1 - group[0].q0
    if last.q1 != run.q0 or rows > GROUP_ROWS or max(run.q1 - run.q0, last.q1 - last.q0) >= short_rows:
        return False
    together = [*group, run]
    span = _span(together)
    covered = rows * (span[1] - span[0] + span[3] - span[2])
    return covered <= 2 * sum(r.pairs for r in together) + GROUP_ROWS * GROUP_ROWS


def _span(group: list[Run]) -> tuple[int, int, int, int]:
    """Smallest sink range and smallest key range that hold those of every run; the first is empty if they touch."""
    sinks = [(r.s0, r.s1) for r in group if r.s1 > r.s0]
    keys = [(r.k0, r.k1) for r in group if r.k1 > r.k0]
    (s0, s1), (k0, k1) = _hull(sinks or keys), _hull(keys or sinks)
    return (s0, s1, k0, k1) if s1 < k0 else (min(s0, k0), min(s0, k0), min(s0, k0), max(s1, k1))


def _hull(ranges: list[tuple[int, int]]) -> tuple[int, int]:
    return min(a for a, _ in ranges), max(b for _, b in ranges)


def _block(group: list[Run]) -> Block:
    q0, q1 = group[0].q0, group[-1].q1
    calls = _lone_calls(group[0]) if len(group) == 1 else _group_calls(group)
    return Block(q0, q1, tuple(calls))


def _lone_calls(run: Run) -> list[Call]:
    calls = [Call(run.s0, run.s1, False, ())] if run.s1 > run.s0 else []
    square = run.k1 - (run.q1 - run.q0) if run.causal else run.k1
    if square > run.k0:
        calls.append(Call(run.k0, square, False, ()))
    if run.causal:
        calls.append(Call(square, run.k1, True, ()))
    return calls


def _group_calls(group: list[Run]) -> list[Call]:
    s0, s1, k0, k1 = _span(group)
    calls = []
    if s1 > s0:
        alike = all((r.s0, r.s1) == (s0, s1) for r in group)
        calls.append(Call(s0, s1, False, () if alike else _relative(group, s0, s1)))
    common = min(r.k1 - (r.q1 - r.q0 - 1 if r.causal else 0) for r in group)
    if all(r.k0 == k0 and r.s1 == r.s0 for r in group) and common - k0 >= GROUP_ROWS:
        calls.append(Call(k0, common, False, ()))
        k0 = common
    if k1 > k0:
        alike = all((r.k0, r.k1, r.causal) == (k0, k1, False) for r in group)
        calls.append(Call(k0, k1, False, () if alike else _relative(group, k0, k1)))
    return calls


def _relative(group: list[Run], k0: int, k1: int) -> tuple[Run, ...]:
    """The runs of a group seen from its first row and from key k0, cut to [k0, k1)."""
    base, width = group[0].q0, k1 - k0

    def cut(key: int) -> int:
        return min(max(key - k0, 0), width)

    return tuple(
        Run(
            r.q0 - base,
            r.q1 - base,
            cut(r.s0),
            cut(r.s1),
            cut(r.k0),
            r.k1 - k0 if r.causal else cut(r.k1),
            r.causal,
        )
        for r in group
    )


@lru_cache(maxsize=32)
def additive_mask(rows: tuple[Run, ...], width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[rows, width], 0 where a row sees a key and -inf elsewhere."""
    mask = torch.full((rows[-1].q1, width), float("-inf"), dtype=dtype)
    for run in rows:
        part = mask[run.q0 : run.q1]
        part[:, run.s0 : run.s1] = 0
        if not run.causal:
            part[:, run.k0 : run.k1] = 0
            continue
        for i in range(run.q1 - run.q0):
            part[i, run.k0 : max(run.k1 - (run.q1 - run.q0 - 1 - i), run.k0)] = 0
    return mask.to(device)


@lru_cache(maxsize=32)
def blind_rows(rows: tuple[Run, ...], width: int, device: torch.device) -> torch.Tensor | None:
    """[rows] bool, True for rows that a mask hides completely; None if there are none."""
    blind = additive_mask(rows, width, torch.float32, torch.device("cpu")).isinf().all(-1)
    return blind.to(device) if bool(blind.any()) else None
