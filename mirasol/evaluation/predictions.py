"""Predictions on disk: a line for each example, and the files that the published sets' own scripts and servers take.

| set | file | form |
|---|---|---|
| msrvtt-qa | predictions.json | [{"id", "answer"}]: the set has no form of its own; ids are those of its questions |
| activitynet-qa | predictions.json | [{"question_id", "answer"}], for its evaluation/eval.py |
| nextqa-mc | predictions.json | {"<video>_<qid>": {"prediction", "answer"}}, numbers of choices, for its eval_mc.py |
| nextqa-oe | predictions.json | {video: {qid: text}}, for its eval_oe.py |
| vggsound | predictions/<file>.npy | float32 [C] probabilities, the classes in order of the alphabet, for its eval.py |
| epic-sounds | submission.zip | test.json of the EPIC-SOUNDS recognition challenge, the classes in order of class_id |
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from mirasol.data import Example
from mirasol.evaluation.metrics import closed_set, ranked, right
from mirasol.evaluation.prediction import Prediction
from mirasol.kernels.core.checks import expect

LISTED = 5
"""Likeliest classes of a closed set that predictions.jsonl lists; an example's own choices are listed all."""


def write_jsonl(predictions: Sequence[Prediction], path: Path) -> None:
    """A JSON object a line, in the order of the table; "right" is null where the truth is not known."""
    with path.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(_row(prediction), ensure_ascii=False) + "\n")


def check_examples(examples: Sequence[Example], benchmark: str, classes: Sequence[str]) -> None:
    """Refuse, before anything is answered, a table that a set's file of predictions cannot be made of.

    Raises:
        ValueError: an example without an id, or whose id is not of the set; nextqa-mc without choices; vggsound or
            epic-sounds without classes.
    """
    if benchmark in ("vggsound", "epic-sounds"):
        expect(len(classes) > 0, "classes", f"be given for {benchmark}, whose predictions are scores of classes", None)
    for example in examples:
        name = example.id
        expect(bool(name), "id", f"be the question's own name in {benchmark}", example)
        if benchmark == "nextqa-mc":
            expect(bool(example.choices), "choices", "be those of the question in nextqa-mc", example)
        elif benchmark == "nextqa-oe":
            expect(all(name.rpartition("_")), "id", 'be "<video>_<qid>" in nextqa-oe', name)
        elif benchmark == "vggsound":
            expect(Path(name).name == name, "id", "be the name of a file in vggsound", name)


def write_predictions(predictions: Sequence[Prediction], benchmark: str, folder: Path) -> Path:
    """Write the set's own file of predictions into a folder that exists, and return its path.

    A clip that could not be read is answered by "", by choice -1, or by equal scores: the scripts take no gaps.

    Raises:
        ValueError: as `check_examples`.
    """
    classes = predictions[0].choices if closed_set(predictions) else ()
    check_examples([prediction.example for prediction in predictions], benchmark, classes)
    return _WRITERS[benchmark](predictions, folder)


def probabilities(prediction: Prediction) -> list[float]:
    """Of the choices, given that it is one of them: softmax of their scores; equal ones where nothing was scored."""
    if not prediction.scores:
        return [1 / len(prediction.choices)] * len(prediction.choices)
    highest = max(prediction.scores)
    weights = [math.exp(score - highest) for score in prediction.scores]
    return [weight / sum(weights) for weight in weights]


def _row(prediction: Prediction) -> dict[str, Any]:
    example = prediction.example
    row: dict[str, Any] = {
        "id": example.id,
        "clip": example.clip,
        "start": example.start,
        "end": example.end,
        "type": example.type,
        "question": example.question,
        "answer": prediction.answer,
        "truth": list(prediction.truths),
        "right": bool(right(prediction)) if prediction.truths else None,
    }
    if prediction.scores:
        order = range(len(prediction.choices)) if example.choices else ranked(prediction)[:LISTED]
        row["log_probabilities"] = {prediction.choices[i]: prediction.scores[i] for i in order}
    if prediction.error:
        row["error"] = prediction.error
    return row


def _msrvtt_qa(predictions: Sequence[Prediction], folder: Path) -> Path:
    return _dump([{"id": p.example.id, "answer": p.answer} for p in predictions], folder)


def _activitynet_qa(predictions: Sequence[Prediction], folder: Path) -> Path:
    return _dump([{"question_id": p.example.id, "answer": p.answer} for p in predictions], folder)


def _nextqa_mc(predictions: Sequence[Prediction], folder: Path) -> Path:
    said = {}
    for p in predictions:
        answer, choices = p.example.answer, p.example.choices
        said[p.example.id] = {
            "prediction": -1 if p.error else choices.index(p.answer),
            "answer": None if answer is None else choices.index(answer),
        }
    return _dump(said, folder)


def _nextqa_oe(predictions: Sequence[Prediction], folder: Path) -> Path:
    said: dict[str, dict[str, str]] = {}
    for p in predictions:
        video, _, qid = p.example.id.rpartition("_")
        said.setdefault(video, {})[qid] = p.answer
    return _dump(said, folder)


def _vggsound(predictions: Sequence[Prediction], folder: Path) -> Path:
    import numpy as np

    classes = predictions[0].choices
    order = sorted(range(len(classes)), key=classes.__getitem__)
    folder = folder / "predictions"
    folder.mkdir(exist_ok=True)
    for p in predictions:
        told = probabilities(p)
        np.save(folder / f"{p.example.id}.npy", np.array([told[i] for i in order], dtype=np.float32))
    return folder


def _epic_sounds(predictions: Sequence[Prediction], folder: Path) -> Path:
    """The levels of supervision, sls_*, are the highest; who submits states the model's own."""
    count = len(predictions[0].choices)
    results = {}
    for p in predictions:
        scores = p.scores or (0.0,) * count
        results[p.example.id] = {"interaction": {str(i): score for i, score in enumerate(scores)}}
    head = {"version": "0.1", "challenge": "audio_based_interaction_recognition"}
    levels = {"sls_pt": 5, "sls_tl": 5, "sls_td": 5, "t_mod": 2}  # 2: heard and seen
    path = folder / "submission.zip"
    with ZipFile(path, "w", ZIP_DEFLATED) as file:
        file.writestr("test.json", json.dumps({**head, **levels, "results": results}))
    return path


def _dump(value: Any, folder: Path) -> Path:
    path = folder / "predictions.json"
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


_WRITERS: dict[str, Callable[[Sequence[Prediction], Path], Path]] = {
    "msrvtt-qa": _msrvtt_qa,
    "activitynet-qa": _activitynet_qa,
    "nextqa-mc": _nextqa_mc,
    "nextqa-oe": _nextqa_oe,
    "vggsound": _vggsound,
    "epic-sounds": _epic_sounds,
}
