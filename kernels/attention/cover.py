"""How calls of one attention cover the visible pairs: rectangles, causal squares, and few small masks.

Neighbouring rows are taken together where that is cheaper than a call for each chunk; a mask hides what not all of
them see. Attentions of one form, whose rows and keys advance by constant steps, are one call with a batch of them.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from mirasol.kernels.attention.visibility import Chunks, count_pairs, ranges

SHARED_KEYS = 1024  # that all rows of a group see are worth an unmasked call of their own
MOST_COPIES = 4  # of the keys: what a batch of overlapping windows may hold at a time
MOST_DENSE = 2**20  # elements of one mask for everything


class Price(NamedTuple):
    """Time of m rows and l keys, in visible pairs of a large attention: `call` or `item` + l (m + row).

    `call` for one that stands alone, `item` for one in a batch. Up to `wait` hidden pairs, and as many as are visible,
    cost less than many calls. A group has at most `rows` rows.
    """

    call: int
    item: int
    row: int
    rows: int = 128
    wait: int = 0


class Call(NamedTuple):
    """`times` attentions: rows [q0, q0 + rows) see keys [k0, k0 + keys), the next rows those `step` keys later.

    `seen` holds the ranges [4, rows] of `additive_mask`, None without a mask; `causal` ones are square. Exactly one
    call is the `first` to meet a row that sees anything, and shows it at least one key.
    """

    q0: int
    rows: int
    k0: int
    keys: int
    causal: bool = False
    seen: bytes | None = None
    first: bool = True
    times: int = 1
    step: int = 0


class Cover(NamedTuple):
    """Calls that cover every visible pair once; `blind` if some rows see nothing."""

    calls: tuple[Call, ...]
    blind: bool


class _Runs(NamedTuple):
    """Neighbouring rows [q0, q1) that see keys [s0, s1) (0, 0 where empty) and [k0, k1), which is never empty.

    With `causal` the last q1 - q0 keys form a causal square.
    """

    q0: np.ndarray
    q1: np.ndarray
    s0: np.ndarray
    s1: np.ndarray
    k0: np.ndarray
    k1: np.ndarray
    causal: np.ndarray


@lru_cache(maxsize=256)
def cover(chunks: Chunks, price: Price, most_rows: int | None = None) -> Cover:
    """Calls for a rule; `most_rows` bounds the rows of one, for backends that write scores out."""
    runs = _runs(chunks, most_rows)
    sinks: list[Call] = []
    shared: list[Call] = []
    own: list[Call] = []
    for a, b in [(0, len(runs.q0))] if _at_once(chunks, runs, price) else _groups(runs, price):
        _cover_group(_Runs(*(t[a:b] for t in runs)), price.rows, own, shared, sinks)
    most_rows = chunks.n_q if most_rows is None else most_rows
    most_keys = MOST_COPIES * chunks.n_k
    calls = [call for kind in (own, shared, sinks) for call in _batched(kind, most_rows, most_keys)]
    return Cover(tuple(calls), _seeing(runs) < chunks.n_q)


def _seeing(runs: _Runs) -> int:
    return int((runs.q1 - runs.q0).sum())


def _at_once(chunks: Chunks, runs: _Runs, price: Price) -> bool:
    """Whether all rows are one group, under one mask if they differ."""
    size = chunks.n_q * chunks.n_k
    if len(runs.q0) == 1 or price.wait == 0 or size > MOST_DENSE or _seeing(runs) < chunks.n_q:
        return len(runs.q0) == 1
    pairs = count_pairs(chunks)
    return 0 < size - pairs <= min(pairs, price.wait)


def _runs(chunks: Chunks, most_rows: int | None) -> _Runs:
    q0, q1, s0, s1, k0, own0, k1 = ranges(chunks)
    runs = np.stack([q0, q1, s0, s1, k0, k1, np.zeros_like(q0)])
    if chunks.causal:  # the first rows of a chunk of more rows than keys see no key of their own chunk
        border = np.maximum(q1 - (k1 - own0), q0)
        early = np.stack([q0, border, s0, s1, k0, own0, np.zeros_like(q0)])
        late = np.stack([border, q1, s0, s1, k0, k1, q1 - border > 1])
        runs = np.stack([early, late], 2).reshape(7, -1)
    if most_rows is not None:
        runs = _split(runs, most_rows)
    only_sinks = runs[4] == runs[5]
    runs[4:6, only_sinks] = runs[2:4, only_sinks]
    runs[2:4, only_sinks | (runs[2] == runs[3])] = 0
    return _Runs(*runs[:, (runs[1] > runs[0]) & (runs[5] > runs[4])])


def _split(runs: np.ndarray, most_rows: int) -> np.ndarray:
    parts = -(-(runs[1] - runs[0]) // most_rows)
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    runs = np.repeat(runs, parts, axis=1)
    q0, q1, *keys, k1, causal = runs
    begin = q0 + number * most_rows
    end = np.minimum(begin + most_rows, q1)
    return np.stack([begin, end, *keys, np.where(causal, k1 - (q1 - end), k1), causal * (end - begin > 1)])


class _Group(NamedTuple):
    """Rows [q0, q1) and the keys that an attention of all of them meets; how many pairs are visible."""

    q0: int
    q1: int
    s0: int
    s1: int
    k0: int
    k1: int
    pairs: int
    fixed: int

    def cost(self, price: Price) -> int:
        return self.fixed + (self.q1 - self.q0 + price.row) * (self.k1 - self.k0 + self.s1 - self.s0)

    def joined(self, other: _Group) -> _Group:
        s0, s1, k0 = self.s0, self.s1, min(self.k0, other.k0)
        if (s0, s1) != (other.s0, other.s1):  # not a rectangle of their own, but under the mask
            k0 = min([k0, *(g.s0 for g in (self, other) if g.s1 > g.s0)])
            s0 = s1 = -1
        pairs, fixed = self.pairs + other.pairs, max(self.fixed, other.fixed)
        return _Group(self.q0, other.q1, s0, s1, k0, max(self.k1, other.k1), pairs, fixed)


def _groups(runs: _Runs, price: Price) -> list[tuple[int, int]]:
    """First run and end of each group: a run joins while that is cheaper and lowers the price of a visible pair."""
    rows, keys = runs.q1 - runs.q0, runs.k1 - runs.k0
    pairs = rows * (runs.s1 - runs.s0 + keys) - runs.causal * (rows * (rows - 1) // 2)
    form = np.stack([rows, keys, runs.s0, runs.s1, runs.causal])
    alike = (form[:, 1:] == form[:, :-1]).all(0) & (runs.k0[1:] > runs.k0[:-1]) & (runs.q0[1:] == runs.q1[:-1])
    in_batch = np.zeros(len(rows), bool)
    in_batch[1:] = alike
    in_batch[:-1] |= alike
    fixed = np.where(in_batch, price.item, price.call)
    starts: list[int] = []
    group = None
    for i, numbers in enumerate(np.stack([*runs[:-1], pairs, fixed]).T.tolist()):
        run = _Group(*numbers)
        if group is not None and run.q0 == group.q1 and run.q1 - group.q0 <= price.rows:
            joint = group.joined(run)
            apart, together = group.cost(price), joint.cost(price)
            if together <= apart + run.cost(price) and joint.pairs * apart >= group.pairs * together:
                group = joint
                continue
        starts.append(i)
        group = run
    return list(pairwise([*starts, len(rows)]))


def _cover_group(runs: _Runs, most_rows: int, own: list[Call], shared: list[Call], sinks: list[Call]) -> None:
    """Add the calls of one group: the first of its rows, those to keys that all rows see, those to common sinks."""
    q0, rows, k0, k1 = int(runs.q0[0]), int(runs.q1[-1] - runs.q0[0]), int(runs.k0.min()), int(runs.k1.max())
    s0, s1 = int(runs.s0[0]), int(runs.s1[0])
    own_sinks = bool((runs.s0 == s0).all() and (runs.s1 == s1).all())
    if own_sinks and s1 > s0:
        sinks.append(Call(q0, rows, s0, s1 - s0, first=False))
    lone = len(runs.q0) == 1
    square = rows if lone and runs.causal[0] else 0
    if lone and not square:
        own.append(Call(q0, rows, k0, k1 - k0))
        return
    if not own_sinks:
        k0 = min(k0, int(runs.s0[runs.s1 > runs.s0].min()))
    _, end, s0s, s1s, low, high, causal = np.repeat(np.stack(runs), runs.q1 - runs.q0, axis=1)
    high = high - causal * (end - 1 - np.arange(q0, q0 + rows))
    # Under the mask every row keeps a key to see.
    common = k1 - square if square else int(high.min()) - 1
    if own_sinks and (low == k0).all() and common - k0 >= (1 if square > most_rows else SHARED_KEYS):
        shared.append(Call(q0, rows, k0, common - k0, first=False))
        k0 = common
    if square == k1 - k0:
        own.append(Call(q0, rows, k0, square, causal=True))
        return
    if own_sinks:
        s0s = s1s = np.full(rows, k0)
    seen = np.clip(np.stack([s0s, s1s, low, high]) - k0, 0, k1 - k0).astype(np.int32)
    own.append(Call(q0, rows, k0, k1 - k0, seen=seen.tobytes()))


def _batched(calls: list[Call], most_rows: int, most_keys: int) -> list[Call]:
    """Calls of one form as one call: to the same keys with more rows, at constant steps with a batch."""
    joined: list[Call] = []
    for call in calls:
        more = _together(joined[-1], call) if joined else None
        if more is not None and more.times * more.rows <= most_rows and more.times * more.keys <= most_keys:
            joined[-1] = more
        else:
            joined.append(call)
    return joined


def _together(last: Call, call: Call) -> Call | None:
    if call.q0 != last.q0 + last.rows * last.times or call.keys != last.keys:
        return None
    step = call.k0 - last.k0 - (last.times - 1) * last.step
    if step == 0 and last.times == 1 and not (call.causal or last.causal or call.seen or last.seen):
        return last._replace(rows=last.rows + call.rows)
    alike = call.rows == last.rows and call.causal == last.causal and call.seen == last.seen
    if alike and step > 0 and (last.times == 1 or step == last.step):
        return last._replace(times=last.times + 1, step=step)
    return None


@lru_cache(maxsize=64)
def additive_mask(seen: bytes, keys: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[rows, keys], 0 where a row sees a key and -inf elsewhere.

    Args:
        seen: int32 [4, rows], row i sees keys [seen[0, i], seen[1, i]) and [seen[2, i], seen[3, i]).
    """
    s0, s1, k0, k1 = np.frombuffer(seen, np.int32).reshape(4, -1, 1)
    key = np.arange(keys, dtype=np.int32)
    hidden = ((key < s0) | (key >= s1)) & ((key < k0) | (key >= k1))
    mask = torch.zeros(hidden.shape, dtype=dtype, device="cpu")
    return mask.masked_fill_(torch.from_numpy(hidden), -torch.inf).to(device)
