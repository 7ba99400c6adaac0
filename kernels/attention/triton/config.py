"""Block sizes of the attention kernels: arithmetic on head width, element size and target, a reason in a line each.

A kernel owns a block of rows or keys, whose accumulators lie in registers, and walks over blocks of the other side, of
which it keeps `stages` pairs (keys and values, or queries and gradients) in shared memory. All that comes out compiles
without spills (tests/aot); nothing is tuned at run time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mirasol.kernels.core.device import Target, triton_version

FORWARD, BACKWARD_KV, BACKWARD_Q = "forward", "backward_kv", "backward_q"
KERNELS = (FORWARD, BACKWARD_KV, BACKWARD_Q)
WIDTHS = (64, 128, 256)  # head widths as padded inside: narrower ones break on Hopper
SPECIALIZING_TRITON = ((3, 6), (3, 10))  # versions of Triton known to compile specialised warps: from, below


@dataclass(frozen=True)
class Config:
    """What one kernel is compiled with.

    block_m: query rows. block_n: keys. warps, stages: as Triton names them.
    masks: "none" where every block is seen completely; "edges" masks only the blocks that are not, in a loop apart;
    "all" masks every block in one loop, where two loops do not fit into the registers.
    tma: loads by the tensor memory accelerator; needs 16-byte aligned strides and a power of two of grouped heads.
    specialize: loads in a group of warps of their own, the block that the kernel owns in halves on two more.
    registers: the most that a thread may take; 0 leaves it to the compiler.
    """

    block_m: int
    block_n: int
    warps: int = 8
    stages: int = 1
    masks: str = "none"
    tma: bool = False
    specialize: bool = False
    registers: int = 0


_pinned: dict[str, Config] = {}
_switches = {"specialize": False}


def settings() -> tuple[object, ...]:
    """What else than its arguments `config` depends on."""
    return (*_pinned.items(), _switches["specialize"])


def padded_width(width: int, target: Target) -> int:
    """The head width that a kernel computes with."""
    if target.kind == "interpreter":
        return max(16, 1 << (width - 1).bit_length())
    return next(padded for padded in WIDTHS if padded >= width)


def config(
    kernel: str, width: int, itemsize: int, target: Target, *, masked: bool, tma: bool, halves: bool = False
) -> Config:
    """The configuration of a kernel for a head width and an element size in bytes.

    Args:
        masked: False where no block of the shape needs a mask.
        tma: whether the tensors can be loaded by descriptors.
        halves: whether two groups of warps can share a block, so that loads can have their own.
    """
    if kernel in _pinned:
        found = _pinned[kernel]
        specialize = found.specialize and halves and tma and not masked
        masks = (found.masks if found.masks != "none" else "edges") if masked else "none"
        return replace(found, masks=masks, tma=found.tma and tma, specialize=specialize)
    if target.kind == "interpreter":
        return Config(16, 16, 4, masks="edges" if masked else "none")
    width = padded_width(width, target)
    if itemsize == 4:
        return _fma(kernel, width, masked, target)
    if target.kind == "hip":
        return _mfma(kernel, width, masked)
    if tma and 90 <= target.arch < 120:
        if _switches["specialize"] and halves and not masked and width <= 128 and target.arch < 100:
            return _specialized(kernel, width)
        return _fit(kernel, width, _wgmma(kernel, width, masked, target), target)
    return _fit(kernel, width, _mma(kernel, width, masked), target)


def _blocks(kernel: str, own: int, other: int, **rest: object) -> Config:
    """A configuration by what a kernel owns and what it walks over."""
    m, n = (other, own) if kernel == BACKWARD_KV else (own, other)
    return Config(m, n, **rest)  # type: ignore[arg-type]


def _wgmma(kernel: str, width: int, masked: bool, target: Target) -> Config:
    """Hopper's and Blackwell's products of whole warp groups: operands in shared memory, 64 rows at least."""
    masks = "edges" if masked else "none"
    if kernel == FORWARD:
        other = min(128, 16384 // width)
        if masked and width > 64:
            other //= 2  # the loop apart takes registers
        # A pair of 64 KB hides its own latency; of smaller ones three are in flight.
        return _blocks(kernel, 128, other, stages=3 if other * width <= 8192 else 2, masks=masks, tma=True)
    own = min(128, 16384 // width)  # dk and dv, or dq beside two operands: 128 registers a thread
    if width == 256:
        masks = "all" if masked else "none"
    if kernel == BACKWARD_KV:
        if masked and width == 128:
            own = 64
        if width == 256 and target.arch >= 100:  # accumulators lie in tensor memory, room for no second stage
            return _blocks(kernel, 64, 64, stages=1, masks=masks, tma=True)
        if width == 256 and masked and target.triton >= (3, 9):  # it keeps the addresses of all operands in registers
            return _blocks(kernel, 64, 16, stages=3, masks=masks, tma=True)
        return _blocks(kernel, own, min(64, 8192 // width), stages=3 if width == 64 else 2, masks=masks, tma=True)
    other = 8192 // width
    if masked and width < 256:
        other //= 2
    stages = 1 if width == 256 and target.arch >= 100 and not masked else 2
    return _blocks(kernel, own, other, stages=stages, masks=masks, tma=True)


def _specialized(kernel: str, width: int) -> Config:
    """Hopper's specialised warps: named four, they become twelve of 168 registers, of which loads give theirs away."""
    other = 128 if kernel == FORWARD else 64
    return _blocks(kernel, 128, other, warps=4, stages=3 if width == 64 else 2, tma=True, specialize=True)


