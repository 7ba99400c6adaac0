"""The study: its rows, its clips, its queue, one small run from end to end, and what is told of results."""

import json
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

import learn
from core import provenance
from learning import data, floor, plots, queue, report, rows, run
from learning.rows import ROWS, Stage
from mirasol import Model
from mirasol.config import Config
from mirasol.data import Example, collate, read_table
from mirasol.data.worlds.questions import Ask, Question
from mirasol.data.worlds.spec import Event, Picture, Sound, World
from mirasol.tokenizer import encode_prompt
from report import claims

FAMILIES = rows.FAMILIES


@pytest.fixture
def quick(monkeypatch):
    """A recipe of seconds."""
    monkeypatch.setattr(rows, "STAGES", (Stage(2, 2, 3, batch=4), Stage(4, 2, 2, batch=4)))
    for module in (rows, run):
        monkeypatch.setattr(module, "BASE", Stage(1, 1, 2, batch=4))
    monkeypatch.setattr(data, "CLIPS", 20)
    monkeypatch.setattr(data, "TEST_CLIPS", 20)
    for cached in (data.draw_test, data.types):
        cached.cache_clear()
    yield
    for cached in (data.draw_test, data.types):
        cached.cache_clear()


def test_every_row_is_a_model_of_its_own():
    configs = {name: Config.preset("tiny", **row.config) for name, row in ROWS.items()}
    assert len({row.digest for row in ROWS.values()}) == len(ROWS)
    assert all(configs[name].text_window == (None if row.group == "sight" else 1) for name, row in ROWS.items())
    compared = [configs[name] for name, row in ROWS.items() if row.group == "combiner"]
    assert {config.latents_per_chunk for config in compared} == {4, 16}
    assert {row.name for row in rows.chosen(False)} == {"ttm", "all-4", "this-1"}
    assert len(rows.chosen(True)) == len(ROWS)


def test_a_changed_recipe_is_another_row(monkeypatch):
    before = ROWS["ttm"].digest
    assert replace(ROWS["ttm"], lr=1e-3).digest != before
    assert replace(ROWS["ttm"], families=("what",)).digest != before
    monkeypatch.setattr(rows, "CLIPS", 7)
    assert ROWS["ttm"].digest != before


def test_clips_of_all_stages_end_together_and_are_drawn_anew(tmp_path, quick):
    config = Config.preset("tiny", **rows.MODEL)
    drawn = [data.draw_stage(Stage(chunks, 2, 1), FAMILIES, 5, 8, tmp_path / f"{chunks}.csv") for chunks in (4, 8)]
    for source, chunks in zip(drawn, (4, 8), strict=True):
        clip = source(Example("3"), config, 99)
        assert clip.chunks == chunks
        assert clip.times[-1] == pytest.approx(7 * config.seconds_per_chunk)
        assert clip.video.shape == (3, 4 * chunks, 32, 32)
    again = data.draw_stage(Stage(8, 2, 1), FAMILIES, 5, 8, tmp_path / "again.csv")
    assert again.worlds == drawn[1].worlds
    assert read_table(tmp_path / "again.csv")[0].question == read_table(tmp_path / "8.csv")[0].question
    worlds, tables = data.draw_test(8, 2, FAMILIES)
    assert not set(worlds) & set(drawn[1].worlds)
    assert {question.ask.words for question in tables[data.TEST]} == set(FAMILIES)


