"""Clips and questions of a stage: drawn by seed, and rendered in memory as `mirasol.data.worlds` does into files."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from learning.rows import CLIPS, PER_TYPE, Stage
from mirasol.config import Config
from mirasol.data import ClipTensors, Example
from mirasol.data.worlds import Look, floors
from mirasol.data.worlds.questions import Question, asks
from mirasol.data.worlds.spec import LEARNED, World, draw_world
from mirasol.data.worlds.write import TABLES, draw_set, render

LEARN, TEST, HELD_OUT, WORDINGS = TABLES
TEST_SEED, TEST_CLIPS = 1_000_000, 500
"""Of the clips that rows are measured on, a fifth of them each for the test and for what is held out."""
VOCABULARY = 640
"""Most tokens that the study's tokenizer has: enough for all of its words."""


@lru_cache
def types(chunks: int, families: tuple[str, ...]) -> tuple[str, ...]:
    """The types of questions that some families make about clips of T chunks."""
    world = draw_world(random.Random(0), chunks, min(chunks, 3))
    return tuple(sorted({ask.type for ask, _ in asks(world, LEARNED) if ask.words in families}))


class Rendered:
    """Makes tensors of the clips of a set; a name is its number. A `ClipSource`.

    Args:
        late: chunks after which the clips begin.
    """

    def __init__(self, worlds: Sequence[World], late: int = 0) -> None:
        self.worlds, self.late = worlds, late

    def __call__(self, example: Example, config: Config, max_chunks: int) -> ClipTensors:
        world = self.worlds[int(Path(example.clip).name)]
        look = Look(config.seconds_per_chunk, config.frames_per_chunk, config.image_size, config.sample_rate)
        pictures, sound = render(world, look)
        times = (self.late + torch.arange(world.chunks)) * config.seconds_per_chunk
        return ClipTensors(times, torch.from_numpy(pictures).permute(3, 0, 1, 2), torch.from_numpy(sound))


def draw_stage(stage: Stage, families: tuple[str, ...], seed: int, chunks: int, table: Path) -> Rendered:
    """Draw what a stage learns from, and write its table of questions.

    Args:
        seed: of the run; every stage has clips of its own.
        chunks: T of the run's last stage, with whose end clips end.
    """
    own = 1000 * seed + stage.chunks
    worlds, tables = draw_set(
        CLIPS, own, chunks=stage.chunks, events=stage.events, per_type=PER_TYPE, types=types(stage.chunks, families)
    )
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="", encoding="utf-8") as stream:
        lines = ([question.clip, question.text, question.answer] for question in tables[LEARN])
        csv.writer(stream).writerows([("clip", "question", "answer"), *lines])
    return Rendered(worlds, chunks - stage.chunks)


@lru_cache
def draw_test(chunks: int, events: int, families: tuple[str, ...]) -> tuple[list[World], dict[str, list[Question]]]:
    """The clips that rows are measured on, and the questions of the test, of held-out kinds and of new words."""
    worlds, tables = draw_set(
        TEST_CLIPS, TEST_SEED + chunks, chunks=chunks, events=events, per_type=PER_TYPE, types=types(chunks, families)
    )
    return worlds, {name: tables[name] for name in (TEST, HELD_OUT, WORDINGS)}


def test_floors(chunks: int, events: int, families: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """What can be guessed of the test, by type of question; see `mirasol.data.worlds.floors`."""
    worlds, tables = draw_test(chunks, events, families)
    return floors(worlds, tables[TEST])


def study_tokenizer() -> Any:
    """A byte-level BPE in which every word of the study's questions and answers is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    _, tables = draw_set(60, 0, chunks=64, events=8, per_type=20.0)
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*special.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    own.train_from_iterator((f"{question.text}\n{question.answer}" for question in tables[LEARN]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=own, **special)
