"""How well a model answers a table of questions about clips, and one answer to one question."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils.data

from mirasol.config import Config
from mirasol.data import ClipSource, ClipTensors, Example, collate, load_clip, read_examples
from mirasol.data.loader import BROKEN
from mirasol.evaluation.answer import Answerer, read_classes
from mirasol.evaluation.metrics import measure
from mirasol.evaluation.options import AnswerOptions, EvaluateOptions
from mirasol.evaluation.prediction import Prediction
from mirasol.evaluation.predictions import check_examples, write_jsonl, write_predictions
from mirasol.evaluation.report import report_template, thumbnails, write_report
from mirasol.kernels.core.checks import expect

_Batch = tuple[list[list[int]], "list[ClipTensors | str]"]


def evaluate(
    run: str | Path,
    table: str | Path | Sequence[Example],
    options: EvaluateOptions = EvaluateOptions(),  # noqa: B008
    *,
    source: ClipSource | None = None,
) -> dict[str, Any]:
    """Let a model answer a table, and write what it said and how well it did into `options.out`.

    A clip is decoded and encoded once for all its questions. One that cannot be read is named, and its questions count
    as wrong. On a CPU the result is a pure function of the arguments.

    Args:
        run: a folder with a model and its tokenizer, as training leaves it.
        table: what `mirasol.data.read_examples` reads, or examples.
        source: what reads a clip; default: what goes with the table, media files with examples.
    Returns:
        what metrics.json holds: run, table, benchmark, examples, clips, unlabelled (examples without a truth, which are
        answered and not measured), broken ([{"clip", "reason"}]) and metrics (measure -> group -> value, count).
    Raises:
        ImportError: a package of the extra [eval] is missing.
        FileNotFoundError, ValueError: the run, the table or the classes cannot be read.
        LookupError: benchmark "nextqa-oe" without WordNet.
    """
    examples, own = read_examples(table) if isinstance(table, str | Path) else (list(table), None)
    expect(len(examples) > 0, "table", "hold at least one example", examples)
    classes = _classes(options, examples)
    # What is missing is told now, not when everything is answered
    if options.benchmark is not None:
        check_examples(examples, options.benchmark, classes)
    measure([], options.benchmark)
    report_template()
    answerer = Answerer(run, options)
    clips = _Clips(examples, answerer.model.config, answerer.max_chunks, source or own or load_clip)
    chosen = _spread(len(examples), options.shown)
    predictions: dict[int, Prediction] = {}
    frames: dict[int, list[bytes]] = {}
    broken: dict[tuple[str, str], None] = {}
    for asked, found in _progress(clips.batches(options.batch, options.workers), len(clips), options.progress):
        for rows, clip in zip(asked, found, strict=True):
            if isinstance(clip, str):
                broken[examples[rows[0]].clip, clip] = None
                predictions |= {
                    i: Prediction(e, choices=e.choices or classes, error=clip) for i, e in _at(examples, rows)
                }
            elif clip.video is not None:
                frames |= {i: thumbnails(clip.video) for i in rows if i in chosen}
        whole = [(rows, clip) for rows, clip in zip(asked, found, strict=True) if not isinstance(clip, str)]
        predictions |= _answer(answerer, examples, whole, classes)
    said = [predictions[i] for i in range(len(examples))]

    summary = {
        "run": str(run),
        "table": str(table) if isinstance(table, str | Path) else f"{len(examples)} examples",
        "benchmark": options.benchmark,
        "examples": len(examples),
        "clips": len(clips),
        "unlabelled": sum(example.answer is None for example in examples),
        "broken": [{"clip": clip, "reason": reason} for clip, reason in broken],
        "metrics": measure(said, options.benchmark),
    }
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_jsonl(said, out / "predictions.jsonl")
    if options.benchmark is not None:
        write_predictions(said, options.benchmark, out)
    write_report(out / "report.html", summary, [said[i] for i in chosen], [frames.get(i, []) for i in chosen])
    return summary


def ask(
    run: str | Path,
    clip: str,
    question: str,
    *,
    start: float | None = None,
    end: float | None = None,
    choices: Sequence[str] = (),
    options: AnswerOptions = AnswerOptions(),  # noqa: B008
) -> str:
    """The answer of a model to one question about one clip.

    Args:
        run: a folder with a model and its tokenizer, as training leaves it.
        clip: a media file.
        question: what is asked; "" asks for a caption or a label, as the model has learned.
        start, end: the span in seconds; default: the whole clip.
        choices: answer with the likeliest of these.
    Raises:
        FileNotFoundError, ValueError: the run or the clip cannot be read.
    """
    example = Example(clip, question, start=start, end=end, choices=tuple(choices))
    answerer = Answerer(run, options)
    inputs = collate([load_clip(example, answerer.model.config, answerer.max_chunks)])
    encoded = answerer.encode(inputs)
    if not example.choices:
        return answerer.generate(encoded, [question], [0])[0]
    scores = answerer.score(encoded, [question], [example.choices], [0])[0]
    return example.choices[scores.index(max(scores))]


class _Clips(torch.utils.data.Dataset["ClipTensors | str"]):
    """The different spans of a table's clips, in its order, each with the numbers of its examples.

    An item is the clip's tensors, or why it cannot be read.
    """

    def __init__(self, examples: Sequence[Example], config: Config, max_chunks: int, source: ClipSource) -> None:
        self._examples, self._config, self._max_chunks, self._source = examples, config, max_chunks, source
        spans: dict[tuple[Any, ...], list[int]] = {}
        for i, example in enumerate(examples):
            spans.setdefault((example.clip, example.start, example.end), []).append(i)
        self._asked = list(spans.values())

    def __len__(self) -> int:
        return len(self._asked)

    def __getitem__(self, span: int) -> ClipTensors | str:
        try:
            return self._source(self._examples[self._asked[span][0]], self._config, self._max_chunks)
        except BROKEN as error:
            return f"{type(error).__name__}: {error}"

    def batches(self, size: int, workers: int) -> Iterator[_Batch]:
        """(numbers of the examples of each clip, the clips), so many clips at a time."""
        loader = torch.utils.data.DataLoader(self, batch_size=size, num_workers=workers, collate_fn=list)
        for number, clips in enumerate(loader):
            yield self._asked[number * size : (number + 1) * size], clips


def _answer(
    answerer: Answerer,
    examples: Sequence[Example],
    clips: Sequence[tuple[list[int], ClipTensors]],
    classes: tuple[str, ...],
) -> dict[int, Prediction]:
    """Predictions about some clips by the number of the example: scored where there is a choice, else generated."""
    if not clips:
        return {}
    encoded = answerer.encode(collate([clip for _, clip in clips]))
    asked = [(i, row) for row, (rows, _) in enumerate(clips) for i in rows]
    scored = [(i, row) for i, row in asked if examples[i].choices or classes]
    free = [(i, row) for i, row in asked if not (examples[i].choices or classes)]
    predictions = {}
    choices = [examples[i].choices or classes for i, _ in scored]
    found = answerer.score(encoded, [examples[i].question for i, _ in scored], choices, [row for _, row in scored])
    for (i, _), texts, scores in zip(scored, choices, found, strict=True):
        predictions[i] = Prediction(examples[i], texts[scores.index(max(scores))], texts, tuple(scores))
    answers = answerer.generate(encoded, [examples[i].question for i, _ in free], [row for _, row in free])
    return predictions | {i: Prediction(examples[i], text) for (i, _), text in zip(free, answers, strict=True)}


def _classes(options: EvaluateOptions, examples: Sequence[Example]) -> tuple[str, ...]:
    """The closed set of classes; empty without one."""
    if options.classes is None:
        return ()
    own = next((example for example in examples if example.choices), None)
    expect(own is None, "classes", "be left out where examples have choices of their own", own)
    if options.classes == "table":
        in_order = options.benchmark != "epic-sounds"
        expect(in_order, "classes", "be a file with the classes in order of class_id for epic-sounds", options.classes)
        classes = tuple(sorted({example.answer for example in examples if example.answer is not None}))
        expect(len(classes) > 0, "classes", "be a file where the table holds no answers", options.classes)
        return classes
    classes = read_classes(options.classes)
    unknown = sorted({e.answer for e in examples if e.answer is not None and e.answer not in classes})
    expect(not unknown, "classes", "hold every answer of the table", f"without {unknown[:5]}")
    return classes


def _spread(total: int, count: int) -> list[int]:
    """So many numbers, or all, that lie evenly in 0 .. total - 1."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _at(examples: Sequence[Example], rows: Sequence[int]) -> list[tuple[int, Example]]:
    return [(i, examples[i]) for i in rows]


def _progress(batches: Iterator[_Batch], clips: int, shown: bool) -> Iterator[_Batch]:
    """The batches, with a bar of the clips that are done."""
    if not shown:
        yield from batches
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the bar of progress needs the package tqdm: pip install -e '.[eval]'") from error
    with tqdm(total=clips, unit="clip", dynamic_ncols=True) as bar:
        for asked, found in batches:
            yield asked, found
            bar.update(len(found))