def test_who_knows_the_last_chunk_says_what_it_shows():
    def event(start, end, colour, pitch):
        return Event(start, end, Picture(colour, "circle", "up", ("top left",)), Sound(pitch, "flute", "slow"))

    world = World((event(0, 3, "red", "low"), event(3, 8, "blue", "high")))
    red, blue, green = (("seen", (colour, "circle")) for colour in ("red", "blue", "green"))

    def asked(words, sense, noun, choices, key, **more):
        return Question(0, Ask(words, words, sense, noun, choices, **more), 0, key)

    colours = ("red", "blue")
    questions = [
        asked("what", "seen", "colour", colours, 0, side="first"),
        asked("what", "seen", "colour", colours, 1, side="last"),
        asked("ago", "heard", "pitch", ("low", "high"), 1, ago=2),
        asked("order", "seen", "order", ("red circle", "blue circle"), 0, cues=(red, blue)),
        asked("order", "seen", "order", ("green circle", "red circle"), 1, cues=(green, red)),
        asked("while", "seen", "colour", colours, 1, side="last"),
    ]
    assert floor.last_chunk([world], questions) == {"what": [1, 2], "ago": [1, 1], "order": [1.5, 2], "all": [3.5, 5]}


def test_an_answer_counts_where_greedy_decoding_writes_it(quick):
    torch.manual_seed(0)
    tokenizer = data.study_tokenizer()
    size = dict(vocab_size=len(tokenizer), pad_id=0, bos_id=1, eos_id=2)
    model = Model(Config.preset("tiny", **rows.MODEL, combiner="mean", **size)).eval()
    worlds, tables = data.draw_test(4, 2, FAMILIES)
    questions, source = tables[data.TEST], data.Rendered(worlds)
    clip = questions[0].clip
    clips = collate([source(Example(str(clip)), model.config, 4)])
    latents = model.encode(clips["video"], clips["audio"], times=clips["times"])
    prompt = torch.tensor([encode_prompt(tokenizer, questions[0].text)])
    written = model.generate(latents=latents, prompt=prompt, max_new_tokens=3)[0, prompt.shape[1] :].tolist()
    said = tokenizer.decode(written[: written.index(2)] if 2 in written else written)
    told = []
    for choices in ((said, "other"), ("other", said)):
        ask = replace(questions[0].ask, choices=choices)
        ids = tokenizer.encode(said, add_special_tokens=False)
        ends = written[len(ids) : len(ids) + 1] == [2]
        told.append(run._right(model, tokenizer, source, [replace(questions[0], ask=ask, key=0)])["all"] == [ends, 1])
    assert told[0]
    wrong = replace(questions[0], ask=replace(questions[0].ask, choices=("zebra",)), key=0)
    assert run._right(model, tokenizer, source, [wrong])["all"] == [0, 1]


