"""A server with a model that says one sentence, a browser, and pages that must stay free of mistakes."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import driver
import pytest
import torch
from driver import ANSWER, MEMORY, QUESTION, SECONDS, VISITORS

import mirasol
from clips import write_clip
from mirasol.batch import IGNORE
from mirasol.tokenizer import ByteTokenizer, encode_answer, encode_prompt


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shots", type=Path, help="folder for a picture of the page at the end of each test")


def pytest_sessionstart(session: pytest.Session) -> None:
    try:
        driver.find_browser()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A tiny model whose text decoder has learned a sentence and looks at latents without minding what they hold."""
    torch.manual_seed(0)
    model, tokenizer = mirasol.Model.from_preset("tiny").train(), ByteTokenizer()
    prompt, answer = encode_prompt(tokenizer, QUESTION), encode_answer(tokenizer, ANSWER)
    text, labels = torch.tensor([prompt + answer]), torch.tensor([[IGNORE] * len(prompt) + answer])
    for block in model.text_decoder.blocks:
        torch.nn.init.zeros_(block.cross_attention.out.weight).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.text_decoder.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(400):
        latents = torch.randn(1, 2 * model.config.latents_per_chunk, model.config.av_dim)
        loss = model(latents=latents, text=text, labels=labels).losses.text
        if loss.item() < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.02, "the sentence was not learned"
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A clip with sound that no browser plays as it is."""
    path = tmp_path_factory.mktemp("clips") / "square.mkv"
    return write_clip(path, seconds=SECONDS, width=320, height=240, sound_seconds=SECONDS - 0.1)


@pytest.fixture(scope="session")
def browser():
    with driver.open_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def address(run, clip):
    options = ["--memory", str(MEMORY), "--visitors", str(VISITORS), "--max-new-tokens", "600"]
    with driver.serve(run, *options, "--examples", str(clip.parent)) as address:
        yield address


@pytest.fixture
def learned(run, tmp_path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The address of a server whose model's folder tells of its world, and that world."""
    world: dict[str, Any] = dict(chunks=6, events=2, types=["what-heard", "what-seen"])
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "world.json").write_text(json.dumps({**world, "look": {}}))
    with driver.serve(folder) as address:
        yield address, world


@pytest.fixture
def visit(browser, address, request) -> Callable[..., driver.Visit]:
    """Opens pages, on request those of another server. None of them may have had an error or asked another machine for
    anything."""
    visits: list[driver.Visit] = []

    def open_page(where: str = address) -> driver.Visit:
        visits.append(driver.Visit(browser, where))
        return visits[-1]

    yield open_page
    shots = request.config.getoption("--shots")
    for number, one in enumerate(visits):
        if shots is not None and not one.page.is_closed():
            shots.mkdir(parents=True, exist_ok=True)
            one.page.screenshot(path=shots / f"{request.node.name}-{number}.png")
        one.context.close()
    assert [mistake for one in visits for mistake in one.mistakes] == []
