"""The cache of a decode: parity with the whole forward, what is shared, what stays in place, and one compilation."""

from __future__ import annotations

import re

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import mirasol
from mirasol.generation import generate, score
from mirasol.text import Cache, Seen, TextDecoder
from tolerance import assert_close

CLIPS = torch.tensor([2, 0, 0, 1])
LENGTHS = torch.tensor([3, 8, 5])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mirasol.Model.from_preset("tiny", text_layers=4, cross_every=2).eval().requires_grad_(False).double()


@pytest.fixture
def decoder(model) -> TextDecoder:
    return model.text_decoder


@pytest.fixture
def latents(model):
    return torch.randn(3, 8, model.config.av_dim, dtype=torch.float64)


def make_text(rows: int, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length))


def in_pieces(decoder: TextDecoder, text: torch.Tensor, cache: Cache) -> torch.Tensor:
    return torch.cat([decoder(part, None, cache) for part in text.split([4, 1, 3, 1], dim=1)], dim=1)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
@pytest.mark.parametrize("clips", [None, CLIPS], ids=["own", "asked"])
@pytest.mark.parametrize("copies", [1, 3])
def test_cached_steps_equal_the_whole_forward(decoder, latents, lengths, clips, copies):
    rows = (torch.arange(3) if clips is None else clips).repeat_interleave(copies)
    text = make_text(len(rows))
    whole = decoder(text, latents, lengths=lengths, clip_of_text=rows)
    cache = decoder.new_cache(decoder.see(latents, lengths), 20, copies, clip_of_text=clips)
    assert_close("logits", in_pieces(decoder, text, cache), whole, rtol=1e-10)
    assert cache.position.tolist() == [9]


def test_questions_about_the_one_clip_equal_the_whole_forward(decoder, latents):
    clips, text = torch.zeros(4, dtype=torch.int64), make_text(8)
    whole = decoder(text, latents[:1].expand(8, -1, -1), lengths=torch.full((8,), 5))
    cache = decoder.new_cache(decoder.see(latents[:1], torch.tensor([5])), 9, 2, clip_of_text=clips)
    assert_close("logits", in_pieces(decoder, text, cache), whole, rtol=1e-10)


def test_what_is_seen_is_not_copied_for_beams_nor_for_questions_about_one_clip(decoder, latents):
    seen = decoder.see(latents)
    assert [entry is None for entry in seen.keys_values] == [True, False, True, False]
    assert seen.keys_values[1][0].shape == (3, 4, 8, 16)
    for held, clips in ((seen, None), (decoder.see(latents[:1]), torch.zeros(5, dtype=torch.int64))):
        cache = decoder.new_cache(held, 9, 4, clip_of_text=clips)
        for entry, kept in zip(held.keys_values, cache.cross.keys_values, strict=True):
            for tensor, other in zip(entry or (), kept or (), strict=True):
                assert other.data_ptr() == tensor.data_ptr()
                assert other.shape == tensor.shape
    gathered = decoder.new_cache(seen, 9, 4, clip_of_text=CLIPS).cross.keys_values[1][0]
    assert gathered.untyped_storage().nbytes() == 4 * 4 * 8 * 16 * 8, "once a question, not once a beam"


def test_a_row_goes_on_as_a_copy_of_another(decoder, latents):
    text, rows = make_text(6, 5), torch.tensor([1, 1, 3, 2, 5, 5])
    cache = decoder.new_cache(decoder.see(latents), 9, 2)
    decoder(text[:, :4], None, cache)
    buffers = [buffer.data_ptr() for buffer in cache.text]
    cache.reorder(rows)
    text = torch.cat([text[rows, :4], text[:, 4:]], dim=1)
    whole = decoder(text, latents, clip_of_text=torch.arange(3).repeat_interleave(2))
    assert_close("logits", decoder(text[:, 4:], None, cache), whole[:, 4:], rtol=1e-10)
    assert buffers == [buffer.data_ptr() for buffer in cache.text]


