"""Checkpoints on disk: replaced whole or not at all, whatever dies; read by name; broken files named."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

import mirasol
from mirasol import atomic

INDEX = "model.safetensors.index.json"
in_shards = mock.patch(
    "huggingface_hub.split_torch_state_dict_into_shards",
    functools.partial(huggingface_hub.split_torch_state_dict_into_shards, max_shard_size="2MB"),
)


class VersionedTokenizer(mirasol.ByteTokenizer):
    """Says in its file which save it is of; that of an odd one has a second file."""

    def __init__(self, version: int):
        self.version = version

    def save_pretrained(self, folder):
        config = {"tokenizer_class": "ByteTokenizer", "version": self.version}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
        if self.version % 2:
            (Path(folder) / "vocab.json").write_text(str(self.version))


@functools.cache
def blank() -> mirasol.Model:
    return mirasol.Model.from_preset("tiny")


def save(folder: Path, version: int) -> None:
    """Weights, configuration and tokenizer all say which version they are of."""
    model = blank()
    model.config = mirasol.Config.preset("tiny", text_weight=float(version))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(version)
    with in_shards:
        model.save_pretrained(folder, VersionedTokenizer(version))


def version_of(folder: Path) -> int:
    """Which version a folder holds, after all of it was found to be of one."""

    def read(root: Path) -> tuple:
        model = mirasol.Model.from_pretrained(folder)
        version = int(model.config.text_weight)
        weights = {value for parameter in model.parameters() for value in parameter.unique().tolist()}
        tokenizer = atomic.read_json(root / "tokenizer_config.json")["version"], (root / "vocab.json").exists()
        return version, weights, tokenizer

    version, weights, tokenizer = atomic.consistent(folder, read)
    assert weights == {version}
    assert tokenizer == (version, version % 2 == 1)
    return version


def assert_tidy(folder: Path, *others: str) -> None:
    found = {path.name for path in folder.iterdir()}
    shards = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    assert len(shards) > 1
    version = json.loads((folder / "tokenizer_config.json").read_text())["version"]
    vocabulary = {"vocab.json"} if version % 2 else set()
    assert found == {"config.json", INDEX, "tokenizer_config.json", *shards, *vocabulary, *others}


def save_until_killed(folder: Path, first: int, started) -> None:
    torch.set_num_threads(1)
    for version in range(first, first + 10_000):
        started.value = version
        save(folder, version)


def save_until_step(folder: Path, version: int, fatal: int) -> None:
    """Die at the `fatal`-th call to the file system that concerns `folder`."""
    torch.set_num_threads(1)
    blank()
    steps = 0

    def count(event: str, args: tuple) -> None:
        nonlocal steps
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(folder) in str(args[0]):
            steps += 1
            if steps == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save(folder, version)


def save_until(folder: Path, first: int, enough: Any) -> None:
    """Every second version from the first on, until the event `enough`."""
    torch.set_num_threads(1)
    for version in itertools.count(first, 2):
        save(folder, version)
        if enough.wait(1.0):  # a reader begins again where a save comes between: it needs a pause
            return


@pytest.fixture(scope="module")
def processes():
    """Children forked from a process that has imported everything, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["mirasol.model", "huggingface_hub", "safetensors.torch", "torch.distributed.tensor"]
    )
    return context


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_one_whole_checkpoint(processes, tmp_path, kills):
    moments = random.Random(kills)
    (tmp_path / "README.md").write_text("mine")
    save(tmp_path, 0)
    found, newer = 0, 0
    for _ in range(kills):
        started = processes.Value("i", 0)
        child = processes.Process(target=save_until_killed, args=(tmp_path, found + 1, started))
        child.start()
        while not started.value:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.4))
        assert child.is_alive()
        child.kill()
        child.join()
        last = started.value
        found = version_of(tmp_path)
        assert found in (last - 1, last)
        newer += found == last
    save(tmp_path, found + 1)
    assert version_of(tmp_path) == found + 1
    assert_tidy(tmp_path, "README.md")
    print(f"{kills} kills, {newer} of them after the switch")


