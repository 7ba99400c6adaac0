"""Batches of clips, each decoded once for all its questions, in an order that is known at every step of every epoch."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from mirasol.config import Config
from mirasol.kernels.core.checks import expect, expect_int
from mirasol.tokenizer import Tokenizer

from .clips import ClipSource, ClipTensors, load_clip
from .collate import collate
from .table import Example

BROKEN = (OSError, ValueError, RuntimeError)
"""What a source raises for a clip that cannot be read."""
JUDGED_FROM = 20
"""Clips of an epoch, or all where it has fewer, that are tried before the share of broken ones is judged."""

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What a step of training or evaluation takes.

    Attributes:
        inputs: keyword arguments of `Model.forward`, as `collate` gives them.
        examples: the Q examples that the texts are of, in their order.
        tried: clips that were opened for this batch.
        skipped: (clip, reason) of those that could not be read and are left out.
        repeated: whether the batch is a repetition of clips that come elsewhere in the epoch, since this rank had none
            left for the step, or none that could be read; an evaluation does not count it.
    """

    inputs: dict[str, Tensor]
    examples: list[Example]
    tried: int
    skipped: list[tuple[str, str]]
    repeated: bool


class Steps(torch.utils.data.Sampler[tuple[int, int]]):
    """(epoch, step) of what comes next: the sampler that goes with `Loader.batches`.

    The n-th iteration is epoch n; the first after `load_state_dict` goes on where the state was taken.
    """

    def __init__(self, per_epoch: int) -> None:
        self.per_epoch, self.epoch, self.step = per_epoch, -1, 0
        self._resumed = False

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for epoch, step in self.remaining():
            self.step = step + 1
            yield epoch, step

    def remaining(self) -> list[tuple[int, int]]:
        """Begin the next epoch, or go on with the one that was resumed: its places that are left."""
        if not self._resumed:
            self.epoch, self.step = self.epoch + 1, 0
        self._resumed = False
        return [(self.epoch, step) for step in range(self.step, self.per_epoch)]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        self._resumed = self.epoch >= 0 and self.step < self.per_epoch


