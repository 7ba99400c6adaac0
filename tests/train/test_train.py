"""The loop: what learns and how fast, batches in parts and in processes, what is logged, what stops a run."""

import json
import math
import shutil
import warnings

import pytest
import runs
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mirasol
from mirasol.model import Model
from mirasol.training.build import build
from mirasol.training.logs import peak_flops
from mirasol.training.optim import freeze, parameter_groups, schedule
from mirasol.training.options import TrainOptions

# What may not know of parts and processes: no masks, and no latent loss, which is centred over a part's clips
PLAIN = dict(mask_ratio=0.0, latent_weight=0.0)


def test_the_documented_lines_train_and_load(tmp_path, monkeypatch):
    import inspect

    import mirasol.train

    text = inspect.getdoc(mirasol.train)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert len(lines) <= 12
    monkeypatch.chdir(tmp_path)
    runs.write_table(tmp_path)
    runs.run(runs.options("questions.csv", "pretrained", steps=1))
    monkeypatch.setattr("mirasol.data.loader.load_clip", runs.made_clip)
    code = "\n".join(lines).replace("steps=1000", "steps=2, workers=0")
    names: dict = {}
    exec(code, names)
    assert names["model"].config.text_weight == 10.0
    assert not names["model"].training
    before, after = runs.weights(tmp_path / "pretrained"), runs.weights(tmp_path / "run")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert "video_vit" not in changed
    assert {"audio_vit", "combiner", "text_decoder"} <= changed
    assert mirasol.load_tokenizer(tmp_path / "run") == mirasol.ByteTokenizer()


def test_parts_learn_at_their_own_rates_and_frozen_ones_not(tmp_path):
    model = Model(mirasol.Config.preset("tiny", **runs.CONFIG))
    freeze(model, ["video_vit", "audio_embedding"])
    rates = {"text_decoder": 1e-5, "text_decoder.blocks.0": 1e-6, "modality": 0.5}
    groups = parameter_groups(model, 1e-3, rates, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    told = {names[id(p)]: (group["peak_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert told["text_decoder.blocks.0.mlp.enter.weight"] == (1e-6, 0.1)
    assert told["text_decoder.blocks.0.mlp.enter.bias"] == (1e-6, 0.0)
    assert told["text_decoder.embedding.weight"] == (1e-5, 0.1)
    assert told["audio_vit.norm.weight"] == (1e-3, 0.0)
    assert told["modality"] == (0.5, 0.1)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(told) == learning
    assert not any(name.startswith(("video_vit.", "audio_embedding.")) for name in learning)
    assert sum(len(group["params"]) for group in groups) == len(learning)


@pytest.mark.parametrize("option", ["freeze", "lr_of"])
def test_a_part_that_the_model_lacks_is_named(option):
    model = Model(mirasol.Config.preset("tiny", **runs.CONFIG))
    with pytest.raises(ValueError, match=rf"{option} must name parts of the model \(modality, video.*, was 'video'"):
        freeze(model, ["video"]) if option == "freeze" else parameter_groups(model, 1e-3, {"video": 1e-5}, 0.0)
    with pytest.raises(ValueError, match="freeze must leave a part that learns"):
        freeze(model, {name.split(".")[0] for name, _ in model.named_parameters()})


def test_the_rate_rises_then_falls_to_almost_nothing():
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3
    assert all(0 < schedule(step, 1, 1.0) <= 1 for step in range(1))
    assert all(0 < schedule(step, 3, 0.0) <= 1 for step in range(3))


@pytest.mark.parametrize("way", ["parts", "activation_checkpointing"])
def test_a_batch_in_parts_is_the_same_step(tmp_path, way):
    """Clips of 1 to 3 chunks, some without sound, answers of different lengths: means of means would differ."""
    table = runs.write_table(tmp_path)
    changes = dict(accumulate=4) if way == "parts" else {way: True}
    for name, told in (("whole", {}), ("other", changes)):
        runs.run(runs.options(table, tmp_path / name, steps=3, config=PLAIN, lr=1e-3, **told))
    assert_same_run(tmp_path / "whole", tmp_path / "other")


def assert_same_run(one, other):
    for a, b in zip(runs.log(one), runs.log(other), strict=True):
        for name in ("loss", "video", "audio", "text", "grad_norm", "lr"):
            assert math.isclose(a[name], b[name], rel_tol=2e-5), (name, a, b)
    first, second = runs.weights(one), runs.weights(other)
    for name, value in first.items():
        same = torch.isclose(second[name], value, rtol=1e-5, atol=1e-5)
        if name.endswith("key_value.bias"):
            same = same[
                len(same) // 2 :
            ]  # keys' biases change no output: their gradient is rounding, made big by AdamW
        assert same.all(), (name, (second[name] - value).abs().max())


def in_two_processes(rank: int, folder: str, told: TrainOptions) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    runs.run(told)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_the_same_run_and_one_goes_on_with_it(tmp_path):
    table = runs.write_table(tmp_path)
    settings = dict(config=PLAIN, lr=1e-3, save_every=2, steps=5)
    runs.run(runs.options(table, tmp_path / "one", **settings))
    told = runs.options(table, tmp_path / "two", **settings)
    mp.spawn(in_two_processes, (str(tmp_path), told), nprocs=2)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000005")
    runs.run(told)  # from step 4, which two processes wrote
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_what_is_logged(tmp_path):
    table = runs.write_table(tmp_path)
    told = runs.options(table, tmp_path / "run", steps=4, lr=2e-3, lr_of={"text_decoder": 1e-3}, warmup=0.5)
    runs.run(told)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[name] for name in ("latent", "video", "audio", "text")))
        assert line["share_of_peak"] is None  # of a CPU nobody knows it
        assert line["clips_per_s"] > 0
        assert line["tokens_per_s"] > line["clips_per_s"]
        assert 0 <= line["waiting"] <= 1
        assert line["grad_norm"] > 0
        assert 0 <= line["latent_constant"] <= 2
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 2e-3, 2e-3, 1e-3])
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    for name in ("loss", "text", "grad_norm", "clips_per_s", "lr"):
        logged = board.Scalars(name)
        assert [event.step for event in logged] == [1, 2, 3, 4]
        assert [event.value for event in logged] == pytest.approx([line[name] for line in lines], rel=1e-5)


