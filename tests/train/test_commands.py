"""The command line: the commands of the README on a generated set, and one line for every mistake."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

import mirasol
from mirasol.__main__ import COMMANDS, main
from mirasol.data.worlds import Look, write_world, write_worlds

ROOT = Path(__file__).parents[2]
SMALL = [f"{key}={value}" for key, value in {**runs.CONFIG, "image_size": 32, "samples_per_chunk": 6400}.items()]


def call(capsys, *arguments: object) -> str:
    """Run a command that must succeed; what it prints."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "set"
    write_worlds(path, clips=6, chunks=4, look=Look(seconds_per_chunk=0.4, frames_per_chunk=2))
    return path


@pytest.fixture(scope="module")
def run(folder):
    out = folder.parent / "run"
    size = ["--preset", "tiny", "--config", *SMALL, "--questions-per-clip", "6", "--device", "cpu", "--workers", "0"]
    steps = ["--steps", "10", "--batch", "4", "--lr", "1e-2"]
    assert main(["train", str(folder / "questions.csv"), "--out", str(out), *size, *steps]) == 0
    return out


def test_what_is_trained_on_the_generated_set_learns_and_answers(folder, run, capsys):
    losses = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert losses[-1]["loss"] < 0.7 * losses[0]["loss"]
    for name in ("text", "video", "audio"):
        assert losses[-1][name] < losses[0][name], name
    clip, asked = next((folder / "clips").iterdir()), "What pitch did the last sound have?"
    assert call(capsys, "ask", clip, asked, "--run", run, "--choices", "low", "high").strip() in ("low", "high")
    call(capsys, "ask", "--run", run, clip, asked, "--start", "0.5", "--end", "1.5", "--max-new-tokens", "4")
    out = folder.parent / "evaluation"
    table = folder / "questions-test.csv"
    printed = call(capsys, "evaluate", table, "--run", run, "--out", out, "--max-new-tokens", "8")
    assert "exact_match" in printed
    assert (out / "report.html").is_file()


def test_without_a_run_the_model_in_the_package_is_asked_about_its_own_world(run, capsys, tmp_path, monkeypatch):
    packaged = shutil.copytree(run, tmp_path / "packaged")
    look = dict(seconds_per_chunk=0.4, frames_per_chunk=2, size=64, sample_rate=16000)
    types = ["what-seen", "where"]
    (packaged / "world.json").write_text(json.dumps(dict(chunks=6, events=2, types=types, look=look)))
    monkeypatch.setattr("mirasol.embedded.EMBEDDED", packaged)
    clip = tmp_path / "a clip.mp4"
    printed = call(capsys, "world", clip, "--seed", "7").splitlines()
    assert call(capsys, "world", "--seed", "7", clip).splitlines() == printed
    told = write_world(tmp_path / "again.mp4", 7, chunks=6, events=2, types=types, look=Look(**look))
    assert clip.read_bytes() == (tmp_path / "again.mp4").read_bytes()
    assert len(told) == 2
    assert printed[1::2] == [f"    {answer}" for _, answer in told]
    for line, (question, _) in zip(printed[::2], told, strict=True):
        words = shlex.split(line)
        assert words == ["python", "-m", "mirasol", "ask", str(clip), question]
        short = ["--max-new-tokens", "4"]
        answer = call(capsys, *words[3:], *short)
        assert answer == call(capsys, *words[3:], *short, "--run", run)
    row = f"clip,question,answer\n{clip},{told[0][0]},{told[0][1]}\n"
    (tmp_path / "table.csv").write_text(row)
    call(capsys, "evaluate", tmp_path / "table.csv", "--out", tmp_path / "out", *short)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["run"] == str(packaged)
    line = call(capsys, "world", clip, "--run", run, "--chunks", "20").splitlines()[0]
    assert line.endswith(f" --run {run} --max-chunks 20"), "a folder that tells of no world has its name in the command"


