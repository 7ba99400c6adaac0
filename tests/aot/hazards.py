"""What Hopper's asynchronous products may read too late, found in the text of a compiled kernel.

Triton 3.6 to 3.9 let a loop refill a shared tile that wgmma still reads, if more than the product uses its load (as in
triton-lang/triton pull request 3106), and before 3.8 lets it write registers that wgmma still reads (issue 9433). Both
are invisible to the interpreter, and to a GPU most of the time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_WGMMA = re.compile(r"wgmma\.mma_async\S* \{[^}]*\}, (?:\{([^}]*)\}|\S+),")
_WRITES = re.compile(r"(?:@!?%\w+ +)?[a-z][\w.:]* +\{?\s*((?:%\w+|_)(?:, *(?:%\w+|_))*)")
_NO_RESULT = ("st.", "bra", "cp.async", "bar", "wgmma.", "mbarrier.arrive", "mbarrier.init", "stmatrix")


def hazards(ttgir: str, ptx: str) -> list[str]:
    """A sentence for each tile, and for each register, that is written while wgmma may still read it."""
    return [*dict.fromkeys([*refilled_tiles(ttgir), *written_registers(ptx)])]


def written_registers(ptx: str) -> Iterator[str]:
    """Straight through the text, then twice through every loop: what writes what a pending product reads?"""
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    labels = {line[:-1]: k for k, line in enumerate(lines) if re.fullmatch(r"\$[\w$]+:", line)}
    paths = [lines]
    for k, line in enumerate(lines):
        target = re.match(r"(?:@!?%\w+\s+)?bra(?:\.uni)?\s+(\S+);", line)
        if target and labels.get(target[1], k) < k:
            paths.append(2 * lines[labels[target[1]] : k])
    for path in paths:
        pending: list[tuple[int, set[str]]] = []  # group, registers of A
        group = 0
        for line in path:
            if product := _WGMMA.match(line):
                pending.append((group, set(re.findall(r"%\w+", product[1] or ""))))
            elif line.startswith("wgmma.commit_group"):
                group += 1
            elif wait := re.match(r"wgmma\.wait_group\S*\s+(\d+)", line):
                pending = [(g, read) for g, read in pending if g >= group - int(wait[1])]
            elif pending and (written := _WRITES.match(line)) and not line.startswith(_NO_RESULT):
                for register in re.findall(r"%\w+", written[1]):
                    if any(register in read for _, read in pending):
                        yield f"register {register} is written while wgmma may still read it: {line}"


def refilled_tiles(ttgir: str) -> Iterator[str]:
    """In every innermost loop: are there buffers enough for the copies under way and the products that are not done?

    A product of iteration k reads buffer k, a copy of the same iteration fills buffer k + (copies before the loop).
    """
    allocations = re.findall(r"(%[\w#]+) = ttg.local_alloc : \(\) -> !ttg.memdesc<(\d+)x", ttgir)
    buffers = {name: int(n) for name, n in allocations}
    lines = ttgir.splitlines()
    for first, line in enumerate(lines):
        if not (loop := re.match(r"(\s*)(?:%[\w#:]+ = )?scf\.for", line)):
            continue
        last = next(k for k in range(first + 1, len(lines)) if lines[k].startswith(loop[1] + "}"))
        body, before = "\n".join(lines[first + 1 : last]), "\n".join(lines[:first])
        products = re.findall(r"warp_group_dot (%[\w#]+), (%[\w#]+),[^\n]*isAsync = true", body)
        if "scf.for" in body or not products:
            continue
        left = [int(n) for n in re.findall(r"warp_group_dot_wait [^\n]*pendings = (\d+)", body)]
        unfinished = -(-max(left, default=0) // len(products))  # iterations whose products may still run
        for tile in {_allocation(operand, body) for pair in products for operand in pair} & buffers.keys():
            if tile not in {_allocation(filled, body) for filled in _filled(body)}:
                continue
            ahead = sum(_allocation(filled, before) == tile for filled in _filled(before))
            if buffers[tile] < ahead + unfinished:
                needed = f"{ahead} copies ahead and {unfinished} unfinished products"
                yield f"tile {tile} has {buffers[tile]} buffers for {needed}"


def _filled(text: str) -> list[str]:
    """What copies into shared memory write."""
    by_threads = re.findall(r"async_copy_global_to_local [^,]*, (%[\w#]+)", text)
    return by_threads + re.findall(r"async_tma_copy_global_to_local [^\n]*\] (%[\w#]+),", text)


def _allocation(view: str, text: str) -> str:
    """The buffers that a view was taken of."""
    for _ in range(8):
        found = re.search(rf"{re.escape(view)} = ttg\.memdesc_\w+ (%[\w#]+)", text)
        if not found:
            break
        view = found[1]
    return view
