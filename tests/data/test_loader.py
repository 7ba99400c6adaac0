"""The loader: what is in a batch, the order, resuming exactly, ranks, broken files."""

import gc
import json
import logging
import signal
from pathlib import Path

import av
import pytest
import torch

from mirasol.config import Config
from mirasol.data import Batch, ClipTensors, Example, Loader, collate, load_clip
from mirasol.tokenizer import ByteTokenizer

CONFIG, BYTES = Config.preset("tiny"), ByteTokenizer()


def table(clips: int, questions: int = 1) -> list[Example]:
    return [Example(f"{c}.mp4", f"q{c}.{q}", f"a{q}") for c in range(clips) for q in range(questions)]


class Fake:
    """A source that reads no file: the clip's number is in every sample; clips in `broken` cannot be read."""

    def __init__(self, broken: set[str] | None = None) -> None:
        self.broken, self.asked = broken or set(), []

    def __call__(self, example: Example, config: Config, max_chunks: int) -> ClipTensors:
        self.asked.append(example.clip)
        if example.clip in self.broken:
            raise ValueError(f"no moov in {example.clip}")
        number = int(Path(example.clip).stem)
        return ClipTensors(torch.arange(1 + number % 3) * 0.16, audio=torch.full((2560 * (1 + number % 3),), number))


def loader(examples, **options) -> Loader:
    return Loader(examples, CONFIG, BYTES, **{"batch_clips": 3, "source": Fake(), **options})


def same(a: Batch, b: Batch) -> bool:
    tensors = a.inputs.keys() == b.inputs.keys() and all(torch.equal(a.inputs[k], b.inputs[k]) for k in a.inputs)
    return tensors and a[1:] == b[1:]


def asked(batches) -> list[str]:
    return [example.question for batch in batches for example in batch.examples]


def test_a_batch_is_what_loading_and_collating_alone_give(media):
    clips = [str(media / name) for name in ("0.mp4", "sound.wav", "4.mp4", "still.png")]
    examples = [
        Example(clip, f"what {q}?", f"it {q}", end=end) for q in range(2) for clip in clips for end in (0.3, 0.6)
    ]
    made = Loader(examples, CONFIG, BYTES, batch_clips=3, max_chunks=4, workers=2)
    batches = list(made)
    assert len(batches) == len(made) == 3
    assert [len(batch.examples) for batch in batches] == [6, 6, 4]
    for batch in batches:
        spans = list(dict.fromkeys((e.clip, e.end) for e in batch.examples))
        alone = collate(
            [load_clip(Example(clip, end=end), CONFIG, 4) for clip, end in spans],
            [e.question for e in batch.examples],
            [e.answer for e in batch.examples],
            tokenizer=BYTES,
            clip_of_text=[spans.index((e.clip, e.end)) for e in batch.examples],
        )
        assert alone.keys() == batch.inputs.keys()
        assert all(torch.equal(batch.inputs[name], value) for name, value in alone.items())
    assert sorted(asked(batches)) == sorted(e.question for e in examples)


def test_workers_do_not_wait_for_threads_of_decoders_among_the_garbage(media):
    def source(example, config, max_chunks):
        gc.collect()
        return Fake()(example, config, max_chunks)

    gc.collect()
    gc.disable()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the workers wait"))
    signal.alarm(20)
    try:
        with av.open(str(media / "long.mp4")) as container:
            for frame in container.decode(video=0):
                frame.to_ndarray(format="rgb24")
                assert frame.side_data is not None  # which is tied to its frame in a circle
        del frame
        assert len(list(loader(table(6), source=source, workers=2))) == 2
    finally:
        signal.alarm(0)
        gc.enable()


def test_a_clip_is_read_once_for_all_its_questions():
    source = Fake()
    batches = list(loader(table(5, 4), source=source))
    assert source.asked == [f"{c}.mp4" for c in range(5)]
    assert asked(batches) == [e.question for e in table(5, 4)]
    apart = [table(2, 2)[i] for i in (0, 2, 1, 3)]
    assert asked(loader(apart)) == ["q0.0", "q0.1", "q1.0", "q1.1"]


def test_questions_of_a_clip_all_come_before_any_comes_again():
    made = loader(table(4, 7), questions_per_clip=3, seed=5)
    epochs = [asked(made) for _ in range(7)]
    assert all(len(epoch) == 12 for epoch in epochs)
    for clip in range(4):
        seen = [question for epoch in epochs for question in epoch if question.startswith(f"q{clip}.")]
        assert sorted(seen) == sorted([f"q{clip}.{q}" for q in range(7)] * 3)
        assert len(set(seen[:6])) == 6
    assert asked(made) == epochs[0]


