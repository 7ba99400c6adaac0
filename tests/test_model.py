"""The whole model: causality, determinism, missing modalities, learning, compile, checkpoints."""

import re

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate

import mirasol
from mirasol.config import Config
from mirasol.layers import Attention
from tolerance import SAME_SUMS, assert_close

COMBINERS = {
    "transformer": dict(combiner="transformer"),
    "transformer, this chunk": dict(combiner="transformer", combiner_window=1),
    "transformer, two chunks": dict(combiner="transformer", combiner_window=2),
    "ttm": dict(combiner="ttm"),
    "ttm, latent query": dict(combiner="ttm", ttm_summary="latent_query", ttm_initial_memory="normal"),
    "ttm, mean, zeros": dict(combiner="ttm", ttm_summary="mean", ttm_initial_memory="zeros"),
    "ttm, erase-add, mixer": dict(combiner="ttm", ttm_write="erase_add", ttm_process="mixer"),
    "ttm, mlp, no positions": dict(combiner="ttm", ttm_process="mlp", ttm_positions=False),
    "ttm, official": dict(combiner="ttm", ttm_official=True),
    "ttm, four groups": dict(combiner="ttm", ttm_groups=4, ttm_summary="latent_query", ttm_process="mixer"),
    "attention": dict(combiner="attention"),
    "attention, two chunks": dict(combiner="attention", combiner_window=2),
    "perceiver": dict(combiner="perceiver"),
    "mean": dict(combiner="mean"),
    "none": dict(combiner="none"),
}
combiners = pytest.mark.parametrize("changes", COMBINERS.values(), ids=COMBINERS.keys())


def clips(config: Config, batch: int = 2, chunks: int = 3) -> dict[str, torch.Tensor]:
    frames, size = chunks * config.frames_per_chunk, config.image_size
    return dict(
        video=torch.randint(0, 256, (batch, 3, frames, size, size), dtype=torch.uint8),
        audio=torch.randn(batch, chunks * config.samples_per_chunk) * 0.1,
    )


def question(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length))


@combiners
def test_a_later_chunk_never_changes_an_earlier_latent(changes):
    model = mirasol.Model.from_preset("tiny", **changes).eval()
    config, inputs = model.config, clips(Config.preset("tiny"))
    before = model.encode(**inputs).unflatten(1, (3, -1))
    last_frames, last_samples = 2 * config.frames_per_chunk, 2 * config.samples_per_chunk
    for name, start in (("video", last_frames), ("audio", last_samples)):
        changed = {key: value.clone() for key, value in inputs.items()}
        axis = 2 if name == "video" else 1
        tail = changed[name].narrow(axis, start, changed[name].shape[axis] - start)
        tail.copy_(tail.flip(axis) + 1)
        after = model.encode(**changed).unflatten(1, (3, -1))
        assert torch.equal(before[:, :2], after[:, :2]), name
        assert not torch.equal(before[:, 2], after[:, 2]), name


@combiners
def test_fewer_chunks_give_the_same_latents(changes):
    """The clip cut short gives what its beginning gave: no normalisation or position looks at the whole."""
    model = mirasol.Model.from_preset("tiny", **changes).eval().double()
    config, inputs = model.config, clips(model.config)
    whole = model.encode(inputs["video"], inputs["audio"].double()).unflatten(1, (3, -1))
    short = model.encode(
        inputs["video"][:, :, : 2 * config.frames_per_chunk],
        inputs["audio"][:, : 2 * config.samples_per_chunk].double(),
    )
    assert_close("latents", short.unflatten(1, (2, -1)), whole[:, :2], rtol=SAME_SUMS)


@combiners
def test_trains_through_every_parameter(changes):
    model = mirasol.Model.from_preset("tiny", **changes).train()
    text = question()
    output = model(**clips(model.config), text=text, labels=text)
    output.loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    # The missing tokens stand in for nothing here, and chance decides whether the mask token is used.
    still = {name for name, p in model.named_parameters() if not p.grad.any()}
    assert still <= {"video_embedding.missing", "audio_embedding.missing", "audio_video.mask"}


