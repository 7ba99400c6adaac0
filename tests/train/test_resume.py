"""A run that is killed goes on as if nothing had been; what must not change within a run is refused."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import runs
import torch

import mirasol

CONTEXT = multiprocessing.get_context("forkserver")  # the server has everything loaded, and has never computed
CONTEXT.set_forkserver_preload(["mirasol.train", "torch._dynamo", "torch.utils.tensorboard", "tqdm"])


def in_a_process(told) -> None:
    import warnings

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    runs.run(told)


def start(told):
    process = CONTEXT.Process(target=in_a_process, args=(told,))
    process.start()
    return process


def steps_logged(folder: Path) -> int:
    path = folder / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(told, step: int, delay: float) -> None:
    """Run until a step is logged and a moment longer, then kill -9."""
    process = start(told)
    while steps_logged(Path(told.out)) < step:
        assert process.is_alive(), "the run ended before it was killed"
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def killed_and_unbroken_agree(tmp_path, steps: int, save_every: int, kills: int) -> list[str]:
    table = runs.write_table(tmp_path)
    settings = dict(steps=steps, save_every=save_every, config=dict(mask_ratio=0.25, combiner="ttm"))
    unbroken = start(runs.options(table, tmp_path / "unbroken", **settings))
    unbroken.join()
    assert unbroken.exitcode == 0
    random_ = random.Random(0)
    at = sorted(random_.sample(range(save_every, steps - 1), kills))
    killed = runs.options(table, tmp_path / "killed", **settings)
    found = []
    for step in at:
        kill_after(killed, step, random_.random() * 0.02)
        found.append(max((path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*")), default="none"))
    last = start(killed)
    last.join()
    assert last.exitcode == 0
    assert runs.log(tmp_path / "killed") == runs.log(tmp_path / "unbroken")
    assert [line["step"] for line in runs.log(tmp_path / "killed")] == list(range(1, steps + 1))
    for name, value in runs.weights(tmp_path / "unbroken").items():
        assert torch.equal(value, runs.weights(tmp_path / "killed")[name]), name
    return found


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    found = killed_and_unbroken_agree(tmp_path, steps=8, save_every=2, kills=1)
    assert found[-1] != "none"


@pytest.mark.slow
def test_ten_kills_in_two_hundred_steps_change_no_bit(tmp_path):
    found = killed_and_unbroken_agree(tmp_path, steps=200, save_every=10, kills=10)
    assert len(set(found)) >= 6, found


def test_only_whole_checkpoints_are_gone_on_from_and_the_last_ones_kept(tmp_path, monkeypatch):
    told = runs.options(runs.write_table(tmp_path), tmp_path / "run", steps=6, save_every=2, keep=2)
    runs.run(told)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]
    for name in (".tmp-step-00000008", ".tmp-step-00000002"):
        (folder / name).mkdir()  # what a kill leaves behind
    monkeypatch.setattr(mirasol.Model, "forward", lambda *_, **__: pytest.fail("nothing is left to be computed"))
    runs.run(told)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]


def test_a_run_interrupted_while_the_model_is_written_ends_at_the_next_call(tmp_path, monkeypatch):
    told = runs.options(runs.write_table(tmp_path), tmp_path / "run", save_every=100)

    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mirasol.Model, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs.run(told)
    logged = (tmp_path / "run" / "log.jsonl").read_text()
    with pytest.raises(FileNotFoundError):
        mirasol.Model.from_pretrained(tmp_path / "run")
    assert runs.run(told) == tmp_path / "run"
    assert (tmp_path / "run" / "log.jsonl").read_text() == logged  # no step was computed again
    mirasol.Model.from_pretrained(tmp_path / "run")


def test_a_part_that_has_not_learned_yet_is_gone_on_with(tmp_path):
    """A loss that weighs nothing leaves its head without gradients, and AdamW without a state for it."""
    told = dict(steps=3, save_every=2, config=dict(latent_weight=0.0))
    table = runs.write_table(tmp_path)
    runs.run(runs.options(table, tmp_path / "run", **told))
    unbroken = runs.weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    runs.run(runs.options(table, tmp_path / "run", **told))
    for name, value in runs.weights(tmp_path / "run").items():
        assert torch.equal(value, unbroken[name]), name


def test_options_that_matter_may_not_change_within_a_run(tmp_path):
    table = runs.write_table(tmp_path)
    runs.run(runs.options(table, tmp_path / "run"))
    runs.run(runs.options(table, tmp_path / "run", workers=1, save_every=2, activation_checkpointing=True))
    for changes, message in (
        (dict(lr=1e-4), r"lr was 0.01 and is 0.0001"),
        (dict(steps=7), r"steps was 6 and is 7"),
        (dict(freeze=("video_vit",)), r"freeze was \[\] and is \['video_vit'\]"),
        (dict(config=dict(combiner="ttm")), r"config was .* and is .*'combiner': 'ttm'"),
    ):
        with pytest.raises(ValueError, match=message):
            runs.run(runs.options(table, tmp_path / "run", **changes))
    (tmp_path / "moved").mkdir()
    runs.run(runs.options(runs.write_table(tmp_path / "moved"), tmp_path / "run"))
    runs.write_table(tmp_path, clips=5)
    with pytest.raises(ValueError, match=r"questions was '.*--fresh"):
        runs.run(runs.options(table, tmp_path / "run"))
    runs.run(runs.options(table, tmp_path / "run", steps=2, fresh=True))
    assert [line["step"] for line in runs.log(tmp_path / "run")] == [1, 2]
    assert json.loads((tmp_path / "run" / "options.json").read_text())["steps"] == 2


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(FileExistsError, match=r"out must be a new folder, an empty one or a run's, was '.*out'"):
            runs.run(runs.options(runs.write_table(tmp_path), tmp_path / "out", fresh=fresh))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_options_may_change_before_there_is_a_checkpoint(tmp_path):
    table = runs.write_table(tmp_path)
    with pytest.raises(ValueError, match="freeze must name parts"):
        runs.run(runs.options(table, tmp_path / "run", freeze=("video",)))
    runs.run(runs.options(table, tmp_path / "run", freeze=("video_vit",), steps=1))
