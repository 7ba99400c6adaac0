"""Measures against values counted by hand, with the quirks of the sets they belong to."""

import math

import pytest

from mirasol.data import Example
from mirasol.data.sets import ACTIVITYNET_TYPES, SETS
from mirasol.evaluation.metrics import (
    GROUPS,
    closed_set,
    equal,
    exact_match,
    measure,
    normalise,
    per_class_mean,
    right,
    top_k,
)
from mirasol.evaluation.options import Benchmark
from mirasol.evaluation.prediction import Prediction


def free(answer: str, truth: str | None, kind: str = "", *references: str, error: str = "") -> Prediction:
    return Prediction(Example("c.mp4", "q?", truth, type=kind, references=references), answer, error=error)


def scored(truth: str, scores: dict[str, float], *, own: bool = False, kind: str = "") -> Prediction:
    choices = tuple(scores)
    example = Example("c.mp4", "q?", truth, type=kind, choices=choices if own else ())
    return Prediction(example, max(choices, key=lambda c: scores[c]), choices, tuple(scores.values()))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  The  Dog. ", "the dog"),
        ("T-shirt!", "tshirt"),
        ("don\u2019t", "dont"),
        ("«oui»", "oui"),
        ("ÉTÉ", "été"),
        ("3.5 $", "35"),
        ("?!", ""),
        ("a\tb\nc", "a b c"),
    ],
)
def test_normalise(text, plain):
    assert normalise(text) == plain


def test_exact_match_takes_the_whole_answer_and_any_reference():
    assert exact_match(free("A dog.", "dog", "", "a dog")) == 1
    assert exact_match(free("a dog runs", "a dog")) == 0
    assert exact_match(free("", "dog")) == 0
    assert equal(free("dog", "dog")) == 1
    assert equal(free("Dog", "dog")) == equal(free("dog ", "dog")) == 0


def test_a_clip_that_was_not_read_is_wrong_in_every_measure():
    broken = free("dog", "dog", error="no moov")
    assert exact_match(broken) == equal(broken) == right(broken) == 0
    classes = Prediction(Example("c.mp4", answer="a"), choices=("a", "b"), error="no moov")
    assert right(classes) == top_k(classes, 2) == 0
    assert per_class_mean([classes]) == {"value": 0.0, "count": 1}


def test_types_of_the_table_are_the_groups_without_a_set():
    predictions = [free("a", "a", "x"), free("b", "a", "x"), free("a", "a", "y"), free("a", "a"), free("a", None, "x")]
    assert measure(predictions) == {
        "exact_match": {
            "all": {"value": 0.75, "count": 4},
            "x": {"value": 0.5, "count": 2},
            "y": {"value": 1.0, "count": 1},
        }
    }


def test_activitynet_qa_is_plain_equality_and_free_is_types_3_to_8():
    predictions = [
        free("yes", "yes", "yes/no"),
        free("No", "no", "yes/no"),
        free("red", "blue", "color"),
        free("running", "running", "motion"),
        free("4", "4", "number"),
    ]
    tables = measure(predictions, "activitynet-qa")
    assert tables["accuracy"]["all"] == {"value": 3 / 5, "count": 5}
    assert tables["accuracy"]["free"] == {"value": 2 / 4, "count": 4}
    assert tables["accuracy"]["free: yes/no"] == {"value": 1 / 2, "count": 2}
    assert tables["accuracy"]["motion"] == {"value": 1.0, "count": 1}
    assert tables["accuracy"]["spatial"] == {"value": None, "count": 0}
    assert tables["exact_match"]["free"] == {"value": 3 / 4, "count": 4}
    named = {t for types in GROUPS["activitynet-qa"].values() for t in types}
    assert named == set(ACTIVITYNET_TYPES)


def test_nextqa_merges_next_and_previous_and_tells_c_t_d():
    kinds = ["CW", "CW", "CH", "TN", "TP", "TC", "DC", "DL", "DO"]
    hits = [1, 0, 1, 1, 0, 0, 1, 1, 0]
    predictions = [
        scored("a", {"a": -1.0, "b": -2.0 if hit else -0.5}, own=True, kind=kind)
        for kind, hit in zip(kinds, hits, strict=True)
    ]
    tables = measure(predictions, "nextqa-mc")
    assert list(tables) == ["accuracy"]
    values = {name: share["value"] for name, share in tables["accuracy"].items()}
    assert values["all"] == pytest.approx(5 / 9)
    assert values["C"] == pytest.approx(2 / 3)
    assert values["C: why"] == 0.5
    assert values["T"] == pytest.approx(1 / 3)
    assert values["T: next, previous"] == 0.5
    assert values["D"] == pytest.approx(2 / 3)


def test_msrvtt_qa_is_told_by_the_question_word():
    tables = measure([free("dog", "dog", "what"), free("two", "three", "how")], "msrvtt-qa")["exact_match"]
    assert {name: share["value"] for name, share in tables.items()} == {
        "all": 0.5, "what": 1.0, "how": 0.0, "color": None, "where": None, "who": None, "when": None,
    }  # fmt: skip


def test_every_set_that_can_be_read_can_be_named():
    assert set(SETS) == set(Benchmark.__args__)
    assert set(GROUPS) <= set(SETS)


def test_classes_by_hand():
    scores = {"a": 0.0, "b": -1.0, "c": -2.0, "d": -3.0, "e": -4.0, "f": -5.0}
    predictions = [scored("a", scores), scored("a", scores), scored("b", scores), scored("f", scores)]
    tables = measure(predictions, "vggsound")
    assert tables["accuracy"]["all"] == {"value": 0.5, "count": 4}
    assert tables["top5"]["all"] == {"value": 0.75, "count": 4}
    assert tables["per_class"]["all"] == {"value": pytest.approx(1 / 3), "count": 3}


def test_own_choices_are_no_closed_set():
    both = [scored("a", {"a": 0.0, "b": -1.0}, own=True)] * 2
    assert not closed_set(both)
    assert list(measure(both)) == ["accuracy"]
    assert closed_set([scored("a", {"a": 0.0, "b": -1.0})])


def test_equal_scores_are_ranked_as_they_come():
    tie = {"a": -1.0, "b": -1.0, "c": -1.0}
    assert top_k(scored("a", tie), 1) == 1
    assert top_k(scored("b", tie), 1) == 0
    assert top_k(scored("b", tie), 2) == 1


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(ValueError, match="scores must be a number"):
        top_k(scored("a", {"a": math.nan, "b": -1.0}), 1)
    with pytest.raises(ValueError, match=r"answer must be one of \['a', 'b'\], was 'z'"):
        top_k(scored("z", {"a": 0.0, "b": -1.0}), 1)


def test_nothing_measured_has_no_value():
    assert measure([free("a", None)]) == {"exact_match": {"all": {"value": None, "count": 0}}}
