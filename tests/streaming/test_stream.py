"""A stream against the whole clip, its rows against one another, and what it keeps."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mirasol import ByteTokenizer, Config, Model
from mirasol.batch import Clips
from mirasol.streaming import Stream
from mirasol.streaming.advance import advance, new_past, reaches
from tolerance import assert_close

EXACT = 1e-10
WINDOWS: dict[str, Any] = dict(
    combiner_window=2, combiner_sinks=1, av_window=3, av_sinks=1, text_window=2, text_sinks=2
)
VARIANTS = {
    "transformer": dict(combiner="transformer"),
    "transformer, this chunk": dict(combiner="transformer", combiner_window=1, combiner_sinks=0),
    "ttm": dict(combiner="ttm"),
    "ttm, official": dict(combiner="ttm", ttm_official=True),
    "ttm, erase-add, mixer, normal": dict(
        combiner="ttm", ttm_write="erase_add", ttm_process="mixer", ttm_initial_memory="normal"
    ),
    "ttm, latent query, four groups": dict(combiner="ttm", ttm_groups=4, ttm_summary="latent_query"),
    "ttm, mean": dict(combiner="ttm", ttm_summary="mean"),
    "attention": dict(combiner="attention"),
    "perceiver": dict(combiner="perceiver"),
    "mean": dict(combiner="mean"),
    "none": dict(combiner="none"),
    "longer chunks": dict(
        combiner="ttm", frames_per_chunk=8, samples_per_chunk=5120, share_encoders=True, cross_every=2
    ),
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def a_model(**changes: Any) -> Model:
    return Model.from_preset("tiny", **{**WINDOWS, **changes}).eval().double()


def a_clip(config: Config, batch: int, chunks: int) -> dict[str, Tensor]:
    frames, size = chunks * config.frames_per_chunk, config.image_size
    return dict(
        video=torch.randint(0, 256, (batch, 3, frames, size, size), dtype=torch.uint8),
        audio=torch.randn(batch, chunks * config.samples_per_chunk).double() * 0.1,
    )


def cut(config: Config, inputs: dict[str, Tensor], chunk: int) -> dict[str, Tensor]:
    found = {}
    if "video" in inputs:
        found["video"] = inputs["video"].unflatten(2, (-1, config.frames_per_chunk))[:, :, chunk]
    if "audio" in inputs:
        found["audio"] = inputs["audio"].unflatten(1, (-1, config.samples_per_chunk))[:, chunk]
    return found


def assert_same_answers(stream: Stream, model: Model, latents: Tensor) -> None:
    """Those of a whole clip, from every row."""
    prompt = torch.randint(0, 256, (latents.shape[0], 5))
    assert torch.equal(
        stream.generate(prompt, max_new_tokens=6), model.generate(latents=latents, prompt=prompt, max_new_tokens=6)
    )
    assert torch.equal(
        stream.generate(prompt, max_new_tokens=4, num_beams=3),
        model.generate(latents=latents, prompt=prompt, max_new_tokens=4, num_beams=3),
    )


@variants
@pytest.mark.parametrize("given", ["both", "video", "audio"])
def test_chunk_by_chunk_is_the_whole_clip(changes, given):
    model = a_model(**changes)
    config, chunks = model.config, 7
    inputs = a_clip(config, 2, chunks)
    if given != "both":
        inputs = {given: inputs[given]}
    whole = model.encode(**inputs)
    stream = model.stream(batch=2)
    before = stream.nbytes
    for chunk, expected in enumerate(whole.unflatten(1, (chunks, -1)).unbind(1)):
        assert_close(f"h of chunk {chunk}", stream.push(**cut(config, inputs, chunk)), expected, rtol=EXACT)
    assert stream.nbytes == before
    assert stream.chunks == [chunks, chunks]
    assert_same_answers(stream, model, whole)


@pytest.mark.parametrize("combiner", ["transformer", "ttm"])
def test_what_is_missing_in_the_middle(combiner):
    """Now the picture, now the sound, now both, of one row or of all."""
    model = a_model(combiner=combiner)
    config, chunks = model.config, 6
    inputs = a_clip(config, 2, chunks)
    seen = torch.tensor([[1, 0, 0, 1, 1, 0], [1, 0, 1, 1, 0, 1]]).bool()
    heard = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 1]]).bool()
    whole = model.encode(**inputs, video_present=seen, audio_present=heard)
    stream = model.stream(batch=2)
    for chunk, expected in enumerate(whole.unflatten(1, (chunks, -1)).unbind(1)):
        now: dict[str, Any] = cut(config, inputs, chunk)
        for name, there in (("video", seen[:, chunk]), ("audio", heard[:, chunk])):
            if not there.any():
                del now[name]
            elif not there.all():
                now[f"{name}_present"] = there
                now[name][~there] = 99  # what is not there is not looked at
        assert_close(f"h of chunk {chunk}", stream.push(**now), expected, rtol=EXACT)
    assert_same_answers(stream, model, whole)


def test_times_in_seconds():
    model = a_model(combiner="ttm")
    inputs, times = a_clip(model.config, 1, 3), [0.5, 2.25, 90.0]
    whole = model.encode(**inputs, times=torch.tensor([times])).unflatten(1, (3, -1))
    stream = model.stream()
    for chunk, second in enumerate(times):
        h = stream.push(**cut(model.config, inputs, chunk), times=[second])
        assert_close("h", h, whole[:, chunk], rtol=EXACT)


@pytest.mark.parametrize("combiner", ["transformer", "ttm", "attention"])
def test_memory_stands_for_the_windows_that_are_not_set(combiner):
    torch.manual_seed(3)
    plain = Model.from_preset("tiny", combiner=combiner).eval().double()
    windows = dict(av_window=3, av_sinks=1, text_window=3, text_sinks=1)
    if combiner != "ttm":
        windows |= dict(combiner_window=3, combiner_sinks=1)
    windowed = Model.from_preset("tiny", combiner=combiner, **windows).eval().double()
    windowed.load_state_dict(plain.state_dict())
    inputs = a_clip(plain.config, 1, 8)
    stream, growing = plain.stream(memory=3, sinks=1), plain.stream(grow=True)
    first, whole = windowed.encode(**inputs).unflatten(1, (8, -1)), plain.encode(**inputs).unflatten(1, (8, -1))
    for chunk in range(8):
        h = stream.push(**cut(plain.config, inputs, chunk))
        assert_close("with memory", h, first[:, chunk], rtol=EXACT)
        if chunk < 4:
            assert_close("before anything is forgotten", h, whole[:, chunk], rtol=EXACT)
        assert_close("growing", growing.push(**cut(plain.config, inputs, chunk)), whole[:, chunk], rtol=EXACT)
    assert_same_answers(stream, windowed, first.flatten(1, 2))
    assert_same_answers(growing, plain, whole.flatten(1, 2))


def test_a_stream_that_grows_grows():
    stream = Model.from_preset("tiny", combiner="ttm").eval().stream(grow=True)
    before = stream.nbytes
    for _ in range(20):
        stream.push()
    assert stream.nbytes > 1.5 * before


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        (dict(combiner="transformer"), "combiner_window, av_window, text_window"),
        (dict(combiner="ttm", text_window=4), "av_window"),
        (dict(combiner="attention", combiner_window=1, av_window=2), "text_window"),
    ],
)
def test_what_would_grow_is_refused_in_a_sentence(changes, missing):
    model = Model.from_preset("tiny", **changes)
    with pytest.raises(ValueError, match=f"the configuration sets no {missing}: what is kept would grow"):
        model.stream()
    model.stream(memory=2)
    model.stream(grow=True)


def test_chunks_that_see_later_ones_cannot_stream():
    with pytest.raises(ValueError, match=r"config.av_causal must be True"):
        Model.from_preset("tiny", av_causal=False).stream(memory=2)


def test_rows_that_join_and_leave_give_what_each_gives_alone():
    """Up to 32 streams at a time, of random lengths; pushes of whoever has a chunk."""
    model = a_model(combiner="ttm").float()
    config, chance = model.config, random.Random(4)
    pool, length, streams = model.stream(batch=32, tokenizer=ByteTokenizer()), 6, 44
    material = a_clip(config, streams, length)
    material["audio"] = material["audio"].float()
    waiting, inside, done, most = list(range(streams)), dict[int, list[int]](), 0, 0
    while waiting or inside:
        most = max(most, len(inside))
        while waiting and len(inside) < 32 and chance.random() < 0.9:
            inside[pool.join()] = [waiting.pop(), 0]
        rows = [row for row in inside if chance.random() < 0.8]
        if rows:
            clips = torch.tensor([inside[row][0] for row in rows])
            chunks = torch.tensor([inside[row][1] for row in rows])
            video = material["video"].unflatten(2, (length, -1))[clips, :, chunks]
            audio = material["audio"].unflatten(1, (length, -1))[clips, chunks]
            pool.push(video, audio, rows=rows)
            for row in rows:
                inside[row][1] += 1
        for row, (clip, count) in list(inside.items()):
            assert pool.chunks[row] == count
            if count == length or (count > 1 and chance.random() < 0.1):
                alone = model.stream(tokenizer=ByteTokenizer())
                for chunk in range(count):
                    alone.push(**{name: x[clip : clip + 1] for name, x in cut(config, material, chunk).items()})
                question = f"What is in {clip}?"
                assert pool.ask(question, row=row, max_new_tokens=6) == alone.ask(question, max_new_tokens=6)
                scores = pool.score(question, ["a square", "a bell"], row=row)
                assert scores == pytest.approx(alone.score(question, ["a square", "a bell"]), rel=1e-4)
                pool.leave(row)
                del inside[row]
                done += 1
    assert done == streams
    assert most > 24


@pytest.mark.parametrize("rows", [[1, 0], [2, 0, 1], [2]])
def test_rows_in_any_order(rows):
    model = a_model(combiner="ttm").float()
    stream, inputs = model.stream(batch=3), a_clip(model.config, len(rows), 3)
    inputs["audio"] = inputs["audio"].float()
    prompt = torch.randint(0, 256, (len(rows), 5))
    for chunk in range(3):
        h = stream.push(**cut(model.config, inputs, chunk), rows=rows)
    answers = stream.generate(prompt, rows=rows, max_new_tokens=5)
    for i, row in enumerate(rows):
        alone = model.stream()
        for chunk in range(3):
            expected = alone.push(**{name: x[i : i + 1] for name, x in cut(model.config, inputs, chunk).items()})
        assert_close("h", h[i : i + 1], expected, rtol=1e-4)
        assert stream.chunks[row] == 3
        assert torch.equal(answers[i : i + 1], alone.generate(prompt[i : i + 1], max_new_tokens=5))


def test_a_pool_that_is_full_and_rows_that_nobody_took():
    pool = a_model(combiner="ttm").stream(batch=2)
    assert [pool.join(), pool.join()] == [0, 1]
    with pytest.raises(RuntimeError, match="all 2 rows are taken"):
        pool.join()
    pool.push(rows=[1])
    pool.leave(1)
    assert pool.chunks == [0, 0]
    with pytest.raises(ValueError, match=r"row must be one of those taken, \[0\], was 1"):
        pool.leave(1)


def a_talk(model: Model, seed: int = 0) -> Stream:
    """A stream that has seen a few chunks, by frames and samples, and holds the beginning of the next one."""
    torch.manual_seed(seed)
    config, stream = model.config, model.stream(tokenizer=ByteTokenizer())
    go_on(stream, 0, 5)
    assert stream.chunks == [5 * 3 // config.frames_per_chunk - 0] or stream.chunks[0] >= 3
    return stream


def go_on(stream: Stream, first: int, last: int) -> None:
    """Pictures and sound of some seconds' parts: 3 frames and as much sound each."""
    config = stream.config
    generator = torch.Generator().manual_seed(first)
    rate = config.frames_per_chunk / config.seconds_per_chunk
    for part in range(first, last):
        frames = torch.randint(0, 256, (3, 3, config.image_size, config.image_size), generator=generator)
        stream.push_frames(frames.to(torch.uint8), [(3 * part + i) / rate for i in range(3)])
        samples = torch.randn(round(3 * config.samples_per_chunk / config.frames_per_chunk), generator=generator)
        stream.push_samples(0.1 * samples, 3 * part / rate)


