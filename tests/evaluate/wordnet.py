"""A WordNet of a few words, and a tagger for them, in the files that NLTK reads."""

import json
from pathlib import Path

NAMES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
WORDS = {
    "n": {"entity": None, "animal": "entity", "dog": "animal", "cat": "animal", "place": "entity", "park": "place"},
    "v": {"act": None, "move": "act", "run": "move", "walk": "move", "eat": None},
    "a": {"red": None, "happy": None},
    "r": {"slowly": None},
}
"""Lemmas by part of speech, each with what it is a kind of."""
TAGS = {
    **dict.fromkeys(("dog", "cat", "park", "animal"), "NN"),
    **dict.fromkeys(("dogs", "cats", "parks"), "NNS"),
    **dict.fromkeys(("running", "walking"), "VBG"),
    **dict.fromkeys(("run", "ran", "walk", "eat"), "VB"),
    **dict.fromkeys(("red", "happy"), "JJ"),
    **dict.fromkeys(("slowly",), "RB"),
}


def write(folder: Path) -> Path:
    """Write corpora/wordnet and taggers/averaged_perceptron_tagger_eng into a folder, for `nltk.data.path`."""
    corpus, tagger = folder / "corpora" / "wordnet", folder / "taggers" / "averaged_perceptron_tagger_eng"
    for made in (corpus, tagger):
        made.mkdir(parents=True)
    (corpus / "lexnames").write_text("00\tall\t1\n")
    (corpus / "index.sense").write_text("")
    for part, name in NAMES.items():
        _write_words(corpus, part, name)
        (corpus / f"{name}.exc").write_text("ran run\n" if part == "v" else "")
    for attribute, value in (("weights", {}), ("tagdict", TAGS), ("classes", sorted({*TAGS.values(), "NN"}))):
        (tagger / f"averaged_perceptron_tagger_eng.{attribute}.json").write_text(json.dumps(value))
    return folder


def _write_words(corpus: Path, part: str, name: str) -> None:
    """data.* holds a synset a line, found by its offset in bytes; index.* the offsets of each lemma."""
    lines: dict[str, str] = {}
    offsets: dict[str, int] = {}
    at = 0
    for word, kind in WORDS[part].items():
        pointers = "000" if kind is None else f"001 @ {{{kind}}} {part} 0000"
        lines[word] = f"{at:08d} 00 {part} 01 {word} 0 {pointers} | gloss  \n"
        offsets[word] = at
        at += len(lines[word]) if kind is None else len(lines[word]) - len(kind) - 2 + 8
    texts = (line.format(**{w: f"{o:08d}" for w, o in offsets.items()}) for line in lines.values())
    (corpus / f"data.{name}").write_text("".join(texts))
    index = "".join(f"{word} {part} 1 0 1 0 {offsets[word]:08d}  \n" for word in sorted(offsets))
    (corpus / f"index.{name}").write_text(index)
