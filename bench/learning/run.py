"""One run: a row of the study is trained with one seed, by `mirasol.train`, and measured."""

from __future__ import annotations

import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from learning.data import Rendered, draw_stage, draw_test, study_tokenizer, test_floors
from learning.rows import BASE, LEARNING, MODEL, QUESTIONS_PER_STEP, ROWS, Row, Stage
from mirasol import Model, cost
from mirasol.config import Config
from mirasol.data import Example, collate
from mirasol.data.worlds.questions import Question
from mirasol.tokenizer import Tokenizer, load_tokenizer
from mirasol.train import TrainOptions, train

QUESTION_TOKENS = 16
"""L of the question whose FLOPs are counted with those of its clip: the mean of the study's, answer included."""
TOGETHER = 20
"""Clips that are measured at once."""


def learn_base(seed: int, work: Path) -> Path:
    """Train what all rows of a seed begin from, on single chunks, without memory; returns its folder."""
    begin, out = work / "new", work / "base"
    if not (out / "config.json").is_file():
        tokenizer = study_tokenizer()
        ids = dict(pad_id=tokenizer.pad_token_id, bos_id=tokenizer.bos_token_id, eos_id=tokenizer.eos_token_id)
        config = Config.preset("tiny", **MODEL, combiner="none", vocab_size=len(tokenizer), **ids)
        torch.manual_seed(seed)
        Model(config).save_pretrained(begin, tokenizer=tokenizer)
        _stage(BASE, ROWS["none"], seed, begin, out, chunks=BASE.chunks)
        shutil.rmtree(begin)
    return out


def learn_row(row: Row, seed: int, work: Path, base: Path) -> dict[str, Any]:
    """Train a row from what its seed's rows begin from, and measure it; what an interrupted call has trained counts."""
    began = time.perf_counter()
    folder = work / "begin"
    if not (folder / "config.json").is_file():
        _grown(row, seed, base).save_pretrained(folder, tokenizer=load_tokenizer(base))
    if row.pretrain:
        stage = Stage(row.stages[-1].chunks, row.stages[-1].events, row.pretrain)
        folder = _stage(stage, row, seed, folder, work / "pretrained", text_weight=0.0)
    for stage in row.stages:
        folder = _stage(stage, row, seed, folder, work / f"chunks-{stage.chunks}")
    model, tokenizer = Model.from_pretrained(folder), load_tokenizer(folder)
    events = row.stages[-1].events
    return {
        "row": row.name,
        "seed": seed,
        "digest": row.digest,
        "chunks": row.chunks,
        "events": events,
        "steps": BASE.steps + row.pretrain + sum(stage.steps for stage in row.stages),
        "seconds": round(time.perf_counter() - began, 1),
        **costs(model, row.chunks),
        "floors": test_floors(row.chunks, events, row.families),
        "right": measured(model, tokenizer, *draw_test(row.chunks, events, row.families)),
    }


def costs(model: Model, chunks: int) -> dict[str, int]:
    """Parameters; FLOPs of a clip and a question, and of the Combiner in it; bytes that a stream of it keeps."""
    whole = cost.model(model.config, chunks, QUESTION_TOKENS)
    stream = model.stream(memory=chunks)
    return {
        "parameters": model.num_parameters()["total"],
        "flops": whole.total,
        "combiner_flops": whole.combiner,
        "stream_bytes": stream.nbytes,
    }


def measured(
    model: Model, tokenizer: Tokenizer, worlds: Sequence[Any], tables: dict[str, list[Question]]
) -> dict[str, dict[str, list[int]]]:
    """By table and type of question, and for "all": how many answers are exactly right, and of how many.

    An answer is right where its every token, its end included, is the likeliest: what greedy decoding writes.
    """
    source = Rendered(worlds)
    return {name: _right(model.eval(), tokenizer, source, questions) for name, questions in tables.items()}


@torch.no_grad()
def _right(model: Model, tokenizer: Tokenizer, source: Rendered, questions: list[Question]) -> dict[str, list[int]]:
    asked: dict[int, list[Question]] = defaultdict(list)
    for question in questions:
        asked[question.clip].append(question)
    clips, right, count = list(asked), Counter[str](), Counter[str]()
    for first in range(0, len(clips), TOGETHER):
        own = clips[first : first + TOGETHER]
        texts = [(row, question) for row, clip in enumerate(own) for question in asked[clip]]
        batch = collate(
            [source(Example(str(clip)), model.config, source.worlds[clip].chunks) for clip in own],
            [question.text for _, question in texts],
            [question.answer for _, question in texts],
            tokenizer=tokenizer,
            clip_of_text=[row for row, _ in texts],
        )
        labels = batch["labels"][:, 1:]
        written = model(**batch).logits[:, :-1].argmax(-1)
        exact = ((written == labels) | (labels < 0)).all(1).tolist()
        for (_, question), good in zip(texts, exact, strict=True):
            for name in (question.ask.type, "all"):
                count[name] += 1
                right[name] += good
    return {name: [right[name], count[name]] for name in sorted(count)}


def _grown(row: Row, seed: int, base: Path) -> Model:
    """A row's new model with all of the base's weights that fit it."""
    old = Model.from_pretrained(base)
    ids = {name: getattr(old.config, name) for name in ("vocab_size", "pad_id", "bos_id", "eos_id")}
    torch.manual_seed(seed)
    model = Model(Config.preset("tiny", **row.config, **ids))
    own, known = model.state_dict(), old.state_dict()
    fitting = {name: x for name, x in known.items() if name in own and own[name].shape == x.shape}
    model.load_state_dict(own | fitting)
    return model


def _stage(
    stage: Stage, row: Row, seed: int, begin: Path, out: Path, *, chunks: int | None = None, text_weight: float = 1.0
) -> Path:
    """Train what lies in `begin` on the clips of a stage; returns `out`, where it then lies.

    Args:
        chunks: T of the clips with whose end those of this stage end; default: the row's.
    """
    if (out / "config.json").is_file():
        return out
    table = out.parent / f"{out.name}.csv"
    source = draw_stage(stage, row.families, seed, row.chunks if chunks is None else chunks, table)
    options = TrainOptions(
        str(table), str(out), init=str(begin), config={"text_weight": text_weight}, steps=stage.steps,
        max_chunks=stage.chunks, batch=stage.batch, questions_per_clip=QUESTIONS_PER_STEP // stage.batch,
        lr=row.lr, seed=seed, workers=0, save_every=200, keep=1, device="cpu", **LEARNING,
    )  # fmt: skip
    train(options, source=source)
    shutil.rmtree(out / "checkpoints")
    table.unlink()
    return out