@pytest.mark.parametrize("own", [False, True])
def test_a_cache_begins_again(decoder, latents, own):
    first, second, text = decoder.see(latents, LENGTHS), decoder.see(latents.flip(0) + 1, LENGTHS.flip(0)), make_text(4)
    before = [tensor.clone() for entry in first.keys_values for tensor in entry or ()]
    cache = decoder.new_cache(first, 9, clip_of_text=CLIPS, own=own)

    def places() -> list[int]:
        seen = [tensor for entry in cache.cross.keys_values for tensor in entry or ()]
        return [tensor.data_ptr() for tensor in (*seen, cache.cross.mask, *cache.text, cache.position)]

    stand = places()
    decoder(text, None, cache)
    cache.reset(second, clip_of_text=CLIPS.flip(0))
    whole = decoder(text, latents.flip(0) + 1, lengths=LENGTHS.flip(0), clip_of_text=CLIPS.flip(0))
    assert_close("logits", in_pieces(decoder, text, cache), whole, rtol=1e-10)
    assert (stand == places()) == own
    after = [tensor for entry in first.keys_values for tensor in entry or ()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "what others share is left alone"


def test_a_cache_of_its_own_leaves_what_it_was_made_of_alone(decoder, latents):
    first, second = decoder.see(latents), decoder.see(latents + 1)
    before = first.keys_values[1][0].clone()
    cache = decoder.new_cache(first, 9, own=True)
    cache.reset(second)
    assert torch.equal(first.keys_values[1][0], before)
    assert torch.equal(cache.cross.keys_values[1][0], second.keys_values[1][0])


@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 8])])
def test_attention_is_the_softmax_of_the_cross_attentions(decoder, latents, lengths):
    """Against the formula, from what enters each cross-attention in a whole forward."""
    entered = []
    crosses = [block.cross_attention for block in decoder.blocks if block.cross_attention is not None]
    hooks = [cross.register_forward_pre_hook(lambda _, args: entered.append(args[0])) for cross in crosses]
    text, latents = make_text(4, 5), latents[:2]
    decoder(text, latents, lengths=lengths, clip_of_text=torch.tensor([0, 0, 1, 1]))
    for hook in hooks:
        hook.remove()
    cache = decoder.new_cache(decoder.see(latents, lengths), 9, 2)
    plain = decoder.new_cache(decoder.see(latents, lengths), 9, 2)
    cache.cross.watch()
    for part in text.split([3, 1, 1], dim=1):
        assert torch.equal(decoder(part, None, cache), decoder(part, None, plain)), "looking changes nothing"
    expected = torch.zeros(4, 8, dtype=torch.float64)
    for cross, x in zip(crosses, entered, strict=True):
        q = cross.query(x[:, -1]).view(4, 4, 16)
        k = cross.key_value(latents)[..., :64].view(2, 8, 4, 16).repeat_interleave(2, 0)
        scores = torch.einsum("rhd,rnhd->rhn", q, k) / 4
        if lengths is not None:
            hidden = torch.arange(8) >= lengths.repeat_interleave(2)[:, None]
            scores = scores.masked_fill(hidden[:, None], -torch.inf)
        expected += scores.softmax(-1).mean(1) / len(crosses)
    assert cache.cross.attention.dtype == torch.float32
    assert_close("attention", cache.cross.attention, expected)
    assert_close("sum", cache.cross.attention.sum(-1), torch.ones(4))