@pytest.mark.parametrize("changes", [dict(combiner="transformer"), dict(combiner="ttm")], ids=["transformer", "ttm"])
@pytest.mark.parametrize("missing", ["video", "audio"])
def test_trains_without_a_modality(changes, missing):
    model = mirasol.Model.from_preset("tiny", **changes).train()
    inputs = clips(model.config)
    del inputs[missing]
    text = question()
    output = model(**inputs, text=text, labels=text)
    assert getattr(output.losses, missing) == 0
    output.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert getattr(model, f"{missing}_embedding").missing.grad.any()


def test_attention_in_a_block_copies_nothing():
    """Heads are split and joined again as views, since attention follows the order of its queries."""

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.copies = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() in ("aten::clone", "aten::copy_", "aten::_to_copy"):
                self.copies.append(func.name())
            return func(*args, **(kwargs or {}))

    attention = Attention(32, 4)
    x = torch.randn(2, 24, 32)
    with Count() as count, torch.no_grad():
        attention(x, attention.keys_values(x), q_chunk=24)
    assert count.copies == []


def test_text_alone_trains():
    model = mirasol.Model.from_preset("tiny")
    text = question()
    output = model(text=text, labels=text)
    output.loss.backward()
    assert torch.isfinite(output.loss)


def test_absent_clips_of_a_batch_are_ignored():
    model = mirasol.Model.from_preset("tiny").eval()
    inputs = clips(model.config)
    present = torch.tensor([True, False])
    both = model.encode(**inputs, audio_present=present)
    alone = model.encode(inputs["video"], torch.rand_like(inputs["audio"]), audio_present=torch.tensor([False, False]))
    assert torch.equal(both[1], alone[1])
    assert not torch.equal(both[0], alone[0])


def test_two_evaluations_are_identical():
    model = mirasol.Model.from_preset("tiny", combiner="ttm").eval()
    inputs, text = clips(model.config), question()
    first, second = (model(**inputs, text=text, labels=text) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.loss, second.loss)


def test_losses_only_where_asked_for():
    model = mirasol.Model.from_preset("tiny").eval()
    inputs, text = clips(model.config), question()
    silent = model(**inputs, text=text)
    assert silent.loss is None
    assert silent.losses is None
    assert model(**inputs, text=text, labels=text).loss > 0
    assert model(**inputs).logits is None
    assert model.train()(**inputs).losses.text == 0


def test_total_loss_is_the_weighted_sum():
    weights = dict(latent_weight=2.0, video_weight=3.0, audio_weight=0.5, text_weight=10.0)
    model = mirasol.Model.from_preset("tiny", **weights).eval()
    text = question()
    output = model(**clips(model.config), text=text, labels=text)
    parts = output.losses
    expected = 2 * parts.latent + 3 * parts.video + 0.5 * parts.audio + 10 * parts.text
    assert_close("loss", output.loss, expected, rtol=SAME_SUMS)


def test_only_minus_100_does_not_count():
    model = mirasol.Model.from_preset("tiny").eval()
    inputs, text = clips(model.config), question(length=5)
    plain = model(**inputs, text=text, labels=text).losses.text
    padded = torch.nn.functional.pad(text, (0, 3), value=model.config.pad_id)
    ignored = padded.masked_fill(padded == model.config.pad_id, -100)
    assert_close("ignored", model(**inputs, text=padded, labels=ignored).losses.text, plain, rtol=SAME_SUMS)
    counted = model(**inputs, text=padded, labels=padded).losses.text
    assert not torch.isclose(counted, plain, rtol=1e-3)


def test_the_end_of_text_is_learned_where_pad_equals_eos():
    model = mirasol.Model.from_preset("tiny", pad_id=258, eos_id=258).train()
    text = torch.tensor([[257, 65, 258, 258]])
    output = model(text=text, labels=torch.tensor([[-100, -100, 258, -100]]))
    output.loss.backward()
    assert output.losses.text > 0
    assert model.text_decoder.logits.weight.grad[258].abs().sum() > 0


