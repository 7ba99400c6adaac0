"""Live streams: the time a chunk takes, a question's way to its first token, hours of chunks, many streams together."""

from __future__ import annotations

import time
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from core.harness import LEAST_ROUNDS, Comparison, Variant, Verdict, compare
from core.rows import Case, Row, Settings
from mirasol import ByteTokenizer, Config, Model, generation
from mirasol.streaming.session import process_memory
from mirasol.tokenizer import encode_prompt
from report import tables as report
from report.console import Table

SUITE = "stream"
QUESTION = "What moves, and what is heard?"
SETTINGS: dict[str, Any] = dict(av_window=16, text_window=16, text_sinks=1)
COMBINERS: dict[str, dict[str, Any]] = {
    "TTM": dict(combiner="ttm"),
    "Transformer, 4 chunks": dict(combiner="transformer", combiner_window=4),
}
FIRST_ANSWERS = 64
"""Chunks of the long stream after which answers and latents are compared with those of the whole clip."""
ALLOWED = 1e-3
"""Error of latents, relative to the largest: that of float32 through all layers."""
PAIRS = 100
"""Pushes of an old and of a young stream, in turns, whose times are compared."""


def cases(settings: Settings) -> list[Case]:
    quick = settings.effort == "quick"
    questions = (4,) if quick else (16, 64, 256)
    return [
        Case("a chunk", partial(_chunk, "tiny" if quick else "small")),
        *(Case(f"a question after {chunks} chunks", partial(_question, chunks)) for chunks in questions),
        Case("hours", partial(_hours, 150 if quick else 10_000)),
        Case("32 streams", partial(_many, 4 if quick else 32)),
    ]


def _model(preset: str, settings: Settings, **changes: Any) -> Model:
    torch.manual_seed(0)
    return Model.from_preset(preset, **{**SETTINGS, "combiner": "ttm", **changes}).eval().to(settings.device)


def _clip(config: Config, batch: int, chunks: int, settings: Settings) -> tuple[Tensor, Tensor]:
    generator = settings.generator()
    shape = (batch, 3, chunks * config.frames_per_chunk, config.image_size, config.image_size)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, device=settings.device, generator=generator)
    return video, 0.1 * settings.randn(batch, chunks * config.samples_per_chunk, dtype=torch.float32)


def _cut(config: Config, clip: tuple[Tensor, Tensor], chunk: int) -> tuple[Tensor, Tensor]:
    frames, samples = config.frames_per_chunk, config.samples_per_chunk
    return clip[0][:, :, chunk * frames :][:, :, :frames], clip[1][:, chunk * samples :][:, :samples]


