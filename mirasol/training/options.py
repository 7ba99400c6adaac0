"""What a training run is told. Plain values, so that `python -m mirasol train --help` waits for no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainOptions:
    """Train a model on a table of questions about clips, and leave a `from_pretrained` folder.

    Raises:
        TypeError, ValueError: a value that cannot work, by name, with what it must be.
    """

    table: str
    """Table of questions (.csv, .jsonl, .parquet) with the columns clip, question and answer; or folder of shards."""
    out: str = "run"
    """Folder of the run: the model, options.json, log.jsonl, tensorboard/ and checkpoints/. A run that lies there is
    continued, to the step."""
    fresh: bool = False
    """Begin anew where a run lies already, which is deleted."""

    preset: str | None = None
    """Size of a new model: tiny, small (the default), base or mirasol-3b."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of mirasol.Config to set otherwise: combiner=ttm mask_ratio=0.1."""
    init: str | None = None
    """Folder or Hub repository of a model to fine-tune, in place of a preset. The text loss then weighs 10, as the
    paper reports for fine-tuning, unless --config text_weight=... says otherwise."""
    image_vit: str | None = None
    """Weights of an image ViT (.safetensors, .pt, .bin) from which both encoders start."""
    text_decoder: str | None = None
    """Folder or Hub name of a language model of `transformers` that becomes the text decoder, with its tokenizer."""
    tokenizer: str | None = None
    """Folder of a tokenizer; default: that of --init, or bytes. vocab_size, pad_id, bos_id and eos_id of a new model
    follow it."""

    steps: int | None = None
    """Optimizer steps, in place of epochs."""
    epochs: int = 10
    """Times that every clip is seen."""
    batch: int = 8
    """Clips of one optimizer step, over all processes and all parts. A step's losses are means over what counts in all
    of them."""
    accumulate: int = 1
    """Parts in which a process computes its share of the batch, one after the other: less memory, the same step."""
    questions_per_clip: int | None = None
    """Most questions asked of a clip in one step; all by default."""
    max_chunks: int = 16
    """Most chunks taken of a clip."""
    features: str | None = None
    """Folder in which the outputs of the encoders, which must be frozen, are kept and found again: clips are then read
    and encoded once. The next chunk's features are predicted with --config reconstruction_target=features; its pixels,
    which are not at hand, are not."""

    lr: float = 3e-4
    """Highest learning rate; reached after the warm-up, then falling along a cosine to 0."""
    lr_of: dict[str, float] = field(default_factory=dict)
    """Learning rates of parts of the model, by name: text_decoder=1e-5 text_decoder.blocks.0=1e-6. The longest name
    holds."""
    freeze: tuple[str, ...] = ()
    """Parts of the model that do not learn, by name: video_vit audio_vit."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.05
    """AdamW's, on matrices only."""
    clip_norm: float = 1.0
    """Largest norm of a step's gradient; a larger one is scaled down."""
    seed: int = 0
    """Of the initial weights, the order of the clips and what is masked: on a CPU a run is a pure function of these
    options."""

    device: str | None = None
    """cpu or cuda; a GPU where there is one."""
    bf16: bool | None = None
    """Compute in bfloat16 where autocast allows it; default: on a GPU."""
    activation_checkpointing: bool = False
    """Compute every block's activations again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """torch.compile every block."""
    workers: int | None = None
    """Processes that read clips, per training process; default: one for each of its cores, 8 at most."""

    save_every: int = 500
    """Steps between two checkpoints."""
    keep: int = 2
    """Checkpoints that are kept, the newest ones."""
    trackio: str | None = None
    """Project of the package `trackio` to log to besides."""

    def __post_init__(self) -> None:
        from mirasol.kernels.core.checks import expect, expect_int

        self.freeze = tuple(self.freeze)
        for name in ("epochs", "batch", "accumulate", "max_chunks", "save_every", "keep"):
            expect_int(name, getattr(self, name))
        for name in ("steps", "questions_per_clip"):
            if getattr(self, name) is not None:
                expect_int(name, getattr(self, name))
        expect_int("seed", self.seed, minimum=0)
        if self.workers is not None:
            expect_int("workers", self.workers, minimum=0)
        rates = {"lr": self.lr, **{f"lr_of[{part!r}]": rate for part, rate in self.lr_of.items()}}
        for name, value in {**rates, "clip_norm": self.clip_norm}.items():
            expect(value > 0, name, "be greater than 0", value)
        expect(self.weight_decay >= 0, "weight_decay", "be at least 0", self.weight_decay)
        expect(0 <= self.warmup <= 1, "warmup", "be a share in [0, 1]", self.warmup)
        for name in ("preset", "text_decoder"):
            both = self.init is not None and getattr(self, name) is not None
            expect(not both, name, "be left out with init, which has its own", getattr(self, name))
        both = self.tokenizer is not None and self.text_decoder is not None
        expect(not both, "tokenizer", "be left out with text_decoder, which has its own", self.tokenizer)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**dataclasses.asdict(self), "freeze": list(self.freeze)}


INDIFFERENT = (
    *("table", "out", "fresh", "accumulate", "device", "activation_checkpointing", "compile"),
    *("workers", "save_every", "keep", "trackio"),
)
"""Options that a run may be continued with otherwise: they change where and how fast it runs, not what it learns."""
