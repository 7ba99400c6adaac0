"""What the losses say: a prediction that knows nothing of the clip is told apart from one that does."""

import pytest
import torch

import mirasol
from mirasol.config import Config
from mirasol.layers import SINCOS_STD
from mirasol.losses import latent_loss, text_loss
from tolerance import assert_close


def test_a_constant_prediction_has_no_small_latent_loss():
    """Combined tokens are nearly the same for all clips, slot by slot; predicting their mean is worth nothing."""
    slots = torch.randn(1, 1, 6, 32)
    combined = slots + 0.1 * torch.randn(8, 5, 6, 32)
    counts = torch.ones(8, 5, dtype=torch.bool)
    loss, constant = latent_loss(combined.mean((0, 1), keepdim=True).expand(8, 4, -1, -1), combined, counts)
    assert loss > 0.9
    assert constant > 0.8
    perfect, _ = latent_loss((combined - combined.mean((0, 1)))[:, 1:], combined, counts)
    assert perfect < 1e-5


def test_the_constant_loss_is_that_of_the_best_constant():
    combined, counts = torch.randn(3, 4, 2, 5), torch.ones(3, 4, dtype=torch.bool)
    counts[1, 2:] = False
    _, constant = latent_loss(torch.zeros(3, 3, 2, 5), combined, counts)
    guess = torch.randn(1, 1, 2, 5, requires_grad=True)
    optimizer = torch.optim.Adam([guess], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss, _ = latent_loss(guess.expand(3, 3, -1, -1), combined, counts)
        loss.backward()
        optimizer.step()
    assert_close("constant", loss.detach(), constant, rtol=1e-3)


def test_one_chunk_has_no_latent_loss():
    loss, constant = latent_loss(torch.zeros(2, 0, 3, 4), torch.randn(2, 1, 3, 4), torch.ones(2, 1, dtype=torch.bool))
    assert loss == constant == 0


def noise(config: Config) -> dict[str, torch.Tensor]:
    video = torch.randint(0, 256, (6, 3, 3 * config.frames_per_chunk, 32, 32), dtype=torch.uint8)
    return dict(video=video, audio=torch.randn(6, 3 * config.samples_per_chunk) * 0.3)


def lasting(config: Config) -> dict[str, torch.Tensor]:
    """A colour and a pitch that last the whole clip, others in each."""
    colour = torch.randint(0, 256, (6, 3, 1, 1, 1), dtype=torch.uint8)
    time = torch.arange(3 * config.samples_per_chunk) / config.sample_rate
    pitch = 6.2832 * (200 + 2000 * torch.rand(6, 1))
    return dict(video=colour.expand(-1, -1, 3 * config.frames_per_chunk, 32, 32), audio=(pitch * time).sin() * 0.5)


@pytest.mark.parametrize("combiner", ["transformer", "ttm"])
@pytest.mark.parametrize("kind", [noise, lasting])
def test_the_latent_loss_tells_what_can_be_predicted(combiner, kind):
    """Of noise it learns no more than the constant; of what lasts nearly all, and the clips move apart for it."""
    model = mirasol.Model.from_preset("tiny", combiner=combiner).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    held_out, seen = kind(model.config), []
    model.combiner.register_forward_hook(lambda module, args, out: seen.append(out.detach()))

    def spread() -> float:
        model.eval().encode(**held_out)
        model.train()
        return float((seen[-1] - seen[-1].mean(0)).norm() / seen[-1].norm())

    before = spread()
    for _ in range(60):
        optimizer.zero_grad()
        output = model(**kind(model.config))
        output.loss.backward()
        optimizer.step()
    loss, constant = output.losses.latent, output.losses.latent_constant
    if kind is noise:
        assert loss > 0.9 * constant
    else:
        assert loss < 0.5 * constant
        assert spread() > 1.5 * before


def test_learned_tokens_are_as_large_as_what_they_stand_beside():
    model = mirasol.Model.from_preset("base", text_layers=1, av_layers=1, encoder_layers=1, combiner_layers=1)
    unit = {
        "text_decoder.embedding.weight",
        "audio_video.mask",
        "reconstruct_video.query",
        "reconstruct_audio.query",
        "video_embedding.missing",
        "audio_embedding.missing",
    }
    positions = {"audio_video.slots", "modality"}
    sizes = {name: float(p.detach().std()) for name, p in model.named_parameters() if name in unit | positions}
    assert set(sizes) == unit | positions
    for name, size in sizes.items():
        expected = 1.0 if name in unit else SINCOS_STD
        assert 0.9 * expected < size < 1.1 * expected, name


def test_text_is_learned_at_the_pace_of_unit_embeddings():
    """A small language model of fixed sentences: what drowns the tokens in positions is far behind at this step."""
    torch.manual_seed(0)
    words = [
        f"{a} {b} {c}." for a in ("red", "blue", "green") for b in ("cat", "dog", "bird") for c in ("runs", "sits")
    ]
    model = mirasol.Model.from_preset("tiny").train()
    rows = [[257, *word.encode(), 258] for word in words]
    longest = max(map(len, rows))
    text = torch.tensor([row + [256] * (longest - len(row)) for row in rows])
    labels = text.masked_fill(text == 256, -100)
    decoder, latents = model.text_decoder, torch.zeros(len(rows), 4, 64)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = text_loss(decoder(text, latents), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.9