@pytest.mark.parametrize("every", [6, pytest.param(2, marks=pytest.mark.slow)])
def test_a_kill_at_each_step_leaves_one_whole_checkpoint(processes, tmp_path, every):
    save(tmp_path, 0)
    outcomes, found = [], 0
    for fatal in range(1, 1000, every):
        child = processes.Process(target=save_until_step, args=(tmp_path, found + 1, fatal))
        child.start()
        child.join()
        version = version_of(tmp_path)
        assert version in (found, found + 1)
        outcomes.append(version - found)
        found = version
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    print(len(outcomes), "steps")
    assert 0 in outcomes
    assert outcomes.count(1) > 2, "some must die between the switch and the end"
    assert outcomes[-1] == 1
    assert_tidy(tmp_path)


def test_concurrent_saves_never_mix_and_readers_see_whole_ones(processes, tmp_path):
    save(tmp_path, 0)
    enough = processes.Event()
    children = [processes.Process(target=save_until, args=(tmp_path, 1 + i, enough)) for i in range(2)]
    for child in children:
        child.start()
    seen: set[int] = set()
    while len(seen) < 3:
        assert all(child.is_alive() for child in children)
        seen.add(version_of(tmp_path))
    enough.set()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert version_of(tmp_path) > 0
    assert_tidy(tmp_path)


def test_an_error_on_the_way_leaves_the_old_checkpoint(tmp_path):
    save(tmp_path, 1)
    full = mock.patch("safetensors.torch.save_file", side_effect=OSError("no space left"))
    with full, pytest.raises(OSError, match="no space left"):
        save(tmp_path, 2)
    assert version_of(tmp_path) == 1
    assert_tidy(tmp_path)


