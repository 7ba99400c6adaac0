"""The report: what it shows, that it needs nothing else, and that no text of the table becomes code."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from mirasol.data import Example
from mirasol.evaluate import evaluate
from mirasol.evaluation.options import EvaluateOptions
from mirasol.evaluation.prediction import Prediction
from mirasol.evaluation.report import thumbnails, write_report

BAD = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"


class Page(HTMLParser):
    """The elements of a page, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def having(self, css_class: str) -> int:
        return sum(css_class in (attributes.get("class") or "").split() for _, attributes in self.tags)


def test_the_report_shows_numbers_frames_answers_and_choices(run, examples, clips, tmp_path):
    evaluate(run, examples, EvaluateOptions(out=str(tmp_path), max_new_tokens=4, progress=False, device="cpu"))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    for words in ("accuracy", "choice", "who runs there, and why?", "c and d", "a cat", clips[2], "v2_2"):
        assert words in page.text
    assert page.having("example") == 7
    assert page.having("right") + page.having("wrong") == 6
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 5 * 8
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[0].removeprefix("data:image/jpeg;base64,"))))
    assert picture.format == "JPEG"
    shown = re.findall(r"width: ([\d.]+)%", text)
    assert sum(map(float, shown)) == pytest.approx(200, abs=0.5)  # two questions with choices were asked


def test_the_report_asks_nothing_of_the_network_and_runs_no_code(run, examples, tmp_path):
    evaluate(run, examples, EvaluateOptions(out=str(tmp_path), max_new_tokens=4, progress=False, device="cpu"))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert not {"script", "link", "iframe"} & {tag for tag, _ in Page(text).tags}


def test_texts_never_become_code(tmp_path):
    example = Example(BAD, BAD, BAD, type=BAD, choices=(BAD, "b"), references=(BAD,), id=BAD)
    predictions = [
        Prediction(example, BAD, example.choices, (0.0, -1.0)),
        Prediction(Example(BAD, BAD, BAD), BAD),
        Prediction(Example(BAD, BAD, BAD), error=BAD),
    ]
    share = {"value": 1.0, "count": 3}
    summary = dict(
        run=BAD, table=BAD, benchmark=None, examples=3, clips=1, unlabelled=0, broken=[{"clip": BAD, "reason": BAD}],
        metrics={"accuracy": {"all": share, BAD: share}},
    )  # fmt: skip
    write_report(tmp_path / "report.html", summary, predictions, [[], [], []])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.text.count(BAD) >= 18
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_only_so_many_examples_are_shown_evenly(run, examples, tmp_path):
    evaluate(run, examples, EvaluateOptions(out=str(tmp_path), shown=2, max_new_tokens=2, progress=False, device="cpu"))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.having("example") == 2
    assert "v0_0" in page.text
    assert "v3_3" in page.text


def test_thumbnails_lie_evenly_and_keep_their_shape():
    video = torch.arange(16, dtype=torch.uint8)[None, :, None, None].expand(3, 16, 200, 100) * 16
    files = thumbnails(video, count=4, height=96)
    pictures = [Image.open(io.BytesIO(file)) for file in files]
    assert [picture.size for picture in pictures] == [(48, 96)] * 4
    assert [round(picture.getpixel((20, 50))[0] / 16) for picture in pictures] == [2, 6, 10, 14]
    assert len(thumbnails(video[:, :2], count=4)) == 2