def _mma(kernel: str, width: int, masked: bool) -> Config:
    """Products of single warps (sm_80 to sm_89, sm_120, and wherever descriptors cannot read): rows in registers."""
    masks = ("all" if width == 256 else "edges") if masked else "none"
    if kernel == FORWARD:
        # 16 rows a warp: their sums and weights stay in it. Wider heads have no registers for so many rows.
        if masked and width == 128:
            return _blocks(kernel, 64, 32, warps=4, stages=3, masks=masks)
        own = 64 if width == 256 else 128
        other = 32 if masked and width == 256 else 64
        return _blocks(kernel, own, other, stages=3 if width == 64 else 2, masks=masks)
    if kernel == BACKWARD_KV:
        own = 8192 // width  # dk and dv: 64 registers a thread
        other = 32 if masked or width == 256 else 64
        if masked and width < 256:
            own = 64
        warps = 4 if masked and width == 64 else 8
        return _blocks(kernel, own, other, warps=warps, stages=1 if width == 256 else 2, masks=masks)
    other = 32 if width == 256 or (masked and width == 64) else 64
    return _blocks(kernel, max(64, 8192 // width), other, stages=1 if width == 256 else 2, masks=masks)


def _fma(kernel: str, width: int, masked: bool, target: Target) -> Config:
    """float32 without matrix units: a thread multiplies columns one by one, so blocks are small and one loop is all."""
    masks = "all" if masked else "none"
    if kernel == FORWARD:
        own = 16 if width == 256 else 32
        return _blocks(kernel, own, own, masks=masks, registers=168 if width == 256 else 0)
    # Left alone, the compiler spills to make room for one more program.
    if width == 256:
        return _blocks(kernel, 16, 16, warps=4 if target.kind == "hip" else 8, masks=masks, registers=168)
    if kernel == BACKWARD_KV:
        return _blocks(kernel, 2048 // width, 16, warps=4, masks=masks, registers=168)
    if width == 128:
        return _blocks(kernel, 16, 16, warps=4, masks=masks, registers=168)
    return _blocks(kernel, 32, 32, masks=masks, registers=128)


def _mfma(kernel: str, width: int, masked: bool) -> Config:
    """AMD: 64 lanes a warp, 512 registers, 64 KB of shared memory, in which one or two pairs fit."""
    masks = "edges" if masked else "none"
    if width == 256:
        if kernel == FORWARD:
            return _blocks(kernel, 64, 32, warps=8 if masked else 4, masks=masks)
        if kernel == BACKWARD_KV:
            return _blocks(kernel, 32 if masked else 64, 16, masks=masks)
        return Config(64 if masked else 32, 16 if masked else 32, 4, masks=masks)
    if kernel == FORWARD:
        if not masked:
            return _blocks(kernel, 128, 64, warps=4, stages=2)
        return _blocks(kernel, 128, 32, warps=width // 16, masks="all")
    if kernel == BACKWARD_KV:
        if masked:
            return _blocks(kernel, 64, 16, warps=4, masks=masks)
        return _blocks(kernel, 128, 32, warps=512 // width)
    return _blocks(kernel, 128, 32 if masked else 64, warps=4, masks=masks)


def shared_memory(kernel: str, width: int, itemsize: int, found: Config) -> int:
    """Bytes of shared memory that a program of an NVIDIA configuration takes, at most."""
    own, other = (found.block_n, found.block_m) if kernel == BACKWARD_KV else (found.block_m, found.block_n)
    rows = (1 if kernel == FORWARD else 2) * own * width * itemsize
    pair = 2 * other * width * itemsize
    weights = own * other * itemsize  # handed from one product's layout to the next one's
    rest = 1024 + (8 * other * found.stages if kernel == BACKWARD_KV else 0)  # barriers, row sums of the stages
    if found.tma:
        return rows + found.stages * pair + (0 if kernel == FORWARD else max(2 * weights, pair)) + rest
    if kernel == FORWARD and found.block_m >= 16 * found.warps:  # weights stay in their warp
        return rows + found.stages * pair + rest
    if found.stages == 1:
        return max(rows, weights) + pair + (pair // 2 if kernel == BACKWARD_KV else 0) + rest
    return max(rows + pair, found.stages * pair) + (2 if kernel == BACKWARD_KV else 1) * weights + rest


def _fit(kernel: str, width: int, found: Config, target: Target) -> Config:
    """Smaller other blocks, then fewer stages, then smaller blocks of both, until shared memory holds it."""
    own, other = ("block_n", "block_m") if kernel == BACKWARD_KV else ("block_m", "block_n")
    while shared_memory(kernel, width, 2, found) > target.shared_memory and found.block_m * found.block_n > 256:
        sizes = getattr(found, own), getattr(found, other)
        if sizes[1] <= 32 and found.stages > 1:
            found = replace(found, stages=found.stages - 1)
        elif sizes[1] > 32 or sizes[1] >= sizes[0]:
            found = replace(found, **{other: sizes[1] // 2})
        else:
            found = replace(found, **{own: sizes[0] // 2})
    return found


def splits(programs: int, key_blocks: int, target: Target) -> int:
    """Over how many programs the keys of one query block are split: 1 unless a few queries leave the device idle."""
    least = 2  # fewer key blocks than this are not worth a program and a partial result
    if programs * 2 > target.multiprocessors or key_blocks < 2 * least:
        return 1
    return min(2 * target.multiprocessors // programs, key_blocks // least, 128)


@contextlib.contextmanager
def specialized_warps() -> Iterator[None]:
    """Specialise warps inside the block: Hopper, heads up to 128 wide and not grouped, shapes that need no mask.

    Gradients are computed so where `backward` is called inside the block. Kernels then allocate a little memory at
    each launch: by the allocator given to `triton.set_allocator`, else by PyTorch's. Not yet timed on a GPU.

    Raises:
        RuntimeError: Triton is not installed, or its version was not yet seen to compile this form: a compiler that
            fails on it may end the process.
    """
    first, below = SPECIALIZING_TRITON
    version = triton_version()
    if version is None or not first <= version < below:
        found = "it is not installed" if version is None else f"this is {version[0]}.{version[1]}"
        raise RuntimeError(f"specialised warps need Triton {first[0]}.{first[1]} to {below[0]}.{below[1] - 1}, {found}")
    before = _switches["specialize"]
    _switches["specialize"] = True
    try:
        yield
    finally:
        _switches["specialize"] = before


@contextlib.contextmanager
def pinned(**configs: Config) -> Iterator[None]:
    """Use the given configurations, by kernel name, inside the block: for tests and for the search of better ones."""
    before = dict(_pinned)
    _pinned.update(configs)
    try:
        yield
    finally:
        _pinned.clear()
        _pinned.update(before)
