"""Features on the disk: those of the encoders, found while nothing has changed, and missed as soon as something has."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import mirasol
from mirasol.data import Example, FeatureCache, Loader, Shards, cache_features, write_shards
from mirasol.tokenizer import ByteTokenizer
from tolerance import assert_close

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mirasol.Model.from_preset("tiny")


@pytest.fixture
def examples(media, tmp_path) -> list[Example]:
    """Of copies, which may be changed; two questions a clip."""
    names = ("0.mp4", "3.mp4", "silent.mp4", "sound.wav")
    for name in names:
        shutil.copy(media / name, tmp_path / name)
    return [Example(str(tmp_path / name), f"q{i}", "a") for i in range(2) for name in names]


def count(cache: FeatureCache) -> int:
    return len(list(cache.folder.glob("*/*.safetensors")))


def test_a_model_makes_the_same_of_features_as_of_the_clips(model, examples, tmp_path):
    cache = cache_features(model, examples, tmp_path / "cache", max_chunks=4, batch_clips=3, workers=2)
    assert count(cache) == 4
    options = dict(batch_clips=2, max_chunks=4, questions_per_clip=1)
    raw, cached = (Loader(examples, model.config, BYTES, source=source, **options) for source in (None, cache))
    model.eval()
    for a, b in zip(raw, cached, strict=True):
        assert a.examples == b.examples
        assert not {"video", "audio"} & b.inputs.keys()
        shared = ("chunks", "times", "video_present", "audio_present", "text", "labels", "clip_of_text")
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in shared)
        with torch.no_grad():
            assert_close("logits", model(**b.inputs).logits, model(**a.inputs).logits)
    assert cached.skipped == []


def test_training_on_features_neither_decodes_nor_encodes(model, examples, tmp_path, monkeypatch):
    cache = cache_features(model, examples, tmp_path / "cache", max_chunks=4)
    monkeypatch.setattr("mirasol.media.source.Source.__init__", lambda *_: pytest.fail("opened a media file"))
    monkeypatch.setattr(model.video_vit, "forward", lambda x: pytest.fail("encoded") if len(x) > 1 else x)
    batch = next(iter(Loader(examples[:2], model.config, BYTES, batch_clips=2, max_chunks=4, source=cache)))
    model.train()
    model(**batch.inputs).loss.backward()
    assert model.text_decoder.embedding.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_what_is_there_is_not_encoded_again(model, examples, tmp_path, monkeypatch):
    first = cache_features(model, examples[:2], tmp_path / "cache")
    times = {path: path.stat().st_mtime_ns for path in first.folder.glob("*/*")}
    seen = []
    features = model.features
    monkeypatch.setattr(model, "features", lambda **given: seen.append(len(given["video"])) or features(**given))
    second = cache_features(model, examples, tmp_path / "cache")
    assert seen == [2]
    assert count(second) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    cache_features(model, examples, tmp_path / "cache")
    assert seen == [2]


def test_a_change_of_file_span_limit_or_encoder_misses(model, examples, tmp_path):
    example = examples[0]
    cache = cache_features(model, [example], tmp_path / "cache", max_chunks=4)
    assert cache(example, model.config, 4).chunks == 3
    for other, limit in ((example, 3), (Example(example.clip, end=0.3), 4)):
        with pytest.raises(FileNotFoundError, match=r"no features of .*0\.mp4"):
            cache(other, model.config, limit)
    with pytest.raises(ValueError, match="config must have the encoders"):
        cache(example, mirasol.Config.preset("tiny", mel_mean=-5.0), 4)
    assert cache(example, mirasol.Config.preset("tiny", combiner="ttm", text_layers=3), 4).chunks == 3

    state = os.stat(example.clip)
    os.utime(example.clip, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    with pytest.raises(FileNotFoundError):
        cache(example, model.config, 4)
    os.utime(example.clip, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert cache.has(example, 4)

    same = mirasol.Model(model.config)
    same.load_state_dict(model.state_dict())
    torch.nn.init.normal_(same.text_decoder.embedding.weight)
    assert FeatureCache(tmp_path / "cache", same).has(example, 4)
    with torch.no_grad():
        next(same.audio_vit.parameters()).view(-1)[-1] += 1e-3
    assert not FeatureCache(tmp_path / "cache", same).has(example, 4)
    assert not FeatureCache(tmp_path / "cache", mirasol.Model(model.config).bfloat16()).has(example, 4)


def test_features_of_shards_are_found_wherever_the_shards_lie(model, examples, tmp_path):
    write_shards(examples, tmp_path / "shards")
    shards = Shards(tmp_path / "shards")
    cache_features(model, shards.examples, tmp_path / "cache", source=shards)
    shutil.copytree(tmp_path / "shards", tmp_path / "elsewhere")
    moved = Shards(tmp_path / "elsewhere")
    cache = FeatureCache(tmp_path / "cache", model, moved)
    assert all(cache.has(example, 16) for example in moved.examples)
    loader = Loader(moved.examples, model.config, BYTES, batch_clips=4, source=cache, workers=2)
    assert sum(len(batch.examples) for batch in loader) == len(examples)


def test_bfloat16_features_stay_so(model, examples, tmp_path):
    half = mirasol.Model(model.config)
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    cache = cache_features(half, examples[:2], tmp_path / "cache")
    assert cache(examples[0], model.config, 16).video_features.dtype == torch.bfloat16


def test_files_appear_whole_or_not_at_all(model, examples, tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path / "cache", model)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("mirasol.data.features.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cache_features(model, examples[:1], tmp_path / "cache")
    assert [path for path in cache.folder.rglob("*") if path.is_file()] == []
    assert not cache.has(examples[0], 16)


def test_broken_clips_and_damaged_features_are_left_out_and_named(model, examples, tmp_path):
    Path(examples[1].clip).write_bytes(b"x" * 1000)
    with pytest.raises(RuntimeError, match=r"1 of 4 clips .*3\.mp4"):
        cache_features(model, examples, tmp_path / "cache", batch_clips=1)
    cache = cache_features(model, examples, tmp_path / "cache", bad_share=1.0)
    assert count(cache) == 3
    path = cache.path(examples[0], 16)
    path.write_bytes(path.read_bytes()[:50])
    loader = Loader(examples, model.config, BYTES, batch_clips=2, source=cache, bad_share=0.5)
    assert sum(len(batch.examples) for batch in loader if not batch.repeated) == 4
    assert [Path(clip).name for clip, _ in loader.skipped] == ["0.mp4", "3.mp4"]
    assert "safetensors" in loader.skipped[0][1]
    assert "no features of" in loader.skipped[1][1]
