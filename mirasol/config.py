"""Every size and choice of the model, flat, and the presets.

Comments mark what the paper states ("known"), what is reported second-hand ("reported"); everything else is our choice.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

from mirasol.encoders.tubes import MergedTube
from mirasol.kernels import Tube, check_tubes
from mirasol.past import Reach

CombinerKind = Literal["transformer", "ttm", "attention", "perceiver", "mean", "none"]

SHORT_TUBES = (
    Tube((8, 8, 8), (16, 32, 32)),
    Tube((4, 12, 12), (16, 32, 32), (0, 16, 16)),
    Tube((1, 16, 16), (32, 16, 16)),
)
"""TubeViT's tubes but for the 16-frame one, which an 8-frame chunk cannot hold: 294 tokens at 8 x 224 x 224."""


@dataclass(unsafe_hash=True)
class Config:
    """Sizes and choices of `mirasol.Model`.

    The number of chunks T is not among them: it is the clip's length over `frames_per_chunk`, and no parameter
    depends on it. Fields are set once; other names may be assigned, as trainers do that keep notes of their own here.

    Raises:
        TypeError, ValueError: a value that cannot work, by name, with what it must be.
    """

    # The clip: T chunks of F frames and the sound of the same time
    frames_per_chunk: int = 8  # reported: 128 frames = 16 chunks x 8; known: 32 frames = 4 chunks x 8
    image_size: int = 224
    tubes: tuple[Tube, ...] = SHORT_TUBES
    tube_merge: tuple[tuple[int, int, int], ...] = ()  # space-to-depth of each tube along (t, h, w); empty: none
    tube_kernels: Literal["separate", "interpolated"] = "separate"  # a kernel a tube, or one resized to all shapes
    tube_kernel_size: tuple[int, int, int] = (8, 8, 8)  # of the one kernel; known (TubeViT)
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    sample_rate: int = 16000
    samples_per_chunk: int = 30720  # 1.92 s: 192 spectrogram frames
    n_fft: int = 400
    hop: int = 160
    n_mels: int = 128
    mel_patch: tuple[int, int] = (16, 16)  # mel bins, frames: 96 tokens
    mel_mean: float = -6.0  # of log-mel power, natural logarithm
    mel_std: float = 4.0

    # Encoders: two ViTs, or one for both
    encoder_dim: int = 768
    encoder_layers: int = 12
    encoder_heads: int = 12
    share_encoders: bool = False  # the paper is unclear

    # Combiner: n tokens a chunk to m
    combiner: CombinerKind = "transformer"
    combined_tokens: int = 32  # m; reported
    combiner_dim: int = 768
    combiner_layers: int = 4
    combiner_heads: int = 12
    combiner_window: int | None = (
        None  # chunks seen, own included: 1 is this chunk only, None all (paper: contradictory)
    )
    combiner_sinks: int = 0  # first chunks that stay in sight of a windowed Combiner
    ttm_memory: int = 96  # s, of all groups together
    ttm_read: int = 32  # r, of all groups together; the last m of these are passed on
    ttm_groups: int = 2  # memories, each for its own share of a chunk's tokens (arXiv 2410.16267)
    ttm_time_stamps: bool = True  # when a chunk begins, in seconds, added to its tokens (arXiv 2410.16267)
    ttm_official: bool = False  # as arXiv 2211.09119 has it: one memory, from zeros, without time stamps
    ttm_hidden: int = 64  # known (TTM)
    ttm_summary: Literal["token_learner", "latent_query", "mean"] = "token_learner"
    ttm_write: Literal["summary", "erase_add"] = "summary"
    ttm_process: Literal["transformer", "mixer", "mlp"] = "transformer"
    ttm_layers: int = 1
    ttm_mixer_hidden: int = 128  # known (TTM): inner width of the mixer's token MLP
    ttm_slots: int = 8  # known (TTM): slots of the erase-add write
    ttm_positions: bool = True
    ttm_initial_memory: Literal["learned", "normal", "zeros"] = "learned"

    # Audio-video Transformer over T x m tokens
    av_dim: int = 768
    av_layers: int = 12
    av_heads: int = 12
    av_window: int | None = None  # chunks seen, own included; None all
    av_sinks: int = 0  # first chunks that stay in sight beyond the window
    av_causal: bool = True  # False: every chunk sees every chunk, the baseline that cannot predict
    mask_ratio: float = 0.25  # of combined tokens, in training; reported without a number

    # Reconstruction of chunk t + 1 from h[t]
    reconstruction_target: Literal["pixels", "features"] = "pixels"  # reported: "a smaller copy" of the video
    reconstruction_size: int = 28  # pixels of the smaller copy's side
    reconstruction_patch: int = 4
    reconstruction_dim: int = 512
    reconstruction_layers: int = 2
    reconstruction_heads: int = 8

    # Text decoder
    vocab_size: int = 259  # bytes, then pad, bos, eos
    pad_id: int = 256
    bos_id: int = 257
    eos_id: int = 258
    text_dim: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_window: int | None = None  # last chunks of a clip that its texts look at; None all
    text_sinks: int = 0  # first chunks that they look at beside these
    cross_every: int = 1  # a cross-attention in every layer
    rotary_base: float = 10000.0  # of the text's positions (arXiv 2104.09864)

    # Weights of the losses: equal in pre-training, text x 10 in fine-tuning (reported)
    latent_weight: float = 1.0
    video_weight: float = 1.0
    audio_weight: float = 1.0
    text_weight: float = 1.0

    mlp_ratio: int = 4
    norm_eps: float = 1e-6

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ and name in self.__dataclass_fields__:
            raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}: make a configuration of its own")
        object.__setattr__(self, name, value)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _as_tuples(getattr(self, field.name))
            _check_kind(field.name, field.default, value)
            object.__setattr__(self, field.name, value)
            if isinstance(field.default, int | None) and not isinstance(value, bool | None):
                smallest = 0 if field.name.endswith(("_id", "_sinks")) else 1
                _require(value >= smallest, field.name, f"be at least {smallest}", value)
            if isinstance(field.default, float) or field.name.startswith("pixel_"):
                values = value if isinstance(value, tuple) else (value,)
                _require(all(_is_finite(number) for number in values), field.name, "be finite", value)
            choices = _CHOICES.get(field.name)
            if choices:
                _require(value in choices, field.name, f"be one of {', '.join(choices)}", value)
        if self.ttm_official:
            official = {"ttm_groups": 1, "ttm_time_stamps": False, "ttm_initial_memory": "zeros"}
            for name, value in official.items():
                object.__setattr__(self, name, value)
        for name in ("latent_weight", "video_weight", "audio_weight", "text_weight"):
            _require(getattr(self, name) >= 0, name, "be at least 0", getattr(self, name))
        for name in ("mel_std", "norm_eps", "rotary_base"):
            _require(getattr(self, name) > 0, name, "be above 0", getattr(self, name))
        for name in ("pixel_mean", "pixel_std"):
            _require(len(getattr(self, name)) == 3, name, "hold a number for each of 3 colours", getattr(self, name))
        _require(min(self.pixel_std) > 0, "pixel_std", "be above 0", self.pixel_std)
        for part in ("encoder", "combiner", "av", "reconstruction", "text"):
            dim, heads = getattr(self, f"{part}_dim"), getattr(self, f"{part}_heads")
            _require(dim % heads == 0, f"{part}_dim", f"be a multiple of {part}_heads = {heads}", dim)
        for part in ("combiner", "av", "text"):
            window, sinks = self.reach(part)
            _require(window is not None or sinks == 0, f"{part}_sinks", f"be 0 without {part}_window", sinks)
        _require(
            self.text_dim // self.text_heads % 2 == 0,
            "text_dim",
            f"give each of text_heads = {self.text_heads} an even width",
            self.text_dim,
        )
        self._check_tubes()
        bins, frames = self.mel_patch
        _require(self.n_fft >= self.hop, "n_fft", f"be at least hop = {self.hop}", self.n_fft)
        _require(self.n_mels % bins == 0, "n_mels", f"be a multiple of mel_patch[0] = {bins}", self.n_mels)
        _require(
            self.samples_per_chunk % (self.hop * frames) == 0,
            "samples_per_chunk",
            f"be a multiple of hop x mel_patch[1] = {self.hop * frames}",
            self.samples_per_chunk,
        )
        if self.combiner == "ttm":
            limit, what = self.ttm_read, "ttm_read"
            shared = {"the tokens of a chunk": self.tokens_per_chunk, "ttm_memory": self.ttm_memory, what: limit}
            for name, count in shared.items():
                _require(count % self.ttm_groups == 0, "ttm_groups", f"divide {name} = {count}", self.ttm_groups)
        else:
            limit, what = self.tokens_per_chunk, "the tokens of a chunk"
        if self.combiner in ("ttm", "transformer", "mean"):
            name = "combined_tokens"
            _require(self.combined_tokens <= limit, name, f"be at most {what} = {limit}", self.combined_tokens)
        _require(0 <= self.mask_ratio < 1, "mask_ratio", "be in [0, 1)", self.mask_ratio)
        _require(
            self.reconstruction_size % self.reconstruction_patch == 0,
            "reconstruction_size",
            f"be a multiple of reconstruction_patch = {self.reconstruction_patch}",
            self.reconstruction_size,
        )
        for name in ("pad_id", "bos_id", "eos_id"):
            value = getattr(self, name)
            _require(0 <= value < self.vocab_size, name, f"be in [0, vocab_size = {self.vocab_size})", value)

    def _check_tubes(self) -> None:
        size = (self.frames_per_chunk, self.image_size, self.image_size)
        object.__setattr__(self, "tubes", check_tubes(self.tubes, *size))
        count = len(self.tubes)
        _require(
            len(self.tube_merge) in (0, count), "tube_merge", f"hold one (t, h, w) a tube, {count}", self.tube_merge
        )
        for tube in self.merged_tubes:
            _require(0 not in tube.grid(*size), "tube_merge", f"leave a token in a chunk of {size}", tube.merge)
            _require(self.encoder_dim % tube.parts == 0, "encoder_dim", f"divide by {tube.merge}", self.encoder_dim)
        plain = self.tube_kernels == "separate" or not self.tube_merge
        _require(plain, "tube_merge", "be empty with tube_kernels = 'interpolated'", self.tube_merge)

    def reach(self, part: str) -> Reach:
        """How far back the "combiner", the "av" Transformer or the "text" sees."""
        return Reach(getattr(self, f"{part}_window"), getattr(self, f"{part}_sinks"))

    @property
    def seconds_per_chunk(self) -> float:
        """How long a chunk lasts."""
        return self.samples_per_chunk / self.sample_rate

    @property
    def merged_tubes(self) -> tuple[MergedTube, ...]:
        """The tubes with their space-to-depth."""
        merges = self.tube_merge or ((1, 1, 1),) * len(self.tubes)
        return tuple(MergedTube.of(tube, merge) for tube, merge in zip(self.tubes, merges, strict=True))

    @property
    def video_tokens(self) -> int:
        """n_v: tokens of a chunk's video."""
        size = (self.frames_per_chunk, self.image_size, self.image_size)
        return sum(prod(tube.grid(*size)) for tube in self.merged_tubes)

    @property
    def mel_grid(self) -> tuple[int, int]:
        """Patches of a chunk's spectrogram: along mel bins, along time."""
        bins, frames = self.mel_patch
        return self.n_mels // bins, self.samples_per_chunk // self.hop // frames

    @property
    def audio_tokens(self) -> int:
        """n_a: tokens of a chunk's sound."""
        return self.mel_grid[0] * self.mel_grid[1]

    @property
    def tokens_per_chunk(self) -> int:
        """n = n_v + n_a: what the Combiner takes in per chunk."""
        return self.video_tokens + self.audio_tokens

    @property
    def latents_per_chunk(self) -> int:
        """m: what the Combiner hands on per chunk (all n where there is none)."""
        return self.tokens_per_chunk if self.combiner == "none" else self.combined_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`; an unknown key is an error that names it."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"config has unknown fields: {', '.join(unknown)}")
        return cls(**values)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Config:
        return cls.from_dict(json.loads(Path(path).read_text()))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Config:
        """A named configuration, with `changes` applied.

        Args:
            name: "tiny" (tests), "small" (a laptop), "base" (one GPU), "mirasol-3b" (the paper's size).
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, was {name!r}")
        return cls.from_dict({**PRESETS[name], **changes})


_CHOICES = {
    "combiner": get_args(CombinerKind),
    "ttm_summary": ("token_learner", "latent_query", "mean"),
    "ttm_write": ("summary", "erase_add"),
    "ttm_process": ("transformer", "mixer", "mlp"),
    "ttm_initial_memory": ("learned", "normal", "zeros"),
    "reconstruction_target": ("pixels", "features"),
    "tube_kernels": ("separate", "interpolated"),
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        frames_per_chunk=4, image_size=32, tubes=(Tube((4, 8, 8), (4, 8, 8)), Tube((1, 16, 16), (4, 16, 16))),
        samples_per_chunk=2560, n_mels=32, mel_patch=(16, 8),
        encoder_dim=64, encoder_layers=2, encoder_heads=4,
        combined_tokens=4, combiner_dim=64, combiner_layers=2, combiner_heads=4,
        ttm_memory=16, ttm_read=4, ttm_hidden=32,
        av_dim=64, av_layers=2, av_heads=4,
        reconstruction_size=8, reconstruction_dim=64, reconstruction_layers=1, reconstruction_heads=4,
        text_dim=64, text_layers=2, text_heads=4,
    ),
    "small": dict(
        image_size=112,
        encoder_dim=384, encoder_layers=6, encoder_heads=6,
        combined_tokens=16, combiner_dim=384, combiner_layers=4, combiner_heads=6, ttm_memory=64, ttm_read=16,
        av_dim=384, av_layers=6, av_heads=6,
        reconstruction_dim=256, reconstruction_heads=4,
        text_dim=384, text_layers=6, text_heads=6,
    ),
    "base": dict(),
    # Known: 3 B parameters. Reported: about half of them in the audio-video part, m = 32.
    "mirasol-3b": dict(
        encoder_dim=1024, encoder_layers=24, encoder_heads=16,
        combiner_dim=1024, combiner_layers=6, combiner_heads=16,
        av_dim=1536, av_layers=24, av_heads=12,
        reconstruction_dim=1024, reconstruction_layers=4, reconstruction_heads=16,
        text_dim=2048, text_layers=24, text_heads=16,
    ),
}  # fmt: skip


def _require(condition: bool, name: str, must: str, was: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must {must}, was {was!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _check_kind(name: str, default: Any, value: Any) -> None:
    """A value is of the kind of its default; a number may be a whole one, and what defaults to None an int."""
    kinds = {
        bool: (bool,),
        int: (int,),
        float: (int, float),
        str: (str,),
        tuple: (tuple,),
        type(None): (int, type(None)),
    }
    allowed = kinds[tuple if isinstance(default, tuple) else type(default)]
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
        raise TypeError(f"{name} must be of type {names}, was {value!r}")


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list | tuple) else value
