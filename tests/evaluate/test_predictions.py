"""The sets' own files of predictions, read back as the sets' scripts read them."""

import json
import math
from zipfile import ZipFile

import numpy as np
import pytest

from mirasol.data import Example
from mirasol.evaluation.prediction import Prediction
from mirasol.evaluation.predictions import probabilities, write_predictions


def prediction(name: str, answer: str, truth: str | None = None, *, error: str = "", **of_example) -> Prediction:
    return Prediction(Example("c.mp4", "q?", truth, id=name, **of_example), answer, error=error)


def scored(name: str, scores: dict[str, float], truth: str | None = None) -> Prediction:
    choices = tuple(scores)
    answer = max(choices, key=scores.__getitem__)
    return Prediction(Example("c.mp4", answer=truth, id=name), answer, choices, tuple(scores.values()))


def written(predictions, benchmark, folder):
    return json.loads(write_predictions(predictions, benchmark, folder).read_text(encoding="utf-8"))


def test_msrvtt_qa(tmp_path):
    said = written([prediction("85", "höhle"), prediction("7", "", error="no moov")], "msrvtt-qa", tmp_path)
    assert said == [{"id": "85", "answer": "höhle"}, {"id": "7", "answer": ""}]


def test_activitynet_qa(tmp_path):
    said = written([prediction("v_x-1_Y_0", "yes")], "activitynet-qa", tmp_path)
    assert said == [{"question_id": "v_x-1_Y_0", "answer": "yes"}]


def test_nextqa_multiple_choice(tmp_path):
    choices = ("a", "b", "c", "d", "e")
    predictions = [
        prediction("4010069381_6", "c", "b", choices=choices),
        prediction("4010069381_7", "", "a", choices=choices, error="no moov"),
        prediction("4010069381_8", "a", choices=choices),
    ]
    assert written(predictions, "nextqa-mc", tmp_path) == {
        "4010069381_6": {"prediction": 2, "answer": 1},
        "4010069381_7": {"prediction": -1, "answer": 0},
        "4010069381_8": {"prediction": 0, "answer": None},
    }


def test_nextqa_open_ended(tmp_path):
    predictions = [prediction("401_6", "x"), prediction("401_7", "y"), prediction("402_6", "z")]
    assert written(predictions, "nextqa-oe", tmp_path) == {"401": {"6": "x", "7": "y"}, "402": {"6": "z"}}
    with pytest.raises(ValueError, match="<video>_<qid>"):
        write_predictions([prediction("401", "x")], "nextqa-oe", tmp_path)


def test_vggsound_has_a_file_a_clip_with_the_classes_in_order_of_the_alphabet(tmp_path):
    predictions = [
        scored("x_000010.mp4", {"wind": math.log(0.2), "cat": math.log(0.8)}),
        Prediction(Example("d.mp4", id="y_000030.mp4"), choices=("wind", "cat"), error="no moov"),
    ]
    folder = write_predictions(predictions, "vggsound", tmp_path)
    first, second = (np.load(folder / f"{name}.npy") for name in ("x_000010.mp4", "y_000030.mp4"))
    assert first.dtype == np.float32
    assert first == pytest.approx([0.8, 0.2])
    assert second == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match="name of a file"):
        write_predictions([scored("../x.mp4", {"a": 0.0})], "vggsound", tmp_path)


def test_epic_sounds_is_the_submission_of_the_challenge(tmp_path):
    path = write_predictions([scored("P01_01_0", {"rustle": -1.5, "beep": -0.5})], "epic-sounds", tmp_path)
    with ZipFile(path) as file:
        said = json.loads(file.read("test.json"))
    assert said == {
        "version": "0.1", "challenge": "audio_based_interaction_recognition",
        "sls_pt": 5, "sls_tl": 5, "sls_td": 5, "t_mod": 2,
        "results": {"P01_01_0": {"interaction": {"0": -1.5, "1": -0.5}}},
    }  # fmt: skip


def test_what_a_set_cannot_take_is_refused(tmp_path):
    with pytest.raises(ValueError, match="id must be the question's own name in msrvtt-qa"):
        write_predictions([prediction("", "x")], "msrvtt-qa", tmp_path)
    with pytest.raises(ValueError, match="classes must be given for vggsound"):
        write_predictions([prediction("x.mp4", "x")], "vggsound", tmp_path)
    with pytest.raises(ValueError, match="choices must be those of the question"):
        write_predictions([prediction("401_6", "x")], "nextqa-mc", tmp_path)


def test_probabilities_are_a_softmax_however_low_the_scores():
    assert probabilities(scored("x", {"a": -1000.0, "b": -1000.0})) == [0.5, 0.5]
    assert probabilities(scored("x", {"a": 0.0, "b": float("-inf")})) == [1.0, 0.0]