def test_what_world_json_cannot_tell_is_named(tmp_path):
    from mirasol.embedded import learned_world

    right = dict(chunks=6, events=2, types=["where"], look={})
    for wrong, error, message in (
        ({**right, "chnks": 3}, ValueError, "world.json must hold chunks, events, look, types, was .*'chnks'"),
        ({**right, "look": {"size": 31}}, ValueError, "size must be at least 32, was 31"),
        ({**right, "look": {"sise": 32}}, TypeError, "sise"),
    ):
        (tmp_path / "world.json").write_text(json.dumps(wrong))
        with pytest.raises(error, match=message):
            learned_world(tmp_path)
    (tmp_path / "world.json").write_text(json.dumps(right))
    assert learned_world(tmp_path) == {**right, "look": Look()}
    with pytest.raises(
        ValueError, match=r"types must name types of questions that the clip can be asked, was .*whither"
    ):
        write_world(tmp_path / "clip.mp4", types=("whither",))


def test_shards_and_features_stand_in_for_media_files(folder, run, capsys, tmp_path):
    call(capsys, "shards", folder / "questions.csv", tmp_path / "shards")
    call(capsys, "features", run, tmp_path / "shards", tmp_path / "features")
    count = sum(1 for _ in (tmp_path / "features").rglob("*.safetensors"))
    assert count == 4
    frozen = ["video_embedding", "video_vit", "audio_embedding", "audio_vit"]
    more = ["--features", tmp_path / "features", "--steps", "1", "--workers", "0", "--batch", "4"]
    fine = ["train", tmp_path / "shards", "--init", run, "--out", tmp_path / "run", *more, "--freeze"]
    call(capsys, *fine, *frozen)
    assert sum(1 for _ in (tmp_path / "features").rglob("*.safetensors")) == count  # found again
    before, after = runs.weights(run), runs.weights(tmp_path / "run")
    assert all((before[name] == after[name]).all() for name in before if name.split(".")[0] in frozen)
    assert main([str(argument) for argument in [*fine, "video_vit"]]) == 2
    message = "freeze must hold video_embedding audio_embedding audio_vit with features, was ('video_vit',)"
    assert message in capsys.readouterr().err
    more = ["--run", run, "--out", tmp_path / "evaluation", "--max-new-tokens", "2"]
    call(capsys, "evaluate", tmp_path / "shards", *more)


def test_a_mistake_is_one_line(folder, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table, clip = folder / "questions.csv", next((folder / "clips").iterdir())
    Path("bad.csv").write_text("klip,question\na,b\n")
    Path("gone.csv").write_text("clip,question,answer\nnone.mp4,q,a\n")
    tiny = ["--preset", "tiny", "--workers", "0"]
    for arguments, message in (
        (
            ["trian", table],
            f"the command must be one of {', '.join(COMMANDS)}, was 'trian'",
        ),
        (["train", "none.csv"], "mirasol train: path must be a table, was 'none.csv': no such file"),
        (["train", "bad.csv"], "bad.csv: a table must have a column 'clip', had 'klip', 'question'"),
        (["train", table, "--preset", "huge"], "preset must be one of tiny, small, base, mirasol-3b, was 'huge'"),
        (["train", table, *tiny, "--config", "combinr=ttm"], "config has unknown fields: combinr"),
        (["train", table, *tiny, "--freeze", "vit"], "freeze must name parts of the model (modality, "),
        (["train", table, "--init", tmp_path], "must be a folder with config.json"),
        (["train", "gone.csv", *tiny], "1 clips in a row cannot be read: none.mp4 (FileNotFoundError: clip must be"),
        (["train", "gone.csv", "--preset", "tiny", "--workers", "1"], "mirasol train: 1 clips in a row cannot be read"),
        (["evaluate", "none.csv", "--run", run], "path must be a table, was 'none.csv': no such file"),
        (["evaluate", table, "--run", "nowhere"], "'nowhere'"),
        (["ask", "none.mp4", "What?", "--run", run], "clip must be a media file, was 'none.mp4': no such file"),
        (["ask", "bad.csv", "What?", "--run", run], "was 'bad.csv'"),
        (["ask", clip, "What?", "--run", run, "--start", "9"], "start must lie before the end of"),
        (["world", "clip.mp4", "--run", "nowhere"], "folder must hold config.json, was 'nowhere', which holds none"),
        (["world", "clip.mp4", "--run", run, "--events", "99"], "events must be at most chunks = 16, was 99"),
        (["worlds", tmp_path], "folder must be new, or one of an earlier set"),
        (["shards", "none.csv", "out"], "path must be a table, was 'none.csv': no such file"),
        (["features", "nowhere", table, "out"], "'nowhere'"),
    ):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2, arguments
        printed = [
            line for line in capsys.readouterr().err.splitlines() if "step/s" not in line and "clip/s" not in line
        ]
        told = [line for line in printed if line.startswith("mirasol") and message in line]
        assert len(told) == 1, (arguments, printed)
        assert not [line for line in printed if "Traceback" in line]
    with pytest.raises(FileNotFoundError):
        main(["train", "none.csv", "--debug"])


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch):
    def wrong(arguments):
        return {}["key"]

    monkeypatch.setitem(COMMANDS, "train", wrong)
    with pytest.raises(KeyError):
        main(["train"])


