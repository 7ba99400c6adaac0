"""A table from end to end with a tiny model: what is written is what the model says, and nothing is left out."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mirasol
from mirasol.data import Example, collate, load_clip
from mirasol.data.sets import SETS
from mirasol.evaluate import ask, evaluate
from mirasol.evaluation.answer import Answerer
from mirasol.evaluation.options import AnswerOptions, EvaluateOptions
from mirasol.tokenizer import ByteTokenizer, encode_answer, encode_prompt


def options(folder, **changes) -> EvaluateOptions:
    return EvaluateOptions(**{"out": str(folder), "max_new_tokens": 6, "progress": False, "device": "cpu", **changes})


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture
def encoded(run):
    """What the model alone makes of an example's clip."""
    model = mirasol.Model.from_pretrained(run)

    def encode(example):
        return model, model.encode(**collate([load_clip(example, model.config, 16)]))

    return encode


def test_answers_are_those_of_the_model_alone(run, examples, encoded, tmp_path):
    evaluate(run, examples, options(tmp_path, batch=2, texts_at_once=2))
    said, tokenizer = lines(tmp_path), ByteTokenizer()
    assert [row["id"] for row in said] == [example.id for example in examples]
    for example, row in zip(examples, said, strict=True):
        if "broken" in example.clip:
            continue
        model, latents = encoded(example)
        prompt = encode_prompt(tokenizer, example.question)
        if example.choices:
            answers = [encode_answer(tokenizer, text) for text in example.choices]
            scores = model.score(latents, [prompt], [answers])[0].tolist()
            assert list(row["log_probabilities"]) == list(example.choices)
            assert list(row["log_probabilities"].values()) == pytest.approx(scores, rel=1e-4)
            assert row["answer"] == example.choices[scores.index(max(scores))]
        else:
            ids = model.generate(latents=latents, prompt=torch.tensor([prompt]), max_new_tokens=6)[0, len(prompt) :]
            assert row["answer"] == tokenizer.decode(ids.tolist()).split("<eos>")[0].strip()
    free = {row["answer"] for row in said if "log_probabilities" not in row and "error" not in row}
    assert len(free) > 1


def test_a_broken_clip_is_named_and_wrong(run, examples, clips, tmp_path):
    told = evaluate(run, examples, options(tmp_path))
    assert [entry["clip"] for entry in told["broken"]] == [clips[2]]
    assert "broken.mp4" in told["broken"][0]["reason"]
    assert told["examples"] == 7
    assert told["clips"] == 4
    assert told["unlabelled"] == 1
    assert told["metrics"]["accuracy"]["all"]["count"] == 6
    assert told["metrics"]["accuracy"]["choice"]["count"] == 3
    for row in lines(tmp_path):
        if row["clip"] == clips[2]:
            assert row["right"] is False
            assert row["answer"] == ""
            assert "broken.mp4" in row["error"]
    assert lines(tmp_path)[4]["right"] is None


def test_nothing_but_broken_clips_is_an_evaluation_too(run, clips, tmp_path):
    table = [Example(clips[2], f"{i}?", "yes", start=i / 10, end=1.0) for i in range(25)]
    told = evaluate(run, table, options(tmp_path, batch=4))
    assert told["metrics"]["exact_match"]["all"] == {"value": 0.0, "count": 25}
    assert len(lines(tmp_path)) == 25


def test_the_same_bits_each_time_whatever_is_asked_at_once(run, examples, tmp_path):
    runs = [dict(batch=3), dict(batch=3), dict(batch=1, texts_at_once=1), dict(batch=8, workers=1)]
    for i, changes in enumerate(runs):
        evaluate(run, examples, options(tmp_path / str(i), **changes))
    first, second, apart, workers = (lines(tmp_path / str(i)) for i in range(4))
    assert first == second
    for name in ("metrics.json", "report.html"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    answers = [row["answer"] for row in first]
    assert [row["answer"] for row in apart] == [row["answer"] for row in workers] == answers


def test_a_table_on_disk_with_a_doubled_row(run, clips, tmp_path):
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("clip", "question", "answer"), *[(clips[0], "what?", "dog")] * 2])
    told = evaluate(run, tmp_path / "table.csv", options(tmp_path / "out"))
    assert told["table"] == str(tmp_path / "table.csv")
    assert told["clips"] == 1
    first, second = lines(tmp_path / "out")
    assert first == second
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == told


def test_classes_are_scored_in_parts(run, clips, tmp_path, encoded):
    names = ("dog barking", "rain", "people, cheering", "wind")
    table = [Example(clips[i % 2], answer=name, id=f"{i}.mp4") for i, name in enumerate(names)]
    file = tmp_path / "classes.txt"
    file.write_text("\n".join(names) + "\n")
    told = evaluate(run, table, options(tmp_path, classes=str(file), texts_at_once=3, mean_per_token=True))
    assert list(told["metrics"]) == ["accuracy", "top5", "per_class"]
    assert told["metrics"]["top5"]["all"]["value"] == 1.0
    for example, row in zip(table, lines(tmp_path), strict=True):
        model, latents = encoded(example)
        ids = [encode_answer(ByteTokenizer(), name) for name in names]
        scores = model.score(latents, [encode_prompt(ByteTokenizer(), "")], [ids])[0].tolist()
        means = {name: score / len(i) for name, score, i in zip(names, scores, ids, strict=True)}
        assert row["log_probabilities"] == pytest.approx(means, rel=1e-4)
        assert row["answer"] == max(means, key=means.__getitem__) == next(iter(row["log_probabilities"]))
    same = evaluate(run, table, options(tmp_path / "table", classes="table", texts_at_once=3, mean_per_token=True))
    assert same["metrics"] == told["metrics"]


