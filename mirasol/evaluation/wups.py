"""WUPS as NExT-QA's open-ended questions are scored: how near the words of two answers are in WordNet.

Source: eval_oe.py and metrics.py of doc-doc/NExT-OE, whose published numbers it reproduces (its HGA predictions: 21.48
on the validation set as published, 25.16 on the test set for 25.18).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mirasol.evaluation.prediction import Prediction

STOP_WORDS = frozenset(
    """i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his
    himself she she's her hers herself it it's its itself they them their theirs themselves what which who whom this
    that that'll these those am is are was were be been being have has had having do does did doing a an the and but if
    or because as until while to from of at for with about into through during again further then here there when where
    why how all any each most other some such only own so than too very s t can will just don don't should should've now
    d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't haven haven't isn
    isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren weren't won
    won't wouldn wouldn't""".split()  # noqa: SIM905
)
"""Those of NExT-QA: prepositions of place and "no" and "not" are not among them."""

EXACT_TYPES = ("DC", "DB")
"""Types of questions, counts and yes/no, whose words must be the same."""

_PARTS_OF_SPEECH = {"NN": "n", "JJ": "a", "VB": "v", "RB": "r"}
_GET = "python -m nltk.downloader wordnet averaged_perceptron_tagger_eng"


class WordNetScores:
    """WUPS of predictions. Loads WordNet and the tagger of parts of speech at once.

    Raises:
        ImportError: NLTK is not installed.
        LookupError: its data are not there; the message says how to get them.
    """

    def __init__(self) -> None:
        try:
            from nltk.corpus import wordnet
            from nltk.stem import PorterStemmer, WordNetLemmatizer
            from nltk.tag import PerceptronTagger
            from nltk.tokenize import NLTKWordTokenizer
        except ImportError as error:
            raise ImportError(
                "WUPS needs the package nltk, which is not installed: pip install -e '.[eval]'"
            ) from error
        try:
            wordnet.ensure_loaded()
            self._tag = PerceptronTagger().tag
        except LookupError as error:
            raise LookupError(
                f"WUPS needs WordNet and a tagger, data that nltk does not find: {_GET} fetches them, or put them into "
                f"corpora/wordnet and taggers/averaged_perceptron_tagger_eng of a folder that NLTK_DATA names"
            ) from error
        self._split, self._stem = NLTKWordTokenizer().tokenize, PorterStemmer().stem
        self._lemma, self._synsets = WordNetLemmatizer().lemmatize, wordnet.synsets
        self.words = lru_cache(maxsize=1 << 16)(self._words)
        self._similarity = lru_cache(maxsize=1 << 20)(self._wu_palmer)

    def __call__(self, prediction: Prediction, *, alpha: float = 0.0) -> float:
        """0 .. 1: the best over the truths; for counts and yes/no 1 where all words are those of one of them."""
        if prediction.error:
            return 0.0
        answer, truths = self.words(prediction.answer), [self.words(truth) for truth in prediction.truths]
        if prediction.example.type in EXACT_TYPES:
            return float(answer in truths)
        return max(min(self.one_way(answer, t, alpha), self.one_way(t, answer, alpha)) for t in truths)

    def one_way(self, words: Sequence[str], others: Sequence[str], alpha: float) -> float:
        """The product, over `words`, of each one's best similarity to `others`, less a factor 10 where below `alpha`.

        A word that is like none of them (0) is passed over; if all are, the product is 0.
        """
        best = [max((self._word(a, b, alpha) for b in others), default=0.0) for a in words]
        product = 1.0
        for similarity in best:
            product *= similarity or 1.0
        return product if any(best) else 0.0

    def _word(self, a: str, b: str, alpha: float) -> float:
        similarity = self._similarity(a, b)
        return similarity if similarity >= alpha else 0.1 * similarity

    def _words(self, text: str) -> tuple[str, ...]:
        """Lemmas of a text but for the stop words, as pywsd makes them: by the part of speech, else the stem."""
        lemmas = (self._lemmatise(word.lower(), tag) for word, tag in self._tag(self._split(text)))
        return tuple(lemma for lemma in lemmas if lemma not in STOP_WORDS)

    def _lemmatise(self, word: str, tag: str) -> str:
        part = _PARTS_OF_SPEECH.get(tag[:2]) or _PARTS_OF_SPEECH.get(self._tag([word])[0][1][:2], "n")
        lemma = self._lemma(word, part)
        if self._synsets(lemma):
            return str(lemma)
        stem = self._stem(word)
        return str(stem) if self._synsets(stem) else word

    def _wu_palmer(self, a: str, b: str) -> float:
        """Similarity of the first synsets of two words; not symmetric.

        Nouns are like nouns, and verbs like anything below a root that is made up for all; an adjective or adverb is
        like nothing but itself. That is what NLTK 3.5 did, which the published numbers were made with; later ones have
        a root above nouns and adjectives, too, and give all answers less.
        """
        if a == b:
            return 1.0
        first, second = self._first(a), self._first(b)
        if first is None or second is None:
            return 0.0
        if first.pos() != "v" and not first.pos() == second.pos() == "n":
            return 0.0
        return float(first.wup_similarity(second) or 0.0)

    def _first(self, word: str) -> Any:
        synsets = self._synsets(word)
        return synsets[0] if synsets else None