def test_masking_only_in_training():
    model = mirasol.Model.from_preset("tiny", mask_ratio=0.9).train()
    combined = torch.randn(2, 3, 4, 64)
    times = torch.arange(3.0).expand(2, -1)
    assert not torch.equal(model.audio_video(combined, times), model.audio_video(combined, times))
    model.eval()
    assert torch.equal(model.audio_video(combined, times), model.audio_video(combined, times))


def test_positions_count_chunks_however_short_these_are():
    """Time stamps of 1 ms would be lost beside those of 2 s."""
    latents = []
    for rate in (16000, 800):
        torch.manual_seed(0)
        model = mirasol.Model.from_preset("tiny", combiner="ttm", sample_rate=rate).double().eval()
        seconds = torch.arange(3.0, dtype=torch.float64)[None] * model.config.seconds_per_chunk
        generator = torch.Generator().manual_seed(0)
        features = [
            torch.randn(1, 3, count, 64, generator=generator, dtype=torch.float64)
            for count in (model.config.video_tokens, model.config.audio_tokens)
        ]
        latents.append(model.encode(video_features=features[0], audio_features=features[1], times=seconds))
    torch.testing.assert_close(latents[0], latents[1])


@pytest.mark.parametrize("target", ["pixels", "features"])
def test_reconstruction_targets_are_the_next_chunk(target):
    """Only chunk 0 is used to predict when there are two chunks, and only chunk 1 is a target."""
    model = mirasol.Model.from_preset("tiny", reconstruction_target=target).eval()
    inputs, text = clips(model.config, chunks=2), question()
    seen = {}
    model.reconstruct_video.register_forward_hook(lambda module, args, out: seen.update(prediction=out))
    before = model(**inputs, text=text, labels=text).losses.video
    changed = inputs["video"].clone()
    changed[:, :, model.config.frames_per_chunk :] = 255 - changed[:, :, model.config.frames_per_chunk :]
    first = seen["prediction"]
    after = model(changed, inputs["audio"], text=text, labels=text).losses.video
    assert torch.equal(first[:, 0], seen["prediction"][:, 0])
    assert before != after


def test_precomputed_features_replace_the_encoders():
    model = mirasol.Model.from_preset("tiny").eval()
    inputs = clips(model.config)
    seen = {}
    model.enter_combiner.register_forward_hook(lambda module, args, out: seen.setdefault(args[0].shape[2], args[0]))
    expected = model.encode(**inputs)
    video, audio = seen[model.config.video_tokens], seen[model.config.audio_tokens]
    assert torch.equal(model.encode(video_features=video, audio_features=audio), expected)


def test_shared_encoders_hold_one_vit():
    separate, shared = (mirasol.Model.from_preset("tiny", share_encoders=share) for share in (False, True))
    difference = separate.num_parameters()["total"] - shared.num_parameters()["total"]
    assert difference == sum(p.numel() for p in shared.video_vit.parameters())
    shared(**clips(shared.config)).loss.backward()


def test_more_frames_need_no_new_parameter():
    model = mirasol.Model.from_preset("tiny", combiner="ttm").eval()
    keys = set(model.state_dict())
    for chunks in (1, 4, 16):
        latents = model.encode(**clips(model.config, batch=1, chunks=chunks))
        assert latents.shape == (1, chunks * model.config.combined_tokens, model.config.av_dim)
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("combiner", ["transformer", "ttm"])
@pytest.mark.slow
def test_compiles_whole(combiner):
    one_layer = {f"{part}_layers": 1 for part in ("encoder", "combiner", "av", "text")}
    model = mirasol.Model.from_preset("tiny", combiner=combiner, **one_layer).eval()
    inputs, text = clips(model.config), question()
    expected = model(**inputs, text=text)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, text=text)
    assert_close("logits", compiled.logits, expected.logits)
    assert_close("latents", compiled.latents, expected.latents)