def test_help_is_quick_and_waits_for_no_torch():
    code = "import sys; from mirasol.__main__ import main; main({}); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    for arguments, expected in ((["--help"], "python -m mirasol ask clip.mp4"), (["train", "--help"], "--lr-of")):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "mirasol", *arguments], capture_output=True, text=True, env=environment, check=True
        )
        assert expected in done.stdout
        assert time.perf_counter() - began < 5
    done = subprocess.run(
        [sys.executable, "-c", code.format("['--help']")], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: python -m mirasol {command}" in printed
    assert "torch" not in printed or command == "train"


def test_dictionaries_are_read_as_pairs(monkeypatch):
    told = []
    monkeypatch.setattr("mirasol.train.train", told.append)
    config = ["--config", "combiner=ttm", "mask_ratio=0.5", "av_window=None", "mel_patch=(16, 8)"]
    assert main(["train", "q.csv", *config, "--lr-of", "text_decoder=1e-5", "--freeze", "video_vit", "audio_vit"]) == 0
    (options,) = told
    assert options.config == {"combiner": "ttm", "mask_ratio": 0.5, "av_window": None, "mel_patch": (16, 8)}
    assert options.lr_of == {"text_decoder": 1e-5}
    assert options.freeze == ("video_vit", "audio_vit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "combiner"], "must be KEY=VALUE, was 'combiner'"),
        (["--batch", "0"], "batch must be at least 1, was 0"),
        (["--lr-of", "text_decoder=-1"], "must be greater than 0, was -1"),
        (["--stepps", "3"], "--steps"),
    ],
)
def test_an_option_that_cannot_be_read_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "questions.csv", *arguments])
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_default_preset_is_small(tmp_path):
    from mirasol.training.build import build
    from mirasol.training.options import TrainOptions

    model, _ = build(TrainOptions("questions.csv", config=dict(encoder_layers=1, av_layers=1, text_layers=1)))
    assert model.config == mirasol.Config.preset("small", encoder_layers=1, av_layers=1, text_layers=1)


def test_groups_without_examples_are_shown_as_such(monkeypatch, capsys):
    metrics = {"accuracy": {"all": {"value": 0.5, "count": 2}, "how": {"value": None, "count": 0}}}
    monkeypatch.setattr("mirasol.evaluate.evaluate", lambda *_: {"metrics": metrics})
    assert main(["evaluate", "table.csv"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[:2]] == [
        ["accuracy", "all", "0.500", "of", "2"],
        ["accuracy", "how", "-", "of", "0"],
    ]