class Loader:
    """The batches of an epoch: `for batch in loader: model(**batch.inputs)`. The n-th iteration is epoch n.

    Examples of the same span of the same clip are asked together: the clip is read once for all of them. Every rank
    gets the same number of batches, and none is empty: where a rank has no clip left for the last step, or none that
    can be read, it repeats another (`Batch.repeated`). A clip that cannot be read is logged, kept in `skipped` and
    left out of its batch.

    The order is a function of seed, epoch and step alone, so neither the number of workers nor what they read ahead
    changes a batch, and `state_dict` tells the place of what has been handed out. `batches` and `steps` serve
    torchdata's loader: `StatefulDataLoader(loader.batches, batch_size=None, sampler=loader.steps, num_workers=2)`.

    Args:
        examples: at least one; with `answers` each must have one.
        config: of the model: sizes of chunks, frames and sound.
        tokenizer: makes ids of the texts; None: batches of clips without texts.
        batch_clips: most clips of a batch, on each rank.
        questions_per_clip: most questions of a clip in an epoch, drawn so that all come before any comes again. None:
            all of them, in the order of the table.
        max_chunks: most chunks of a clip; a longer span is read as so many chunks spread over it.
        max_text: most ids of a text, see `collate`.
        shuffle: another order of the clips in every epoch; else that of their first examples.
        seed: of the order and of the questions drawn, at least 0.
        workers: processes that read clips; 0: this one.
        rank, world: which share of every step's clips this process takes, of how many.
        bad_share: clips of an epoch that may be broken, as a share; more stop the run.
        answers: whether the texts are questions with answers to learn, with labels; else they are prompts.
        source: what reads a clip; default: `load_clip`, from media files.
    Raises:
        TypeError, ValueError: an argument out of range, by name.
        RuntimeError: while iterating, too many clips that cannot be read; it lists them.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: Config,
        tokenizer: Tokenizer | None,
        *,
        batch_clips: int,
        questions_per_clip: int | None = None,
        max_chunks: int = 16,
        max_text: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        bad_share: float = 0.05,
        answers: bool = True,
        source: ClipSource | None = None,
    ) -> None:
        expect(len(examples) > 0, "examples", "hold at least one example", examples)
        for name, value, least in (
            ("batch_clips", batch_clips, 1), ("max_chunks", max_chunks, 1), ("seed", seed, 0),
            ("workers", workers, 0), ("world", world, 1), ("rank", rank, 0),
        ):  # fmt: skip
            expect_int(name, value, minimum=least)
        if questions_per_clip is not None:
            expect_int("questions_per_clip", questions_per_clip)
        expect(rank < world, "rank", f"be below world = {world}", rank)
        expect(0 <= bad_share <= 1, "bad_share", "be in [0, 1]", bad_share)
        if answers and tokenizer is not None:
            unknown = next((example for example in examples if example.answer is None), None)
            expect(unknown is None, "examples", "have an answer each, or answers be False", unknown)
        self.examples, self.config, self.tokenizer = list(examples), config, tokenizer
        self.source: ClipSource = source if source is not None else load_clip
        self.questions_per_clip, self.max_chunks, self.max_text = questions_per_clip, max_chunks, max_text
        self.shuffle, self.seed, self.workers, self.answers = shuffle, seed, workers, answers
        self.rank, self.world, self.clips_per_step, self.bad_share = rank, world, batch_clips * world, bad_share
        spans: dict[tuple[Any, ...], list[int]] = {}
        for i, example in enumerate(self.examples):
            spans.setdefault((example.clip, example.start, example.end), []).append(i)
        self._spans = list(spans.values())  # the examples of each
        self._order: tuple[int, list[int]] | None = None  # of the epoch that was asked for last
        self.batches, self.steps, self._given = _Batches(self), Steps(len(self)), Steps(len(self))
        self.skipped: list[tuple[str, str]] = []
        self._tried = self._failed = 0  # clips of this epoch

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._spans) // self.clips_per_step)

    def __iter__(self) -> Iterator[Batch]:
        places = self._given.remaining()
        if places[0][1] == 0:
            self._tried = self._failed = 0
        if self.workers:
            gc.collect()  # in a forked worker, decoders among the garbage would wait for threads that it does not have
        batches = torch.utils.data.DataLoader(
            self.batches,
            batch_size=None,
            sampler=places,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
        )
        for (_, step), batch in zip(places, batches, strict=True):
            self._given.step = step + 1
            self._count(batch)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Place and counts after the last batch that was handed out, ready for JSON."""
        counts = {"tried": self._tried, "failed": self._failed, "skipped": [list(pair) for pair in self.skipped]}
        return {**self._given.state_dict(), **counts, **self._fixed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, with the next iteration, at the batch after the last that was handed out when the state was taken.

        Raises:
            ValueError: a state of a loader whose order is another, by the argument that differs.
        """
        for name, value in self._fixed().items():
            expect(state.get(name) == value, f"state[{name!r}]", f"be {value} as in this loader", state.get(name))
        self._given.load_state_dict(state)
        self._tried, self._failed = int(state["tried"]), int(state["failed"])
        self.skipped = [(clip, reason) for clip, reason in state["skipped"]]

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch of a step of an epoch."""
        order, first = self._order_of(epoch), step * self.clips_per_step
        together = order[first : first + self.clips_per_step]
        share = together[len(together) * self.rank // self.world : len(together) * (self.rank + 1) // self.world]
        clips: dict[int, ClipTensors] = {}
        skipped = []
        for span in share:
            clip = self._load(span)
            if isinstance(clip, ClipTensors):
                clips[span] = clip
            else:
                skipped.append(clip)
        repeated = not clips
        if repeated:
            clips = self._stand_in(order, first + self.rank)
        asked = [(i, e) for i, span in enumerate(clips) for e in self._questions(epoch, span)]
        examples = [self.examples[e] for _, e in asked]
        inputs = self._collate(list(clips.values()), examples, [i for i, _ in asked])
        return Batch(inputs, examples, len(share), skipped, repeated)

    def _fixed(self) -> dict[str, Any]:
        """What the order depends on."""
        return {
            "spans": len(self._spans),
            "examples": len(self.examples),
            "clips_per_step": self.clips_per_step,
            "questions_per_clip": self.questions_per_clip,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def _order_of(self, epoch: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            count = len(self._spans)
            random = np.random.default_rng((self.seed, epoch))
            self._order = epoch, random.permutation(count).tolist() if self.shuffle else list(range(count))
        return self._order[1]

    def _load(self, span: int) -> ClipTensors | tuple[str, str]:
        """The clip of a span, or its name and why it cannot be read."""
        example = self.examples[self._spans[span][0]]
        try:
            return self.source(example, self.config, self.max_chunks)
        except BROKEN as error:
            return example.clip, f"{type(error).__name__}: {error}"

    def _stand_in(self, order: list[int], place: int) -> dict[int, ClipTensors]:
        """The first clip from a place of the order on that can be read."""
        broken = []
        for i in range(min(len(order), JUDGED_FROM)):
            span = order[(place + i) % len(order)]
            clip = self._load(span)
            if isinstance(clip, ClipTensors):
                return {span: clip}
            broken.append(clip)
        raise RuntimeError(f"{len(broken)} clips in a row cannot be read: {_list(broken)}")

    def _questions(self, epoch: int, span: int) -> list[int]:
        """The examples of a span that an epoch asks: the next `questions_per_clip` along a shuffled circle of them."""
        members, k = self._spans[span], self.questions_per_clip
        if k is None or k >= len(members):
            return members
        circle = np.random.default_rng((self.seed, 0, span)).permutation(len(members)).tolist()
        return sorted(members[circle[(epoch * k + i) % len(members)]] for i in range(k))

    def _collate(self, clips: list[ClipTensors], examples: list[Example], clip_of_text: list[int]) -> dict[str, Tensor]:
        if self.tokenizer is None:
            return collate(clips)
        return collate(
            clips,
            [example.question for example in examples],
            [example.answer or "" for example in examples] if self.answers else None,
            tokenizer=self.tokenizer,
            clip_of_text=clip_of_text,
            max_text=self.max_text,
        )

    def _count(self, batch: Batch) -> None:
        """Keep and log what was skipped; stop where it is too much."""
        self._tried += batch.tried
        self._failed += len(batch.skipped)
        for clip, reason in batch.skipped:
            log.warning("%s is left out: %s", clip, reason)
            if (clip, reason) not in self.skipped:
                self.skipped.append((clip, reason))
        judged = self._tried >= JUDGED_FROM or self._given.step == len(self)
        if judged and self._failed > self.bad_share * self._tried:
            raise RuntimeError(
                f"{self._failed} of {self._tried} clips cannot be read, more than bad_share = {self.bad_share:g}: "
                f"{_list(self.skipped)}"
            )


class _Batches(torch.utils.data.Dataset[Batch]):
    """A loader's batches by (epoch, step), as PyTorch's loaders ask for them."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        return self._loader.batch(*place)


def _as_it_is(batch: Any) -> Any:
    return batch


def _list(broken: list[tuple[str, str]], most: int = 10) -> str:
    more = f"; and {len(broken) - most} more" if len(broken) > most else ""
    return "; ".join(f"{clip} ({reason})" for clip, reason in broken[:most]) + more
