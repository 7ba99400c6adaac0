"""Which code a result was measured with, and what may be kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import run
from core import provenance
from core.provenance import REPOSITORY, RESULTS, blob, changed, code_of, refusal, state

BENCH = REPOSITORY / "bench"
CLEAN = {"commit": "c", "dirty": False, "uncommitted": []}
DIRTY = {"commit": "c", "dirty": True, "uncommitted": ["kernels/x.py"]}
NO_GIT = {"commit": None, "dirty": None, "uncommitted": None}


def about(facts=CLEAN, code=None, **settings):
    settings = {"suites": ["attention"], "effort": "default", "filter": "", **settings}
    return {"machine": facts, "code": code or {"a": "1"}, "settings": settings}


@pytest.mark.parametrize("suite", run.SUITES)
def test_the_code_of_a_suite_holds_all_of_the_rooms_that_it_loads(suite):
    """What Python loads, in a process of its own, against what is read in the sources."""
    script = f"import sys, cases.{suite}; print(*(getattr(m, '__file__', None) for m in sys.modules.values()))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    loaded = {Path(name) for name in ended.stdout.split() if name.startswith(str(BENCH))}
    wanted = {path for path in loaded if path.parent.name in ("cases", "peers", "core") and path.name != "__init__.py"}
    about_the_machine = {BENCH / "core" / name for name in provenance.ABOUT}
    code = code_of([suite])
    assert {str(path.relative_to(REPOSITORY)) for path in wanted - about_the_machine} <= code.keys()
    assert f"bench/cases/{suite}.py" in code
    assert "bench/core/rows.py" in code
    assert any(path.startswith(("kernels/", "mirasol/")) for path in code)


def test_every_path_that_is_named_exists():
    named = [*provenance.MATTERS, *provenance.MODEL]
    named += [path for paths in provenance.LIBRARY.values() for path in paths]
    named += [f"bench/core/{name}" for name in provenance.ABOUT]
    named += [f"mirasol/{name}" for name in provenance.NOT_THE_MODEL]
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


def test_the_whole_model_is_what_a_new_file_belongs_to(tmp_path):
    for path in (
        "mirasol/model.py",
        "mirasol/new/part.py",
        "mirasol/demo/page.py",
        "kernels/a.cu",
        "csrc/b.h",
        "csrc/c.o",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    assert set(code_of(["savings"], tmp_path)) == {
        "mirasol/model.py",
        "mirasol/new/part.py",
        "kernels/a.cu",
        "csrc/b.h",
    }


def test_content_is_named_as_git_names_it():
    file = REPOSITORY / "bench" / "run.py"
    named = subprocess.run(["git", "hash-object", str(file)], capture_output=True, text=True, check=True).stdout
    assert named.startswith(blob(file))


def test_changes_are_named_new_and_removed_files_too():
    assert changed({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"}) == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("stored", "now", "expected"),
    [
        (about(), {"a": "1"}, ("current", "")),
        (about(), {"a": "2"}, ("older than its code", "1 files changed: a")),
        (about(), {"a": "1", "b": "2"}, ("older than its code", "1 files changed: b")),
        (about(DIRTY), {"a": "1"}, ("uncommitted code", "kernels/x.py")),
        (about({"commit": "c", "dirty": True}), {"a": "1"}, ("uncommitted code", "which, it does not say")),
        (about(NO_GIT), {"a": "1"}, ("unknown", "git could not say which commit")),
        ({"machine": CLEAN, "settings": {}}, {"a": "1"}, ("unknown", "no record of its code")),
        ({}, {"a": "1"}, ("unknown", "git could not say which commit")),
    ],
)
def test_what_a_stored_result_is_worth(stored, now, expected):
    assert state(stored, now) == expected


def test_a_result_of_the_code_at_hand_is_current_until_a_file_of_its_suite_changes(tmp_path):
    for path in ("kernels/attention/eager.py", "kernels/ttm/eager.py", "bench/cases/attention.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    measured = about(code=code_of(["attention"], tmp_path))
    (tmp_path / "kernels/ttm/eager.py").write_text("y")
    assert state(measured, code_of(["attention"], tmp_path))[0] == "current"
    (tmp_path / "kernels/attention/eager.py").write_text("y")
    assert state(measured, code_of(["attention"], tmp_path))[0] == "older than its code"


def test_a_repository_says_what_is_not_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    assert provenance.commit() == NO_GIT
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for name in provenance.MATTERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.py").write_text("x")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "m"]):
        subprocess.run([*git, *command], check=True)
    assert provenance.commit()["uncommitted"] == []
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "bench" / "results").mkdir()
    (tmp_path / "bench" / "results" / "a.json").write_text("x")
    assert provenance.commit()["dirty"] is False, "what no number depends on"
    (tmp_path / "kernels" / "new.py").write_text("x")
    (tmp_path / "bench" / "file.py").write_text("y")
    found = provenance.commit()
    assert found["dirty"] is True
    assert found["uncommitted"] == ["bench/file.py", "kernels/new.py"]


@pytest.mark.parametrize(
    ("run_of", "sentence"),
    [
        (about(), ""),
        (about(DIRTY), "committed code only; not committed: kernels/x.py"),
        (about(NO_GIT), "git does not say"),
        (about(effort="quick"), "whole runs"),
        (about(filter="ttm"), "whole runs"),
    ],
)
def test_bench_results_takes_whole_runs_of_committed_code(run_of, sentence):
    assert sentence in refusal(RESULTS / "x.json", run_of)
    assert bool(refusal(RESULTS / "x.json", run_of)) == bool(sentence)
    assert refusal(REPOSITORY / "build" / "x.json", run_of) == ""


def test_a_refused_run_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr("core.provenance.commit", lambda: DIRTY)
    monkeypatch.setattr("core.roofline.measure", lambda settings: pytest.fail("measured"))
    arguments = ["--only", "attention", "--device", "cpu"]
    assert run.main([*arguments, "--out", str(RESULTS)]) == run.REFUSED
    assert run.main([*arguments, "--json", str(RESULTS / "new.json")]) == run.REFUSED
    assert "not committed: kernels/x.py" in capsys.readouterr().err
    assert not (RESULTS / "new.json").exists()
