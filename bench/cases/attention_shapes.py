"""The problems on which attention is compared: chunks of tokens, and what a chunk sees."""

from __future__ import annotations

from dataclasses import dataclass

from mirasol.cost import chunk_pairs
from mirasol.past import Reach

WORK = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5, "step": 1.0}
"""Matrix products of a mode over those of the forward pass."""


@dataclass(frozen=True)
class Shape:
    """T chunks of n tokens, seen through a window of so many chunks (None: all earlier ones)."""

    label: str
    batch: int
    heads: int
    head_dim: int
    chunks: int
    tokens: int
    window: int | None = None
    modes: tuple[str, ...] = ("fwd", "fwd+bwd")

    @property
    def name(self) -> str:
        window = f" window {self.window}" if self.window else ""
        return f"{self.label} {self.chunks}x{self.tokens} D{self.head_dim}{window}"

    @property
    def length(self) -> int:
        return self.chunks * self.tokens

    def pairs(self, mode: str) -> int:
        chunks = self.chunks if self.window is None else min(self.window, self.chunks)
        if mode == "step":
            return self.tokens * self.tokens * chunks
        return chunk_pairs(self.chunks, self.tokens, self.tokens, Reach(self.window))

    def flops(self, mode: str) -> int:
        return int(WORK[mode] * 4 * self.pairs(mode) * self.head_dim * self.batch * self.heads)

    def dense_flops(self, mode: str) -> int:
        """Of all pairs."""
        return int(WORK[mode] * 4 * self.length**2 * self.head_dim * self.batch * self.heads)


QUICK = [Shape("tiny", 1, 2, 32, 4, 16, modes=("fwd", "fwd+bwd", "step"))]
CPU = [
    Shape("model", 1, 2, 64, 16, 448, modes=("fwd", "fwd+bwd", "step")),
    Shape("model", 1, 2, 64, 16, 448, window=2, modes=("fwd",)),
    Shape("latents", 1, 12, 64, 16, 32),
    Shape("video", 1, 1, 128, 4, 1560),
]
CPU_FULL = [
    *CPU,
    Shape("model", 1, 1, 64, 64, 448, modes=("fwd", "fwd+bwd", "step")),
    Shape("model", 1, 1, 64, 64, 448, window=2),
    Shape("latents", 1, 12, 64, 64, 32),
]
GPU_MODES = ("fwd", "bwd", "fwd+bwd")
GPU = [
    Shape("model", 1, 16, 128, 64, 448, modes=(*GPU_MODES, "step")),
    Shape("model", 1, 16, 128, 64, 448, window=2, modes=GPU_MODES),
    Shape("video", 1, 24, 128, 7, 1560, modes=GPU_MODES),
    Shape("model", 1, 16, 64, 64, 448, modes=(*GPU_MODES, "step")),
    Shape("model", 4, 16, 64, 16, 448, modes=(*GPU_MODES, "step")),
    Shape("latents", 16, 12, 128, 16, 32, modes=GPU_MODES),
]
GPU_FULL = [*GPU, Shape("video", 1, 24, 128, 21, 1560, modes=GPU_MODES)]


def windows(shape: Shape) -> list[tuple[slice, slice]]:
    """Rows and visible keys of every chunk."""
    n, window = shape.tokens, shape.window or shape.chunks
    return [(slice(c * n, (c + 1) * n), slice(max(0, c + 1 - window) * n, (c + 1) * n)) for c in range(shape.chunks)]
