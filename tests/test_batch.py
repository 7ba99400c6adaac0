"""Batches as data come: clips of different lengths, absent content, many texts a clip, and what is refused."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mirasol
import mirasol.batch
import mirasol.generation
from mirasol.config import Config
from tolerance import SAME_SUMS, assert_close

COMBINERS = ("transformer", "ttm", "attention", "perceiver", "mean", "none")
LENGTHS = (3, 1, 2)


def make_model(**changes) -> mirasol.Model:
    return mirasol.Model.from_preset("tiny", mask_ratio=0.0, **changes).double()


def clips(config: Config, batch: int = 3, chunks: int = 3) -> dict[str, torch.Tensor]:
    size = config.image_size
    return dict(
        video=torch.rand(batch, 3, chunks * config.frames_per_chunk, size, size, dtype=torch.float64),
        audio=torch.randn(batch, chunks * config.samples_per_chunk, dtype=torch.float64) * 0.1,
        times=torch.tensor([[0.0, 0.5, 2.0], [7.0, 0.0, 0.0], [1.0, 4.0, 0.0]]),
    )


def alone(config: Config, inputs: dict[str, torch.Tensor], row: int, length: int) -> dict[str, torch.Tensor]:
    return dict(
        video=inputs["video"][row : row + 1, :, : length * config.frames_per_chunk],
        audio=inputs["audio"][row : row + 1, : length * config.samples_per_chunk],
        times=inputs["times"][row : row + 1, :length],
    )


@pytest.mark.parametrize(
    "changes",
    [*(dict(combiner=kind) for kind in COMBINERS), dict(av_causal=False), dict(combiner="ttm", ttm_official=True)],
    ids=str,
)
def test_clips_of_different_lengths_equal_each_alone(changes):
    model = make_model(**changes).eval()
    config, inputs, text = model.config, clips(model.config), torch.randint(0, 256, (3, 6))
    together = model(**inputs, chunks=torch.tensor(LENGTHS), text=text)
    poisoned = {name: value.clone() for name, value in inputs.items()}
    for row, length in enumerate(LENGTHS):
        poisoned["video"][row, :, length * config.frames_per_chunk :] = 1e3
        poisoned["audio"][row, length * config.samples_per_chunk :] = 1e3
        single = model(**alone(config, inputs, row, length), text=text[row : row + 1])
        m = single.latents.shape[1]
        assert_close("latents", together.latents[row : row + 1, :m], single.latents, rtol=SAME_SUMS)
        assert not together.latents[row, m:].any()
        assert_close("logits", together.logits[row : row + 1], single.logits, rtol=SAME_SUMS)
    padded = model(**poisoned, chunks=torch.tensor(LENGTHS), text=text)
    assert_close("padding", padded.logits, together.logits, rtol=SAME_SUMS)


@pytest.mark.parametrize("target", ["pixels", "features"])
def test_losses_and_gradients_do_not_see_the_padding(target):
    model = make_model(combiner="ttm", reconstruction_target=target).train()
    config, inputs, text = model.config, clips(model.config), torch.randint(0, 256, (3, 6))
    lengths = torch.tensor(LENGTHS)
    grads = []
    for filling in (0.0, float("nan")):
        for row, length in enumerate(LENGTHS):
            inputs["video"][row, :, length * config.frames_per_chunk :] = 0.5 if target == "features" else filling
            inputs["audio"][row, length * config.samples_per_chunk :] = 0.25 * (filling == filling)
        model.zero_grad()
        output = model(**inputs, chunks=lengths, text=text, labels=text)
        output.loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()} | {"loss": output.loss.detach()})
    for name, value in grads[0].items():
        assert_close(name, grads[1][name], value, rtol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("target", ["pixels", "features"])
def test_content_of_absent_clips_reaches_nothing(bad, target):
    model = make_model(reconstruction_target=target).train()
    inputs = clips(model.config)
    present = torch.tensor([True, False, True])
    results = []
    for filling in (0.0, bad):
        inputs["video"][1], inputs["audio"][1] = filling, filling
        model.zero_grad()
        output = model(**inputs, video_present=present, audio_present=present)
        output.loss.backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        results[-1]["loss"] = output.loss.detach()
    for name, value in results[0].items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, results[1][name]), name


def test_absent_features_are_what_missing_clips_are_encoded_to():
    model = make_model().eval()
    inputs, present = clips(model.config), torch.tensor([True, False, True])
    video, audio = model.features(inputs["video"], inputs["audio"])
    expected = model.encode(**inputs, video_present=present, audio_present=present)
    video[1], audio[1] = float("nan"), float("nan")
    given = dict(video_features=video, audio_features=audio, video_present=present, audio_present=present)
    assert_close("latents", model.encode(**given, times=inputs["times"]), expected, rtol=SAME_SUMS)


def test_a_modality_that_no_clip_has_is_encoded_once():
    model = mirasol.Model.from_preset("tiny").eval()
    config = model.config
    video = torch.zeros(2, 3, 8 * config.frames_per_chunk, 32, 32, dtype=torch.uint8)
    audio = torch.zeros(2, 8 * config.samples_per_chunk)
    absent = torch.zeros(2, dtype=torch.bool)
    with FlopCounterMode(display=False) as once:
        expected = model.encode(video)
    with FlopCounterMode(display=False) as each:
        assert_close("latents", model.encode(video, audio, audio_present=absent), expected)
    saved = each.get_total_flops() - once.get_total_flops()
    with FlopCounterMode(display=False) as whole:
        model.features(audio=audio)
    with FlopCounterMode(display=False) as nothing:
        model.features(audio=audio[:1, : config.samples_per_chunk])
    encoder = whole.get_total_flops() - nothing.get_total_flops()  # 15 of the 16 chunks' sound
    assert saved >= encoder


def test_many_texts_a_clip():
    model = make_model(cross_every=2).eval()
    inputs, lengths = clips(model.config), torch.tensor(LENGTHS)
    text, of = torch.randint(0, 256, (5, 6)), torch.tensor([2, 0, 0, 1, 2])
    together = model(**inputs, chunks=lengths, text=text, labels=text, clip_of_text=of)
    latents = model.encode(**inputs, chunks=lengths)
    again = model(latents=latents, chunks=lengths, text=text, labels=text, clip_of_text=of)
    assert_close("logits", again.logits, together.logits, rtol=SAME_SUMS)
    assert_close("text", again.losses.text, together.losses.text, rtol=SAME_SUMS)
    for q, clip in enumerate(of.tolist()):
        single = model(**alone(model.config, inputs, clip, LENGTHS[clip]), text=text[q : q + 1])
        assert_close("logits", together.logits[q : q + 1], single.logits, rtol=SAME_SUMS)
    prompt = dict(prompt=text[:, :3], max_new_tokens=4)
    written = model.generate(latents=latents, chunks=lengths, clip_of_text=of, **prompt)
    for q, clip in enumerate(of.tolist()):
        one = model.generate(
            **alone(model.config, inputs, clip, LENGTHS[clip]), prompt=text[q : q + 1, :3], max_new_tokens=4
        )
        assert torch.equal(written[q, : one.shape[1]], one[0])


def test_scores_are_the_log_probabilities_of_the_answers():
    model = make_model().eval()
    inputs, lengths = clips(model.config), torch.tensor(LENGTHS)
    latents = model.encode(**inputs, chunks=lengths)
    prompts, of = [[257, 65], [257, 66, 67]], torch.tensor([2, 0])
    answers = [[[70, 258], [71, 72, 258], [258]], [[73, 74, 258], [75, 258]]]
    scores = model.score(latents, prompts, answers, chunks=lengths, clip_of_text=of)
    assert scores.shape == (2, 3)
    assert scores[1, 2] == -torch.inf
    for q, choices in enumerate(answers):
        for c, answer in enumerate(choices):
            whole = torch.tensor([prompts[q] + answer])
            clip = alone(model.config, inputs, int(of[q]), LENGTHS[of[q]])
            steps = model(**clip, text=whole).logits.log_softmax(-1)[0]
            first = len(prompts[q])
            expected = sum(steps[first + i - 1, token] for i, token in enumerate(answer))
            assert abs(scores[q, c] - expected) < 1e-5


def test_start_times_are_seconds():
    model = make_model(combiner="ttm").eval()
    inputs = clips(model.config)
    default = model.encode(inputs["video"], inputs["audio"])
    times = torch.arange(3).expand(3, -1) * model.config.seconds_per_chunk
    assert torch.equal(model.encode(inputs["video"], inputs["audio"], times=times), default)
    assert not torch.allclose(model.encode(**inputs), default)
    official = make_model(combiner="ttm", ttm_official=True).eval()
    seen = []
    official.combiner.register_forward_hook(lambda module, args, out: seen.append(out))
    official.encode(inputs["video"], inputs["audio"])
    official.encode(**inputs)
    assert torch.equal(seen[0], seen[1])


def test_the_official_ttm_holds_one_memory_of_the_same_size():
    grouped, official = (mirasol.Model.from_preset("tiny", combiner="ttm", ttm_official=on) for on in (False, True))
    assert grouped.combiner.memory.shape[:2] == (2, 8)
    assert official.combiner.memory.shape[:2] == (1, 16)
    assert not official.combiner.memory.any()
    assert grouped.combiner.memory.any()


def test_reconstruction_is_skipped_at_weight_0():
    model = mirasol.Model.from_preset("tiny", video_weight=0, audio_weight=0.0, text_weight=0).train()
    calls = []
    for module in (model.reconstruct_video, model.reconstruct_audio):
        module.register_forward_hook(lambda *_: calls.append(1))
    video = torch.zeros(1, 3, 8, 32, 32, dtype=torch.uint8)
    text = torch.randint(0, 256, (1, 4))
    output = model(video, text=text, labels=text)
    assert calls == []
    assert output.losses.video == output.losses.audio == 0
    assert torch.equal(output.loss, output.losses.latent)


def test_small_copy_holds_one_chunk_at_a_time():
    from mirasol.losses import small_copy

    config = Config.preset("tiny", image_size=64)
    video = torch.randint(0, 256, (1, 3, 32 * config.frames_per_chunk, 64, 64), dtype=torch.uint8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        copy = small_copy(video, config)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 2 * copy.numel() * 4
    one_by_one = [small_copy(chunk, config) for chunk in video.split(config.frames_per_chunk, 2)]
    assert torch.equal(copy, torch.cat(one_by_one, 1))


def inputs_for(**changes):
    base = dict(video=torch.zeros(2, 3, 8, 32, 32, dtype=torch.uint8))
    return base | changes


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (inputs_for(video=torch.zeros(0, 3, 8, 32, 32)), ValueError, "video must hold at least one clip"),
        (inputs_for(video=torch.zeros(2, 3, 8, 48, 32)), ValueError, "video must have H = W = image_size = 32"),
        (inputs_for(video_features=torch.zeros(2, 2, 19, 64)), ValueError, "video_features must be [B, T, n_v"),
        (inputs_for(audio_features=torch.zeros(2, 2, 5, 64)), ValueError, "audio_features must be [B, T, n_a"),
        (inputs_for(audio_features=torch.zeros(2, 2, 4, 32)), ValueError, "audio_features must be [B, T, n_a"),
        (
            inputs_for(chunks=torch.tensor([0, 2])),
            ValueError,
            "chunks must hold 1..2, the chunks of each clip, was 0..2",
        ),
        (
            inputs_for(chunks=torch.tensor([1, 3])),
            ValueError,
            "chunks must hold 1..2, the chunks of each clip, was 1..3",
        ),
        (inputs_for(chunks=torch.tensor([1.0, 2.0])), TypeError, "chunks must be of dtype"),
        (inputs_for(chunks=torch.tensor([1])), ValueError, "chunks must be [B] = [2]"),
        (inputs_for(times=torch.zeros(2, 3)), ValueError, "times must be [B, T] = [2, 2]"),
        (inputs_for(times=torch.full((2, 2), float("nan"))), ValueError, "times must be finite numbers of seconds"),
        (inputs_for(video_present=torch.ones(2)), TypeError, "video_present must be a bool tensor [B]"),
        (
            inputs_for(video_present=torch.ones(2, dtype=torch.bool, device="meta")),
            ValueError,
            "video_present must be on cpu like the other inputs",
        ),
        (
            inputs_for(audio=torch.zeros(2, 5120, device="meta")),
            ValueError,
            "audio must be on cpu like the other inputs",
        ),
        (inputs_for(text=torch.zeros(3, 4).long()), ValueError, "text must hold 2 rows like the clips, or come with"),
        (
            inputs_for(text=torch.zeros(3, 4).long(), clip_of_text=torch.tensor([0, 1, 2])),
            ValueError,
            "clip_of_text must hold rows of the 2 clips, was 0..2",
        ),
        (
            inputs_for(text=torch.zeros(3, 4).long(), clip_of_text=torch.tensor([0, 1])),
            ValueError,
            "clip_of_text must be [Q] like text = [3], was [2]",
        ),
        (inputs_for(clip_of_text=torch.tensor([0, 1])), ValueError, "clip_of_text must come with text"),
        (
            inputs_for(text=torch.zeros(2, 4).long(), labels=torch.full((2, 4), 300)),
            ValueError,
            "labels must hold token ids in [0, vocab_size = 259) or -100, was 300..300",
        ),
        (
            inputs_for(text=torch.zeros(2, 4).long(), labels=torch.full((2, 4), -1)),
            ValueError,
            "labels must hold token ids in [0, vocab_size = 259) or -100, was -1..-1",
        ),
        (inputs_for(latents=torch.zeros(2, 8, 64)), ValueError, "latents must come without video"),
        (dict(latents=torch.zeros(2, 7, 64)), ValueError, "latents must hold m = 4 tokens a chunk"),
    ],
)
def test_refusals_name_the_argument(arguments, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        mirasol.Model.from_preset("tiny").eval()(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts=[[257]], answers=[[[1]], [[2]]]), "answers must hold choices for each of 1 prompts, was 2"),
        (dict(prompts=[[257], []], answers=[[[1]], [[2]]]), "prompts[1] must not be empty"),
        (dict(prompts=[[257], [257]], answers=[[[1]], [[2], []]]), "answers[1][1] must hold at least one token"),
        (dict(prompts=[[257], [300]], answers=[[[1]], [[2]]]), "text must hold token ids in [0, vocab_size = 259)"),
        (dict(prompts=[[257]], answers=[[[1]]]), "prompts must hold 2 rows like the clips, was 1"),
    ],
)
def test_score_refuses(arguments, message):
    model = mirasol.Model.from_preset("tiny").eval()
    with pytest.raises(ValueError, match=re.escape(message)):
        model.score(torch.zeros(2, 8, 64), **arguments)


def test_prompts_out_of_the_vocabulary_are_refused():
    model = mirasol.Model.from_preset("tiny").eval()
    with pytest.raises(ValueError, match=re.escape("prompt must hold token ids in [0, vocab_size = 259), was 0..259")):
        model.generate(latents=torch.zeros(1, 8, 64), prompt=torch.tensor([[0, 259]]))


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: values read on the host, and tensors made of the host's values."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::is_nonzero", "aten::equal"):
            self.calls.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_device(monkeypatch):
    """The checks that look at values leave them alone, as they do on a device."""
    for module in (mirasol.batch, mirasol.generation.loop):
        monkeypatch.setattr(module, "may_look_at", lambda tensor: False)


@pytest.mark.usefixtures("as_on_a_device")
def test_a_training_step_waits_for_nothing():
    model = mirasol.Model.from_preset("tiny").train()
    config, text = model.config, torch.randint(0, 256, (2, 6))
    video = torch.zeros(2, 3, 2 * config.frames_per_chunk, 32, 32, dtype=torch.uint8)
    audio, present = torch.zeros(2, 2 * config.samples_per_chunk), torch.tensor([True, False])
    with Waits() as waits:
        output = model(video, audio, text, text, audio_present=present)
        output.loss.backward()
    assert waits.calls == []


@pytest.mark.usefixtures("as_on_a_device")
def test_decoding_waits_every_eighth_step():
    model = mirasol.Model.from_preset("tiny").eval()
    latents, prompt = torch.randn(2, 8, 64), torch.randint(0, 256, (2, 3))
    with Waits() as waits:
        text = model.generate(latents=latents, prompt=prompt, max_new_tokens=17)
    assert len(waits.calls) <= 3
    end = int(text[0, 5])
    with Waits() as waits:
        short = model.generate(latents=latents[:1], prompt=prompt[:1], max_new_tokens=17, eos_token_id=end)
    assert short.shape[1] == 3 + (text[0, 3:] == end).nonzero()[0, 0] + 1
