"""Question-answering and sound sets in the formats that they are published in.

Each reader takes the folder that the set's own repository or archive unpacks to, and the folder of the videos, and
names the videos as the set does. Ids are those that the set's prediction files want.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .table import Example, csv_rows, parse_seconds

ACTIVITYNET_TYPES = (
    "motion", "spatial", "temporal", "yes/no", "color", "object", "location", "number", "other",
)  # fmt: skip
"""Types 0 .. 8 of ActivityNet-QA; its "Free" questions are those from yes/no on."""


def msrvtt_qa(folder: str | Path, split: str, videos: str | Path) -> list[Example]:
    """MSRVTT-QA: {split}_qa.json, "train", "val" or "test"; videos video{N}.mp4. Type: the question's first word."""
    path = Path(folder) / f"{split}_qa.json"
    examples = []
    for place, row in _json_list(path):
        question = _value(row, "question", place)
        examples.append(
            Example(
                clip=str(Path(videos) / f"video{_value(row, 'video_id', place)}.mp4"),
                question=question,
                answer=_value(row, "answer", place),
                type=question.split(maxsplit=1)[0].lower() if question.strip() else "",
                id=_value(row, "id", place),
            )
        )
    return examples


def activitynet_qa(folder: str | Path, split: str, videos: str | Path) -> list[Example]:
    """ActivityNet-QA: {split}_q.json and {split}_a.json, "train", "val" or "test"; videos v_{name} with any suffix.

    Type: one of `ACTIVITYNET_TYPES`.
    """
    questions, answers = (list(_json_list(Path(folder) / f"{split}_{kind}.json")) for kind in "qa")
    if len(questions) != len(answers):
        raise ValueError(
            f"{folder}: {split}_a.json must answer the {len(questions)} questions of {split}_q.json, had {len(answers)}"
        )
    find = _Videos(Path(videos))
    examples = []
    for (place, asked), (answer_place, told) in zip(questions, answers, strict=True):
        name, of = _value(asked, "question_id", place), _value(told, "question_id", answer_place)
        if name != of:
            raise ValueError(f"{answer_place}: question_id must be {name!r} as in {split}_q.json, was {of!r}")
        kind = _index(told, "type", answer_place, len(ACTIVITYNET_TYPES))
        examples.append(
            Example(
                clip=find(f"v_{_value(asked, 'video_name', place)}"),
                question=_value(asked, "question", place),
                answer=_value(told, "answer", answer_place),
                type=ACTIVITYNET_TYPES[kind],
                id=name,
            )
        )
    return examples


def nextqa_mc(folder: str | Path, split: str, videos: str | Path) -> list[Example]:
    """NExT-QA, multiple choice: {split}.csv, "train", "val" or "test", with map_vid_vidorID.json beside it.

    Videos lie as VidOR has them, {videos}/0101/2909445186.mp4; without the map, as {videos}/{video}.mp4. Types CW, CH,
    TN, TC, TP, DC, DL, DO; ids "{video}_{qid}".
    """
    choices = tuple(f"a{i}" for i in range(5))
    find = _vidor(Path(folder), Path(videos))
    examples = []
    for place, row in _csv(Path(folder) / f"{split}.csv", ("video", "question", "answer", "qid", "type", *choices)):
        texts = tuple(row[name].strip() for name in choices)
        right = _index(row, "answer", place, len(choices))
        examples.append(
            Example(
                clip=find(row["video"]),
                question=row["question"].strip(),
                answer=texts[right],
                type=row["type"],
                choices=texts,
                id=f"{row['video']}_{row['qid']}",
            )
        )
    return examples


def nextqa_oe(folder: str | Path, split: str, videos: str | Path) -> list[Example]:
    """NExT-QA, open-ended: {split}.csv, "train", "val" or "test"; videos and types as in `nextqa_mc`, and type DB.

    The test's second answers, of add_reference_answer_test.json, become `references`. Ids "{video}_{qid}".
    """
    folder = Path(folder)
    extra = _json_object(folder / "add_reference_answer_test.json") if split == "test" else {}
    find = _vidor(folder, Path(videos))
    examples = []
    for place, row in _csv(folder / f"{split}.csv", ("video", "question", "answer", "qid", "type")):
        if "a0" in row:
            raise ValueError(f"{place}: is of the table of multiple choice, for nextqa_mc")
        further = extra.get(row["video"], {}).get(row["qid"])
        examples.append(
            Example(
                clip=find(row["video"]),
                question=row["question"].strip(),
                answer=row["answer"].strip(),
                type=row["type"],
                references=() if further is None else (str(further).strip(),),
                id=f"{row['video']}_{row['qid']}",
            )
        )
    return examples


