"""Shards: standard tar archives of whole clips, each once, from which a clip gives the same tensors as its file."""

import gc
import json
import os
import re
import shutil
import subprocess
import tarfile
import warnings
from pathlib import Path

import pytest
import torch

from mirasol.config import Config
from mirasol.data import Example, Loader, Shards, load_clip, write_shards
from mirasol.tokenizer import ByteTokenizer

CONFIG, BYTES = Config.preset("tiny"), ByteTokenizer()
NAMES = ("0.mp4", "long.mp4", "sound.wav", "still.png")


def table(media: Path) -> list[Example]:
    rows = [Example(str(media / name), f"what {i}?", "a|b", start=0.0, end=0.3 + i) for i in range(2) for name in NAMES]
    return [*rows, Example(str(media / "1.mp4"), "wo?", "天", 0.1, None, "loc", ("天", "b"), ("c",), "id.7")]


@pytest.fixture
def shards(media, tmp_path) -> Shards:
    # 0.mp4, sound.wav and still.png have less than 60 kB each, long.mp4 has more
    assert write_shards(table(media), tmp_path / "out", shard_bytes=60_000) == []
    return Shards(tmp_path / "out")


def test_the_table_comes_back_with_keys_for_clips(media, shards):
    keyed = sorted((vars(e) for e in shards.examples), key=str)
    original = sorted(({**vars(e), "clip": Path(e.clip).stem} for e in table(media)), key=str)
    assert keyed == original
    assert sorted(shards.entries) == sorted(["0", "long", "sound", "still", "1"])


def test_the_archives_are_what_webdataset_and_tar_read(media, shards):
    archives = sorted(shards.folder.glob("*.tar"))
    assert len(archives) > 1
    assert [path.name for path in archives] == [f"shard-{i:06d}.tar" for i in range(len(archives))]
    found = {}
    for path in archives:
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for clip, asked in zip(members[::2], members[1::2], strict=True):
                assert clip.name.split(".")[0] == asked.name.removesuffix(".json")
                found[clip.name] = tar.extractfile(clip).read()
                assert all(question["question"] for question in json.load(tar.extractfile(asked)))
        listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True).stdout.split()
        assert listed == [member.name for member in members]
    assert found == {name: (media / name).read_bytes() for name in (*NAMES, "1.mp4")}


