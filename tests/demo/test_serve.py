"""The command `demo` where it cannot work: one line each."""

import sys

import mirasol
from mirasol.__main__ import main
from mirasol.tokenizer import ByteTokenizer


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["demo", "--run", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_without_gradio_the_command_says_how_to_install_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    told = refused(capsys, tmp_path)
    assert told == "mirasol demo: the page needs the package gradio: pip install -e '.[demo]'"


def test_what_is_no_model_or_cannot_stream_is_refused_before_anything_is_served(capsys, tmp_path):
    assert "holds none" in refused(capsys, tmp_path)
    mirasol.Model.from_preset("tiny", av_causal=False).save_pretrained(tmp_path, ByteTokenizer())
    assert "av_causal must be True for a stream" in refused(capsys, tmp_path)