def test_other_files_stay_and_a_tokenizer_stays_until_another_comes(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.safetensors").write_text("mine")
    (tmp_path / "lora.safetensors").write_text("mine")
    save(tmp_path, 1)
    save(tmp_path, 3)
    blank().save_pretrained(tmp_path)
    assert isinstance(mirasol.load_tokenizer(tmp_path), mirasol.ByteTokenizer)
    assert (tmp_path / "vocab.json").read_text() == "3"
    assert (tmp_path / "checkpoints" / "model.safetensors").read_text() == "mine"
    assert (tmp_path / "lora.safetensors").read_text() == "mine"
    mirasol.Model.from_pretrained(tmp_path)


def test_stale_weights_never_override_the_indexed(tmp_path):
    save(tmp_path, 1)
    for stale in ("model.safetensors", "model-00001-of-00002.safetensors", "zzz.safetensors"):
        shard = next(iter(tmp_path.glob("model-*-00001-of-*.safetensors")))
        weights = {name: value + 1 for name, value in read_weights(shard).items()}
        write_weights(weights, tmp_path / stale)
    assert version_of(tmp_path) == 1
    save(tmp_path, 2)
    assert_tidy(tmp_path, "zzz.safetensors")


def test_all_files_are_as_readable_as_others(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "mine").write_text("")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def write_weights(weights: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights, file)


def test_the_hubs_tools_read_and_write_the_same_folders(tmp_path):
    save(tmp_path, 3)
    other = mirasol.Model.from_preset("tiny")
    huggingface_hub.load_torch_model(other, tmp_path, strict=True)
    assert all(bool((parameter == 3).all()) for parameter in other.parameters())
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    huggingface_hub.save_torch_model(other, foreign)
    other.config.save(foreign / "config.json")
    assert (foreign / "model.safetensors").exists()
    loaded = mirasol.Model.from_pretrained(foreign)
    assert all(bool((parameter == 3).all()) for parameter in loaded.parameters())
    save(foreign, 4)
    assert version_of(foreign) == 4
    assert_tidy(foreign)


def test_fields_are_changed_on_loading(tmp_path):
    save(tmp_path, 1)
    model = mirasol.Model.from_pretrained(tmp_path, mask_ratio=0.5, video_weight=3.0, dtype=torch.bfloat16)
    assert (model.config.mask_ratio, model.config.video_weight, model.config.text_weight) == (0.5, 3.0, 1.0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=re.escape("changes must be fields of mirasol.Config, was 'mask_ration'")):
        mirasol.Model.from_pretrained(tmp_path, mask_ration=0.5)
    with pytest.raises(ValueError, match=r"do not fit .*: text_decoder\.embedding\.weight is \[259, 64\], expected"):
        mirasol.Model.from_pretrained(tmp_path, vocab_size=300)
    with pytest.raises(ValueError, match=re.escape("mask_ratio must be in [0, 1), was 2.0")):
        mirasol.Model.from_pretrained(tmp_path, mask_ratio=2.0)


def test_what_is_not_saved_is_right_after_loading(tmp_path):
    model = blank()
    model.save_pretrained(tmp_path)
    for dtype in (None, torch.bfloat16):
        loaded = mirasol.Model.from_pretrained(tmp_path, dtype=dtype)
        missing = dict(loaded.named_buffers()).keys() - loaded.state_dict().keys()
        assert missing
        for name in missing:
            assert torch.equal(loaded.get_buffer(name), model.get_buffer(name)), name


def test_a_tokenizer_with_too_many_ids_is_refused(tmp_path):
    model = mirasol.Model.from_preset("tiny", vocab_size=100, pad_id=0, bos_id=1, eos_id=2)
    with pytest.raises(ValueError, match="vocab_size must be at least 259, the ids of ByteTokenizer, was 100"):
        model.save_pretrained(tmp_path / "new", mirasol.ByteTokenizer())
    assert not (tmp_path / "new").exists()


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 8)


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda folder: truncate(first_shard(folder)), ValueError, r"model-.*-00001-of-.*whole safetensors file"),
        (lambda folder: first_shard(folder).write_bytes(b"x" * 99), ValueError, r"model-.*-00001-of.*safetensors file"),
        (lambda folder: first_shard(folder).unlink(), FileNotFoundError, r"model-.*-00001-of-.* is missing, which mod"),
        (lambda folder: (folder / "config.json").write_text("{"), ValueError, r"config\.json must be JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), ValueError, r"config\.json must hold a JSON object"),
        (lambda folder: (folder / "config.json").write_text('{"a": 1}'), ValueError, r"json.*unknown fields: a"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff"), ValueError, r"config\.json must be JSON"),
        (lambda folder: (folder / INDEX).write_text("{"), ValueError, r"model\.safetensors\.index\.json must be JSON"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": 1}'), ValueError, r"json must hold a weight_map"),
        (lambda folder: (folder / INDEX).unlink(), FileNotFoundError, r"model\.safetensors is missing"),
        (lambda folder: shutil.rmtree(folder), FileNotFoundError, r"must be a folder or a repository"),
    ],
)  # fmt: skip
def test_broken_files_are_named(tmp_path, harm, error, message):
    with in_shards:
        blank().save_pretrained(tmp_path / "run")
        harm(tmp_path / "run")
        with pytest.raises(error, match=message):
            mirasol.Model.from_pretrained(tmp_path / "run")


def save_sharded(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = mirasol.Model.from_preset("tiny", combiner="ttm")
    mesh = dist.init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.save_pretrained(f"{folder}/run", mirasol.ByteTokenizer())
    assert Path(folder, "run", "config.json").exists(), "no rank goes on before the checkpoint is whole"
    Path(folder, "file").write_text("")
    with pytest.raises((OSError, RuntimeError), match="rank 0 could not save" if rank else "exists"):
        model.save_pretrained(f"{folder}/file")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_model_is_saved_whole(tmp_path):
    mp.spawn(save_sharded, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    expected = mirasol.Model.from_preset("tiny", combiner="ttm").state_dict()
    loaded = mirasol.Model.from_pretrained(tmp_path / "run").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert isinstance(mirasol.load_tokenizer(tmp_path / "run"), mirasol.ByteTokenizer)
