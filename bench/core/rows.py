"""What suites and the command line hand to each other: settings, cases, rows of results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

Effort = Literal["quick", "default", "full"]


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    device: torch.device
    dtype: torch.dtype | None = None  # None: the suite's own choice
    effort: Effort = "default"
    traces: Path | None = None  # where profiler traces go
    tlx_python: Path | None = None  # interpreter of an environment with fbtriton, whose triton is not this process's

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype, seed: int = 0, grad: bool = False) -> torch.Tensor:
        """Seeded normal values: data of zeros runs faster than real data on many devices."""
        values = torch.randn(shape, generator=self.generator(seed), device=self.device, dtype=torch.float32)
        return values.to(dtype).requires_grad_(grad)


@dataclass
class Row:
    """One line of results. None stands for what does not apply; times in milliseconds, sizes in bytes."""

    suite: str
    case: str
    impl: str
    mode: str = ""  # fwd, bwd, fwd+bwd, step, count
    role: str = "peer"  # ours, peer, limit (a speed of light: other mathematics or plain copying)
    shape: str = ""
    dtype: str = ""
    device: str = ""
    status: str = "ok"  # ok, FAIL, SKIP
    reason: str = ""
    n: int = 0
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    baseline: str = ""
    speedup: float | None = None  # baseline's time over this one's: median of the rounds' ratios
    speedup_p20: float | None = None
    speedup_p80: float | None = None
    best_peer: str = ""
    against_best: float | None = None  # the best peer's time over this one's, on rows of ours
    flops: int | None = None
    flops_model: int | None = None  # by the analytic cost model
    tflops: float | None = None
    bytes: int | None = None  # that must move
    gbps: float | None = None
    roof: str = ""  # what bounds the work: "gemm" or "copy"
    roof_pct: float | None = None  # of the rate measured in the same process
    peak_bytes: int | None = None  # above what was held before the call (inputs and weights)
    build_ms: float | None = None  # before the first result, less the time of a call
    error: float | None = None  # largest, relative to the largest magnitude of the exact result
    allowed: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """What makes a row the same row in another file."""
        return (self.suite, self.case, self.impl, self.mode, self.dtype, self.device)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        return cls(**values)


@dataclass(frozen=True)
class Case:
    """A named piece of a suite: what `--list` shows, `--filter` chooses and the progress bar counts."""

    name: str
    run: Callable[[Settings], list[Row]]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
