"""What training the 3B model needs on 1 to 64 GPUs: the tables of docs/scale.md. All of it is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mirasol.config import Config
from mirasol.cost.fits import USABLE
from mirasol.cost.flops import model as flops
from mirasol.cost.flops import training
from mirasol.cost.memory import Memory, memory
from mirasol.cost.parameters import parameters

BEGIN, END = "<!-- scale: begin -->", "<!-- scale: end -->"
COMMAND = "python -m mirasol.cost --write docs/scale.md"

PRESET, COMBINERS, CHUNKS, WORLDS, TEXT_TOKENS = "mirasol-3b", ("transformer", "ttm"), (64, 128), (1, 8, 64), 64

DEVICES = {"H100": 80e9, "H200": 141e9}  # bytes
PEAK = 989.4e12
"""Dense bfloat16 FLOP/s of both (NVIDIA's data sheets, SXM)."""
SHARE = 0.40
NVLINK, NETWORK = 450e9, 50e9
"""Bytes a second to and from a GPU: inside a machine of 8, and between machines (400 Gbit/s for each GPU)."""
DISK = 2e9
"""Bytes a second that a machine of 8 GPUs writes: an assumption."""
FRAME_RATE = 25
DECODED = {"360p": 1500.0, "720p": 690.0}
"""Source frames a second that one CPU core decodes and resizes, sound included: `mirasol.media.load`, one thread, H.264
of 25 frames a second written by tests/clips.py, which is easier to decode than most (0.16 Mbit/s), an x86 server."""
DAY = 86400


@dataclass(frozen=True)
class Run:
    """One setting: a Combiner, a length of clip, so many GPUs."""

    combiner: str
    chunks: int
    world: int

    @property
    def config(self) -> Config:
        return Config.preset(PRESET, combiner=self.combiner)

    @property
    def name(self) -> list[str]:
        return [self.combiner, str(self.chunks * self.config.frames_per_chunk), str(self.world)]

    def memory(self, clips: int, checkpointing: bool) -> Memory:
        return memory(self.config, self.chunks, TEXT_TOKENS, clips=clips, world=self.world, checkpointing=checkpointing)

    def clips(self, device: str, checkpointing: bool) -> int:
        """How many clips fit on each GPU; 0: not even one."""
        none, one = (self.memory(clips, checkpointing).total for clips in (0, 1))
        return max(0, int((USABLE * DEVICES[device] - none) // (one - none)))

    def best(self, device: str) -> tuple[int, bool]:
        """Clips a GPU, and whether blocks are checkpointed: the faster way; (0, True) where nothing fits."""
        ways = [(self.clips(device, checkpointing), checkpointing) for checkpointing in (False, True)]
        fitting = [way for way in ways if way[0]]
        return max(fitting, key=lambda way: way[0] / self.seconds(*way), default=(0, True))

    def seconds(self, clips: int, checkpointing: bool) -> float:
        """Of a step with so many clips on each GPU: work, or the exchange that it hides where that takes longer.

        Blocks that are computed again cost a forward pass more.
        """
        work = training(self.config, self.chunks, TEXT_TOKENS) * (4 / 3 if checkpointing else 1)
        return max(clips * work / (SHARE * PEAK), self.sent() / self.wire())

    def sent(self) -> float:
        """Bytes that a GPU receives, and sends, in a step: parameters twice, and gradients, in float32."""
        return parameters(self.config).total * (4 + 4 + 4) * (self.world - 1) / self.world

    def wire(self) -> float:
        return NVLINK if self.world <= 8 else NETWORK


def text() -> str:
    """The tables as they stand between the markers of the page."""
    runs = [Run(combiner, chunks, world) for combiner in COMBINERS for chunks in CHUNKS for world in WORLDS]
    key = ["Combiner", "frames", "GPUs"]
    tables = [
        (
            f"Work and activations of one clip: preset `{PRESET}`, bfloat16, {TEXT_TOKENS} tokens of text. "
            "A step is three forward passes.",
            [*key[:2], "forward, TFLOP", "step, TFLOP", "Combiner's share", "activations", "checkpointed"],
            [_clip(run) for run in runs if run.world == 1],
        ),
        (
            f"Memory of one GPU without clips, in GB, and how many clips the rest of {USABLE:.0%} of it holds.",
            [
                *key,
                *("parameters", "gradients", "AdamW", "gathered", "casts", "in all"),
                *(f"clips, {device}" for device in DEVICES),
                *(f"checkpointed, {device}" for device in DEVICES),
            ],
            [_memory(run) for run in runs],
        ),
        (
            f"Speed at {SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s, with as many clips as fit on an H100, checkpointed "
            "where that is faster. Exchanged: what each GPU receives and sends in a step, at "
            f"{NVLINK / 1e9:.0f} GB/s up to 8 GPUs and {NETWORK / 1e9:.0f} GB/s beyond; the work hides it, or the step "
            "takes as long. Tokens: those that enter the Combiner, and the text's.",
            [*key, "clips a GPU", "s a step", "clips a day", "tokens a day", "exchanged, GB", "s for that"],
            [_speed(run) for run in runs],
        ),
        (
            f"Data: source frames, {FRAME_RATE} a second, that the same runs need every second, and the CPU cores that "
            f"decode them, {DECODED['360p']:.0f} a second each (360p) or {DECODED['720p']:.0f} (720p).",
            [*key, "frames taken a s", "decoded a s", "cores, 360p", "cores, 720p", "cores a GPU, 360p"],
            [_data(run) for run in runs],
        ),
        (
            f"Checkpoints: float32 parameters and both moments, {DISK / 1e9:.0f} GB/s for each machine of 8 GPUs.",
            [
                "Combiner",
                "parameters",
                "weights, GB",
                "checkpoint, GB",
                *(f"s, {n} GPU{'s' * (n > 1)}" for n in WORLDS),
            ],
            [_checkpoint(combiner) for combiner in COMBINERS],
        ),
    ]
    about = f"Written by `{COMMAND}`."
    return "\n\n".join([about, *(f"{caption}\n\n{_markdown(columns, lines)}" for caption, columns, lines in tables)])


def replaced(page: str) -> str:
    """A page with the tables between its markers.

    Raises:
        ValueError: a page without them.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must hold the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text()}\n{END}{after}"


def _clip(run: Run) -> list[str]:
    forward = flops(run.config, run.chunks, TEXT_TOKENS, losses=True)
    step = training(run.config, run.chunks, TEXT_TOKENS)
    kept = [run.memory(1, checkpointing).activations for checkpointing in (False, True)]
    share = f"{forward.combiner / forward.total:.1%}"
    return [
        *run.name[:2],
        f"{forward.total / 1e12:.1f}",
        f"{step / 1e12:.0f}",
        share,
        *(f"{x / 1e9:.1f} GB" for x in kept),
    ]


def _memory(run: Run) -> list[str]:
    none = run.memory(0, False)
    sizes = (none.parameters, none.gradients, none.optimizer, none.gathered, none.casts, none.total)
    clips = [run.clips(device, checkpointing) for checkpointing in (False, True) for device in DEVICES]
    return [*run.name, *(f"{size / 1e9:.1f}" for size in sizes), *(str(n) if n else "none" for n in clips)]


def _speed(run: Run) -> list[str]:
    clips, checkpointing = run.best("H100")
    if not clips:
        return [*run.name, "none", *["–"] * 5]
    seconds = run.seconds(clips, checkpointing)
    a_day = DAY / seconds * clips * run.world
    tokens = a_day * (run.chunks * run.config.tokens_per_chunk + TEXT_TOKENS)
    sent = run.sent()
    mark = f"{clips}, checkpointed" if checkpointing else str(clips)
    return [
        *run.name, mark, f"{seconds:.1f}", f"{a_day:,.0f}", f"{tokens / 1e9:.1f} G",
        f"{sent / 1e9:.1f}", f"{sent / run.wire():.2f}",
    ]  # fmt: skip


def _data(run: Run) -> list[str]:
    clips, checkpointing = run.best("H100")
    if not clips:
        return [*run.name, *["–"] * 5]
    clips_a_second = clips * run.world / run.seconds(clips, checkpointing)
    taken = clips_a_second * run.chunks * run.config.frames_per_chunk
    seconds_per_chunk = run.config.samples_per_chunk / run.config.sample_rate
    decoded = clips_a_second * run.chunks * seconds_per_chunk * FRAME_RATE
    cores = [decoded / rate for rate in DECODED.values()]
    return [*run.name, f"{taken:,.0f}", f"{decoded:,.0f}", *(f"{n:.1f}" for n in cores), f"{cores[0] / run.world:.2f}"]


def _checkpoint(combiner: str) -> list[str]:
    total = parameters(Config.preset(PRESET, combiner=combiner)).total
    machines = [-(-world // 8) for world in WORLDS]
    times = [f"{12 * total / (DISK * n):.1f}" for n in machines]
    return [combiner, f"{total / 1e9:.2f} G", f"{4 * total / 1e9:.1f}", f"{12 * total / 1e9:.1f}", *times]


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = "|".join("--" for _ in columns)
    return "\n".join([f"| {' | '.join(columns)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)])
