"""What launches execute and move, by kernel, as it is held against tests/figures.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from emulator.machine import Launch

WAITING = ("mbarrier.", "bra", "selp.", "setp.")  # what a warp that waits executes over and over
TO_L2 = ("load_bytes", "store_bytes", "copy_bytes", "bulk_bytes")
WAVEFRONTS = ("shared_load_wavefronts", "shared_store_wavefronts", "ldmatrix_wavefronts")


def counted(launches: Iterable[Launch]) -> dict[str, int]:
    """Sums over the launches of each kernel; no instructions of kernels that nvcc compiles, of whatever version."""
    found: Counter[str] = Counter()
    for launch in launches:
        n, name = launch.counters, launch.name
        found[f"{name}: bytes to and from L2"] += sum(getattr(n, counter) for counter in TO_L2)
        found[f"{name}: distinct bytes"] += n.distinct_read_bytes + n.distinct_written_bytes
        if not name.startswith("extract_tubes"):
            work = sum(times for opcode, times in launch.executed.items() if not opcode.startswith(WAITING))
            found[f"{name}: instructions"] += work
            found[f"{name}: matrix FLOPs"] += n.matrix_flops
            found[f"{name}: wavefronts of shared memory"] += sum(getattr(n, counter) for counter in WAVEFRONTS)
    return dict(found)
