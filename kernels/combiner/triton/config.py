"""How the kernels are cut: pure functions of shape, dtype and device, with the reason beside each choice.

None was timed on a GPU: each compiles without spilling and within its shared memory (`tests/aot/test_combiner_aot.py`).
"""

from __future__ import annotations

import dataclasses

from mirasol.kernels.core.device import Target

MAX_WIDTH = 8192  # backward holds whole rows in registers


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Rows and output columns of one program, columns of x that one step of its product takes, warps and stages."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int

    def shared_memory(self, element_size: int) -> int:
        """Bytes: every stage holds one step of the rows and of the weight."""
        return self.stages * (self.rows + self.columns) * self.step * element_size


def forward_config(rows: int, d_out: int, element_size: int, aligned: bool, target: Target) -> ForwardConfig:
    """For `rows` kept rows and d_out columns; aligned: every row of x and of the weight starts at 16 elements."""

    def busy(block_rows: int, block_columns: int) -> bool:  # most multiprocessors have a program
        return -(-rows // block_rows) * -(-d_out // block_columns) >= 0.75 * target.multiprocessors

    if target.kind == "interpreter":
        return ForwardConfig(32, 32, 32, warps=4, stages=1)
    if element_size > 2:  # IEEE products have no matrix instructions: large blocks would gain nothing and spill
        block = ForwardConfig(64, 64, 16, warps=8, stages=3)
    elif not aligned:  # loaded element by element: the addresses take the registers
        block = ForwardConfig(64, 64, 32, warps=8, stages=2)
    elif not busy(128, 128):  # few rows: spread them
        block = ForwardConfig(64, 64, 64, warps=4, stages=4)
    elif target.arch in range(90, 120) and busy(128, 256):
        # The least reading for a product; normalised rows leave no registers for a step of 64 on Hopper.
        block = ForwardConfig(128, 256, 32 if target.arch < 100 else 64, warps=8, stages=4)
    else:
        block = ForwardConfig(128, 128, 64 if target.arch in range(90, 120) else 32, warps=8, stages=4)
    room = target.shared_memory - 1024  # reductions and barriers
    stages = min(block.stages, room * block.stages // block.shared_memory(element_size))
    return dataclasses.replace(block, stages=stages)


def backward_config(rows: int, d: int, target: Target) -> tuple[int, int, int, int]:
    """Rows held at a time, their width padded to a power of two, programs that share all `rows`, and warps.

    Warps lie side by side along a row, 256 columns each: what is summed over all rows stays in registers. 16 warps a
    multiprocessor at most, as each program leaves a partial sum.
    """
    width = max(16, 1 << (d - 1).bit_length())
    if target.kind == "interpreter":
        return 2, width, 2, 4
    warps = min(8, max(1, width // 256))
    block = max(1, 512 * warps // width)  # 16 elements a thread
    return block, width, max(1, min(16 // warps * target.multiprocessors, -(-rows // block))), warps