def test_activation_checkpointing_changes_nothing():
    model = mirasol.Model.from_preset("tiny", combiner="ttm", mask_ratio=0.0).train()
    inputs, text = clips(model.config), question()
    model(**inputs, text=text, labels=text).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    kinds = model._no_split_modules
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ in kinds)
    model(**inputs, text=text, labels=text).loss.backward()
    for name, p in model.named_parameters():
        assert_close(name, p.grad, expected[name.replace("_checkpoint_wrapped_module.", "")], rtol=SAME_SUMS)


def test_bfloat16_autocast_trains():
    model = mirasol.Model.from_preset("tiny", combiner="ttm").train()
    text = question()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**clips(model.config), text=text, labels=text).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("changes", [dict(), dict(combiner="ttm", share_encoders=True)], ids=["default", "ttm, shared"])
def test_saves_and_loads(tmp_path, changes):
    model = mirasol.Model.from_preset("tiny", **changes).eval()
    model.save_pretrained(tmp_path)
    loaded = mirasol.Model.from_pretrained(tmp_path)
    inputs = clips(model.config)
    assert loaded.config == model.config
    assert torch.equal(loaded.encode(**inputs), model.encode(**inputs))
    assert not loaded.training
    half = mirasol.Model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_loading_refuses_what_does_not_fit(tmp_path):
    model = mirasol.Model.from_preset("tiny")
    model.save_pretrained(tmp_path)
    Config.preset("tiny", text_layers=3).save(tmp_path / "config.json")
    with pytest.raises(ValueError, match=re.escape("missing text_decoder.blocks.2.")):
        mirasol.Model.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape("config.json")):
        mirasol.Model.from_pretrained(tmp_path)


def test_initialises_on_meta():
    with torch.device("meta"):
        model = mirasol.Model.from_preset("tiny", combiner="ttm")
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, float("nan"))
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model.eval().encode(**clips(model.config))).all()


