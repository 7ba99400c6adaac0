"""The adapter for lmms-eval, against a stand-in for the few of its modules that it uses."""

import importlib
import sys
from importlib.metadata import EntryPoint

import fake_lmms
import pytest

from mirasol.evaluate import ask
from mirasol.evaluation.options import AnswerOptions

OPTIONS = AnswerOptions(max_new_tokens=6, device="cpu")


@pytest.fixture
def adapter(monkeypatch):
    """The class as lmms-eval resolves it: entry point, manifest, class path."""
    fake_lmms.install(monkeypatch)
    manifest = EntryPoint("mirasol", "mirasol.evaluation.lmms:manifest", "lmms_eval.models").load()()
    assert (manifest.model_id, manifest.aliases) == ("mirasol", ("mirasol3b",))
    module, _, name = manifest.simple_class_path.rpartition(".")
    yield getattr(importlib.import_module(module), name)
    del sys.modules[module]


@pytest.fixture
def model(adapter, run, clips):
    made = adapter.create_from_arg_string(
        f"pretrained={run}", {"batch_size": 1, "device": "cpu", "max_batch_size": None}
    )
    made.task_dict["task"] = {"test": [{"path": clip} for clip in clips]}
    return made


def visual(doc):
    return [doc["path"]]


def request(context, second, doc_id, kind="generate_until", to_visual=visual):
    return fake_lmms.Instance(kind, (context, second, to_visual, doc_id, "task", "test"), 0)


def test_the_entry_point_is_declared():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\nmirasol = "mirasol.evaluation.lmms:manifest"' in text


def test_generate_until_answers_in_the_order_of_the_requests(model, run, clips, monkeypatch):
    read = []
    plain = model._read
    monkeypatch.setattr(model, "_read", lambda path: (read.append(path), plain(path))[1])
    how = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    requests = [request("what?", how, 0), request("who?", how, 1), request("which?", how, 0), request("what?", how, 2)]
    answers = model.generate_until(requests)
    alone = [
        ask(run, clips[i], question, options=OPTIONS) for i, question in ((0, "what?"), (1, "who?"), (0, "which?"))
    ]
    assert answers == [*alone, ""]
    assert sorted(read) == sorted(clips)
    assert ("generate_until", ("who?", how), answers[1]) in model.cache_hook.seen
    model.generate_until(requests)
    assert len(read) == len(clips)


def test_few_clips_are_kept(model, clips, monkeypatch):
    model._kept = 1
    how = {"max_new_tokens": 2}
    model.generate_until([request("what?", how, 0), request("what?", how, 1)])
    assert list(model._latents) == [clips[1]]


def test_answers_stop_at_what_the_task_says(model, monkeypatch):
    monkeypatch.setattr(model._answerer, "generate", lambda *_, **how: ["a dog. And\nmore"])
    assert model.generate_until([request("what?", {"until": ["\n"]}, 0)]) == ["a dog. And"]
    assert model.generate_until([request("what?", {"until": "."}, 0)]) == ["a dog"]
    assert model.generate_until([request("what?", {"until": [""]}, 0)]) == ["a dog. And\nmore"]


def test_options_of_the_task_reach_the_model(model, monkeypatch):
    given = []
    monkeypatch.setattr(model._answerer, "generate", lambda *_, **how: (given.append(how), ["x"])[1])
    greedy = {"max_new_tokens": 3, "temperature": 0, "do_sample": True, "num_beams": 2, "until": ["\n"], "other": 1}
    model.generate_until([request("what?", greedy, 0)])
    model.generate_until([request("what?", {"do_sample": True, "temperature": 0.7, "top_p": 0.9}, 0)])
    assert given == [
        {"max_new_tokens": 3, "num_beams": 2},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    ]


def test_loglikelihood_is_a_loss_that_the_likeliest_choice_has_least_of(model, run, clips):
    choices = ("a", "b", "c and d")
    requests = [request("which?", f" {text}", 0, "loglikelihood") for text in choices]
    requests.append(request("which?", lambda doc: "b", 0, "loglikelihood"))
    requests.append(request("which?", " a", 2, "loglikelihood"))
    *told, called, broken = model.loglikelihood(requests)
    losses = [loss for loss, _ in told]
    assert all(loss > 0 for loss in losses)
    assert called == told[1]
    assert broken == (float("inf"), False)
    best = ask(run, clips[0], "which?", choices=choices, options=OPTIONS)
    assert choices[losses.index(min(losses))] == best


def test_loglikelihood_knows_what_is_greedy(model, monkeypatch):
    monkeypatch.setattr(
        model._answerer, "generate", lambda *_, **how: ["zebra"] if how["max_new_tokens"] == 6 else ["?"]
    )
    told = model.loglikelihood([request("what?", text, 0, "loglikelihood") for text in (" zebra", "horse", "zebras")])
    assert [greedy for _, greedy in told] == [True, False, False]


def test_rounds_go_on_until_the_task_ends_them(model, run, clips):
    def to_text(doc, previous_output, round_idx, previous_round_info):
        assert len(previous_output) == round_idx
        if round_idx == 3:
            return None, None, True, previous_output, None
        return ([clips[1]] if round_idx == 1 else None), f"round {round_idx}?", False, previous_output, round_idx

    arguments = ("first?", {"max_new_tokens": 6}, visual, to_text, 0, "task", "test")
    rounds = model.generate_until_multi_round([fake_lmms.Instance("generate_until_multi_round", arguments, 0)])
    asked = ((0, "first?"), (1, "round 1?"), (1, "round 2?"))
    assert rounds == [[ask(run, clips[i], question, options=OPTIONS) for i, question in asked]]


@pytest.mark.parametrize("given", [[], [1.5], ["a.mp4", "b.mp4"], [{"array": [0.0], "sampling_rate": 16000}]])
def test_what_is_no_path_of_one_file_is_refused(model, given):
    with pytest.raises(ValueError, match="visuals must be the path of one media file"):
        model.generate_until([request("what?", {}, 0, to_visual=lambda doc: given)])


def test_the_package_does_without_lmms_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    import mirasol.evaluation.lmms

    with pytest.raises(ImportError):
        mirasol.evaluation.lmms.manifest()
