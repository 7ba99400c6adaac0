"""The command `stream`: a line a chunk, questions typed meanwhile, one line for every mistake."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")

from clips import write_clip
from mirasol import ByteTokenizer, Model
from mirasol.__main__ import main
from mirasol.streaming.session import Report
from mirasol.streaming.terminal import Screen, Typed

ROOT = Path(__file__).parents[2]
LINE = re.compile(
    r"chunk +(\d+) +([\d.]+) s  lag +([\d.]+) s +(\d+) ms +[\d.]+ of \d+ MiB  video ([▮▯]) audio ([▮▯])(.*)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    torch.manual_seed(0)
    Model.from_preset("tiny", combiner="ttm").save_pretrained(folder / "run")
    ByteTokenizer().save_pretrained(folder / "run")
    write_clip(folder / "clip.mkv", seconds=1.6, audio_codec="pcm_s16le")
    write_clip(folder / "silent.mkv", seconds=4.0, fps=10, tones=None)
    return folder


@pytest.fixture
def type_in(monkeypatch):
    """Put text where a command run in this process reads what is typed."""
    files = []

    def typed(text: str) -> None:
        reading, writing = os.pipe()
        os.write(writing, text.encode())
        os.close(writing)
        files.append(os.fdopen(reading))
        monkeypatch.setattr(sys, "stdin", files[-1])

    yield typed
    for file in files:
        file.close()


def watch(capsys, *arguments: object) -> list[str]:
    capsys.readouterr()
    assert main(["stream", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


def test_each_chunk_is_a_line_with_its_scores(folder, capsys, type_in):
    type_in("")
    scored = ["--question", "What?", "--choices", "a bell", "a horn", "rain"]
    printed = watch(capsys, folder / "clip.mkv", "--run", folder / "run", *scored)
    lines = [LINE.fullmatch(line) for line in printed]
    chunks = [line for line in lines if line]
    assert [int(line[1]) for line in chunks] == list(range(10))
    assert [float(line[2]) for line in chunks] == pytest.approx([t * 0.16 for t in range(10)], abs=0.006)
    assert {(line[5], line[6]) for line in chunks} == {("▮", "▮")}
    for line in chunks:
        scores = dict(re.findall(r"  (a bell|a horn|rain) ([\d.]+)", line[7]))
        assert len(scores) == 3
        assert sum(map(float, scores.values())) == pytest.approx(1.0, abs=0.02)
    assert printed[0] == "type a question at any time"
    assert re.fullmatch(r"10 chunks, 1\.6 s of the stream in [\d.]+ s: [\d.]+ of real time", printed[-1])
    assert len(printed) == 12


def test_a_kind_that_is_missing_is_shown(folder, capsys, type_in):
    type_in("")
    printed = watch(capsys, folder / "silent.mkv", "--run", folder / "run", "--memory", "4", "--sinks", "1")
    chunks = [match for line in printed if (match := LINE.fullmatch(line))]
    assert len(chunks) == 25
    assert {(line[5], line[6]) for line in chunks} == {("▮", "▯")}


def test_what_was_typed_too_early_is_answered(folder, capsys, type_in):
    type_in("What moves?\n\nAnd what sounds?")
    printed = watch(capsys, folder / "clip.mkv", "--run", folder / "run", "--max-new-tokens", "3", "--grow")
    text = "\n".join(printed)
    assert text.index("> What moves?\n  ") < text.index("> And what sounds?\n  ")
    assert sum(LINE.fullmatch(line) is not None for line in printed) == 10


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8"}


def command(*arguments: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "mirasol", "stream", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), **options,
    )  # fmt: skip


def test_a_question_is_typed_in_the_middle(folder, tmp_path):
    file = write_clip(tmp_path / "long.mkv", seconds=6.0, fps=10, audio_codec="pcm_s16le")
    with command(file, "--run", folder / "run", "--real-time", "--max-new-tokens", 5, stdin=subprocess.PIPE) as process:
        before = [process.stdout.readline().decode() for _ in range(6)]
        process.stdin.write("What moves — and where?\n".encode())
        process.stdin.flush()
        begun = time.monotonic()
        after = process.stdout.read().decode().splitlines()
        took = time.monotonic() - begun
        process.stdin.close()
        assert process.wait(30) == 0, process.stderr.read()
    asked = after.index("> What moves — and where?")
    assert asked < 20
    assert after[asked + 1].startswith("  ")
    chunks = [match for line in [*(line.rstrip("\n") for line in before), *after] if (match := LINE.fullmatch(line))]
    assert [int(match[1]) for match in chunks] == list(range(len(chunks)))
    assert 37 <= len(chunks) <= 39
    assert took > 3  # the file was paced
    assert max(float(match[3]) for match in chunks) < 5


def test_a_pipe_leaves_no_place_for_questions(folder):
    with open(folder / "clip.mkv", "rb") as file, command("-", "--run", folder / "run", stdin=file) as process:
        printed = process.stdout.read().decode().splitlines()
        assert process.wait(30) == 0, process.stderr.read()
    assert printed[0] == "questions are not read: standard input is the source"
    assert sum(LINE.fullmatch(line) is not None for line in printed) == 10


def test_it_is_interrupted_cleanly(folder, tmp_path):
    file = write_clip(tmp_path / "long.mkv", seconds=60.0, fps=2)
    with command(file, "--run", folder / "run", "--real-time", stdin=subprocess.PIPE) as process:
        for _ in range(5):
            process.stdout.readline()
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        printed, told = (part.decode() for part in process.communicate(timeout=30))
    assert process.returncode == 130
    assert time.monotonic() - begun < 20
    assert told == "mirasol stream: interrupted\n"
    assert " chunks, " in printed.splitlines()[-1]


def test_a_mistake_is_one_line(folder, tmp_path, capsys, type_in):
    type_in("")
    (tmp_path / "text.mp4").write_text("nothing to see here")
    run, clip = str(folder / "run"), str(folder / "clip.mkv")
    for arguments, message in (
        (["none.mp4"], "source must be a file, a camera (/dev/video0), - or a URL of rtsp"),
        ([tmp_path / "text.mp4"], "path must be a file that FFmpeg reads"),
        (["/dev/video99"], "source must be a camera that is there, was '/dev/video99'"),
        (["gopher://x"], "source must be a file, a device, - or a URL of rtsp"),
        (["rtsp://127.0.0.1:9/x"], "source must be a stream that can be read, was 'rtsp://127.0.0.1:9/x'"),
        ([clip, "--microphone", "default"], "microphone must be left out, unless source is a camera"),
        ([clip, "--choices", "a", "a"], "choices must differ from one another"),
        ([clip, "--device", "toaster"], "toaster"),
        ([clip, "--run", "nowhere"], "nowhere"),
    ):
        capsys.readouterr()
        try:
            code = main(["stream", *map(str, arguments), *(["--run", run] if "--run" not in arguments else [])])
        except SystemExit as end:
            code = end.code
        told = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert code == 2, arguments
        assert message in told, arguments
        assert "Traceback" not in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "0"], "memory must be at least 1, was 0"),
        (["--sinks", "-1"], "sinks must be at least 0, was -1"),
        (["--sinks", "1", "--grow"], "sinks must be 0 with grow, was 1"),
        (["--choices", "one"], "choices must be two or more"),
        (["--question", "What?"], "question must come with choices"),
        (["--memmory", "3"], "--memory"),
    ],
)
def test_an_option_that_cannot_work_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["stream", "clip.mp4", *arguments])
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def a_report(chunk: int) -> Report:
    return Report(chunk, 1.0, 0.0, 0.1, 2**20, 2**28, True, False, {})


def test_lines_wait_while_an_answer_is_written():
    out = io.StringIO()
    screen = Screen(out)

    def pieces():
        yield "It "
        screen.show_report(a_report(7))
        assert out.getvalue() == "> Is it?\n  It "
        yield "is."

    screen.show_answer("Is it?", pieces())
    screen.show_report(a_report(8))
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["> Is it?", "  It is."]
    assert [line.split()[1] for line in lines[2:]] == ["7", "8"]


def test_a_terminal_without_unicode_gets_letters():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    screen = Screen(out)
    screen.show_report(a_report(1))
    screen.show_answer("Où?", iter(["là"]))
    assert raw.getvalue().endswith(b"video # audio -  \n> O??\n  l?\n")


def test_lines_are_typed_in_pieces():
    reading, writing = os.pipe()
    typed = Typed(reading)
    assert typed.lines(0.01) == []
    for data, lines in ((b"Wha", []), (b"t?\n  \nAnd \xc3", ["What?"]), (b"\xa9?\nLast", ["And é?"])):
        os.write(writing, data)
        assert typed.lines(1.0) == lines
    os.close(writing)
    assert typed.lines(1.0) == ["Last"]
    assert typed.lines(0.0) == []
    os.close(reading)
