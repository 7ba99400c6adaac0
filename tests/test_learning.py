"""The main job, end to end: a real file is read, learned by heart and answered."""

import pytest
import torch

import mirasol
from mirasol.config import Config


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from clips import write_clip

    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(path)
    config = Config.preset("tiny")
    return mirasol.load(
        path,
        chunks=4,
        frames_per_chunk=config.frames_per_chunk,
        size=config.image_size,
        samples_per_chunk=config.samples_per_chunk,
        sample_rate=config.sample_rate,
    )


@pytest.mark.parametrize("combiner", ["transformer", "ttm", "mean"])
def test_overfits_a_clip_and_answers(clip, combiner):
    torch.manual_seed(0)
    tokens = mirasol.ByteTokenizer()
    model = mirasol.Model.from_preset("tiny", combiner=combiner).train()
    prompt = torch.tensor([[tokens.bos_token_id, *tokens.encode("What moves?")]])
    answer = torch.tensor([[*tokens.encode("A red square."), tokens.eos_token_id]])
    text = torch.cat([prompt, answer], dim=1)
    labels = torch.cat([torch.full_like(prompt, -100), answer], dim=1)
    video, audio = clip.video[None], clip.audio[None]

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(90):
        optimizer.zero_grad()
        output = model(video, audio, text, labels)
        output.loss.backward()
        optimizer.step()
        losses.append(output)
    first, last = losses[0].losses, losses[-1].losses
    assert last.text < 0.05
    assert last.video < 0.5 * first.video
    assert last.audio < 0.5 * first.audio
    assert last.latent < 0.5 * first.latent

    written = model.generate(video, audio, prompt, max_new_tokens=20)
    assert tokens.decode(written[0, prompt.shape[1] :].tolist(), skip_special_tokens=True) == "A red square."


def test_answers_depend_on_the_clip():
    """Two clips, one question, two answers: the text decoder must look at the latents."""
    torch.manual_seed(0)
    tokens = mirasol.ByteTokenizer()
    model = mirasol.Model.from_preset("tiny").train()
    config = model.config
    frames = 2 * config.frames_per_chunk
    video = torch.zeros(2, 3, frames, config.image_size, config.image_size, dtype=torch.uint8)
    video[0, 0], video[1, 2] = 255, 255
    time = torch.arange(2 * config.samples_per_chunk) / config.sample_rate
    audio = torch.stack([(6.2832 * pitch * time).sin() * 0.5 for pitch in (300.0, 1200.0)])
    prompt = torch.tensor([[tokens.bos_token_id, *tokens.encode("Colour?")]] * 2)
    answers = torch.tensor(
        [[*tokens.encode("red."), tokens.eos_token_id], [*tokens.encode("blue"), tokens.eos_token_id]]
    )
    text = torch.cat([prompt, answers], dim=1)
    labels = torch.cat([torch.full_like(prompt, -100), answers], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(video, audio, text, labels).loss.backward()
        optimizer.step()
    written = model.generate(video, audio, prompt, max_new_tokens=6)[:, prompt.shape[1] :]
    assert [tokens.decode(row, skip_special_tokens=True) for row in written.tolist()] == ["red.", "blue"]
    swapped = model.generate(video.flip(0), audio.flip(0), prompt, max_new_tokens=6)[:, prompt.shape[1] :]
    assert [tokens.decode(row, skip_special_tokens=True) for row in swapped.tolist()] == ["blue", "red."]