def vggsound(folder: str | Path, split: str, videos: str | Path) -> list[Example]:
    """VGG-Sound: vggsound.csv (id, start, label, split, no header), or else {split}.csv (file name, label).

    Splits "train" and "test". Videos are clips of 10 seconds, {id}_{start, 6 digits}.mp4, which is also the id.
    """
    whole, own = Path(folder) / "vggsound.csv", Path(folder) / f"{split}.csv"
    named: list[tuple[str, str]] = []
    if whole.is_file():
        for place, row in _rows(whole, ("id", "start", "label", "split")):
            if row["split"] not in ("train", "test"):
                raise ValueError(f"{place}: the last column must be train or test, was {row['split']!r}")
            if row["split"] == split:
                named.append((f"{row['id']}_{_index(row, 'start', place):06d}.mp4", row["label"]))
    else:
        named = [(row["file"], row["label"]) for _, row in _rows(own, ("file", "label"))]
    if not named:
        raise ValueError(f"split must be one that {whole if whole.is_file() else own} holds, was {split!r}")
    return [Example(clip=str(Path(videos) / name), answer=label.strip(), id=name) for name, label in named]


def epic_sounds(folder: str | Path, split: str, videos: str | Path) -> list[Example]:
    """EPIC-SOUNDS: EPIC_Sounds_{train,validation}.csv ("train", "val"), EPIC_Sounds_recognition_test_timestamps.csv
    ("test", without answers).

    Videos {video_id} with any suffix, also in a folder of the participant's as EPIC-KITCHENS has them. Answers are
    classes; ids are the annotation_id.
    """
    names = {"train": "train", "val": "validation", "test": "recognition_test_timestamps"}
    if split not in names:
        raise ValueError(f"split must be one of {', '.join(names)}, was {split!r}")
    columns = ("annotation_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp")
    find = _Videos(Path(videos))
    examples = []
    path = Path(folder) / f"EPIC_Sounds_{names[split]}.csv"
    for place, row in _csv(path, columns if split == "test" else (*columns, "class")):
        examples.append(
            Example(
                clip=find(row["video_id"], row["participant_id"], f"{row['participant_id']}/videos"),
                answer=row["class"].strip() if split != "test" else None,
                start=_stamp(row, "start_timestamp", place),
                end=_stamp(row, "stop_timestamp", place),
                id=row["annotation_id"],
            )
        )
    return examples


SETS: dict[str, Callable[[str | Path, str, str | Path], list[Example]]] = {
    "msrvtt-qa": msrvtt_qa,
    "activitynet-qa": activitynet_qa,
    "nextqa-mc": nextqa_mc,
    "nextqa-oe": nextqa_oe,
    "vggsound": vggsound,
    "epic-sounds": epic_sounds,
}
"""Readers by the names that the command line knows: (folder, split, videos) -> examples."""


class _Videos:
    """Finds videos by their names without the suffix, which depends on who has fetched them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, dict[str, str]] = {}

    def __call__(self, stem: str, *below: str) -> str:
        """The file of that name in the folder, or in one of the folders below it; with .mp4 where there is none."""
        for place in (self._folder, *(self._folder / name for name in below)):
            if place not in self._files:
                names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
                self._files[place] = {Path(name).stem: name for name in reversed(names)}
            if stem in self._files[place]:
                return str(place / self._files[place][stem])
        return str(self._folder / f"{stem}.mp4")


def _vidor(folder: Path, videos: Path) -> Callable[[str], str]:
    path = folder / "map_vid_vidorID.json"
    known = _json_object(path) if path.is_file() else None

    def find(video: str) -> str:
        if known is None:
            return str(videos / f"{video}.mp4")
        if video not in known:
            raise ValueError(f"{path}: must name the file of video {video!r}, did not")
        return str(videos / f"{known[video]}.mp4")

    return find


def _csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV with a header that has these columns."""
    rows = list(csv_rows(_existing(path)))
    if not rows:
        raise ValueError(f"{path}: must hold at least one row, had none")
    missing = [name for name in columns if name not in rows[0][1]]
    if missing:
        raise ValueError(f"{path}: must have the columns {missing}, had {list(rows[0][1])}")
    return iter(rows)


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV without a header."""
    return csv_rows(_existing(path), columns)


def _json_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(_json(path, list)):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, entry {number}: must be a JSON object, was {row!r}")
        yield f"{path}, entry {number}", row


def _json_object(path: Path) -> dict[str, Any]:
    return dict(_json(path, dict))


def _json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(_existing(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: must hold a JSON {kind.__name__}, was a {type(value).__name__}")
    return value


def _existing(path: Path) -> Path:
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in path.parent.iterdir())[:20]) if path.parent.is_dir() else "no folder"
        raise FileNotFoundError(f"{path}: no such file; {path.parent} has: {found or 'nothing'}")
    return path


def _value(row: Mapping[str, Any], name: str, place: str) -> str:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{place}: must have a text {name!r}, had {value!r} (of {', '.join(row)})")
    return str(value).strip()


def _index(row: Mapping[str, Any], name: str, place: str, count: int | None = None) -> int:
    """A whole number from 0 on, below `count`."""
    text = _value(row, name, place)
    if not text.isdecimal() or (count is not None and int(text) >= count):
        below = "" if count is None else f" below {count}"
        raise ValueError(f"{place}, column {name!r}: must be a whole number{below}, was {text!r}")
    return int(text)


def _stamp(row: Mapping[str, Any], name: str, place: str) -> float:
    try:
        return parse_seconds(row[name])
    except ValueError as error:
        raise ValueError(f"{place}, column {name!r}: must be HH:MM:SS.mmm, was {row[name]!r}") from error
