"""Decoding: the cache against the whole forward, ragged prompts, sampling, beams against an exhaustive search."""

import itertools
import re

import pytest
import torch

import mirasol
from mirasol.generation import generate, steps
from tolerance import assert_close


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mirasol.Model.from_preset("tiny", cross_every=2).eval().double()


@pytest.fixture
def latents(model):
    return torch.randn(3, 8, model.config.av_dim, dtype=torch.float64)


def test_cached_steps_equal_the_whole_forward(model, latents):
    decoder, text = model.text_decoder, torch.randint(0, 256, (3, 9))
    whole = decoder(text, latents)
    cache = decoder.new_cache(decoder.see(latents), 9)
    pieces = [decoder(part, None, cache) for part in text.split([4, 1, 3, 1], dim=1)]
    assert_close("logits", torch.cat(pieces, dim=1), whole)


def test_greedy_takes_the_likeliest_token_of_the_whole_forward(model, latents):
    prompt = torch.randint(0, 256, (3, 4))
    text = model.generate(prompt=prompt, latents=latents, max_new_tokens=6, eos_token_id=258)
    assert torch.equal(text[:, :4], prompt)
    for length in range(4, text.shape[1]):
        likeliest = model.text_decoder(text[:, :length], latents)[:, -1].argmax(-1)
        ended = (text[:, 4:length] == 258).any(-1)
        assert torch.equal(text[:, length], torch.where(ended, model.config.pad_id, likeliest))


def test_ragged_prompts_give_what_each_gives_alone(model, latents):
    prompt, lengths = torch.randint(0, 256, (3, 5)), torch.tensor([2, 5, 3])
    together = model.generate(prompt=prompt, prompt_lengths=lengths, latents=latents, max_new_tokens=4)
    for row, length in enumerate(lengths.tolist()):
        new = 5 + 4 - length
        alone = model.generate(
            prompt=prompt[row : row + 1, :length], latents=latents[row : row + 1], max_new_tokens=new
        )
        shared = min(alone.shape[1], together.shape[1])
        assert torch.equal(together[row, :shared], alone[0, :shared])


def test_stops_at_the_end_and_pads(model, latents):
    free = model.generate(latents=latents, max_new_tokens=8)
    end = int(free[0, 3])
    text = model.generate(latents=latents, max_new_tokens=8, eos_token_id=end)
    first = (text[0] == end).nonzero()[0, 0]
    assert (text[0, first + 1 :] == model.config.pad_id).all()


def test_sampling_follows_the_distribution(model, latents):
    generator = torch.Generator().manual_seed(0)
    prompt = torch.full((1, 1), 257)
    options = dict(latents=latents[:1], prompt=prompt, max_new_tokens=1, do_sample=True, generator=generator)
    logits = model.text_decoder(prompt, latents[:1])[0, -1]
    kept = logits.topk(5).indices
    drawn = model.generate(**options, num_return_sequences=4000, top_k=5, temperature=0.7)[:, -1]
    assert set(drawn.tolist()) <= set(kept.tolist())
    expected = (logits[kept] / 0.7).softmax(-1)
    observed = torch.stack([(drawn == token).double().mean() for token in kept])
    assert (observed - expected).abs().max() < 0.04
    nucleus = model.generate(**options, num_return_sequences=500, top_p=1e-6)[:, -1]
    assert (nucleus == logits.argmax()).all()


def test_beams_find_the_best_sequence(model, latents):
    """With as many beams as there are continuations of one token, two steps of the search are exhaustive."""
    small = mirasol.Model.from_preset("tiny", vocab_size=6, pad_id=0, bos_id=1, eos_id=2).eval().double()
    prompt = torch.tensor([[1, 4]])
    text = small.generate(
        prompt=prompt, latents=latents[:1], max_new_tokens=2, num_beams=6, num_return_sequences=3, length_penalty=0.0
    )
    scores = {}
    for first, second in itertools.product(range(6), repeat=2):
        if first == 2 and second != 0:
            continue
        whole = torch.cat([prompt, torch.tensor([[first, second]])], dim=1)
        steps = small.text_decoder(whole, latents[:1]).log_softmax(-1)[0]
        scores[first, second] = steps[1, first] + (0 if first == 2 else steps[2, second])
    best = sorted(scores, key=lambda pair: -scores[pair])[:3]
    assert [tuple(row[2:].tolist()) for row in text] == best


def test_one_beam_of_ragged_prompts_is_kept_apart(model, latents):
    prompt, lengths = torch.randint(0, 256, (3, 4)), torch.tensor([1, 4, 2])
    options = dict(max_new_tokens=3, num_beams=3)
    together = model.generate(prompt=prompt, prompt_lengths=lengths, latents=latents, **options)
    alone = model.generate(prompt=prompt[1:2], latents=latents[1:2], **options)
    assert torch.equal(together[1, : alone.shape[1]], alone[0])


def test_decodes_under_autocast(latents):
    single = mirasol.Model.from_preset("tiny").eval()
    with torch.autocast("cpu", torch.bfloat16):
        text = single.generate(latents=latents.float(), max_new_tokens=4, num_beams=2)
    assert text.shape == (3, 5)


