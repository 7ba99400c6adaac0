"""README.md and docs/results.md say what bench/results holds."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import readme
from core.provenance import REPOSITORY, RESULTS
from core.rows import Row
from report import documents, stored
from report.console import Table
from report.documents import BEGIN, END, between_marks, differing, markdown
from report.files import read_json, write_json


@pytest.fixture
def copy(tmp_path):
    """Texts and results of their own, which agree."""
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/results.md"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    shutil.copytree(RESULTS, tmp_path / "results")
    differ = differing(tmp_path, tmp_path / "results")
    for path, text in differ.items():
        path.write_text(text)
    assert differing(tmp_path, tmp_path / "results") == {}
    return tmp_path


def again(folder: Path, change) -> dict[str, str]:
    """What is written once the savings are others."""
    path = folder / "results" / documents.main_result(stored.load(folder / "results")[0]).file
    run, rows = read_json(path)
    write_json(path, run, change(run, rows))
    return {file.name: text for file, text in differing(folder, folder / "results").items()}


def test_the_texts_say_what_the_results_hold(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().out


def test_a_number_that_was_edited_by_hand_is_found(copy, monkeypatch, capsys):
    monkeypatch.setattr(documents, "differing", lambda: differing(copy, copy / "results"))
    text = (copy / "README.md").read_text()
    inside = text[text.index(BEGIN) : text.index(END)]
    figure = re.search(r"\d+\.\d+ %", inside).group()
    (copy / "README.md").write_text(text.replace(inside, inside.replace(figure, "99.9 %")))
    assert readme.main(["--check"]) == 1
    assert "README.md is not what bench/results says: run `make readme`" in capsys.readouterr().out
    assert "99.9 %" in (copy / "README.md").read_text(), "a check writes nothing"
    assert readme.main([]) == 0
    assert (copy / "README.md").read_text() == text
    (copy / "docs" / "results.md").unlink()
    assert readme.main(["--check"]) == 1


def test_another_result_makes_other_texts(copy):
    def slower(run, rows):
        for row in rows:
            if row.case == "time 128 frames" and row.impl == "chunks + TTM":
                row.speedup, row.median_ms = 1.23456, 7654.0
        return rows

    written = again(copy, slower)
    assert set(written) == {"README.md", "results.md"}
    assert "1.23x the speed" in written["README.md"]
    assert ", 7.65 s |" in written["README.md"]


def test_a_result_older_than_its_code_is_marked(copy):
    def old(run, rows):
        run["machine"]["dirty"], run["code"] = False, {"kernels/gone.py": "0"}
        return rows

    assert re.search(r"savings-[a-z-]*\.json \(older than its code\)", again(copy, old)["README.md"])


def test_a_sentence_does_not_outlive_its_number(copy):
    with pytest.raises(ValueError, match="quotes savings/every Combiner 128 frames, attention pooling"):
        again(copy, lambda run, rows: [row for row in rows if row.impl != "attention pooling"])


def test_rows_of_an_earlier_form_are_said_to_be_so():
    row = Row("savings", "work 16 frames", "chunks + TTM", mode="count", flops=1)
    (table,) = documents.tables_of(stored.Result("a.json", {"settings": {"suites": ["savings"]}}, [row]))
    assert re.fullmatch(r"savings: measured before its rows held '[a-z_]+'; to be measured again", table.title)
    assert table.rows == [["work 16 frames", "chunks + TTM"]]


def test_a_result_that_cannot_be_read_is_an_error(copy, monkeypatch, capsys):
    (copy / "results" / "ttm-cpu.json").write_text("{")
    monkeypatch.setattr(documents, "differing", lambda: differing(copy, copy / "results"))
    assert readme.main([]) == 1
    assert "ttm-cpu.json cannot be read" in capsys.readouterr().err


def test_pictures_belong_to_the_longest_name_that_they_begin_with(tmp_path):
    results = [stored.Result(f"{name}.json", {}, []) for name in ("a-cpu", "a-cpu-bfloat16")]
    for name in ("a-cpu-peers.png", "a-cpu-bfloat16-peers.png", "b-cpu-peers.png"):
        (tmp_path / name).touch()
    found = [documents.plots_of(result, results, tmp_path) for result in results]
    assert found == [["a-cpu-peers.png"], ["a-cpu-bfloat16-peers.png"]]


def test_what_stands_outside_the_marks_is_left_alone():
    assert between_marks(f"a\n{BEGIN}\nold\n{END}\nb", "new\n") == f"a\n{BEGIN}\nnew\n{END}\nb"
    for text in ("no marks", f"{BEGIN} begun", f"{END} ended"):
        with pytest.raises(ValueError, match=re.escape(BEGIN)):
            between_marks(text, "new")


def test_what_fails_is_told_briefly_and_never_left_out():
    assert documents.brief("3 of 6 cases: 0.703x loop of SDPA (latents 16x32 D64 fwd)") == "3 of 6 cases: 0.703x"
    for whole in ("nowhere measured", "FAIL: scan 7 mirasol: wrong", "0.800x at 16 frames", "under 1 % against 2 of 3"):
        assert documents.brief(whole) == whole


def test_tables_hold_their_columns_whatever_stands_in_them():
    table = Table("T", ["name", "ms"], [["a|b *", "1"]])
    assert markdown(table) == "| name | ms |\n|---|---:|\n| a\\|b \\* | 1 |"
