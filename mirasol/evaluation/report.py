"""An evaluation as one web page that opens offline: the numbers, and examples with the frames that were seen."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mirasol.evaluation.metrics import ranked, right
from mirasol.evaluation.prediction import Prediction
from mirasol.evaluation.predictions import LISTED, probabilities
from mirasol.kernels.core.checks import expect_int, expect_tensor

FRAMES, HEIGHT = 8, 96
"""Frames that are shown of a clip, and their height in pixels."""


def report_template() -> Any:
    """The page's template.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("the report needs the package jinja2: pip install -e '.[eval]'") from error
    pages = Environment(
        loader=PackageLoader("mirasol.evaluation", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pages.filters["percent"] = lambda value: "" if value is None else f"{100 * value:.1f}"
    return pages.get_template("report.html.jinja")


def write_report(
    path: Path, summary: Mapping[str, Any], shown: Sequence[Prediction], frames: Sequence[Sequence[bytes]]
) -> None:
    """Write the page. All texts of the table and the model are escaped.

    Args:
        summary: what `mirasol.evaluate` returns.
        shown: the examples to show.
        frames: for each of these the JPEG files of its clip's frames (`thumbnails`), or none.
    """
    groups = list(dict.fromkeys(name for table in summary["metrics"].values() for name in table))
    examples = [_example(prediction, files) for prediction, files in zip(shown, frames, strict=True)]
    page = report_template().render(summary, groups=groups, shown=examples)
    path.write_text(page, encoding="utf-8")


def thumbnails(video: Tensor, count: int = FRAMES, height: int = HEIGHT) -> list[bytes]:
    """JPEG files of `count` frames (or all, where there are fewer) that lie evenly over a clip.

    Args:
        video: uint8 [3, F, H, W], at least one frame.
        height: pixels; smaller pictures stay as they are.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("the report needs the package pillow: pip install -e '.[eval]'") from error
    import torch

    expect_tensor("video", video, "3 F H W", dtypes=(torch.uint8,))
    expect_int("count", count)
    total = video.shape[1]
    files = []
    for i in dict.fromkeys((2 * k + 1) * total // (2 * count) for k in range(count)):
        picture = Image.fromarray(video[:, i].permute(1, 2, 0).contiguous().cpu().numpy())
        if picture.height > height:
            picture = picture.resize((max(round(picture.width * height / picture.height), 1), height))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=80)
        files.append(file.getvalue())
    return files


def _example(prediction: Prediction, files: Sequence[bytes]) -> dict[str, Any]:
    example = prediction.example
    span = "" if example.start is None and example.end is None else f"{example.start or 0:g} s to "
    if span:
        span += "the end" if example.end is None else f"{example.end:g} s"
    state = "" if not prediction.truths else "right" if right(prediction) else "wrong"
    return {
        "state": state,
        "frames": [base64.b64encode(file).decode() for file in files],
        "where": " · ".join(part for part in (example.clip, span, example.type, example.id) if part),
        "question": example.question,
        "answer": prediction.answer,
        "truths": prediction.truths,
        "error": prediction.error,
        "choices": _choices(prediction),
    }


def _choices(prediction: Prediction) -> list[dict[str, Any]]:
    """The example's own choices in their order, or the likeliest classes."""
    if not prediction.scores:
        return []
    told = probabilities(prediction)
    order = list(range(len(told))) if prediction.example.choices else ranked(prediction)[:LISTED]
    texts = prediction.choices
    return [{"text": texts[i], "probability": told[i], "truth": texts[i] in prediction.truths} for i in order]
