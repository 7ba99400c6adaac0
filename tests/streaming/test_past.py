"""Rings and memories: what lies where, and whose turn it is."""

from __future__ import annotations

import pytest
import torch

from mirasol.past import Memory, Reach, Ring, Rows

TOKENS, HEADS, WIDTH = 3, 2, 4


def a_chunk(rows: list[int], counts: list[int]) -> torch.Tensor:
    """Keys [R, H, tokens, D] that tell their row and chunk."""
    told = torch.tensor([100.0 * row + counts[row] for row in rows])
    return told[:, None, None, None].expand(-1, HEADS, TOKENS, WIDTH)


def seen_by(ring: Ring, row: int) -> list[float]:
    """Which chunks a row sees, in order, and every token of each."""
    ring.rows.choose([row])
    (keys, values), lengths = ring.read()
    used = keys.shape[2] if lengths is None else int(lengths[0])
    assert torch.equal(keys, -values)
    told = keys[0, :, :used].unflatten(1, (-1, TOKENS))
    assert (told == told[:1, :, :1, :1]).all()
    return told[0, :, 0, 0].tolist()


@pytest.mark.parametrize("reach", [Reach(1), Reach(3), Reach(1, 1), Reach(2, 3), Reach(None)], ids=str)
def test_a_ring_holds_the_window_and_the_sinks(reach):
    rows = Rows(3, torch.device("cpu"))
    ring = Ring(rows, reach, TOKENS, HEADS, WIDTH, torch.empty(0))
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        chosen = [row for row in range(3) if torch.rand((), generator=generator) < (0.3, 0.6, 0.9)[row]]
        if not chosen:
            continue
        rows.choose(None if len(chosen) == 3 else chosen)
        new = a_chunk(chosen, rows.counts)
        (keys, _), _ = ring.append(new, -new)
        assert keys.shape[0] == len(chosen)
        rows.advance()
        rows.count()
        assert rows.seen.tolist() == rows.counts
        for row in range(3):
            count = rows.counts[row]
            expected = [
                c for c in range(count) if reach.window is None or c > count - 1 - reach.window or c < reach.sinks
            ]
            told = [100.0 * row + chunk for chunk in ring.chunks(count)]
            assert sorted(told) == [100.0 * row + chunk for chunk in expected]
            if count:
                assert seen_by(ring, row) == told
    if reach.window is not None:
        assert ring.slots == sum(reach)


def test_rows_of_one_length_are_read_without_a_copy_and_others_as_the_whole_buffer():
    rows = Rows(2, torch.device("cpu"))
    ring = Ring(rows, Reach(4), TOKENS, HEADS, WIDTH, torch.empty(0))
    (keys, _), lengths = ring.append(*2 * [a_chunk([0, 1], rows.counts)])
    assert lengths is None
    assert keys.shape[2] == TOKENS
    assert keys.untyped_storage().data_ptr() == ring.keys.untyped_storage().data_ptr()
    rows.set(1, 2)
    (keys, _), lengths = ring.read()
    assert lengths.tolist() == [0, 2 * TOKENS]
    assert keys.shape[2] == 4 * TOKENS
    rows.set(0, 2)
    rows.fixed = True
    (keys, _), lengths = ring.read()
    assert lengths.tolist() == [2 * TOKENS, 2 * TOKENS]
    rows.set(0, 4)
    rows.set(1, 9)
    (keys, _), lengths = ring.read()
    assert lengths.tolist() == [4 * TOKENS, 4 * TOKENS]
    rows.fixed = False
    assert ring.read()[1] is None


def test_a_memory_is_replaced_row_by_row():
    rows = Rows(3, torch.device("cpu"))
    memory = Memory(rows, torch.arange(2.0))
    rows.choose([2, 0])
    memory.write(torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    assert memory.state.tolist() == [[7, 8], [0, 1], [5, 6]]
    assert memory.read().tolist() == [[5, 6], [7, 8]]
    memory.restart(2)
    assert memory.state.tolist() == [[7, 8], [0, 1], [0, 1]]
