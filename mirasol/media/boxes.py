"""What an MP4 claims to hold: FFmpeg makes an index of all samples that are claimed, whatever the file's size."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

PARENTS = frozenset(
    b"moov trak mdia minf stbl dinf edts mvex moof traf udta meta wave tref ilst sinf schi iprp ipco".split()
)
READ = {**dict.fromkeys(b"stsz stz2 trun hdlr stts stco co64 elst".split(), 24), b"stsc": 2**20}
"""Bytes that are read of each kind of box: the number that it begins with and what follows, or all its runs."""

MAX_BOXES = 2**20

Box = tuple[bytes, int]
"""The first bytes of what a box holds, and how many it holds."""


def claimed_samples(file: Any) -> float:
    """Entries of the index that FFmpeg would make of a file, from an object with `read` and `seek`: of every track the
    samples, as often as edits may repeat them. 0 for a file that is no MP4; infinite where boxes are compressed or
    without number."""
    total = 0
    track: dict[bytes, list[Box]] = {}
    for count, (name, box) in enumerate(_boxes(file, 0, file.seek(0, 2))):
        if name == b"cmov" or count == MAX_BOXES:
            return float("inf")
        if name in (b"trak", b"traf"):
            total, track = total + _entries(track), {}
        track.setdefault(name, []).append(box)
    return total + _entries(track)


def _entries(track: dict[bytes, list[Box]]) -> int:
    """Of one track, from what its boxes hold."""

    def counts(name: bytes) -> list[int]:
        return [int.from_bytes(first[4:8], "big") for first, _ in track.get(name, [])]

    samples = sum(counts(b"trun"))
    for first, length in track.get(b"stsz", []) + track.get(b"stz2", []):
        size, count = struct.unpack_from(">II", first.ljust(12, b"\0"), 4)
        # One size for all samples, or a size each: of 4 bytes, in the other kind of box of 4 bits or more.
        samples += count if size and (b"stsz" in track) else min(count, 2 * length)
    sound = b"hdlr" in track and all(first[8:12] != b"vide" for first, _ in track[b"hdlr"])
    if sound and len(track.get(b"stts", [])) == len(track.get(b"stsc", [])) == 1:
        (stts, _), (stsc, length) = track[b"stts"][0], track[b"stsc"][0]
        each_sample_a_tick = stts[4:8] == stts[12:16] == b"\0\0\0\1"  # PCM: many samples an entry
        if each_sample_a_tick and len(stsc) == length:
            samples = _blocks_of_sound(stsc, sum(counts(b"stco") + counts(b"co64")))
    return samples * max([1, *counts(b"elst")])


def _blocks_of_sound(stsc: bytes, chunks: int) -> int:
    """Of at least 512 samples, but for the last of a chunk; the runs of an stsc box give the samples of the chunks."""
    runs = [struct.unpack_from(">II", stsc, place) for place in range(8, len(stsc) - 11, 12)]
    ends = [first for first, _ in runs[1:]] + [chunks + 1]
    return sum(max(0, end - first) * (samples // 512 + 1) for (first, samples), end in zip(runs, ends, strict=True))


def _boxes(file: Any, begin: int, end: int) -> Iterator[tuple[bytes, Box]]:
    """(name, box) of the boxes between two places and of those within them."""
    while begin + 8 <= end:
        file.seek(begin)
        head = file.read(16)
        size, name, header = int.from_bytes(head[:4], "big"), head[4:8], 8
        if size == 1:
            size, header = int.from_bytes(head[8:], "big"), 16
        if size != 0 and size < header:
            return
        last = min(begin + size, end) if size else end
        inside, length = begin + header, max(0, last - begin - header)
        file.seek(inside)
        yield name, (file.read(min(length, READ.get(name, 0))), length)
        if name in PARENTS:
            yield from _boxes(file, inside + (4 if name == b"meta" else 0), last)
        begin = last
