"""A tiny model in a run's folder, and clips to ask it about."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mirasol
from clips import write_clip
from mirasol.data import Example
from mirasol.tokenizer import ByteTokenizer


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A folder as training leaves it: a tiny model of random weights, and the tokenizer of bytes.

    Its output layer is scaled up, so that texts differ from clip to clip.
    """
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    model = mirasol.Model.from_preset("tiny")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "cross" in name or "video" in name:
                weight.mul_(3)
    model.save_pretrained(folder, ByteTokenizer())
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> list[str]:
    """Two clips with sound, one of them of twice the length, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("clips")
    files = [folder / name for name in ("a.mp4", "b.mp4", "broken.mp4")]
    write_clip(files[0], seconds=0.4, tones=(150.0, 330.0), rate=16000)
    write_clip(files[1], seconds=0.8, tones=(470.0,), rate=16000)
    files[2].write_bytes(b"not a film")
    return [str(file) for file in files]


@pytest.fixture(scope="session")
def examples(clips) -> list[Example]:
    """Questions of three kinds of which two clips are asked, and two that nobody can answer."""
    a, b, broken = clips
    letters = tuple("abc")
    told = [
        Example(a, "what is it?", "a dog", type="what"),
        Example(b, "who runs there, and why?", "a cat", type="who"),
        Example(a, "which?", "b", type="choice", choices=("a", "b", "c and d")),
        Example(broken, "what is it?", "a dog", type="what"),
        Example(b, "what?", None),
        Example(broken, "which?", "a", type="choice", choices=letters),
        Example(b, "which one?", "a", start=0.0, end=0.4, type="choice", choices=letters),
    ]
    return [replace(example, id=f"v{i}_{i}") for i, example in enumerate(told)]
