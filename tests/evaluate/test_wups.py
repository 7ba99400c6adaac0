"""WUPS against values by hand, on a WordNet of a few words, and on the real one where it is installed."""

import nltk
import nltk.corpus
import pytest
import wordnet
from nltk.corpus.reader import CorpusReader, WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader

from mirasol.data import Example
from mirasol.evaluation.metrics import measure
from mirasol.evaluation.prediction import Prediction
from mirasol.evaluation.wups import STOP_WORDS, WordNetScores


def prediction(answer: str, truth: str, kind: str = "CW", *references: str, error: str = "") -> Prediction:
    return Prediction(Example("c.mp4", "why?", truth, type=kind, references=references), answer, error=error)


PUBLISHED = [
    ("to the baby", "in case food fall", 0.0007814407814407814),
    ("birthday birthday", "celebrate his birthday", 0.041666666666666664),
    ("go to the", "turn around and wait for lady", 0.0125),
    ("hand gestures", "standing in front of man in red", 0.0002196957214258252),
    ("prevent baby from falling", "to support the baby", 0.05714285714285714),
    ("put his mouth", "put his hand into mouth", 0.5555555555555556),
    ("find baby s", "happy the kid likes the gift", 0.05647058823529411),
    ("use two colour", "hand signals", 0.0440771349862259),
]
"""Answers of the validation set and what the set's own script gave them, with NLTK 3.5, pywsd 1.2.4 and WordNet 3.0."""


@pytest.fixture
def forget(monkeypatch):
    """NLTK without a WordNet that it has loaded before; what it opens is closed again."""
    languages = LazyCorpusLoader("omw-1.4", CorpusReader, ".*")
    reader = LazyCorpusLoader("wordnet", WordNetCorpusReader, languages)
    monkeypatch.setattr(nltk.corpus, "wordnet", reader)
    yield
    for file in vars(reader).get("_data_file_map", {}).values():
        file.close()


@pytest.fixture
def wups(tmp_path, monkeypatch, forget):
    monkeypatch.setattr(nltk.data, "path", [str(wordnet.write(tmp_path))])
    return WordNetScores()


def test_words_are_lemmas_without_stop_words(wups):
    assert wups.words("The dogs ran slowly") == ("dog", "run", "slowly")
    assert wups.words("he is walking") == ("walk",)
    assert wups.words("") == ()
    assert {"on", "in", "no", "not"}.isdisjoint(STOP_WORDS)


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        ("dog", "dog", 1),
        ("dog", "cat", 4 / 6),  # below animal, the second of its path; each is one step away
        ("dog", "park", 2 / 6),  # below entity
        ("dog", "animal", 4 / 5),
        ("run", "walk", 4 / 6),
        ("run", "eat", 2 / 6),  # below the made-up root of all verbs
        ("run", "dog", 2 / 8),  # below a made-up root, seen from the verb
        ("dog", "run", 0),  # and not from the noun
        ("red", "happy", 0),
        ("red", "dog", 0),
        ("red", "red", 1),
        ("blorb", "dog", 0),
        ("blorb", "blorb", 1),
    ],
)
def test_words_are_compared_by_their_first_synsets(wups, a, b, value):
    assert wups._wu_palmer(a, b) == pytest.approx(value)


def test_sentences_are_a_product_over_words_that_are_like_any(wups):
    assert wups.one_way(("dog", "park"), ("cat", "park"), 0.0) == pytest.approx(4 / 6)
    assert wups.one_way(("dog", "blorb"), ("cat",), 0.0) == pytest.approx(4 / 6)  # blorb is passed over
    assert wups.one_way(("blorb",), ("cat",), 0.0) == 0
    assert wups.one_way((), ("cat",), 0.0) == wups.one_way(("cat",), (), 0.0) == 0
    assert wups.one_way(("dog",), ("cat",), 0.9) == pytest.approx(0.1 * 4 / 6)
    assert wups.one_way(("dog",), ("dog",), 0.9) == 1


def test_the_worse_direction_and_the_better_reference_count(wups):
    assert wups(prediction("dog", "dog park")) == pytest.approx(2 / 6)  # park is only like an entity
    assert wups(prediction("dog", "dog park", "CW", "the cat")) == pytest.approx(4 / 6)
    assert wups(prediction("dog", "cat"), alpha=0.9) == pytest.approx(0.4 / 6)
    assert wups(prediction("", "dog")) == 0
    assert wups(prediction("dog", "dog", error="no moov")) == 0


def test_counts_and_yes_or_no_must_be_the_same_words(wups):
    for kind in ("DC", "DB"):
        assert wups(prediction("the dogs", "dog", kind)) == 1
        assert wups(prediction("cat", "dog", kind)) == 0
        assert wups(prediction("cat", "dog", kind, "cats")) == 1


def test_the_set_is_measured_at_both_thresholds(wups):
    tables = measure(
        [prediction("dog", "cat"), prediction("dog", "dog", "DC"), prediction("dog", "cat", "TP")], "nextqa-oe"
    )
    assert list(tables) == ["wups@0", "wups@0.9", "exact_match"]
    assert tables["wups@0"]["all"] == {"value": pytest.approx((1 + 8 / 6) / 3), "count": 3}
    assert tables["wups@0.9"]["T: next, previous"] == {"value": pytest.approx(0.4 / 6), "count": 1}
    assert tables["exact_match"]["D"] == {"value": 1.0, "count": 1}


def test_missing_data_say_how_to_get_them(monkeypatch, tmp_path, forget):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(LookupError, match=r"nltk.downloader wordnet averaged_perceptron_tagger_eng.*NLTK_DATA"):
        WordNetScores()


def test_the_real_wordnet(forget, skip_loudly):
    try:
        wups = WordNetScores()
    except LookupError:
        skip_loudly("WUPS on the whole WordNet", "its data are not installed")
    assert wups.words("The children were running to the lake") == ("child", "run", "lake")
    assert wups._wu_palmer("dog", "cat") == pytest.approx(24 / 28)
    for answer, truth, value in PUBLISHED:
        assert wups(prediction(answer, truth)) == pytest.approx(value, rel=1e-9), answer
