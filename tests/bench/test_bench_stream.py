"""The suite of live streams: it runs, and what is wrong is no result."""

from __future__ import annotations

import pytest
import torch

from cases import stream as suite_stream
from core.rows import Settings
from mirasol.streaming import Stream

SETTINGS = Settings(device=torch.device("cpu"), effort="quick")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(suite_stream, "FIRST_ANSWERS", 12)
    monkeypatch.setattr(suite_stream, "PAIRS", 3)


def rows_of(name: str):
    (case,) = [case for case in suite_stream.cases(SETTINGS) if case.name == name]
    return case.run(SETTINGS)


@pytest.mark.parametrize("name", ["a chunk", "a question after 4 chunks", "hours", "32 streams"])
def test_runs(name):
    rows = rows_of(name)
    assert all(row.status == "ok" for row in rows), [row.reason for row in rows]
    (table,) = suite_stream.tables(rows)
    assert len(table.rows) == len(rows)


def test_a_stream_that_forgets_is_not_timed(monkeypatch):
    plain = Stream.push

    def forget(self, *args, **kwargs):
        self.restart()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Stream, "push", forget)
    assert [row.status for row in rows_of("a chunk")] == ["ok", "FAIL"] * 2
    (hours,) = rows_of("hours")
    assert hours.status == "FAIL"
    assert hours.detail["answers_different"] > 0
