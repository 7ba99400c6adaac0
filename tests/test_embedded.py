"""The model that comes with the package: what lies there, what its card tells, and that it answers as the card says."""

import random
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

import mirasol
from mirasol import EMBEDDED
from mirasol.__main__ import main
from mirasol.config import Config
from mirasol.data import Example, collate, load_clip
from mirasol.data.worlds import Look, write_world
from mirasol.data.worlds.questions import asks
from mirasol.data.worlds.spec import LEARNED, draw_world
from mirasol.data.worlds.wordings import WORDINGS
from mirasol.demo.examples import SEEDS
from mirasol.embedded import learned_world
from mirasol.evaluation.answer import Answerer
from mirasol.evaluation.options import AnswerOptions

README = Path(__file__).resolve().parents[1] / "README.md"
SHOWN = 7
"""The seed of the README's clip."""
NEW = (SHOWN, *SEEDS, *range(200, 220))
"""Seeds of clips that it must not have learned from."""
MOST = 8_000_000
"""Bytes of the weights."""
DEVIATIONS = 4
"""Standard deviations that a share of right answers may lie below that on the card."""


@pytest.fixture(scope="module")
def card() -> str:
    return (EMBEDDED / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Questions about clips that it has not seen: (question, choices, true answer, the model's)."""
    answerer, world = Answerer(EMBEDDED, AnswerOptions(device="cpu")), learned_world(EMBEDDED)
    clips, found = [], []
    for row, seed in enumerate(NEW):
        path = tmp_path_factory.mktemp("clips") / "clip.mp4"
        questions = write_world(path, seed, **world)
        clips.append(load_clip(Example(str(path)), answerer.model.config, answerer.max_chunks))
        drawn = draw_world(random.Random(seed), world["chunks"], world["events"] or world["chunks"] // 2)
        choices = {
            ask.text(wording): ask.choices
            for ask, _ in asks(drawn, LEARNED)
            for wording in range(len(WORDINGS[ask.words]))
        }
        found += [(row, question, choices[question], answer) for question, answer in questions]
    rows, questions, choices, truths = zip(*found, strict=True)
    said = answerer.generate(answerer.encode(collate(clips)), questions, rows)
    return list(zip(questions, choices, truths, said, strict=True))


def test_the_model_is_small_and_whole():
    assert (EMBEDDED / "model.safetensors").stat().st_size <= MOST
    assert not list(EMBEDDED.glob("*.index.json")), "its weights have their plain name, in one file"
    model = mirasol.Model.from_pretrained(EMBEDDED)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    model.stream(tokenizer=mirasol.load_tokenizer(EMBEDDED), memory=4)


def test_its_world_is_made_to_its_measure():
    config, world = Config.load(EMBEDDED / "config.json"), learned_world(EMBEDDED)
    assert world["look"] == Look.of(config)
    assert Answerer(EMBEDDED, AnswerOptions(device="cpu")).max_chunks == world["chunks"]
    assert "what-seen" in world["types"], "which the README asks"


def test_the_card_tells_what_it_was_made_from_and_what_it_cannot_do(card):
    parameters = sum(parameter.numel() for parameter in mirasol.Model.from_pretrained(EMBEDDED).parameters())
    world = learned_world(EMBEDDED)
    assert f"{parameters:,} parameters, {(EMBEDDED / 'model.safetensors').stat().st_size / 1e6:.1f} MB" in card
    assert f"{world['chunks']} chunks" in card
    assert re.search(r"^\| questions \| (.*) \|$", card, re.MULTILINE)[1].split(", ") == list(world["types"])
    assert re.search(r"^\| code \| commit [0-9a-f]{7,40} \|$", card, re.MULTILINE)
    seed = int(re.search(r"^\| drawn by \| .*, seed (\d+) \|$", card, re.MULTILINE)[1])
    assert seed not in NEW, "the first clip of a set is the one that `world` makes of its seed"
    for kind in world["types"]:
        assert re.search(rf"^\| {kind} \| \d+ \| \*\*[\d.]+ %\*\* \| ", card, re.MULTILINE), kind
    assert len(re.findall(r"^- .{20,}\.$", card.partition("\n## What it cannot do\n")[2], re.MULTILINE)) >= 3


def test_it_answers_what_can_be_answered_as_often_right_as_the_card_says(asked, card):
    assert len(asked) >= 50
    strange = [(question, said) for question, choices, _, said in asked if said not in choices]
    assert len(strange) <= 0.02 * len(asked), strange
    share = float(re.search(r"it answers\s+([\d.]+) % right", card)[1]) / 100
    right, spread = sum(said == truth for _, _, truth, said in asked), (len(asked) * share * (1 - share)) ** 0.5
    assert right >= share * len(asked) - DEVIATIONS * spread, f"{right} of {len(asked)}, the card says {share:.3f}"


def test_the_first_commands_of_the_readme_work_offline(tmp_path, monkeypatch, capsys):
    lines = re.findall(r"^    python -m mirasol (.*)$", README.read_text(encoding="utf-8"), re.MULTILINE)[:2]
    made, ask = (re.findall(r'"[^"]*"|\S+', line.partition(" #")[0]) for line in lines)
    assert (made[0], ask[0]) == ("world", "ask")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", None)
    assert main(made) == 0
    assert "python -m mirasol ask clip.mp4 'W" in capsys.readouterr().out
    assert main([word.strip('"') for word in ask]) == 0
    assert capsys.readouterr().out.strip() in ("red", "green", "blue", "yellow")


def test_the_page_opens_with_clips_of_its_world():
    command = [sys.executable, "-m", "mirasol", "demo", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, cwd=README.parent / "tests", stdout=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().strip()
            with urllib.request.urlopen(address + "config" if address.endswith("/") else address + "/config") as page:
                told = page.read().decode()
        finally:
            server.terminate()
    for seed in SEEDS:
        assert f"world-{seed}.mp4" in told
