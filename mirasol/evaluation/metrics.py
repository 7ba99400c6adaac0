"""How good predictions are, in the measures and groups of the published sets: pure functions of predictions."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TypedDict

from mirasol.evaluation.prediction import Prediction

SCORED_WUPS = (0.0, 0.9)
"""Thresholds alpha at which WUPS is told; NExT-QA's tables have the first."""


class Share(TypedDict):
    """A mean in 0 .. 1 over so many examples (or, by class, classes); None over none."""

    value: float | None
    count: int


Table = dict[str, Share]
"""A measure over all examples, "all", and over groups of them by name."""

Score = Callable[[Prediction], float]
"""0 .. 1 for one prediction."""

Groups = Mapping[str, Collection[str]]
"""Names of groups and the types of examples that belong to each."""

_NEXT_QA: Groups = {
    "C": ("CW", "CH"),
    "C: why": ("CW",),
    "C: how": ("CH",),
    "T": ("TN", "TP", "TC"),
    "T: next, previous": ("TN", "TP"),
    "T: current": ("TC",),
    "D": ("DB", "DC", "DL", "DO"),
    "D: count": ("DC",),
    "D: location": ("DL",),
    "D: other": ("DO",),
}
_FREE = ("yes/no", "color", "object", "location", "number", "other")

GROUPS: dict[str, Groups] = {
    "msrvtt-qa": {name: (name,) for name in ("what", "how", "color", "where", "who", "when")},
    "activitynet-qa": {
        **{name: (name,) for name in ("motion", "spatial", "temporal")},
        "free": _FREE,
        **{f"free: {name}": (name,) for name in _FREE},
    },
    "nextqa-mc": _NEXT_QA,
    "nextqa-oe": {**_NEXT_QA, "D: yes/no": ("DB",)},
}
"""Groups that the published sets are told by; "free" of ActivityNet-QA are its types 3 to 8.

ActivityNet-QA's own script divides the right free answers by the count of all but the first three types that its file
happens to name, which need not be the types 0 to 2 (0.7583 for its example of the validation set); here they are
divided by the number of free questions (0.5055).
"""


def measure(predictions: Sequence[Prediction], benchmark: str | None = None) -> dict[str, Table]:
    """The measures that fit the predictions, those of a published set where it is named.

    Examples whose answer is not known are left out. Without a set: "accuracy" where choices were scored, else
    "exact_match", by the examples' types; with closed classes (every example the same choices) also "top5" and
    "per_class".

    Args:
        benchmark: a name of `mirasol.data.sets.SETS`.
    Returns:
        measure -> group -> value and count: {"accuracy": {"all": {"value": 0.5, "count": 200}, ...}}.
    Raises:
        LookupError: "nextqa-oe" without WordNet; the message says how to get it.
    """
    known = [prediction for prediction in predictions if prediction.truths]
    groups = GROUPS.get(benchmark or "") or {name: (name,) for name in sorted({p.example.type for p in known} - {""})}
    if benchmark == "nextqa-oe":
        from mirasol.evaluation.wups import WordNetScores

        wups = WordNetScores()
        return {
            **{f"wups@{alpha:g}": by_group(known, partial(wups, alpha=alpha), groups) for alpha in SCORED_WUPS},
            "exact_match": by_group(known, exact_match, groups),
        }
    if benchmark == "activitynet-qa":
        return {"accuracy": by_group(known, equal, groups), "exact_match": by_group(known, exact_match, groups)}
    if not any(prediction.choices for prediction in known):
        return {"exact_match": by_group(known, exact_match, groups)}
    tables = {"accuracy": by_group(known, right, groups)}
    if closed_set(known):
        tables["top5"] = by_group(known, lambda prediction: top_k(prediction, 5), groups)
        tables["per_class"] = {"all": per_class_mean(known)}
    return tables


def by_group(predictions: Iterable[Prediction], score: Score, groups: Groups) -> Table:
    """The mean score of all predictions and of each group of types."""
    scored = [(prediction.example.type, score(prediction)) for prediction in predictions]
    table = {"all": _mean([value for _, value in scored])}
    for name, types in groups.items():
        table[name] = _mean([value for kind, value in scored if kind in types])
    return table


def right(prediction: Prediction) -> float:
    """1 for the right choice, or for a free answer that matches exactly."""
    return top_k(prediction, 1) if prediction.choices else exact_match(prediction)


def exact_match(prediction: Prediction) -> float:
    """1 where the whole answer is one of the truths, but for case, punctuation and the width of spaces."""
    truths = [normalise(truth) for truth in prediction.truths]
    return float(not prediction.error and normalise(prediction.answer) in truths)


def equal(prediction: Prediction) -> float:
    """1 where the answer is letter for letter one of the truths, ActivityNet-QA's accuracy."""
    return float(not prediction.error and prediction.answer in prediction.truths)


def normalise(text: str) -> str:
    """Lower case, without punctuation, spaces one wide and none around."""
    kept = (c for c in text.lower() if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join("".join(kept).split())


def top_k(prediction: Prediction, k: int) -> float:
    """1 where a truth is among the k likeliest choices; of equal ones the first counts as likelier.

    Raises:
        ValueError: a truth that is none of the choices, or a score that is not a number.
    """
    if prediction.error:
        return 0.0
    best = ranked(prediction)[:k]
    return float(any(prediction.choices[i] in prediction.truths for i in best))


def ranked(prediction: Prediction) -> list[int]:
    """Indices of the choices, the likeliest first.

    Raises:
        ValueError: as `top_k`.
    """
    choices, scores = prediction.choices, prediction.scores
    if prediction.example.answer is not None and prediction.example.answer not in choices:
        shown = f"{len(choices)} choices" if len(choices) > 8 else str(list(choices))
        raise ValueError(f"answer must be one of {shown}, was {prediction.example.answer!r}")
    if len(scores) != len(choices) or any(score != score for score in scores):
        raise ValueError(f"scores must be a number for each of {len(choices)} choices, was {list(scores)[:8]}")
    return sorted(range(len(choices)), key=lambda i: -scores[i])


def per_class_mean(predictions: Iterable[Prediction]) -> Share:
    """The accuracy of each class that is the truth of an example, and their mean; count is that of the classes."""
    asked: Counter[str] = Counter()
    hit: Counter[str] = Counter()
    for prediction in predictions:
        asked[prediction.truths[0]] += 1
        hit[prediction.truths[0]] += int(top_k(prediction, 1))
    return _mean([hit[name] / count for name, count in asked.items()])


def closed_set(predictions: Sequence[Prediction]) -> bool:
    """Whether all predictions chose from the same classes, rather than each from its own choices."""
    first = predictions[0].choices if predictions else ()
    own = any(prediction.example.choices for prediction in predictions)
    return bool(first) and not own and all(prediction.choices == first for prediction in predictions)


def _mean(values: Sequence[float]) -> Share:
    return {"value": sum(values) / len(values) if values else None, "count": len(values)}