def test_buffers_follow_autocast(latents):
    torch.manual_seed(0)
    decoder = mirasol.Model.from_preset("tiny").eval().text_decoder
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = decoder.new_cache(decoder.see(latents.float()), 9)
        logits = decoder(make_text(3, 4), None, cache)
    assert cache.text[0].dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_a_step_is_compiled_once():
    """Over steps, over further questions, over prompts of other lengths; and to the same answers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = mirasol.Model.from_preset("tiny").eval()
    decoder, config = model.text_decoder, model.config
    questions = [(torch.randn(1, 8, 64), make_text(1, length)) for length in (3, 5, 4)]

    def answers() -> list[torch.Tensor]:
        options = dict(max_new_tokens=6, eos_token_id=258)
        return [generate(decoder, config, model.see(latents), prompt, **options) for latents, prompt in questions]

    expected = answers()
    backend = CompileCounter()
    decoder.compile(fullgraph=True, dynamic=False, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = answers()
    assert backend.frame_count == 1
    for answer, same in zip(found, expected, strict=True):
        assert torch.equal(answer, same)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("watch", [False, True])
def test_a_compiled_step_equals_the_eager_one(watch, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    decoder = mirasol.Model.from_preset("tiny").eval().text_decoder
    decoder.requires_grad_(False)
    seen, text = decoder.see(torch.randn(2, 8, 64), torch.tensor([8, 5])), make_text(4, 6)
    step = torch.compile(decoder, fullgraph=True, dynamic=False, backend=backend)
    told = []
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for call in (decoder, step):
            cache = decoder.new_cache(seen, 16, 2)
            if watch:
                cache.cross.watch()
            told.append(torch.cat([call(token, None, cache) for token in text.split(1, dim=1)], dim=1))
            if watch:
                told.append(cache.cross.attention)
    half = len(told) // 2
    for eager, fast in zip(told[:half], told[half:], strict=True):
        assert_close("compiled", fast, eager, rtol=1e-4)
    torch._dynamo.reset()


def test_a_call_reads_nothing_from_the_device():
    """Tensors without data on a device that is not there: whoever reads a value of theirs raises."""
    config = mirasol.Config.preset("tiny")
    with torch.device("meta"):
        decoder = TextDecoder(config)
    with FakeTensorMode(), torch.no_grad():
        for module in decoder.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                setattr(module, name, torch.empty(parameter.shape, device="cuda"))
        seen = decoder.see(torch.empty(2, 8, 64, device="cuda"), torch.empty(2, device="cuda", dtype=torch.int64))
        cache = decoder.new_cache(seen, 16, 3)
        cache.cross.watch()
        for length in (5, 1):
            logits = decoder(torch.empty(6, length, device="cuda", dtype=torch.int64), None, cache)
            assert logits.shape == (6, length, config.vocab_size)
            assert logits.device.type == "cuda"
        with pytest.raises(RuntimeError):
            int(cache.position)


def test_scores_of_unlike_numbers_of_choices_equal_those_of_the_whole_forward(model, latents):
    decoder = model.text_decoder
    prompts, clips = [[257, 5], [257], [257, 6, 7]], torch.tensor([2, 0, 2])
    answers = [[[1, 258], [2, 3, 258]], [[4, 258]], [[8, 258], [9, 9, 9, 258]]]
    found = score(decoder, model.config, decoder.see(latents, LENGTHS), prompts, answers, clip_of_text=clips)
    for q, choices in enumerate(answers):
        for c, choice in enumerate(choices):
            text = torch.tensor([[*prompts[q], *choice]])
            clip = int(clips[q])
            told = decoder(text, latents[clip : clip + 1, : LENGTHS[clip]]).float().log_softmax(-1)[0, :-1]
            expected = told.gather(1, text[0, 1:, None])[len(prompts[q]) - 1 :].sum()
            assert_close("score", found[q, c], expected)
    assert found[1, 1] == -torch.inf


def test_what_does_not_fit_is_refused_by_name(decoder, latents):
    seen = decoder.see(latents, LENGTHS)
    for wrong in (lambda: decoder.new_cache(seen, 0), lambda: decoder.new_cache(seen, 4, 0)):
        with pytest.raises(ValueError, match=r"(longest|copies) must be at least 1, was 0"):
            wrong()
    with pytest.raises(ValueError, match=re.escape("clip_of_text must be [Q], was [1, 4]")):
        decoder.new_cache(seen, 4, clip_of_text=CLIPS[None])
    cache = decoder.new_cache(seen, 4, own=True)
    with pytest.raises(ValueError, match="text must hold at most the 4 tokens of its cache, was 5"):
        decoder(make_text(3, 5), None, cache)
    decoder(make_text(3, 4), None, cache)
    with pytest.raises(ValueError, match="text must end within the 4 tokens of its cache"):
        decoder(make_text(3, 1), None, cache)
    other = decoder.see(torch.zeros(3, 12, 64, dtype=torch.float64), LENGTHS)
    with pytest.raises(
        ValueError, match=re.escape("of the shapes that the cache was made of, [G, H, N, D] = [3, 4, 8, 16]")
    ):
        cache.reset(other)
    with pytest.raises(ValueError, match="lengths must be None, as in what the cache was made of"):
        decoder.new_cache(decoder.see(latents), 4, own=True).reset(seen)
    with pytest.raises(ValueError, match="keys_values must hold those of a cross-attention, held none"):
        decoder.new_cache(Seen([None]), 4)
