"""The model in the package is asked again: what is right, what its card promised, what is told without the extras."""

import builtins

import pytest
import torch

from cases import embedded
from core.rows import Settings
from mirasol.evaluation.answer import Answerer
from report import claims, plots

QUICK = Settings(torch.device("cpu"), effort="quick")


@pytest.fixture(scope="module")
def rows():
    (case,) = embedded.cases(QUICK)
    return case.run(QUICK)


def test_it_is_as_often_right_as_its_card_says(rows):
    whole = rows[-1]
    assert (whole.impl, whole.status) == ("all", "ok")
    assert whole.detail["count"] == sum(row.detail["count"] for row in rows[:-1]) >= 50
    assert whole.detail["share"] > 0.8 > 0.4 > whole.detail["guessed"]
    assert whole.detail["card"] == embedded.card_share()
    (table,) = embedded.tables(rows)
    assert [line[0] for line in table.rows] == [row.impl for row in rows]
    found = claims.answers(rows)
    assert found.number.endswith(f"% of {whole.detail['count']} on 10 new clips")
    assert str(whole.detail["count"]) in embedded.headline(rows)
    assert plots.as_svg(rows, "embedded", "") == {}, "nothing was timed"


def test_a_model_that_became_worse_fails(monkeypatch):
    def silent(self, encoded, questions, clip_of_text, **how):
        return ["red"] * len(questions)

    monkeypatch.setattr(Answerer, "generate", silent)
    rows = embedded.cases(QUICK)[0].run(QUICK)
    assert rows[-1].status == "FAIL"
    assert "the card says" in rows[-1].reason
    assert 0 < rows[-1].detail["share"] < 0.4


def test_without_the_extras_it_says_so(monkeypatch):
    whole = builtins.__import__

    def without(name, *arguments, **more):
        if name.partition(".")[0] == "transformers":
            raise ImportError("no transformers")
        return whole(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    (row,) = embedded.cases(QUICK)[0].run(QUICK)
    assert row.status == "SKIP"
    assert "[text]" in row.reason
    assert embedded.tables([row])[0].notes == [row.reason]
    assert embedded.headline([row]) == ""