def test_a_row_is_trained_from_its_base_and_goes_on(tmp_path, quick):
    row = replace(ROWS["ttm-pretrained"], chunks=4, pretrain=1)
    base = run.learn_base(0, tmp_path / "base")
    grown = run._grown(row, 0, base).state_dict()
    known = Model.from_pretrained(base).state_dict()
    own = [name for name in grown if name not in known or not torch.equal(grown[name], known[name])]
    assert own
    assert all(name.startswith(("combiner.", "audio_video.slots")) for name in own)
    told = run.learn_row(row, 0, tmp_path / "row", base)
    json.dumps(told)
    assert told["steps"] == 2 + 1 + 3 + 2
    assert told["right"][data.TEST]["all"][1] == len(data.draw_test(4, 2, FAMILIES)[1][data.TEST])
    assert told["floors"]["all"]["count"] == told["right"][data.TEST]["all"][1]
    assert told["stream_bytes"] > 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert {path.parent.name for path in written} == {"base", "begin", "pretrained", "chunks-2", "chunks-4"}
    assert run.learn_base(0, tmp_path / "base") == base
    again = run.learn_row(row, 0, tmp_path / "row", base)
    assert again["right"] == told["right"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Stands in for `learn.py --job`: writes what it was told, fails for "mean", and needs the base to be there."""
    path = tmp_path / "job.py"
    path.write_text(
        textwrap.dedent(f"""
        import json, sys
        sys.path[:0] = {sys.path!r}
        from pathlib import Path
        from learning import queue
        from learning.rows import ROWS
        told = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        name, seed, work = told["--job"], int(told["--seed"]), Path(told["--work"])
        row = None if name == "base" else ROWS[name]
        assert row is None or (work / f"base-{{seed}}" / "result.json").is_file()
        if name == "mean":
            sys.exit("no")
        result = dict(row=name, seed=seed, digest=row.digest if row else "")
        (queue.work_of(queue.Job(row, seed), work) / "result.json").write_text(json.dumps(result))
        """)
    )
    monkeypatch.setattr(queue, "COMMAND", path)
    return path


def test_the_queue_runs_what_is_missing_and_tells_what_failed(tmp_path, program):
    chosen = [ROWS[name] for name in ("ttm", "mean", "all-1")]
    kept, said = [], []
    jobs = queue.missing(chosen, range(2), [])
    failed = queue.run_all(jobs, tmp_path / "work", 2, kept.append, said.append)
    assert sorted(failed) == ["mean-0", "mean-1"]
    assert {(one["row"], one["seed"]) for one in kept} == {(name, seed) for name in ("ttm", "all-1") for seed in (0, 1)}
    assert sum("FAIL mean" in line for line in said) == 2
    left = queue.missing(chosen, range(2), kept)
    assert [job.name for job in left] == ["mean-0", "mean-1"]
    stale = [{**one, "digest": "of another recipe"} for one in kept]
    assert len(queue.missing(chosen, range(2), stale)) == 6


def test_an_interrupt_ends_all_runs_and_keeps_what_is_there(tmp_path, program):
    program.write_text(
        program.read_text().replace(
            'if name == "mean":', 'if name == "all-1":\n    import time\n    time.sleep(60)\nif name == "mean":'
        )
    )
    kept = []

    def keep(result):
        kept.append(result)
        raise KeyboardInterrupt

    jobs = queue.missing([ROWS["all-1"], ROWS["ttm"]], [0], [])
    with pytest.raises(KeyboardInterrupt):
        queue.run_all(jobs, tmp_path / "work", 2, keep, print)
    assert [one["row"] for one in kept] == ["ttm"]
    assert [job.name for job in queue.missing([ROWS["all-1"], ROWS["ttm"]], [0], kept)] == ["all-1-0"]


def result(name: str, seed: int, right: int, far: int, **changes) -> dict:
    """A run with 100 questions of two types."""
    kinds = {"seen-ago-1": [right - far, 50], "seen-ago-16-31": [far, 50], "all": [right, 100]}
    floors = {kind: dict(count=pair[1], majority=0.2, question=0.25) for kind, pair in kinds.items()}
    tables = dict.fromkeys((report.TEST, report.HELD_OUT, report.WORDINGS), kinds)
    costs = dict(parameters=1000, flops=2_000_000, combiner_flops=1_000_000, stream_bytes=4000)
    told = dict(row=name, seed=seed, digest=ROWS[name].digest, chunks=32, events=3, right=tables, floors=floors)
    return {**told, **costs, **changes}


def test_results_are_kept_by_row_and_seed_and_told_with_their_spread(tmp_path):
    file = tmp_path / "learn.json"
    for one in (result("ttm", 0, 90, 41), result("all-4", 0, 80, 30, flops=4_000_000), result("ttm", 1, 50, 5)):
        report.add(file, one)
    report.add(file, result("ttm", 1, 96, 48))
    report.add(file, result("mean", 0, 99, 49, digest="of another recipe"))
    results = report.read(file)
    assert [(one["row"], one["seed"]) for one in results["runs"]] == [("ttm", 0), ("ttm", 1), ("all-4", 0), ("mean", 0)]
    runs = report.current(results)
    assert list(runs) == ["ttm", "all-4"]
    own = report.share(runs["ttm"], "all")
    assert (own.mean, own.low, own.high) == (pytest.approx(0.93), 0.9, 0.96)
    assert str(report.far(runs["ttm"])) == "89.0 (82.0..96.0)"
    assert report.share(runs["ttm"], "how-many") is None
    assert report.guessed(runs["ttm"]) == 0.25
    combiners, kinds, published = report.tables(results)
    assert combiners.rows[0][:2] == ["ttm", ROWS["ttm"].says]
    assert combiners.rows[1][3:5] == ["80.0", "60.0"]
    assert kinds.rows[0] == ["guessed", "25", "25"]
    assert kinds.rows[1] == ["last chunk", "96", "36"]
    assert published.rows == [[ROWS["all-4"].says, "+13.0", "better", "50.0", "0.0"]]
    assert {path.name for path in plots.draw(results, tmp_path)} == {"learn-cost.png", "learn-ago.png"}


def test_claims_are_computed_and_know_the_code_that_they_are_of(tmp_path, monkeypatch):
    assert report.claims({"runs": [result("all-4", 0, 80, 30)]}) == []
    machine = {"commit": "abc", "dirty": False}
    about = dict(machine=machine, code=report.code())
    runs = [
        result("ttm", 0, 90, 41, **about),
        result("all-4", 0, 91, 45, flops=4_000_000, **about),
        result("this-1", 0, 30, 10, flops=2_100_000, **about),
        result("pooling", 0, 99, 49, flops=3_000_000, **about),
    ]
    told = {one["claim"]: one for one in report.claims({"runs": runs})}
    answers, remembers, saves = told.values()
    assert answers["number"] == "90.0 % right (guessed: 25 %)"
    assert answers["peer"] == "attention pooling, all chunks: 99.0 %"
    assert remembers["number"].startswith("4.00 kB; 82.0 % right about 16 and more chunks ago")
    assert remembers["peer"].endswith("98.0 %; who sees each chunk alone 20.0 %")
    assert saves["number"] == "against 1 of 3 Combiners"
    assert saves["peer"] == "Transformer, all chunks, 4 layers (50 %)"
    assert saves["fails"] == "this-1 5 %, +60.0 points; pooling 33 %, -9.0 points"
    (line, *_) = claims.claims([], {"runs": runs}, [])
    assert (line.claim, line.file, line.commit, line.state) == (answers["claim"], "learn.json", "abc", "current")
    old = {"runs": [*runs[1:], {**runs[0], "code": "of another commit"}]}
    assert report.state(old) == ("older than its code", "1 of 4 runs")
    assert report.state({"runs": [{**runs[0], "machine": {**machine, "dirty": True}}]})[0] == "uncommitted code"
    (line,) = claims.claims([], {"runs": []}, [])
    assert (line.claim, line.number) == ("What the Combiners learn", "not measured")


def test_a_file_of_another_schema_is_refused(tmp_path):
    (tmp_path / "learn.json").write_text('{"schema": 99, "runs": []}')
    with pytest.raises(ValueError, match="schema 99"):
        report.read(tmp_path / "learn.json")


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    for arguments, words in (
        (["--only", "nobody"], "--only must name rows"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            learn.main(arguments)
        assert words in capsys.readouterr().err
    assert learn.main(["--embed", "ttm-7", "--work", str(tmp_path)]) == 2
    assert "--embed must name a run" in capsys.readouterr().out
    assert learn.main(["--list", "--full", "--plain"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(ROWS)
    assert learn.main(["--show", "--plain", "--work", str(tmp_path)]) == 0


def test_results_of_uncommitted_code_are_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    monkeypatch.setattr(provenance, "commit", lambda: {"commit": "c", "dirty": True, "uncommitted": ["mirasol/ttm.py"]})
    monkeypatch.setattr(queue, "run_all", None)
    assert learn.main(["--only", "ttm", "--json", str(tmp_path / "learn.json"), "--work", str(tmp_path)]) == 2
    assert "not committed: ['mirasol/ttm.py']" in capsys.readouterr().out