def test_frames_and_samples_are_cut_into_chunks():
    model = a_model(combiner="ttm").float()
    config, stream, whole = model.config, model.stream(), model.stream()
    frames, samples = config.frames_per_chunk, config.samples_per_chunk
    inputs = a_clip(config, 1, 3)
    inputs["audio"] = inputs["audio"].float()
    times = [i * config.seconds_per_chunk / frames for i in range(3 * frames)]
    pushed = 0
    for at in range(3 * frames):
        pushed += stream.push_frames(inputs["video"][0, :, at : at + 1].movedim(1, 0), [times[at]])
        pushed += stream.push_samples(inputs["audio"][0, at * samples // frames : (at + 1) * samples // frames])
    pushed += stream.finish()
    for chunk in range(3):
        whole.push(**cut(config, inputs, chunk))
    assert pushed == 3
    assert stream.chunks == whole.chunks == [3]
    prompt = torch.randint(0, 256, (1, 5))
    assert torch.equal(stream.generate(prompt), whole.generate(prompt))
    for name, tensor in whole.state_dict().items():
        assert_close(name, stream.state_dict()[name].float(), tensor.float(), rtol=1e-6)


def test_a_fork_goes_its_own_way():
    stream = a_talk(a_model(combiner="transformer").float())
    other = stream.fork()
    before = stream.ask("What?", max_new_tokens=8)
    assert other.ask("What?", max_new_tokens=8) == before
    go_on(other, 5, 9)
    assert stream.ask("What?", max_new_tokens=8) == before
    go_on(stream, 5, 9)
    for name, tensor in stream.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("combiner", ["transformer", "ttm"])
def test_goes_on_from_a_file_in_the_middle_of_a_chunk(combiner, tmp_path):
    model = a_model(combiner=combiner).float()
    stream = a_talk(model)
    stream.save(tmp_path / "state.safetensors")
    restored = model.stream(tokenizer=ByteTokenizer())
    restored.load(tmp_path / "state.safetensors")
    assert restored.chunks == stream.chunks
    for one in (stream, restored):
        go_on(one, 5, 9)
    assert restored.chunks == stream.chunks
    assert restored.ask("What moves?", max_new_tokens=8) == stream.ask("What moves?", max_new_tokens=8)
    for name, tensor in stream.state_dict().items():
        assert torch.equal(tensor, restored.state_dict()[name]), name
    assert set(load_file(tmp_path / "state.safetensors")) <= set(stream.state_dict())
    assert not [file for file in tmp_path.iterdir() if file.name != "state.safetensors"]


def test_a_growing_stream_is_restored():
    model = Model.from_preset("tiny").eval()
    stream, other = model.stream(grow=True), model.stream(grow=True)
    for _ in range(18):
        stream.push()
    other.load_state_dict(stream.state_dict())
    assert torch.equal(stream.push(), other.push())
    assert other.chunks == [19]


def test_states_that_do_not_fit_are_refused(tmp_path):
    stream = a_talk(a_model(combiner="ttm").float())
    before = stream.state_dict()
    with pytest.raises(FileNotFoundError, match="path must be a file that"):
        stream.load(tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"path must be a file that Stream.save wrote, was .*broken"):
        stream.load(tmp_path / "broken.safetensors")
    wider = a_model(combiner="ttm", av_window=4).float().stream()
    wider.save(tmp_path / "wider.safetensors")
    with pytest.raises(ValueError, match="path must hold a stream of settings"):
        stream.load(tmp_path / "wider.safetensors")
    with pytest.raises(ValueError, match=r"audio_video.0.keys must be that of a stream like this one"):
        stream.load_state_dict(wider.state_dict())
    with pytest.raises(
        ValueError, match=r"state must hold .* tensors of a stream like this one, was \['sound.state'\]"
    ):
        stream.load_state_dict({name: t for name, t in before.items() if name != "sound.state"})
    for name, tensor in stream.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_questions_leave_the_past_as_it_is():
    stream = a_talk(a_model(combiner="ttm").float())
    before = stream.state_dict()
    stream.ask("What?", max_new_tokens=4, num_beams=3)
    stream.score("What?", ["this", "that"])
    stream.answer("What?", attention=True, max_new_tokens=4).read()
    for name, tensor in stream.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("options", [{}, dict(stop_strings=["a", "e"]), dict(eos_token_id=101)], ids=str)
def test_an_answer_in_pieces_is_the_answer(options):
    stream = a_talk(a_model(combiner="ttm").float())
    for question in ("What?", "Where was the green one?", "When did it ring?"):
        whole = stream.ask(question, max_new_tokens=24, **options)
        assert stream.answer(question, max_new_tokens=24, **options).read() == whole


def test_an_answer_is_about_the_moment_of_its_question():
    model = a_model(combiner="ttm").float()
    stream = a_talk(model)
    expected = stream.ask("What moves now?", max_new_tokens=12)
    answer = stream.answer("What moves now?", max_new_tokens=12, attention=True)
    attention: list[dict[int, float]] = []
    text = ""
    for part, piece in enumerate(answer):
        text += piece
        attention.append(dict(answer.attention))
        go_on(stream, 5 + part, 6 + part)
    assert text == answer.text == expected
    assert answer.first_token is not None
    assert all(sum(shares.values()) == pytest.approx(1, abs=1e-5) for shares in attention)


def test_attention_names_the_chunks_that_are_kept():
    """Sinks and window, whatever slot of the ring they lie in."""
    stream = a_model(combiner="ttm").float().stream(tokenizer=ByteTokenizer())
    for _ in range(8):
        stream.push()
    answer = stream.answer("?", attention=True, max_new_tokens=2)
    answer.read()
    assert sorted(answer.attention) == [0, 1, 6, 7]


def test_pushes_and_questions_from_several_threads():
    model = a_model(combiner="ttm").float()
    stream, alone = model.stream(tokenizer=ByteTokenizer()), model.stream()
    inputs = a_clip(model.config, 1, 12)
    inputs["audio"] = inputs["audio"].float()
    stream.push(**cut(model.config, inputs, 0))
    alone.push(**cut(model.config, inputs, 0))
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(6):
                answer = stream.answer("What is it?", attention=True, max_new_tokens=5)
                answer.read()
                assert sum(answer.attention.values()) == pytest.approx(1, abs=1e-5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for chunk in range(1, 12):
        stream.push(**cut(model.config, inputs, chunk))
        alone.push(**cut(model.config, inputs, chunk))
    for thread in threads:
        thread.join()
    assert not failures
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, stream.state_dict()[name]), name


def test_a_compiled_decoder_is_compiled_once_whatever_has_been_seen():
    model = a_model(combiner="ttm").float()
    stream, plain = (model.stream(tokenizer=ByteTokenizer()) for _ in range(2))
    expected = []
    for _ in range(6):
        plain.push()
        expected.append(plain.ask("What?", max_new_tokens=5))
    torch._dynamo.reset()
    model.text_decoder.compile(fullgraph=True, dynamic=False, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for answer in expected:
            stream.push()
            assert stream.ask("What?", max_new_tokens=5) == answer


@pytest.mark.parametrize("combiner", ["transformer", "ttm"])
def test_a_step_is_one_program_whatever_has_been_seen(combiner):
    """What a CUDA graph asks for: no shape, value or branch depends on how many chunks came before."""
    model = a_model(combiner=combiner).float()
    reach = reaches(model.config, None, 0, False)
    torch._dynamo.reset()
    with torch.no_grad():
        past, plain = new_past(model, 2, reach), new_past(model, 2, reach)
    past.rows.fixed = True

    @torch.compile(fullgraph=True, dynamic=False, backend="eager")
    def step(video: Tensor, audio: Tensor, times: Tensor) -> Tensor:
        return advance(model, Clips.check(model.config, video, audio, times=times), past)

    inputs = a_clip(model.config, 2, 8)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for chunk in range(8):
            now = cut(model.config, inputs, chunk)
            times = torch.full((2, 1), chunk * model.config.seconds_per_chunk)
            h = step(now["video"], now["audio"].float(), times)
            past.rows.count()
            expected = advance(model, Clips.check(model.config, now["video"], now["audio"].float(), times=times), plain)
            plain.rows.count()
            assert_close(f"h of chunk {chunk}", h, expected, rtol=1e-5)


def test_what_is_wrong_is_named():
    model = a_model(combiner="ttm")
    stream, inputs = model.stream(batch=2), a_clip(model.config, 2, 1)
    size = model.config.image_size
    for arguments, message in (
        (dict(video=inputs["video"][:1]), "video must hold 2 rows"),
        (dict(video=inputs["video"][:, :, :2]), "video must hold a multiple of frames_per_chunk"),
        (dict(video=torch.cat([inputs["video"]] * 2, 2)), "video must hold one chunk"),
        (dict(audio=inputs["audio"][:, :-1]), "audio must hold a multiple of samples_per_chunk"),
        (dict(audio=torch.cat([inputs["audio"]] * 2, 1)), "audio must hold one chunk"),
        (dict(rows=[]), "rows must name at least one row"),
        (dict(rows=[2]), "rows must be below batch = 2"),
        (dict(rows=[1, 1]), "rows must be different rows"),
        (dict(times=[0.0]), "times must hold 2 numbers"),
        (dict(times=[0.0, float("nan")]), "times must be finite"),
        (dict(video_present=torch.tensor([True, True])), "video_present must come with video"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.push(**arguments)
    with pytest.raises(TypeError, match="video must be a"):
        stream.push("video")
    with pytest.raises(ValueError, match="frames must be"):
        stream.push_frames(torch.zeros(1, 3, size, size + 1, dtype=torch.uint8), [0.0])
    assert stream.chunks == [0, 0]
    with pytest.raises(ValueError, match="row must have seen a chunk, was 0"):
        stream.generate(torch.zeros(2, 1, dtype=torch.int64))
    stream.push(**cut(model.config, inputs, 0))
    with pytest.raises(ValueError, match=r"tokenizer must be given to Model\.stream"):
        stream.ask("What?")
    for settings, message in (
        (dict(batch=0), "batch must be at least 1"),
        (dict(memory=0), "memory must be at least 1"),
        (dict(sinks=1), "sinks must be 0 without memory"),
    ):
        with pytest.raises(ValueError, match=message):
            model.stream(**settings)


def test_in_bfloat16_and_under_autocast():
    model = a_model(combiner="transformer").float()
    inputs = a_clip(model.config, 1, 4)
    inputs["audio"] = inputs["audio"].float()
    with torch.autocast("cpu", torch.bfloat16):
        whole = model.encode(**inputs).unflatten(1, (4, -1))
        stream = model.stream()
        half = [stream.push(**cut(model.config, inputs, chunk)) for chunk in range(4)]
    assert stream.state_dict()["audio_video.0.keys"].dtype == torch.bfloat16
    cast = a_model(combiner="transformer").to(torch.bfloat16)
    cast.load_state_dict(model.state_dict())
    other = cast.stream()
    for chunk in range(4):
        assert (half[chunk] - whole[:, chunk]).abs().max() < 0.1
        assert (other.push(**cut(model.config, inputs, chunk)).float() - whole[:, chunk]).abs().max() < 0.3


def test_a_model_in_training_streams_as_in_evaluation():
    model = a_model(combiner="ttm").float()
    inputs = a_clip(model.config, 1, 1)
    inputs["audio"] = inputs["audio"].float()
    expected = model.stream().push(**inputs)
    model.train()
    assert torch.equal(model.stream().push(**inputs), expected)
    assert model.training
