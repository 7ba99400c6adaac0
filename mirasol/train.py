"""Training: one loop on plain PyTorch, from a table of questions to a `from_pretrained` folder.

Fine-tuning from a CSV:

    import mirasol
    from mirasol.train import TrainOptions, train

    options = TrainOptions("questions.csv", "run", init="pretrained", steps=1000, freeze=("video_vit",))
    run = train(options)  # the same call goes on where an earlier one was interrupted
    model = mirasol.Model.from_pretrained(run)

Without `init` a new model of `preset` is trained. `torchrun --nproc-per-node 8 -m mirasol train ...` shards the model
over its processes (FSDP2).

A step's losses are means over what counts in its whole batch, whatever the processes and parts that compute them:
tokens of the answers for the text, predicted chunks for the others. Two things do know of the parts: the latent loss
is centred over the clips of one part, and every part draws its own masks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mirasol import cost
from mirasol.batch import IGNORE
from mirasol.config import Config
from mirasol.data import Batch, ClipSource, Example, Loader, read_examples
from mirasol.kernels.core.checks import expect
from mirasol.model import Model
from mirasol.tokenizer import Tokenizer
from mirasol.training.build import build, use_features
from mirasol.training.logs import Log, peak_flops
from mirasol.training.optim import freeze, make_optimizer, parameter_groups, schedule, set_rates
from mirasol.training.options import TrainOptions
from mirasol.training.processes import Processes, processes, shard
from mirasol.training.resume import Checkpoints, open_run

__all__ = ["TrainOptions", "train"]

LEARNED = ("latent", "video", "audio", "text")
LOGGED = (*LEARNED, "latent_constant")


def train(options: TrainOptions, *, source: ClipSource | None = None) -> Path:
    """Train a model, or go on with the run that lies in `options.out`; returns that folder.

    It holds the model and its tokenizer when all is done, and all along options.json, log.jsonl (a line a step),
    tensorboard/ and checkpoints/. PyTorch's generator is seeded.

    Args:
        source: makes tensors of the table's clips; default: they are files, or in the shards that the table names.
    Raises:
        TypeError, ValueError, OSError: options that cannot work, by name.
        FloatingPointError: a loss or a gradient that is not finite; nothing has learned from it.
        RuntimeError: too many clips that cannot be read.
    """
    with processes(options) as here:
        examples, own = read_examples(options.table)
        source = source if source is not None else own
        torch.manual_seed(options.seed)
        model, tokenizer = build(options)
        freeze(model.to(here.device), options.freeze)
        if options.features is not None:
            source = use_features(model, examples, source, options, here)
        shard(model, options, here)
        optimizer = make_optimizer(parameter_groups(model, options.lr, options.lr_of, options.weight_decay))
        loader = _loader(options, examples, source, model.config, tokenizer, here)
        steps = options.steps or options.epochs * len(loader)
        folder = open_run(options, _digest(examples), here)
        checkpoints = Checkpoints(folder, options.keep, model, optimizer, loader, here)
        start = checkpoints.resume()
        with Log(folder, start, steps, options.trackio, here.rank == 0) as log, checkpoints:
            _run(options, here, model, optimizer, loader, checkpoints, log, range(start, steps))
            checkpoints.save(steps)  # where the run goes on if it is interrupted while the model is written
        model.save_pretrained(folder, tokenizer=tokenizer)
    return folder


def _run(
    options: TrainOptions,
    here: Processes,
    model: Model,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    checkpoints: Checkpoints,
    log: Log,
    steps: range,
) -> None:
    """The loop."""
    weights = {name: getattr(model.config, f"{name}_weight") for name in LEARNED}
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    expect(len(weights) > 0, "config", f"give a weight to one of the losses {', '.join(LEARNED)}", weights)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    bf16 = options.bf16 if options.bf16 is not None else here.device.type == "cuda"
    peak = peak_flops(here.device)
    batches = _endless(loader)
    model.train()
    before = time.perf_counter()
    for step in steps:
        set_rates(optimizer, schedule(step, steps.stop, options.warmup))
        batch = next(batches)
        waited = time.perf_counter() - before
        parts = [_part(batch, i, options.accumulate) for i in range(options.accumulate)]
        work = torch.tensor(_work(batch.inputs, model.config), dtype=torch.float64)
        totals = here.sum(torch.cat([torch.stack([part.counts for part in parts]).sum(0), work])).tolist()
        means = torch.zeros(len(LOGGED), device=here.device)
        for i, part in enumerate(parts):
            share = {n: c / max(t, 1) for n, c, t in zip(LOGGED, part.counts.tolist(), totals, strict=False)}
            inputs = {name: x.to(here.device, non_blocking=True) for name, x in part.inputs.items()}
            torch.manual_seed(hash((options.seed, step, i, here.rank)))  # a resumed run masks as the unbroken one
            with torch.autocast(here.device.type, torch.bfloat16, enabled=bf16):
                losses = model(**inputs).losses
            loss = torch.stack([weight * share[n] * getattr(losses, n) for n, weight in weights.items()]).sum()
            (loss * here.world).backward()  # sharding averages over the processes
            means += torch.stack([share[n] * getattr(losses, n).detach() for n in LOGGED])
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)
        # The one wait for the device in a step, before the optimizer can spoil the weights
        *values, norm = torch.stack([*here.sum(means), here.whole(norm)]).tolist()
        figures = dict(zip(LOGGED, values, strict=True))
        figures = {"loss": sum(weight * figures[n] for n, weight in weights.items()), **figures, "grad_norm": norm}
        _expect_finite(figures, step + 1)
        optimizer.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        seconds, before = now - before, now
        clips, tokens, flops = (x / seconds for x in totals[len(LOGGED) :])
        rates = {"lr": optimizer.param_groups[0]["lr"], "clips_per_s": clips, "tokens_per_s": tokens}
        rates |= {"share_of_peak": flops / (peak * here.world) if peak else None, "waiting": waited / seconds}
        log.write(step + 1, figures | rates)
        if (step + 1) % options.save_every == 0:
            checkpoints.save(step + 1)
        checkpoints.poll()


def _loader(
    options: TrainOptions,
    examples: Sequence[Example],
    source: ClipSource | None,
    config: Config,
    tokenizer: Tokenizer,
    here: Processes,
) -> Loader:
    least = here.world * options.accumulate
    fits = options.batch % here.world == 0 and options.batch >= least
    expect(fits, "batch", f"be a multiple of {here.world} processes, and at least {least} for all parts", options.batch)
    return Loader(
        examples,
        config,
        tokenizer,
        batch_clips=options.batch // here.world,
        questions_per_clip=options.questions_per_clip,
        max_chunks=options.max_chunks,
        shuffle=True,
        seed=options.seed,
        workers=options.workers if options.workers is not None else min(here.cores, 8),
        rank=here.rank,
        world=here.world,
        source=source,
    )


def _endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader


@dataclass
class _Part:
    """What one forward and backward pass takes.

    Attributes:
        counts: float64 [5], over how much each loss of `LOGGED` is a mean.
    """

    inputs: dict[str, Tensor]
    counts: Tensor


def _part(batch: Batch, index: int, parts: int) -> _Part:
    """One of so many parts of a batch's clips.

    Of too few clips the first serves again, and counts nothing: all processes must compute as often, also where one of
    them has a clip less.
    """
    clips = len(batch.inputs["chunks"])
    first, end = clips * index // parts, clips * (index + 1) // parts
    counts_nothing = batch.repeated or first == end
    if first == end:
        first, end = 0, 1
    about = batch.inputs["clip_of_text"]
    texts = (about >= first) & (about < end)
    inputs = {
        name: x[texts] if name in ("text", "labels", "clip_of_text") else x[first:end]
        for name, x in batch.inputs.items()
    }
    inputs["clip_of_text"] = inputs["clip_of_text"] - first
    return _Part(inputs, _counts(inputs) * (not counts_nothing))


def _counts(inputs: dict[str, Tensor]) -> Tensor:
    predicted = (inputs["chunks"] - 1).double()
    chunks = predicted.sum()
    video, audio = (predicted[inputs[f"{name}_present"]].sum() for name in ("video", "audio"))
    return torch.stack([chunks, video, audio, (inputs["labels"][:, 1:] != IGNORE).sum().double(), chunks])


def _work(inputs: dict[str, Tensor], config: Config) -> tuple[float, float, float]:
    """Clips; tokens: n a chunk, and those of the texts; FLOPs, padding included and as if every part learned."""
    clips, longest = inputs["times"].shape
    texts, length = inputs["text"].shape
    tokens = float(inputs["chunks"].sum()) * config.tokens_per_chunk + texts * length
    return clips, tokens, cost.training(config, longest, length, clips=clips, texts=texts)


def _expect_finite(figures: dict[str, float], step: int) -> None:
    wrong = [f"{name} = {value}" for name, value in figures.items() if not math.isfinite(value)]
    if wrong:
        raise FloatingPointError(f"losses and gradients must be finite, were not in step {step}: {', '.join(wrong)}")


def _digest(examples: Sequence[Example]) -> str:
    """Of the questions and the names of the clips; the folder may be another."""
    told = [(os.path.basename(example.clip), dataclasses.replace(example, clip="")) for example in examples]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
