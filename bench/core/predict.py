"""How long a launch should take on a Hopper GPU, by arithmetic on what its compiled programs move and execute.

A launch takes the longest of: its distinct bytes through DRAM, all its bytes between the L2 cache and the
multiprocessors, and the busiest multiprocessor's work, to which its start is added. Inside a multiprocessor, matrix
products and the instructions around them overlap only in part: a warp waits for its own product. What is executed is
counted in PTX, which is not what runs: the assembler folds addresses and moves away, so the instructions' share is an
upper estimate.

The constants that no data sheet states are calibrated against published kernels, see `tests/bench/test_predict.py`.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Device:
    """Rates of a GPU, per second or per cycle of a multiprocessor (SM).

    H100 SXM and H200: the same chip and other memory. Sources: [D] NVIDIA H100 and H200 data sheets, [W] H100
    architecture white paper, [G] CUDA C++ programming guide, "Throughput of native arithmetic instructions", 9.0,
    [L] Luo et al. 2024, arXiv 2402.13499 (mma.sync reaches 62.9 % of Hopper's tensor cores on average).
    Without a source: assumed.
    """

    name: str
    copy: float  # bytes a second that a large copy reads and writes: 0.9 of the data sheet's 3.35 and 4.8 TB/s [D]
    l2: float = 6.5e12  # bytes a second from the L2 cache; FlashAttention-4's best rows move 5.9e12
    multiprocessors: int = 132  # [D]
    clock: float = 1.755e9  # under load; at most 1.98e9 [D]
    matrix: float = 4096  # dense 16-bit operations of wgmma: 4 tensor cores, 512 fused multiply-adds each [W]
    mma_share: float = 0.62  # of that, by mma.sync [L]
    special: float = 16  # exp2, log2, reciprocal: results [G]
    issue: float = 4  # warp instructions: four schedulers, one a cycle each [W]
    arithmetic: float = 128  # float32 additions, products and fused multiply-adds [G]
    shared: float = 128  # bytes of shared memory: one wavefront [W]
    port: float = 64  # bytes from the L2 cache into one multiprocessor [W]
    registers: int = 65536  # [G]
    shared_bytes: int = 233472  # 228 KiB [G]
    warps: int = 64  # [G]


PEAK = 989e12  # dense 16-bit operations a second that the data sheet names, at 1.83e9 cycles
H100 = Device("H100", 3.0e12)
H200 = Device("H200", 4.3e12)

PRODUCTS = 0.80  # of the tensor cores' rate that long products sustain: FA4 756 of 949 TFLOP/s with all else hidden
SERIAL = 0.80  # share of the shorter of products and other instructions that is not hidden by one program's own warps
SERIAL_SPECIALIZED = 0.40  # the same where loads and products have warps of their own
LAUNCH = 3e-6  # seconds from the start of a launch to its first result, and its tail
LATENCY = 800  # cycles of an access to the L2 cache or DRAM under load
LOADS = 4  # of a warp under way at a time, where stages in shared memory do not hold more

SPECIAL = ("ex2.", "lg2.", "rcp.", "rsqrt.", "sqrt.", "tanh.", "sin.", "cos.", "div.")
ARITHMETIC = re.compile(r"(add|sub|mul|fma|neg)\.(rn\.|ftz\.|rz\.)*(f32|f16x2|bf16x2|f16|bf16)")
FREE = ("mov.", "bra", "ret", "cvta.", "ld.param", "wgmma.", "mma.", "exit", "call", "mbarrier.")
"""What costs no issue slot that counts: copies of registers, control, waiting, and products, counted as such."""


@dataclass(frozen=True)
class Work:
    """What one launch moves and executes over all its programs.

    counters: as the emulator names them. executed: warp instructions by PTX opcode. registers: of a thread, 0 where
    not known. lengths: relative work of the programs in the order in which they start; empty where all are alike.
    """

    name: str
    programs: int
    threads: int
    shared: int
    counters: Mapping[str, float]
    executed: Mapping[str, float] = field(default_factory=dict)
    registers: int = 0
    specialized: bool = False
    lengths: Sequence[float] = ()

    def count(self, *names: str) -> float:
        return sum(self.counters.get(name, 0) for name in names)

    @property
    def distinct(self) -> float:
        return self.count("distinct_read_bytes", "distinct_written_bytes")

    @property
    def loaded(self) -> float:
        """Bytes from the L2 cache into multiprocessors, by whole sectors, as if the L1 cache never served any."""
        return 32 * self.count("load_sectors", "copy_sectors") + self.count("bulk_bytes")

    @property
    def bytes_a_load(self) -> float:
        """That one load instruction of a warp moves."""
        return 32 * self.count("load_sectors") / (self.count("load_requests") or 1)


@dataclass(frozen=True)
class Prediction:
    """Seconds that a launch should take, and what holds it back."""

    seconds: float
    bound: str
    parts: Mapping[str, float]  # seconds by resource, each as if it were alone


def predict(work: Work, device: Device) -> Prediction:
    """The launch's time, its bound, and the time that each resource would take alone."""
    share = imbalance(work, device) / device.multiprocessors / device.clock  # seconds of the busiest SM for a cycle
    products, others = share * product_cycles(work, device), share * other_cycles(work, device)
    resident = residency(work, device)
    serial = SERIAL_SPECIALIZED if work.specialized else SERIAL / resident
    core = max(products, others) + serial * min(products, others)
    in_flight = resident * max(work.shared, work.threads // 32 * LOADS * work.bytes_a_load)
    parts = {
        "DRAM": work.distinct / device.copy,
        "L2": (work.loaded + 32 * work.count("store_sectors")) / device.l2,
        "latency": share * work.loaded / min(device.port, in_flight / LATENCY),
        "products": products,
        **{name: share * cycles for name, cycles in pipes(work, device).items()},
    }
    longest = max(parts["DRAM"], parts["L2"], parts["latency"], core)
    return Prediction(LAUNCH + longest, _bound(parts, core, longest, work), parts)


def _bound(parts: Mapping[str, float], core: float, longest: float, work: Work) -> str:
    if longest < LAUNCH:
        return "launch"
    for name in ("DRAM", "L2", "latency"):
        if parts[name] == longest:
            return name
    inside = {name: parts[name] for name in parts if name not in ("DRAM", "L2", "latency")}
    bound = max(inside, key=lambda name: inside[name])
    waiting = bound == "products" and core > 1.1 * parts["products"]
    return "products, then the rest" if waiting else bound


def product_cycles(work: Work, device: Device) -> float:
    """Cycles of one multiprocessor's tensor cores, were it alone."""
    rate = device.matrix * (1 if work.count("wgmma_instructions") else device.mma_share)
    return work.count("matrix_flops") / (PRODUCTS * rate)


def pipes(work: Work, device: Device) -> dict[str, float]:
    """Cycles of one multiprocessor, were it alone, by pipe other than the tensor cores."""
    special = arithmetic = issued = 0.0
    for opcode, count in work.executed.items():
        if opcode.startswith(FREE):
            continue
        issued += count
        if opcode.startswith(SPECIAL):
            special += count
        elif ARITHMETIC.match(opcode):
            arithmetic += count
    waves = work.count("shared_load_wavefronts", "shared_store_wavefronts", "ldmatrix_wavefronts")
    return {
        "exp2": 32 * special / device.special,
        "float32": 32 * arithmetic / device.arithmetic,
        "issue": issued / device.issue,
        "shared": waves + work.count("bulk_bytes", "copy_bytes") / device.shared,
    }


def other_cycles(work: Work, device: Device) -> float:
    """Cycles of all but the products: exponentials wait for what they are taken of, so they add to the rest."""
    found = pipes(work, device)
    return found["exp2"] + max(found["float32"], found["issue"], found["shared"])


def residency(work: Work, device: Device) -> int:
    """Programs that one multiprocessor runs at a time, by registers, shared memory, warps and how many there are."""
    warps = work.threads // 32
    by_registers = device.registers // (work.threads * max(8 * -(-work.registers // 8), 24)) if work.registers else 2
    waves = -(-work.programs // device.multiprocessors)
    return max(1, min(by_registers, device.shared_bytes // (work.shared + 1024), device.warps // warps, waves))


def imbalance(work: Work, device: Device) -> float:
    """The busiest multiprocessor's work over that of an even spread; programs go where the least was started."""
    if not work.lengths:
        waves = -(-work.programs // device.multiprocessors)
        return waves * device.multiprocessors / work.programs
    loads = [0.0] * device.multiprocessors
    for length in work.lengths:
        heapq.heapreplace(loads, loads[0] + length)
    return max(loads) * device.multiprocessors / sum(work.lengths)