def test_the_share_of_a_peak_that_is_known(tmp_path, monkeypatch):
    """3 x the FLOPs that PyTorch counts in a forward pass with its losses, over time and peak."""
    monkeypatch.setattr("mirasol.train.peak_flops", lambda device: 1e9)
    told = runs.options(runs.write_table(tmp_path, clips=1), tmp_path / "run", batch=1, steps=3)
    runs.run(told)
    model, _ = build(told)
    clip = runs.made_clip(mirasol.data.Example("0.mp4"), model.config, 16)
    assert clip.video is not None
    assert clip.audio is not None
    text = torch.randint(0, 256, (2, 2 + len("Which?\n") + 1))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model.train()(clip.video[None], clip.audio[None], text, text, clip_of_text=torch.tensor([0, 0]))
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        figures = json.loads(line)
        flops = figures["share_of_peak"] * 1e9 / figures["clips_per_s"]
        assert flops == pytest.approx(3 * counter.get_total_flops(), rel=1e-6)


def test_peaks_are_known_by_the_name_of_the_device(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "Other": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak


def test_a_loss_that_is_not_finite_stops_the_run_before_it_harms(tmp_path, monkeypatch):
    told = runs.options(runs.write_table(tmp_path), tmp_path / "run", steps=6, save_every=1)

    def broken(example, config, max_chunks):
        clip = made_clip(example, config, max_chunks)
        if broken.calls > 8 and clip.audio is not None:
            clip.audio[0] = math.nan
        broken.calls += 1
        return clip

    made_clip, broken.calls = runs.made_clip, 0
    with monkeypatch.context() as patch:
        patch.setattr(runs, "made_clip", broken)
        with pytest.raises(
            FloatingPointError, match=r"must be finite, were not in step 3: loss = nan, .*text = nan, .*grad_norm = nan"
        ):
            runs.run(told)
    lines = runs.log(tmp_path / "run")
    assert len(lines) == 2  # nothing is logged or saved of a step that went wrong
    newest = max(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert newest == "step-00000002"
    runs.run(told)
    assert len(runs.log(tmp_path / "run")) == 6


def test_options_are_checked_by_name(tmp_path):
    for changes, message in (
        (dict(batch=0), "batch must be at least 1, was 0"),
        (dict(steps=0), "steps must be at least 1"),
        (dict(lr=0.0), "lr must be greater than 0"),
        (dict(lr_of={"text_decoder": -1.0}), r"lr_of\['text_decoder'\] must be greater than 0"),
        (dict(warmup=2.0), r"warmup must be a share in \[0, 1\], was 2.0"),
        (dict(init="x"), "preset must be left out with init"),
        (dict(tokenizer="x", text_decoder="y"), "tokenizer must be left out with text_decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            runs.options("questions.csv", tmp_path, **changes)
    table = runs.write_table(tmp_path)
    for changes, message in (
        (dict(batch=2, accumulate=3), "batch must be a multiple of 1 processes, and at least 3 for all parts, was 2"),
        (dict(device="tpu"), "device must be cpu or cuda, was 'tpu'"),
        (dict(config=dict(combinr="ttm")), "unknown fields: combinr"),
        (dict(preset="huge"), "preset must be one of tiny, small, base, mirasol-3b, was 'huge'"),
        (dict(image_vit="none.pt"), "image_vit must be a file of weights, was 'none.pt'"),
        (dict(tokenizer="nowhere"), "'nowhere'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            runs.run(runs.options(table, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_the_encoders_start_from_an_image_vit(tmp_path):
    d, patch = 16, 8
    weights = {"patch_embed.proj.weight": torch.randn(d, 3, patch, patch), "patch_embed.proj.bias": torch.randn(d)}
    for name, shape in (
        ("blocks.0.norm1", (d,)), ("blocks.0.attn.qkv", (3 * d, d)), ("blocks.0.attn.proj", (d, d)),
        ("blocks.0.norm2", (d,)), ("blocks.0.mlp.fc1", (4 * d, d)), ("blocks.0.mlp.fc2", (d, 4 * d)), ("norm", (d,)),
    ):  # fmt: skip
        weights |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    torch.save(weights, tmp_path / "vit.pt")
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "vit.safetensors")
    for file in ("vit.pt", "vit.safetensors"):
        model, _ = build(runs.options("questions.csv", tmp_path, image_vit=str(tmp_path / file)))
        for vit in (model.video_vit, model.audio_vit):
            assert torch.equal(vit.blocks[0].mlp.enter.weight, weights["blocks.0.mlp.fc1.weight"])
            assert torch.equal(vit.norm.bias, weights["norm.bias"])


def test_the_model_follows_the_tokenizer(tmp_path):
    mirasol.ByteTokenizer().save_pretrained(tmp_path)
    model, tokenizer = build(runs.options("questions.csv", tmp_path, tokenizer=str(tmp_path)))
    assert tokenizer == mirasol.ByteTokenizer()
    config = model.config
    assert (config.vocab_size, config.pad_id, config.bos_id, config.eos_id) == (259, 256, 257, 258)
    assert config.text_weight == 1.0
    with pytest.raises(ValueError, match="vocab_size must be at least 259"):
        build(runs.options("questions.csv", tmp_path, config=dict(vocab_size=258, pad_id=0, bos_id=0, eos_id=0)))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_language_model_becomes_the_text_decoder_and_goes_on(tmp_path, bf16):
    """Its weights are tied, its tokenizer has an id more than bytes, and it stays in float32."""
    transformers = pytest.importorskip("transformers")
    import tokenizers

    vocabulary = {chr(i): i for i in range(32, 127)} | {"</s>": 0, "\n": 1}
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
    config = transformers.GPT2Config(
        vocab_size=128, n_positions=64, n_embd=16, n_layer=2, n_head=2, eos_token_id=0, bos_token_id=0
    )
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")

    told = dict(text_decoder=str(tmp_path / "lm"), bf16=bf16, steps=3, save_every=2)
    table = runs.write_table(tmp_path)
    runs.run(runs.options(table, tmp_path / "run", **told, freeze=("text_decoder.lm",)))
    unbroken = runs.weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    runs.run(runs.options(table, tmp_path / "run", **told, freeze=("text_decoder.lm",)))
    model = mirasol.Model.from_pretrained(tmp_path / "run")
    assert (model.config.vocab_size, model.config.eos_id, model.config.pad_id) == (128, 0, 0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, unbroken[name]), name
        assert not value.is_floating_point() or value.dtype == torch.float32
    start = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float32).state_dict()
    for name, value in model.text_decoder.lm.state_dict().items():
        assert torch.equal(value, start[name]), name
    assert mirasol.load_tokenizer(tmp_path / "run").encode("so") == tokenizer.encode("so")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_compiled_blocks_take_the_same_step(tmp_path, monkeypatch):
    table, compiled, compile_ = runs.write_table(tmp_path), [], torch.nn.Module.compile

    def without_code(module):  # what Inductor makes of a block takes minutes
        compiled.append(type(module).__name__)
        compile_(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_code)
    for name, told in (("plain", {}), ("compiled", dict(compile=True))):
        runs.run(runs.options(table, tmp_path / name, steps=1, config=PLAIN, lr=1e-3, **told))
    assert set(compiled) == {"Block", "DecoderBlock"}
    assert_same_run(tmp_path / "plain", tmp_path / "compiled")