def test_beams_and_bfloat16_answer_too(run, examples, tmp_path):
    evaluate(run, examples[:3], options(tmp_path, num_beams=2, bf16=True))
    assert all(isinstance(row["answer"], str) for row in lines(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(classes="missing.txt"), "classes must be .* file"),
        (dict(classes="cat\n"), "classes must hold every answer of the table, was \"without \\['dog'\\]"),
        (dict(classes="dog\ndog\n"), "classes must name each class once"),
        (
            dict(classes="table", benchmark="epic-sounds"),
            "classes must be a file with the classes in order of class_id",
        ),
    ],
)
def test_classes_that_cannot_be_meant_are_refused(run, clips, tmp_path, changes, words):
    if "\n" in changes["classes"]:
        (tmp_path / "classes.txt").write_text(changes["classes"])
        changes = {"classes": str(tmp_path / "classes.txt")}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        evaluate(run, [Example(clips[0], answer="dog")], options(tmp_path, **changes))


def test_choices_and_classes_exclude_each_other(run, examples, tmp_path):
    with pytest.raises(ValueError, match="classes must be left out where examples have choices"):
        evaluate(run, examples, options(tmp_path, classes="table"))
    with pytest.raises(ValueError, match="table must hold at least one example"):
        evaluate(run, [], options(tmp_path))


@pytest.mark.parametrize("name", ["batch", "max_chunks", "max_new_tokens", "num_beams", "texts_at_once"])
def test_options_name_what_they_must_be(name):
    with pytest.raises(ValueError, match=name):
        EvaluateOptions(**{name: 0})


def test_ask_answers_as_the_evaluation_does(run, examples, tmp_path):
    evaluate(run, examples, options(tmp_path))
    said = lines(tmp_path)
    how = AnswerOptions(max_new_tokens=6, device="cpu")
    for i in (0, 2, 6):
        e = examples[i]
        answer = ask(run, e.clip, e.question, start=e.start, end=e.end, choices=e.choices, options=how)
        assert answer == said[i]["answer"]
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        ask(run, examples[3].clip, "what?", options=how)


def test_answers_end_at_the_end(run, clips):
    answerer = Answerer(run, AnswerOptions(device="cpu"))
    assert answerer._text([104, 105, 32, 258, 104, 256]) == "hi"
    assert answerer._text([256, 256]) == ""


def test_each_clip_is_read_once(run, examples, tmp_path):
    read = []

    def source(example, config, max_chunks):
        read.append((example.clip, example.start, example.end))
        return load_clip(example, config, max_chunks)

    evaluate(run, [*examples, *(replace(e, question="and?") for e in examples)], options(tmp_path), source=source)
    assert len(read) == len(set(read)) == 4


@pytest.mark.parametrize(
    ("file", "told", "chunks"),
    [(None, {}, 16), ("options.json", {"max_chunks": 3}, 3), ("world.json", {"chunks": 32}, 32)],
)
def test_a_clip_is_read_as_long_as_the_model_has_learned(run, examples, tmp_path, file, told, chunks):
    folder, seen = tmp_path / "run", []
    shutil.copytree(run, folder)
    if file is not None:
        (folder / file).write_text(json.dumps(told))

    def source(example, config, max_chunks):
        seen.append(max_chunks)
        return load_clip(example, config, max_chunks)

    evaluate(folder, examples[:1], options(tmp_path), source=source)
    evaluate(folder, examples[:1], options(tmp_path, max_chunks=5), source=source)
    assert seen == [chunks, 5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(benchmark="msrvtt-qa"), "id must be the question's own name in msrvtt-qa"),
        (dict(benchmark="vggsound"), "classes must be given for vggsound"),
        (dict(benchmark="nextqa-oe"), "id must be"),
    ],
)
def test_what_a_set_cannot_take_is_refused_before_anything_is_read(clips, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        evaluate(tmp_path / "no run", [Example(clips[0], "what?", "dog")], options(tmp_path, **changes))


def test_a_published_set_from_its_files_to_its_predictions(run, clips, tmp_path):
    names = [Path(clip).name for clip in clips]
    (tmp_path / "test.csv").write_text("".join(f'{name},"{name[0]}, loud"\n' for name in names))
    table = SETS["vggsound"](tmp_path, "test", Path(clips[0]).parent)
    told = evaluate(run, table, options(tmp_path / "out", benchmark="vggsound", classes="table"))
    assert told["metrics"]["accuracy"]["all"]["count"] == 3
    assert sorted(file.name for file in (tmp_path / "out" / "predictions").iterdir()) == [f"{n}.npy" for n in names]
