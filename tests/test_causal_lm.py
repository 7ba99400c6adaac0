"""A causal language model of transformers as the text decoder."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

import mirasol
from mirasol.causal_lm import CausalLMDecoder
from mirasol.generation import steps
from tolerance import assert_close

transformers = pytest.importorskip("transformers")
VOCABULARY = dict(vocab_size=300, bos_token_id=257, eos_token_id=258, pad_token_id=256)


def make_lm(kind: str = "Qwen3", **changes) -> torch.nn.Module:
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)
    if kind != "GPT2":
        sizes |= dict(intermediate_size=64, num_key_value_heads=2)
    if kind == "Qwen3":
        sizes |= dict(head_dim=16, tie_word_embeddings=True)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **VOCABULARY, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def make_model(kind: str = "Qwen3", opened: bool = True, cross_every: int = 2, **changes) -> mirasol.Model:
    """With gates that are open, as after some training."""
    torch.manual_seed(0)
    config = mirasol.Config.preset("tiny", cross_every=cross_every)
    model = mirasol.Model(config, text_decoder=make_lm(kind, **changes)).eval()
    if opened:
        for cross in model.text_decoder.cross:
            torch.nn.init.constant_(cross.gate, 0.7)
    return model


def make_latents(clips: int = 2, count: int = 8) -> torch.Tensor:
    return torch.randn(clips, count, 64, generator=torch.Generator().manual_seed(1))


def make_text(texts: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, (texts, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["Qwen3", "Llama", "GPT2", "OPT"])
@pytest.mark.parametrize("cross_every", [1, 2])
def test_at_first_it_says_what_the_language_model_says(kind, cross_every):
    model, text = make_model(kind, opened=False, cross_every=cross_every), make_text()
    alone = model.text_decoder.lm(input_ids=text).logits
    assert torch.equal(model.text_decoder(text, make_latents()), alone)
    assert torch.equal(model.text_decoder(text, None), alone)
    assert len(model.text_decoder.cross) == 3 // cross_every


@pytest.mark.parametrize("kind", ["Qwen3", "GPT2"])
def test_open_gates_let_the_latents_speak(kind):
    """Against the formula, between blocks that are called one by one."""
    model, text, latents = make_model(kind).double(), make_text(), make_latents().double()
    (cross,) = model.text_decoder.cross
    inputs = {}

    def keep(name):
        def hook(block, args, kwargs, output=None):
            inputs[name] = (args[0] if args else kwargs["hidden_states"]) if output is None else output

        return hook

    lm = model.text_decoder.lm
    blocks = lm.model.layers if kind == "Qwen3" else lm.transformer.h
    blocks[0].register_forward_hook(keep("after"), with_kwargs=True)
    blocks[1].register_forward_pre_hook(keep("before"), with_kwargs=True)
    logits = model.text_decoder(text, latents)
    x = inputs["after"]
    q = cross.attention.query(cross.norm(x)).unflatten(-1, (4, 8)).transpose(1, 2)
    k, v = cross.attention.key_value(latents).unflatten(-1, (2, 4, 8)).permute(2, 0, 3, 1, 4)
    attended = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert_close("x", inputs["before"], x + cross.gate.tanh() * cross.attention.out(attended))
    assert not torch.equal(logits, model.text_decoder(text, latents.flip(0)))


def test_gradients_reach_gates_and_latents_and_a_step_changes_the_answer():
    model, text, latents = make_model(opened=False).train(), make_text(), make_latents().requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    before = model.text_decoder(text, latents)
    model(latents=latents, text=text, labels=text).loss.backward()
    (cross,) = model.text_decoder.cross
    assert cross.gate.grad.abs() > 0
    assert latents.grad.abs().max() == 0, "a closed gate hides the latents"
    optimizer.step()
    assert not torch.equal(model.text_decoder(text, latents), before)
    optimizer.zero_grad()
    model(latents=latents, text=text, labels=text).loss.backward()
    assert latents.grad.abs().min() > 0
    assert cross.attention.key_value.weight.grad.abs().max() > 0


def test_a_frozen_language_model_leaves_the_rest_to_learn():
    model = make_model().train()
    model.text_decoder.lm.requires_grad_(False)
    samples = torch.randn(2, 2 * model.config.samples_per_chunk)
    model(audio=samples, text=make_text(), labels=make_text()).loss.backward()
    assert all(parameter.grad is None for parameter in model.text_decoder.lm.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in model.text_decoder.cross.parameters())
    assert (
        model.audio_video.get_parameter(next(name for name, _ in model.audio_video.named_parameters())).grad is not None
    )


@pytest.mark.parametrize("kind", ["Qwen3", "GPT2"])
def test_gradient_checkpointing_changes_nothing(kind):
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) if kind == "GPT2" else {}
    model, latents = make_model(kind, **no_dropout).train(), make_latents()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            lm = model.text_decoder.lm  # releases of transformers differ in the name
            getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)()
        seen = latents.clone().requires_grad_()
        model.zero_grad()
        # Two calls before the first backward: each must find its own latents again.
        first, second = (model(latents=x, text=make_text(), labels=make_text()).loss for x in (seen, seen.flip(1)))
        (first + 2 * second).backward()
        grads.append({name: p.grad for name, p in model.text_decoder.named_parameters()} | {"latents": seen.grad})
    for name, grad in grads[0].items():
        assert_close(name, grads[1][name], grad)


def test_a_half_precision_language_model_among_full_precision():
    model = mirasol.Model(mirasol.Config.preset("tiny"), text_decoder=make_lm().bfloat16()).train()
    lm, cross = model.text_decoder.lm, model.text_decoder.cross
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in cross.parameters()} == {torch.float32}
    text = make_text()
    assert torch.equal(model.text_decoder(text, make_latents()), lm(input_ids=text).logits)
    model(latents=make_latents(), text=text, labels=text).loss.backward()
    assert cross[0].gate.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        loss = make_model().train()(latents=make_latents(), text=text, labels=text).loss
    loss.backward()
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("kind", ["Qwen3", "Llama", "GPT2"])
def test_cached_steps_equal_the_whole_forward(kind):
    decoder, text, latents = make_model(kind).double().text_decoder, make_text(3, 9), make_latents().double()
    about = dict(clip_of_text=torch.tensor([1, 0, 1]), lengths=torch.tensor([8, 4]))
    whole = decoder(text, latents, **about)
    cache = decoder.new_cache(decoder.see(latents, about["lengths"]), 9, clip_of_text=about["clip_of_text"])
    pieces = [decoder(part, None, cache) for part in text.split([4, 1, 3, 1], dim=1)]
    assert cache.text.get_seq_length() == 9
    assert_close("logits", torch.cat(pieces, dim=1), whole)


@pytest.mark.parametrize("kind", ["Qwen3", "GPT2"])
def test_beams_share_what_is_seen_and_a_cache_begins_again(kind):
    model, text, latents = make_model(kind).double(), make_text(4, 6), make_latents().double()
    decoder, rows = model.text_decoder, torch.tensor([0, 0, 1, 1])
    seen = decoder.see(latents)
    cache = decoder.new_cache(seen, 6, 2)
    assert cache.cross.keys_values[0][0].data_ptr() == seen.keys_values[0][0].data_ptr()
    assert cache.cross.keys_values[0][0].shape == (2, 4, 8, 8)
    pieces = [decoder(part, None, cache) for part in text.split([4, 1, 1], dim=1)]
    assert_close("logits", torch.cat(pieces, dim=1), decoder(text, latents, clip_of_text=rows), rtol=1e-10)
    cache.reset(decoder.see(latents.flip(0)))
    assert_close("logits", decoder(text, None, cache), decoder(text, latents, clip_of_text=rows.flip(0)), rtol=1e-10)


def test_steps_are_what_greedy_generates_and_say_what_was_looked_at():
    model, latents, prompt = make_model().double(), make_latents().double(), make_text(2, 3)
    text = model.generate(prompt=prompt, latents=latents, max_new_tokens=5)
    found = list(steps(model.text_decoder, model.config, model.see(latents), prompt, max_new_tokens=5, attention=True))
    assert torch.equal(torch.stack([step.tokens for step in found], dim=1), text[:, 3:])
    for step in found:
        assert step.attention.shape == (2, 8)
        assert_close("sum", step.attention.sum(-1), torch.ones(2))


def test_texts_are_about_their_clips_and_padding_is_not_seen():
    decoder, text, latents = make_model().double().text_decoder, make_text(3), make_latents().double()
    clips, lengths = torch.tensor([1, 0, 1]), torch.tensor([3, 8])
    together = decoder(text, latents, lengths=lengths, clip_of_text=clips)
    for row, clip in enumerate(clips.tolist()):
        alone = decoder(text[row : row + 1], latents[clip : clip + 1, : lengths[clip]])
        assert_close("logits", together[row : row + 1], alone)
    latents[0, 3:] = 1e3
    assert_close("logits", decoder(text, latents, lengths=lengths, clip_of_text=clips), together)


@pytest.mark.parametrize(
    "options", [dict(), dict(num_beams=3), dict(do_sample=True, top_k=1)], ids=["", "beams", "drawn"]
)
def test_generates_for_ragged_prompts_what_each_gives_alone(options):
    model, latents = make_model().double(), make_latents(2).double()
    prompt, lengths, clips = make_text(3, 5), torch.tensor([2, 5, 3]), torch.tensor([1, 0, 1])
    together = model.generate(
        prompt=prompt, prompt_lengths=lengths, latents=latents, clip_of_text=clips, max_new_tokens=4, **options
    )
    for row, length in enumerate(lengths.tolist()):
        clip = latents[clips[row] : clips[row] + 1]
        alone = model.generate(
            prompt=prompt[row : row + 1, :length], latents=clip, max_new_tokens=9 - length, **options
        )
        shared = min(alone.shape[1], together.shape[1])
        assert torch.equal(together[row, :shared], alone[0, :shared])


def test_greedy_takes_the_likeliest_token_of_the_whole_forward():
    model, latents, prompt = make_model().double(), make_latents().double(), make_text(2, 3)
    text = model.generate(prompt=prompt, latents=latents, max_new_tokens=5, eos_token_id=299)
    for length in range(3, text.shape[1]):
        assert torch.equal(text[:, length], model.text_decoder(text[:, :length], latents)[:, -1].argmax(-1))


def test_beams_are_at_least_as_likely_as_greedy():
    model, latents = make_model().double(), make_latents().double()
    prompt = make_text(2, 3)
    options = dict(prompt=prompt, latents=latents, max_new_tokens=3, eos_token_id=299)
    scores = []
    for beams in (1, 8):
        new = model.generate(**options, num_beams=beams)[:, 3:]
        scores.append(model.score(latents, prompt.tolist(), [[row] for row in new.tolist()])[:, 0])
    assert (scores[1] >= scores[0] - 1e-6).all()


def test_saves_and_loads(tmp_path):
    model, text, latents = make_model(), make_text(), make_latents()
    model.save_pretrained(tmp_path, mirasol.ByteTokenizer())
    assert (tmp_path / "text_decoder" / "config.json").is_file()
    loaded = mirasol.Model.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    lm = loaded.text_decoder.lm
    assert lm.lm_head.weight is lm.model.embed_tokens.weight, "what was tied is tied"
    assert torch.equal(loaded.text_decoder(text, latents), model.text_decoder(text, latents))
    assert torch.equal(
        loaded.generate(latents=latents, max_new_tokens=3), model.generate(latents=latents, max_new_tokens=3)
    )
    given = make_lm()
    loaded = mirasol.Model.from_pretrained(tmp_path, text_decoder=given)
    assert loaded.text_decoder.lm is given
    assert torch.equal(loaded.text_decoder(text, latents), model.text_decoder(text, latents))
    half = mirasol.Model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    rates = half.text_decoder.lm.model.rotary_emb.inv_freq
    assert torch.equal(rates, model.text_decoder.lm.model.rotary_emb.inv_freq), "tables are never rounded"
    mirasol.Model.from_preset("tiny").save_pretrained(tmp_path)
    assert not (tmp_path / "text_decoder" / "config.json").exists()
    assert mirasol.Model.from_pretrained(tmp_path).config.vocab_size == 259


def test_names_are_those_of_the_language_model():
    lm = make_lm()
    names = {f"lm.{name}" for name, _ in lm.named_parameters()}
    decoder = make_model().text_decoder
    assert {name for name, _ in decoder.named_parameters() if name.startswith("lm.")} == names
    assert "cross.0.gate" in decoder.state_dict()


def test_a_copy_is_a_model_of_its_own():
    model, text, latents = make_model(), make_text(), make_latents()
    expected = model.text_decoder(text, latents)
    other = copy.deepcopy(model)
    for cross in model.text_decoder.cross:
        torch.nn.init.constant_(cross.gate, -5.0)
    assert torch.equal(other.text_decoder(text, latents), expected)


def test_initialising_again_keeps_the_language_model():
    model = make_model()
    before = {name: p.clone() for name, p in model.text_decoder.lm.named_parameters()}
    model.init_weights()
    assert all(torch.equal(p, before[name]) for name, p in model.text_decoder.lm.named_parameters())
    assert model.text_decoder.cross[0].gate == 0


def test_the_configuration_takes_on_the_language_models_vocabulary():
    config = make_model().config
    assert (config.vocab_size, config.pad_id, config.bos_id, config.eos_id) == (300, 256, 257, 258)
    assert (config.text_dim, config.text_layers, config.text_heads) == (32, 3, 4)
    config = make_model(bos_token_id=None, pad_token_id=None, eos_token_id=[7, 8]).config
    assert (config.pad_id, config.bos_id, config.eos_id) == (7, 7, 7)
    own = mirasol.Config.preset("tiny", vocab_size=300, eos_id=9)
    assert mirasol.Model(own, text_decoder=make_lm()).config.eos_id == 9


@pytest.mark.parametrize(
    ("lm", "changes", "error", "message"),
    [
        (dict(), dict(vocab_size=310), ValueError, "vocab_size must be 300 like the rows of text_decoder's embedding"),
        (dict(), dict(cross_every=4), ValueError, "cross_every must be at most the 3 blocks of text_decoder, was 4"),
        (dict(eos_token_id=None), dict(), ValueError, "eos_id must be set, for text_decoder.config names none"),
        (dict(eos_token_id=300), dict(), ValueError, "eos_id must be in [0, vocab_size = 300), was 300"),
        (None, dict(), TypeError, "text_decoder must be a causal language model of transformers, was Linear"),
    ],
)  # fmt: skip
def test_what_does_not_agree_is_refused(lm, changes, error, message):
    decoder = torch.nn.Linear(2, 2) if lm is None else make_lm(**lm)
    with pytest.raises(error, match=re.escape(message)):
        mirasol.Model(mirasol.Config.preset("tiny", **changes), text_decoder=decoder)


def test_a_language_model_that_keeps_keywords_to_itself_is_refused():
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **VOCABULARY)
    lm = transformers.AutoModelForCausalLM.from_config(config)
    model = mirasol.Model(mirasol.Config.preset("tiny"), text_decoder=lm)
    with pytest.raises(ValueError, match="text_decoder must hand keywords to its blocks, was BloomForCausalLM"):
        model.text_decoder(make_text(), make_latents())


def train_sharded(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = make_model().train()
    mesh = dist.init_device_mesh("cpu", (2,))
    kinds = model._no_split_modules
    for module in list(model.modules()):
        if type(module).__name__ in kinds:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert type(model.text_decoder.lm.model.layers[0]).__name__ == "FSDPQwen3DecoderLayer"
    model(latents=make_latents(), text=make_text(), labels=make_text()).loss.backward()
    grads = {name: p.grad.full_tensor() for name, p in model.text_decoder.named_parameters()}
    if rank == 0:
        torch.save(grads, f"{folder}/grads.pt")
    model.save_pretrained(f"{folder}/run")
    dist.destroy_process_group()


@pytest.mark.slow
def test_trains_and_saves_sharded(tmp_path):
    mp.spawn(train_sharded, (str(tmp_path),), nprocs=2)
    sharded, model = torch.load(tmp_path / "grads.pt"), make_model().train()
    model(latents=make_latents(), text=make_text(), labels=make_text()).loss.backward()
    for name, p in model.text_decoder.named_parameters():
        assert_close(name, sharded[name], p.grad)
    loaded = mirasol.Model.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_is_a_decoder_of_its_own():
    model = make_model()
    assert isinstance(model.text_decoder, CausalLMDecoder)
    counts = model.num_parameters()
    assert counts["text"] == sum(p.numel() for p in model.text_decoder.parameters())


@pytest.mark.parametrize("kind", ["Qwen3", "GPT2"])
def test_a_stream_answers_by_the_language_model(kind):
    """Window, sinks, several rows and attention, as with our own text decoder."""
    torch.manual_seed(0)
    config = mirasol.Config.preset("tiny", combiner="ttm", av_window=2, text_window=2, text_sinks=1, cross_every=1)
    model = mirasol.Model(config, text_decoder=make_lm(kind)).eval().double()
    for cross in model.text_decoder.cross:
        torch.nn.init.constant_(cross.gate, 0.7)
    c, chunks = model.config, 5
    video = torch.randint(0, 256, (2, 3, chunks * c.frames_per_chunk, 32, 32), dtype=torch.uint8)
    audio = 0.1 * torch.randn(2, chunks * c.samples_per_chunk).double()
    stream = model.stream(batch=2, tokenizer=mirasol.ByteTokenizer())
    for chunk in range(chunks):
        frames, samples = chunk * c.frames_per_chunk, chunk * c.samples_per_chunk
        stream.push(video[:, :, frames:][:, :, : c.frames_per_chunk], audio[:, samples:][:, : c.samples_per_chunk])
    latents, prompt = model.encode(video, audio), make_text()
    expected = model.generate(latents=latents, prompt=prompt, max_new_tokens=5)
    assert torch.equal(stream.generate(prompt, max_new_tokens=5), expected)
    answer = stream.answer("What?", row=1, attention=True, max_new_tokens=3)
    answer.read()
    assert sorted(answer.attention) == [0, 3, 4]
    assert sum(answer.attention.values()) == pytest.approx(1)