def test_every_epoch_has_another_order_of_all_clips_and_a_seed_repeats_it():
    first, again, other = (loader(table(20), shuffle=True, seed=seed) for seed in (1, 1, 2))
    epochs = [asked(first) for _ in range(3)]
    assert [asked(again) for _ in range(3)] == epochs
    assert all(sorted(epoch) == sorted(e.question for e in table(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, asked(other)]}) == 4
    assert asked(loader(table(20))) == [e.question for e in table(20)]


def test_without_answers_texts_are_prompts_and_without_tokenizer_there_are_none():
    examples = [Example("1.mp4", "a"), Example("2.mp4", "b")]
    (prompts,), (clips,) = loader(examples, answers=False), Loader(examples, CONFIG, None, batch_clips=2, source=Fake())
    assert prompts.inputs["text"].tolist() == [[257, *b"a\n"], [257, *b"b\n"]]
    assert "labels" not in prompts.inputs
    assert set(clips.inputs) == {"audio", "chunks", "times", "video_present", "audio_present"}
    assert clips.examples == examples
    with pytest.raises(ValueError, match="examples must have an answer each, or answers be False"):
        loader(examples)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 7, 9, 10])
def test_a_resumed_loader_goes_on_bitwise_with_any_number_of_workers(workers, stop):
    def made(count: int) -> Loader:
        source = Fake({"3.mp4", "11.mp4"})
        options = dict(shuffle=True, questions_per_clip=2, workers=count, bad_share=0.5, source=source)
        return loader(table(13, 3), **options)

    def run(one: Loader):
        while True:
            yield from one

    straight, broken_off = run(made(0)), made(workers)
    expected = [next(straight) for _ in range(14)]
    before = run(broken_off)
    given = [next(before) for _ in range(stop)]
    state = json.loads(json.dumps(broken_off.state_dict()))
    resumed = made(2 - workers)
    resumed.load_state_dict(state)
    after = run(resumed)
    given += [next(after) for _ in range(14 - stop)]
    assert all(same(a, b) for a, b in zip(given, expected, strict=True))
    assert {clip for clip, _ in resumed.skipped} == {"3.mp4", "11.mp4"}
    before.close()
    after.close()


def test_counts_of_broken_clips_are_part_of_the_state():
    def made() -> Loader:
        return loader(table(40), batch_clips=10, bad_share=0.2, source=Fake({f"{i}.mp4" for i in range(15, 23)}))

    straight, first = made(), made()
    with pytest.raises(RuntimeError, match="5 of 20 clips"):
        list(straight)
    next(iter(first))
    resumed = made()
    resumed.load_state_dict(first.state_dict())
    with pytest.raises(RuntimeError, match="5 of 20 clips"):
        list(resumed)
    assert resumed.state_dict() == straight.state_dict()


def test_a_state_of_another_order_is_refused():
    state = loader(table(9), shuffle=True).state_dict()
    for name, options in {"seed": dict(seed=1), "clips_per_step": dict(batch_clips=2), "shuffle": {}}.items():
        with pytest.raises(ValueError, match=f"state.'{name}'"):
            loader(table(9), **{"shuffle": name != "shuffle", **options}).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state.'examples'"):
        loader(table(9, 2), shuffle=True).load_state_dict(state)
    loader(table(9), shuffle=True, batch_clips=1, world=3, rank=2).load_state_dict(state)


def test_breaking_off_an_epoch_leads_to_the_next():
    made = loader(table(9), shuffle=True)
    first = next(iter(made))
    assert not same(next(iter(made)), first)
    assert made.state_dict()["epoch"] == 1