def test_generate_restores_the_mode(model, latents):
    model.train()
    try:
        model.generate(latents=latents, max_new_tokens=1)
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(latents=torch.zeros(3, 8, 63)), "latents must be [B, T * m, av_dim] = [3, 8, 64], was [3, 8, 63]"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, was 0"),
        (dict(temperature=0.0), "temperature must be above 0, was 0.0"),
        (dict(top_p=1.5), "top_p must be in (0, 1], was 1.5"),
        (dict(top_k=0), "top_k must be at least 1, was 0"),
        (dict(num_beams=2, do_sample=True), "do_sample must be False with num_beams > 1"),
        (dict(num_beams=2, num_return_sequences=3), "num_return_sequences must be at most num_beams, was 3"),
        (dict(num_return_sequences=2), "num_return_sequences must be 1 unless do_sample, was 2"),
        (
            dict(prompt=torch.zeros(2, 3).long()),
            "prompt must hold 3 rows like the clips, or come with clip_of_text",
        ),
        (dict(stop_strings=["a"]), "tokenizer must come with stop_strings, was None"),
        (dict(stop_strings=["a", ""]), "stop_strings must hold no empty string"),
        (dict(prompt_lengths=torch.tensor([0, 1, 1])), "prompt_lengths must hold lengths in [1, 1], was 0..1"),
    ],
)
def test_refusals_name_the_option(model, latents, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(**{"latents": latents, **options})


def test_steps_are_what_greedy_generates(model, latents):
    prompt, lengths = torch.randint(0, 256, (3, 5)), torch.tensor([2, 5, 3])
    options = dict(prompt_lengths=lengths, max_new_tokens=6)
    text = model.generate(prompt=prompt, latents=latents, **options)
    found = list(steps(model.text_decoder, model.config, model.see(latents), prompt, **options))
    assert torch.equal(torch.stack([step.tokens for step in found], dim=1), text[:, 2:])
    assert all(step.attention is None for step in found)


def test_steps_draw_what_generate_draws(model, latents):
    options = dict(max_new_tokens=5, do_sample=True, num_return_sequences=2)
    text = model.generate(latents=latents, **options, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    found = steps(model.text_decoder, model.config, model.see(latents), **options, generator=generator)
    assert torch.equal(torch.stack([step.tokens for step in found], dim=1), text[:, 1:])


def test_steps_come_one_by_one_and_say_what_was_looked_at(model, latents):
    calls = []
    hook = model.text_decoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = steps(model.text_decoder, model.config, model.see(latents), max_new_tokens=4, attention=True)
        assert not calls
        taken = [next(found), next(found)]
        assert len(calls) == 2
    finally:
        hook.remove()
    assert taken[0].tokens.shape == (3,)
    for step in taken:
        assert step.attention.shape == (3, 8)
        assert_close("sum", step.attention.sum(-1), torch.ones(3))
    assert not torch.equal(taken[0].attention, taken[1].attention), "each step has one of its own"
    assert all(not step.tokens.requires_grad for step in found)


class Says(torch.nn.Module):
    """A decoder that says its bytes, whatever it is shown; rows that are about other clips say other texts."""

    def __init__(self, decoder, texts):
        super().__init__()
        self.decoder, self.texts = decoder, [[*text.encode(), 258] for text in texts]

    def new_cache(self, seen, longest, copies=1, **about):
        self.said = 0
        return self.decoder.new_cache(seen, longest, copies, **about)

    def forward(self, text, latents, cache):
        rows = text.shape[0]
        logits = torch.full((rows, 1, 259), -30.0, device=text.device)
        for row in range(rows):
            said = self.texts[row * len(self.texts) // rows]
            logits[row, 0, said[min(self.said, len(said) - 1)]] = 0.0
        self.said += 1
        return logits


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("look", ["each", "late"])
def test_a_stop_string_ends_its_row(model, latents, monkeypatch, num_beams, look):
    if look == "late":
        monkeypatch.setattr("mirasol.generation.loop.may_look_at", lambda _: False)
    says = Says(model.text_decoder, ["yes, it\nis so", "no", "ü;\n; very long"])
    text = generate(
        says,
        model.config,
        model.see(latents),
        max_new_tokens=16,
        num_beams=num_beams,
        stop_strings=[";\n;", "t\ni"],
        tokenizer=mirasol.ByteTokenizer(),
    )
    assert text[0].tolist() == [257, *b"yes, it\ni"] + [256] * (text.shape[1] - 10)
    assert text[1].tolist() == [257, *b"no", 258] + [256] * (text.shape[1] - 4)
    assert text[2].tolist() == [257, *"ü;\n;".encode()] + [256] * (text.shape[1] - 6)
    assert text.shape[1] == 10, "no column behind the last end"


def test_a_stop_string_in_the_prompt_ends_nothing(model, latents):
    says = Says(model.text_decoder, ["abc"])
    prompt, lengths = torch.tensor([[*b"\n\n\n"], [*b"x.."]]), torch.tensor([3, 1])
    text = generate(
        says,
        model.config,
        model.see(latents[:2]),
        prompt,
        prompt_lengths=lengths,
        max_new_tokens=4,
        stop_strings=["\n", "b"],
        tokenizer=mirasol.ByteTokenizer(),
    )
    assert text[1].tolist() == [*b"xab", 256, 256][: text.shape[1]]
    assert text[0, :3].tolist() == [*b"\n\n\n"]
    assert text[0, 3] == ord("c"), "the decoder has said two letters while the row was within its prompt"


def test_the_model_passes_stop_strings_on(model, latents):
    free = model.generate(latents=latents[:1], max_new_tokens=8, eos_token_id=258)[0, 1:].tolist()
    tokenizer = Letters()
    text = model.generate(latents=latents[:1], max_new_tokens=8, stop_strings=[chr(free[2])], tokenizer=tokenizer)
    assert text[0, 1:].tolist() == free[: free.index(free[2]) + 1]


class Letters(mirasol.ByteTokenizer):
    """Every id is a letter, as a model without training says any."""

    def decode(self, ids, *, skip_special_tokens=True):
        return "".join(map(chr, ids))