def _alike(expected: list[Tensor], found: list[Tensor]) -> Verdict:
    """Within float32's rounding of a whole model."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return Verdict(problem="other shapes")
    pairs = zip(found, expected, strict=True)
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return Verdict(error, ALLOWED, "" if error <= ALLOWED else f"off by {error:.1e}")


def _chunk(preset: str, settings: Settings) -> list[Row]:
    """The third chunk of a stream: encoders, Combiner, audio-video Transformer, keys and values of the latents."""
    return [row for name in COMBINERS for row in _chunk_of(preset, name, settings)]


def _chunk_of(preset: str, combiner: str, settings: Settings) -> list[Row]:
    model = _model(preset, settings, **COMBINERS[combiner])
    config, m = model.config, model.config.latents_per_chunk
    clip = _clip(config, 1, 3, settings)
    last, stream = _cut(config, clip, 2), model.stream()
    for chunk in range(2):
        stream.push(*_cut(config, clip, chunk))
    state = stream.state_dict()
    push, alone = f"push, {combiner}", f"encode it alone, {combiner}"

    def next_chunk() -> Tensor:
        stream.load_state_dict(state)
        return stream.push(*last)

    encode = torch.no_grad()(model.encode)
    expected = {push: [encode(*clip)[:, -m:]], alone: [encode(*last)]}
    return compare(
        Comparison(
            SUITE,
            "a chunk",
            [Variant(alone, lambda: partial(encode, *last)), Variant(push, lambda: next_chunk, role="ours")],
            lambda name, found: _alike(expected[name], found),
            alone,
            mode="step",
            shape=f"{preset}, {config.seconds_per_chunk:g} s a chunk",
            rounds=(2, 2, 0.0) if settings.effort == "quick" else (LEAST_ROUNDS, 15, 20.0),
            detail={"seconds": config.seconds_per_chunk, "state_bytes": stream.nbytes},
        ),
        settings,
    )


def _question(chunks: int, settings: Settings) -> list[Row]:
    """From the question to its first token, against encoding the clip once more."""
    model = _model("tiny" if settings.effort == "quick" else "small", settings)
    clip, tokens = _clip(model.config, 1, chunks, settings), ByteTokenizer()
    stream = model.stream(tokenizer=tokens)
    for chunk in range(chunks):
        stream.push(*_cut(model.config, clip, chunk))
    prompt = torch.tensor([encode_prompt(tokens, QUESTION)], device=settings.device)

    def first_token() -> Tensor:
        answer = stream.answer(QUESTION, max_new_tokens=1)
        answer.read()
        return torch.tensor(answer.tokens)

    @torch.no_grad()
    def again() -> Tensor:
        seen = model.see(model.encode(*clip))
        return next(generation.steps(model.text_decoder, model.config, seen, prompt, max_new_tokens=1)).tokens.cpu()

    expected = again()
    return compare(
        Comparison(
            SUITE,
            f"a question after {chunks} chunks",
            [
                Variant("the clip again", lambda: again),
                Variant("the stream", lambda: first_token, role="ours"),
            ],
            lambda name, found: Verdict(problem="" if torch.equal(found[0], expected) else "another token"),
            "the clip again",
            mode="first token",
            shape=f"{chunks} chunks of {model.config.seconds_per_chunk:g} s",
            rounds=(2, 3, 20.0) if settings.effort == "quick" else (LEAST_ROUNDS, LEAST_ROUNDS, 0.0),
            warm_up=False,
        ),
        settings,
    )


def _hours(chunks: int, settings: Settings) -> list[Row]:
    """One stream for long: memory of the process, time of a chunk when it is old and when it is young, and answers."""
    model, tokens = _model("tiny", settings), ByteTokenizer()
    clip = _clip(model.config, 1, FIRST_ANSWERS, settings)
    stream = model.stream(tokenizer=tokens)
    row = Row(SUITE, "hours", "stream", mode="step", role="ours", shape=f"tiny, {chunks} chunks", device="cpu")
    row.device = settings.device.type
    prompt = torch.tensor([encode_prompt(tokens, QUESTION)], device=settings.device)
    resident: dict[int, int] = {}
    young, worst, different = stream.fork(), 0.0, 0
    with torch.no_grad():
        whole = model.encode(*clip)
    m = model.config.latents_per_chunk
    started = time.perf_counter()
    for chunk in range(chunks):
        h = stream.push(*_cut(model.config, clip, chunk % FIRST_ANSWERS))
        seen = chunk + 1
        if seen <= min(FIRST_ANSWERS, chunks):
            expected = whole[:, chunk * m : seen * m]
            worst = max(worst, float((h - expected).abs().max() / expected.abs().max()))
            answer = model.generate(latents=whole[:, : seen * m], prompt=prompt, max_new_tokens=8)
            different += not torch.equal(stream.generate(prompt, max_new_tokens=8), answer)
        if seen == 10:
            young = stream.fork()
        if seen in (100, chunks // 10, chunks // 2, chunks):
            resident[seen] = process_memory()
    row.detail["chunks_per_second"] = chunks / (time.perf_counter() - started)
    times: dict[str, list[float]] = {"young": [], "old": []}
    state = young.state_dict()
    for _ in range(PAIRS):
        for name, one in (("young", young), ("old", stream)):
            begin = time.perf_counter()
            one.push(*_cut(model.config, clip, 0))
            times[name].append(1e3 * (time.perf_counter() - begin))
        young.load_state_dict(state)
    row.n, row.median_ms = PAIRS, median(times["old"])
    row.p20_ms, *_, row.p80_ms = quantiles(times["old"], n=5)
    ratios = [old / new for old, new in zip(times["old"], times["young"], strict=True)]
    growth = resident[chunks] / resident[min(resident)] - 1
    row.detail |= {
        "old_over_young": median(ratios),
        "resident_bytes": resident,
        "growth": growth,
        "state_bytes": stream.nbytes,
        "answers_compared": min(FIRST_ANSWERS, chunks),
        "answers_different": different,
    }
    row.error, row.allowed = worst, ALLOWED
    if worst > ALLOWED or different:
        row.status, row.reason = "FAIL", f"off by {worst:.1e}, {different} answers differ"
    return [row]


def _many(batch: int, settings: Settings) -> list[Row]:
    """A chunk of each of many streams: pushed together, and one after the other."""
    model = _model("tiny", settings)
    clip = _clip(model.config, batch, 1, settings)

    def together() -> Tensor:
        return model.stream(batch=batch).push(*clip)

    def alone() -> Tensor:
        pushed = [model.stream().push(clip[0][i : i + 1], clip[1][i : i + 1]) for i in range(batch)]
        return torch.cat(pushed)

    expected = alone()
    return compare(
        Comparison(
            SUITE,
            "32 streams",
            [Variant("one by one", lambda: alone), Variant("together", lambda: together, role="ours")],
            lambda name, found: _alike([expected], found),
            "one by one",
            mode="step",
            shape=f"tiny, {batch} streams",
            rounds=(2, 2, 0.0) if settings.effort == "quick" else (LEAST_ROUNDS, 15, 20.0),
        ),
        settings,
    )


def tables(rows: list[Row]) -> list[Table]:
    columns = ["case", "implementation", "ms (p20–p80)", "n", "x baseline (p20–p80)", "real time", "state"]
    lines = [_line(row) for row in rows]
    notes = [
        "real time: seconds that a chunk lasts over those that it takes; state: what the stream keeps",
        *sorted({f"{row.case}: {row.shape}" for row in rows}),
        *(_about_hours(row) for row in rows if row.case == "hours" and "growth" in row.detail),
        *report.troubles(rows),
    ]
    return [Table("Live streams", columns, lines, 2, notes)]


def _line(row: Row) -> list[str]:
    seconds = row.detail.get("seconds")
    spread = f" ({report.number(row.speedup_p20)}–{report.number(row.speedup_p80)})" if row.speedup else ""
    ours = row.role == "ours"
    return [
        row.case,
        row.impl,
        report.time_range(row),
        str(row.n or ""),
        f"{report.ratio(row.speedup)}{spread}",
        report.ratio(1e3 * seconds / row.median_ms) if seconds and row.median_ms and ours else "",
        report.mebibytes(row.detail.get("state_bytes")) if ours else "",
    ]


def _about_hours(row: Row) -> str:
    detail = row.detail
    sizes = ", ".join(f"{size / 2**20:.1f} after {chunks}" for chunks, size in detail["resident_bytes"].items())
    return (
        f"hours: MiB of the process: {sizes} chunks ({detail['growth']:+.2%}); an old stream's chunk takes "
        f"{detail['old_over_young']:.3f} of a young one's; {detail['answers_different']} of "
        f"{detail['answers_compared']} answers differ from the whole clip's"
    )


def headline(rows: list[Row]) -> str:
    """How much sooner an answer begins than by encoding the clip again."""
    asked = [row for row in rows if row.impl == "the stream" and row.speedup is not None]
    parts = [f"{report.ratio(row.speedup)} ({row.shape})" for row in asked]
    return f"The first token of an answer, against encoding the clip again: {', '.join(parts)}" if parts else ""