# torchdata 0.11 calls what PyTorch has deprecated since
@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader_of_torchdata_resumes_bitwise(workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def made(count: int):
        one = loader(table(13, 2), shuffle=True)
        loaded = stateful.StatefulDataLoader(one.batches, batch_size=None, sampler=one.steps, num_workers=count)
        return one, loaded

    straight = loader(table(13, 2), shuffle=True)
    expected = [batch for _ in range(3) for batch in straight]
    _, first = made(workers)
    given = list(first)
    running = iter(first)
    given += [next(running) for _ in range(2)]
    state = first.state_dict()
    del running
    _, second = made(workers)
    second.load_state_dict(state)
    given += list(second)
    given += list(second)
    assert len(given) == len(expected)
    assert all(same(a, b) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize("clips", [1, 2, 5, 9, 12, 13, 17])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_have_equal_numbers_of_batches_and_every_clip_once(clips, world):
    ranks = [loader(table(clips, 2), rank=rank, world=world, shuffle=True) for rank in range(world)]
    for _ in range(2):
        batches = [list(rank) for rank in ranks]
        assert {len(own) for own in batches} == {-(-clips // (3 * world))}
        assert all(batch.examples for own in batches for batch in own)
        counted = asked(batch for own in batches for batch in own if not batch.repeated)
        assert sorted(counted) == sorted(e.question for e in table(clips, 2))


def test_a_step_holds_the_same_clips_for_any_number_of_ranks():
    alone = list(loader(table(14), batch_clips=4, shuffle=True))
    ranks = [list(loader(table(14), batch_clips=2, shuffle=True, rank=rank, world=2)) for rank in range(2)]
    assert [asked([batch]) for batch in alone] == [asked(step) for step in zip(*ranks, strict=True)]


def test_a_broken_clip_is_named_logged_and_left_out(media, tmp_path, caplog):
    (tmp_path / "bad.mp4").write_bytes((media / "0.mp4").read_bytes()[:300])
    clips = [media / "0.mp4", tmp_path / "bad.mp4", media / "1.mp4", tmp_path / "gone.mp4"]
    examples = [Example(str(clip), "q", "a") for clip in clips]
    made = Loader(examples, CONFIG, BYTES, batch_clips=2, bad_share=0.5, workers=2)
    with caplog.at_level(logging.WARNING):
        batches = list(made)
    assert [[Path(e.clip).name for e in batch.examples] for batch in batches] == [["0.mp4"], ["1.mp4"]]
    assert [batch.inputs["chunks"].shape for batch in batches] == [(1,), (1,)]
    assert [Path(clip).name for clip, _ in made.skipped] == ["bad.mp4", "gone.mp4"]
    assert "FileNotFoundError" in made.skipped[1][1]
    assert [record.message for record in caplog.records] == [f"{c} is left out: {reason}" for c, reason in made.skipped]
    list(made)
    assert len(made.skipped) == 2


def test_a_step_of_broken_clips_alone_repeats_another_clip():
    made = loader(table(7), batch_clips=2, bad_share=0.5, source=Fake({"2.mp4", "3.mp4", "6.mp4"}))
    batches = list(made)
    assert [asked([batch]) for batch in batches] == [["q0.0", "q1.0"], ["q4.0"], ["q4.0", "q5.0"], ["q0.0"]]
    assert [batch.repeated for batch in batches] == [False, True, False, True]


def test_too_many_broken_clips_stop_the_run_by_name():
    broken = {f"{i}.mp4" for i in range(3, 18)}
    with pytest.raises(
        RuntimeError, match=r"15 of 21 clips .* bad_share = 0\.1: 3\.mp4 \(Val.*; 12\.mp4.*; and 5 more"
    ):
        list(loader(table(40), bad_share=0.1, source=Fake(broken)))
    with pytest.raises(RuntimeError, match=r"1 of 3 clips cannot be read.*1\.mp4 \(ValueError: no moov"):
        list(loader(table(3), source=Fake({"1.mp4"})))
    with pytest.raises(RuntimeError, match="3 clips in a row cannot be read"):
        list(loader(table(3), bad_share=1.0, source=Fake({f"{i}.mp4" for i in range(3)})))
    assert len(list(loader(table(40), source=Fake({"39.mp4", "20.mp4"})))) == 14


def test_a_defect_of_the_source_is_not_taken_for_a_broken_clip():
    def source(example, config, max_chunks):
        raise TypeError("wrong call")

    with pytest.raises(TypeError, match="wrong call"):
        list(loader(table(3), source=source))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (dict(batch_clips=0), ValueError),
        (dict(questions_per_clip=0), ValueError),
        (dict(workers=-1), ValueError),
        (dict(rank=1), ValueError),
        (dict(bad_share=1.5), ValueError),
        (dict(seed=-1), ValueError),
        (dict(max_chunks=2.5), TypeError),
    ],
)
def test_arguments_out_of_range_are_named(changes, error):
    with pytest.raises(error, match=f"^{next(iter(changes))} must"):
        loader(table(3), **changes)
    with pytest.raises(ValueError, match=r"^examples must hold"):
        loader([])
