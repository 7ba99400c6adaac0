"""In which words questions are asked: of each list the last wording is held out, training never meets it."""

from __future__ import annotations

WORDINGS: dict[str, tuple[str, ...]] = {
    "what": (
        "What {noun} did the {side} {thing} have?",
        "Name the {noun} of the {side} {thing}.",
        "The {side} {thing}: what was its {noun}?",
        "Which {noun} belongs to the {thing} that was {sensed} {side}?",
    ),
    "ago": (
        "What {noun} did the {thing} have {ago} ago?",
        "Name the {noun} of the {thing} {ago} ago.",
        "Think back {ago}: what was the {noun} of the {thing}?",
        "Go {ago} back. Of which {noun} was the {thing}?",
    ),
    "while": (
        "What {noun} did the {thing} have when the {cue} was {side} {cue_sensed}?",
        "Name the {noun} of the {thing} when the {cue} was {side} {cue_sensed}.",
        "The {cue} was {side} {cue_sensed}: what was the {noun} of the {thing} then?",
        "Of which {noun} was the {thing} at the {side} moment that the {cue} was {cue_sensed}?",
    ),
    "where": (
        "Where was the {cue} when it was {side} seen?",
        "In which corner was the {cue} {side} seen?",
        "The {cue} was {side} seen: where?",
        "What was the {side} place of the {cue}?",
    ),
    "which-way": (
        "Which way did the {cue} move when it was {side} seen?",
        "Where did the {cue} go when it was {side} seen?",
        "The {cue} was {side} seen: which way did it move?",
        "In what direction went the {cue} at the {side} moment that it was seen?",
    ),
    "how-many": (
        "How many copies of the {cue} were there when it was {side} seen?",
        "Count the copies of the {cue} when it was {side} seen.",
        "The {cue} was {side} seen: in how many copies?",
        "In what number did the {cue} come at the {side} moment that it was seen?",
    ),
    "what-rhythm": (
        "What rhythm did the {cue} have when it was {side} heard?",
        "In which rhythm was the {cue} {side} heard?",
        "The {cue} was {side} heard: in what rhythm?",
        "How did the {cue} go at the {side} moment that it was heard?",
    ),
    "order": (
        "Which was {sensed} first, the {cue} or the {other}?",
        "Of the {cue} and the {other}, which was {sensed} first?",
        "The {cue} or the {other}: which came first?",
        "Which came earlier of these two, the {cue} or the {other}?",
    ),
    "order-both": (
        "Was the {cue} first seen before or after the {other} was first heard?",
        "The {cue} was first seen: before or after the {other} was first heard?",
        "Before or after the {other} was first heard, when was the {cue} first seen?",
        "Did the {cue} show up before the {other} sounded, or after?",
    ),
    "presence": (
        "Was a {cue} {sensed}?",
        "Was there ever a {cue}?",
        "Is it true that a {cue} was {sensed}?",
        "Did the clip hold a {cue}?",
    ),
    "absence": (
        "Was no {cue} {sensed}?",
        "Was there never a {cue}?",
        "Is it true that no {cue} was {sensed}?",
        "Did the clip go without a {cue}?",
    ),
}