def test_webdataset_groups_a_clip_with_its_questions(media, shards):
    import webdataset

    urls = [str(path) for path in sorted(shards.folder.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the archives to the garbage collector
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    assert [sample["__key__"] for sample in samples] == list(shards.entries)
    for sample in samples:
        entry = shards.entries[sample["__key__"]]
        name = sample["__key__"] + entry.suffix
        assert sample[entry.suffix[1:]] == (media / name).read_bytes()
        assert len(json.loads(sample["json"])) == sum(e.clip == entry.key for e in shards.examples)


def test_a_clip_of_a_shard_is_the_clip_of_its_file(media, shards):
    files = {Path(e.clip).stem: e.clip for e in table(media)}
    for example in shards.examples:
        a = shards(example, CONFIG, 3)
        b = load_clip(Example(files[example.clip], start=example.start, end=example.end), CONFIG, 3)
        assert (a.chunks, a.video_present, a.audio_present) == (b.chunks, b.video_present, b.audio_present)
        for name in ("video", "audio", "times"):
            one, other = getattr(a, name), getattr(b, name)
            assert one is other is None or torch.equal(one, other)


def test_a_loader_reads_shards_as_it_reads_files(media, shards):
    files = {Path(e.clip).stem: e.clip for e in table(media)}
    examples = [Example(**{**vars(e), "clip": files[e.clip]}) for e in shards.examples]
    options = dict(batch_clips=4, max_chunks=3, shuffle=True)
    packed = Loader(shards.examples, CONFIG, BYTES, source=shards, workers=2, **options)
    for a, b in zip(packed, Loader(examples, CONFIG, BYTES, **options), strict=True):
        assert a.inputs.keys() == b.inputs.keys()
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
    assert packed.skipped == []


def test_the_bytes_of_a_clip_are_a_file(media, shards):
    content = (media / "long.mp4").read_bytes()
    with shards.open("long") as file:
        assert file.read() == content
        assert file.read(1) == b""
        assert file.seek(-10, os.SEEK_END) == len(content) - 10
        assert file.read(100) == content[-10:]
        assert file.seek(100) == 100
        assert file.read(3) == content[100:103]
        assert file.tell() == 103
        assert file.seek(5, os.SEEK_CUR) == 108
        assert file.read(1) == content[108:109]
    assert file.closed


def test_names_that_are_the_same_or_hold_dots_get_keys_of_their_own(media, tmp_path):
    clips = [
        tmp_path / "a" / "x.1.mp4",
        tmp_path / "b" / "x.1.MP4",
        tmp_path / "b" / "ä ö",
        tmp_path / "b" / "x_1-2.mp4",
    ]
    for clip in clips:
        clip.parent.mkdir(exist_ok=True)
        shutil.copy(media / "0.mp4", clip)
    write_shards([Example(str(clip), answer="y") for clip in clips], tmp_path / "out")
    shards = Shards(tmp_path / "out")
    assert [(e.key, e.suffix) for e in shards.entries.values()] == [
        ("x_1", ".mp4"), ("x_1-2", ".mp4"), ("ä_ö", ".media"), ("x_1-2-2", ".mp4"),
    ]  # fmt: skip
    assert all(shards(example, CONFIG, 3).chunks == 3 for example in shards.examples)
    assert len({shards.fingerprint(key) for key in shards.entries}) == 1


def test_missing_clips_are_left_out_up_to_a_share_and_named(media, tmp_path, caplog):
    gone = Example(str(tmp_path / "gone.mp4"), answer="y")
    rows = [*table(media), gone]
    with pytest.raises(ValueError, match=r"1 of 6 were: .*gone\.mp4"):
        write_shards(rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert write_shards(rows, tmp_path / "out", bad_share=0.2) == [(gone.clip, "no such file")]
    assert "gone.mp4 is left out" in caplog.text
    assert len(Shards(tmp_path / "out").entries) == 5


def test_what_is_there_is_not_written_over(media, shards):
    before = {path.name: path.read_bytes() for path in shards.folder.iterdir()}
    with pytest.raises(FileExistsError, match="out must hold no shards"):
        write_shards(table(media), shards.folder)
    (shards.folder / "index.jsonl").unlink()  # broken off before its end
    with pytest.raises(FileExistsError):
        write_shards(table(media), shards.folder)
    with pytest.raises(FileNotFoundError, match=r"must hold index\.jsonl"):
        Shards(shards.folder)
    assert all((shards.folder / name).read_bytes() == data for name, data in before.items() if name != "index.jsonl")


def test_damage_is_named(shards):
    with pytest.raises(FileNotFoundError, match=re.escape("clip must be a key in")):
        shards(Example("none"), CONFIG, 3)
    entry = shards.entries["long"]
    path = shards.folder / entry.shard
    path.write_bytes(path.read_bytes()[: entry.offset + 200])
    with pytest.raises(ValueError, match=rf"was '.*{entry.shard}:long\.mp4'"):
        shards(Example("long"), CONFIG, 3)
    path.unlink()
    loader = Loader(shards.examples, CONFIG, None, batch_clips=4, source=shards, bad_share=0.9)
    list(loader)
    assert {clip for clip, reason in loader.skipped if "No such file" in reason} >= {"long"}
    index = shards.folder / "index.jsonl"
    index.write_text(index.read_text() + '{"key": "x"}\n')
    with pytest.raises(ValueError, match=r"index\.jsonl, line 6: must be a line that write_shards wrote"):
        Shards(shards.folder)
