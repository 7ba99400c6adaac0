"""Load damaged media files, thousands of them, each in a process that may die: `python tests/media/fuzz.py --help`.

A file is a seed (a small real one) after a few mutations, all of it a function of two numbers. What must not happen: a
crash, a hang, an error that does not name the file, more memory than `MOST_MEMORY`. What does is kept under `--out`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import selectors
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clips import write_clip

MOST_MEMORY = 10**9
"""Bytes, of the whole process, Python and torch included (about 300 MB)."""

ADDRESS_SPACE = 16 * 2**30
"""Bytes, so that a file that takes all memory ends its process and no other."""

TIME_LIMIT = 30.0
"""Seconds a file."""

SMALL = {"seconds": 0.8, "fps": 10, "width": 48, "height": 32, "key_every": 4, "rate": 16000}
MP3, OPUS = {"audio_codec": "libmp3lame"}, {"audio_codec": "libopus", "rate": 48000}
SEEDS = {
    "h264.mp4": {"codec": "libx264", "b_frames": 2},
    "fragments.mp4": {"codec": "libx264", "options": {"movflags": "frag_keyframe+empty_moov"}},
    "hevc.mp4": {"codec": "libx265", "width": 96, "height": 64, "options": {"movflags": "faststart"}},
    "mpeg4.mp4": {},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le", "audio_codec": "pcm_s16be"},
    "h264.mkv": {"codec": "libx264", "b_frames": 2, **OPUS},
    "ffv1.mkv": {"codec": "ffv1", "audio_codec": "flac"},
    "vp9.webm": {"codec": "libvpx-vp9", **OPUS},
    "vp8.webm": {"codec": "libvpx", **OPUS},
    "mpeg4.avi": {"b_frames": 2, **MP3},
    "raw.avi": {"codec": "rawvideo", "audio_codec": "pcm_s16le"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "audio_codec": "pcm_u8"},
    "wmv.asf": {"codec": "wmv2", **MP3},
    "sorenson.flv": {"codec": "flv"},
    "h264.ts": {"codec": "libx264", "b_frames": 2},
    "mpeg2.ts": {"codec": "mpeg2video", "audio_codec": "mp2"},
    "mpeg2.mpg": {"codec": "mpeg2video", "audio_codec": "mp2", "fps": 25},
    "opus.ogg": {"width": 0, **OPUS},
    "flac.ogg": {"width": 0, "audio_codec": "flac"},
    "picture.gif": {"codec": "gif", "pix_fmt": "rgb8", "tones": None},
    "picture.apng": {"codec": "apng", "pix_fmt": "rgb24", "tones": None},
    "sound.wav": {"width": 0, "audio_codec": "pcm_s16le"},
    "adpcm.wav": {"width": 0, "audio_codec": "adpcm_ima_wav"},
    "sound.mp3": {"width": 0, **MP3},
    "sound.flac": {"width": 0, "audio_codec": "flac"},
    "sound.aac": {"width": 0},
    "cover.mp4": {"width": 0, "cover": True},
    "sound.aiff": {"width": 0, "audio_codec": "pcm_s16be"},
    "sound.ac3": {"width": 0, "audio_codec": "ac3", "rate": 48000},
}
FIELDS = (
    *b"mvhd tkhd mdhd stsd stts ctts stsc stsz stco elst trun tfhd tfdt mehd avc1 mp4a esds hvcC avcC moof".split(),
    *b"traf sidx dref hdlr avih strh strf idx1 indx movi LIST fmt data IHDR acTL fcTL OpusHead fLaC COMM".split(),
    *(b"SSND", b"FLV", b"OggS", b"\x44\x89", b"\xb0", b"\xba", b"\x2a\xd7\xb1", b"\xe7", b"\xa3", b"\xb5"),
    *(b"\x00\x00\x01\xb3", b"\x47\x40"),
)
"""Names before numbers: boxes of MP4, chunks of RIFF, PNG and AIFF, elements of Matroska, headers of MPEG."""

NUMBERS = (0, 1, 2, 255, 4096, 16384, 65535, 2**24, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
OPTIONS = (
    {},
    {"samples_per_chunk": 4000},
    {"samples_per_chunk": 2000, "spread": True},
    {"samples_per_chunk": 1000, "spread": True, "duration": 60.0},
    {"start": 0.5, "duration": 0.2},
    {"start": 1.2, "duration": 0.5},
    {"samples_per_chunk": 4000, "fit": "squash"},
)


def write_seeds(folder: Path) -> list[Path]:
    """The small real files. A codec that this FFmpeg cannot write is said and left out."""
    files = []
    for name, changes in SEEDS.items():
        try:
            files.append(write_clip(folder / name, **{**SMALL, **changes}))
        except (ValueError, LookupError) as error:
            print(f"not fuzzed: {name}: {error}", file=sys.stderr)
    return files


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to four kinds of damage."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if len(out) < 16:
            return bytes(out)
        rng.choice(DAMAGES)(out, others, rng)
    return bytes(out)


def _place(out: bytearray, rng: random.Random) -> int:
    """Anywhere, or, as often, in the first or last kilobytes, where headers and indices stand."""
    end = len(out) - 8
    near = min(end, 2048)
    return max(0, rng.choice((rng.randrange(end), rng.randrange(end), rng.randrange(near), end - rng.randrange(near))))


def flip_bits(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 4, 16, 64))):
        out[_place(out, rng)] ^= 1 << rng.randrange(8)


def write_number(out: bytearray, others: list[bytes], rng: random.Random, place: int | None = None) -> None:
    size, order = rng.choice((1, 2, 4, 4, 8)), rng.choice(("big", "little"))
    number = rng.choice((rng.choice(NUMBERS), rng.getrandbits(8 * size))) & (2 ** (8 * size) - 1)
    place = _place(out, rng) if place is None else place
    out[place : place + size] = number.to_bytes(size, order)


def change_field(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    """A number shortly after the name of a field: a size, duration, dimension, count or rate."""
    held = [field for field in FIELDS if field in out]
    if held:
        field = rng.choice(held)
        places = [match.start() for match in re.finditer(re.escape(field), out)]
        write_number(out, others, rng, min(rng.choice(places) + len(field) + rng.randrange(-8, 48), len(out) - 8))


def truncate(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    del out[rng.randrange(8, len(out)) :]


def splice(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    other = rng.choice(others)
    first, length = rng.randrange(len(other)), rng.choice((8, 64, 512, 4096))
    place = _place(out, rng)
    out[place : place + rng.choice((0, length))] = other[first : first + length]


def move(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    """Repeat, drop, clear or scramble a part."""
    place, length = _place(out, rng), rng.choice((1, 4, 16, 188, 1024))
    part = bytes(out[place : place + length])
    out[place : place + length] = rng.choice((part * 2, part * 50, b"", bytes(len(part)), rng.randbytes(len(part))))


DAMAGES = (flip_bits, write_number, write_number, change_field, change_field, change_field, truncate, splice, move)


def case(seed: int, index: int, names: list[str], contents: list[bytes]) -> tuple[str, bytes, dict]:
    """(name, content, options of `load`) of a file."""
    rng = random.Random(f"{seed}/{index}")
    which = index % len(names)
    return f"f{index}-{names[which]}", mutate(contents[which], contents, rng), rng.choice(OPTIONS)


def serve(seeds: Path) -> None:
    """Load the files whose numbers come in on standard input; say what happened on standard output."""
    from mirasol.media import load

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings.simplefilter("ignore")
    names = sorted(path.name for path in seeds.iterdir())
    contents = [(seeds / name).read_bytes() for name in names]
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            name, content, options = case(*json.loads(line), names, contents)
            path = Path(folder) / name
            path.write_bytes(content)
            clear.write_text("5")
            result, said = "loaded", ""
            try:
                load(path, chunks=3, frames_per_chunk=2, size=(32, 48), **options)
            except ValueError as error:
                said = f"{error}"
                result = "refused" if name in said else "unnamed"
            except BaseException as error:
                result, said = "unnamed", f"{type(error).__name__}: {error}"
            path.unlink()
            peak = int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
            print(json.dumps([result, peak, said]), flush=True)


class Worker:
    """A process that loads files, and is replaced when it dies."""

    def __init__(self, seeds: Path) -> None:
        self._seeds = seeds
        self._start()

    def _start(self) -> None:
        arguments = [sys.executable, __file__, "--serve", str(self._seeds)]
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def load(self, seed: int, index: int) -> tuple[str, int, str]:
        """(what happened, peak bytes, what was said)."""
        begun = time.monotonic()
        self._process.stdin.write(json.dumps([seed, index]) + "\n")
        self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            told = selector.select(TIME_LIMIT)
        line = self._process.stdout.readline() if told else ""
        if line:
            result, peak, said = json.loads(line)
            return ("memory" if peak > MOST_MEMORY else result), peak, said
        self._process.kill()
        errors = self._process.communicate()[1][-2000:]
        self._start()
        seconds = time.monotonic() - begun
        return ("crash", 0, errors) if told else ("hang", 0, f"{seconds:.0f} s")

    def close(self) -> None:
        self._process.communicate()


def fuzz(seeds: Path, seed: int, indices: range, keep: Path | None = None) -> Iterator[tuple[int, str, int, str]]:
    """(index, what happened, peak bytes, what was said) for each file; one that must not happen is kept."""
    worker = Worker(seeds)
    names = sorted(path.name for path in seeds.iterdir())
    contents = [(seeds / name).read_bytes() for name in names]
    worker.load(seed, indices[0])  # imports
    for index in indices:
        result, peak, said = worker.load(seed, index)
        if keep is not None and result not in ("loaded", "refused"):
            name, content, options = case(seed, index, names, contents)
            (keep / name).write_bytes(content)
            print(f"{result}: {keep / name} {options} {peak >> 20} MB {said}", flush=True)
        yield index, result, peak, said
    worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    counts, most, begun = Counter(), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        write_seeds(Path(folder))
        indices = range(options.first, options.first + options.count)
        for _, result, peak, _ in fuzz(Path(folder), options.seed, indices, options.out):
            counts[result] += 1
            most = max(most, peak)
    print(f"{dict(counts)}, at most {most / 1e6:.0f} MB, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