def test_batches_collate():
    config = Config.preset("tiny")
    rows = [{key: value[0] for key, value in clips(config, batch=1).items()} for _ in range(3)]
    assert mirasol.Model(config).eval().encode(**default_collate(rows)).shape[0] == 3


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (dict(), ValueError, "video, audio or text must be given"),
        (dict(video=torch.zeros(1, 3, 5, 32, 32)), ValueError, "video must hold a multiple of frames_per_chunk = 4"),
        (dict(video=torch.zeros(1, 4, 4, 32, 32)), ValueError, "video must be [B, 3, frames, H, W] with 3 colours"),
        (dict(video=torch.zeros(3, 4, 32, 32)), ValueError, "video must be [B, 3, frames, H, W], was [3, 4, 32, 32]"),
        (dict(video=torch.zeros(1, 3, 4, 32, 32).int()), TypeError, "video must be of dtype uint8"),
        (dict(video=[1]), TypeError, "video must be a torch.Tensor, was list"),
        (dict(audio=torch.zeros(1, 2561)), ValueError, "audio must hold a multiple of samples_per_chunk = 2560"),
        (dict(audio=torch.zeros(1, 2560).long()), TypeError, "audio must be of dtype"),
        (
            dict(video=torch.zeros(1, 3, 8, 32, 32), audio=torch.zeros(1, 2560)),
            ValueError,
            "audio must hold 1 clips of 2 chunks like video, was 1 clips of 1 chunks",
        ),
        (
            dict(audio=torch.zeros(2, 2560), audio_present=torch.ones(3, dtype=torch.bool)),
            ValueError,
            "audio_present must be [B] or [B, T] = [2], was [3] bool on cpu",
        ),
        (
            dict(audio=torch.zeros(1, 2560), video_present=torch.ones(1, dtype=torch.bool)),
            ValueError,
            "video_present must be False without video",
        ),
        (dict(text=torch.full((1, 3), 259)), ValueError, "text must hold token ids in [0, vocab_size = 259), was 259"),
        (dict(text=[1, 2]), TypeError, "text must be a torch.Tensor, was list"),
        (
            dict(audio=torch.zeros(1, 2560), text=torch.zeros(2, 3).long()),
            ValueError,
            "text must hold 1 rows like the clips, or come with clip_of_text, was [2, 3]",
        ),
        (dict(text=torch.zeros(1, 3)), TypeError, "text must be of dtype int64"),
        (
            dict(text=torch.zeros(1, 3).long(), labels=torch.zeros(1, 4).long()),
            ValueError,
            "labels must be [Q, L] like text = [1, 3], was [1, 4]",
        ),
        (
            dict(audio=torch.zeros(1, 2560), labels=torch.zeros(1, 4).long()),
            ValueError,
            "labels must come with text",
        ),
        (
            dict(audio=torch.zeros(1, 2560), text=torch.zeros(1, 4, device="meta").long()),
            ValueError,
            "text must be on cpu like the other inputs, was [1, 4] int64 on meta",
        ),
        (
            dict(video_features=torch.zeros(1, 2, 20, 63)),
            ValueError,
            "video_features must be [B, T, n_v, encoder_dim] = [1, 2, 20, 64]",
        ),
    ],
)
def test_refusals_name_the_argument(arguments, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        mirasol.Model.from_preset("tiny").eval()(**arguments)


@pytest.mark.parametrize("chunks", [None, [5, 2], [3, 4]])
def test_texts_look_at_the_last_chunks_and_the_first(chunks):
    """Chunk by chunk: what lies within reach, and nothing else, changes the text."""
    model = mirasol.Model.from_preset("tiny", text_window=2, text_sinks=1).eval().double()
    m, lengths = model.config.latents_per_chunk, [5, 5] if chunks is None else chunks
    latents, text = torch.randn(2, 5 * m, model.config.av_dim).double(), question()
    given = None if chunks is None else torch.tensor(chunks)
    before = model(latents=latents, text=text, chunks=given).logits
    for chunk in range(5):
        changed = latents.clone()
        changed[:, chunk * m : (chunk + 1) * m] += 1
        after = model(latents=changed, text=text, chunks=given).logits
        for clip, length in enumerate(lengths):
            seen = chunk < length and (chunk < 1 or chunk >= length - 2)
            assert torch.equal(before[clip], after[clip]) != seen, (clip, chunk)


def test_answers_and_scores_look_no_further_back_than_the_text():
    model = mirasol.Model.from_preset("tiny", text_window=1).eval()
    m = model.config.latents_per_chunk
    latents = torch.randn(1, 3 * m, model.config.av_dim)
    assert torch.equal(model.score(latents, [[257]], [[[1, 2]]]), model.score(latents[:, -m:], [[257]], [[[1, 2]]]))
    assert torch.equal(model.generate(latents=latents), model.generate(latents=latents[:, -m:]))


@pytest.mark.parametrize("missing", ["video", "audio"])
def test_what_a_chunk_lacks_is_ignored(missing):
    """In the middle of a clip: its content does not count, and the chunk is as one of a clip that has none."""
    model = mirasol.Model.from_preset("tiny", combiner="mean").eval().double()
    inputs = clips(model.config)
    inputs["audio"] = inputs["audio"].double()
    present = torch.tensor([[True, False, True], [True, True, True]])
    garbage = {name: value.clone() for name, value in inputs.items()}
    garbage["audio"] = garbage["audio"].unflatten(1, (3, -1))
    garbage["video"] = garbage["video"].unflatten(2, (3, -1))
    garbage["audio" if missing == "audio" else "video"].select(2 if missing == "video" else 1, 1)[0].fill_(77)
    garbage["audio"], garbage["video"] = garbage["audio"].flatten(1), garbage["video"].flatten(2, 3)
    known = model.encode(**inputs, **{f"{missing}_present": present}).unflatten(1, (3, -1))
    assert torch.equal(model.encode(**garbage, **{f"{missing}_present": present}).unflatten(1, (3, -1)), known)
    alone = {name: value for name, value in inputs.items() if name != missing}
    seen, heard = model.features(**alone)
    features = torch.cat([model.features(**inputs)[missing == "audio"]])
    features[0, 1] = (seen, heard)[missing == "audio"][0, 1]
    expected = model.encode(**alone, **{f"{missing}_features": features}).unflatten(1, (3, -1))
    assert_close("latents", known[:, :2], expected[:, :2], rtol=SAME_SUMS)
