"""What is claimed, each with its number, its strongest peer, where it fails, and the command that measures it again.

A claim is computed from the rows of results, never written down. What no result holds says so. What the Combiners learn
is a study of its own, `learning.report`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from core.rows import Row
from learning import report as learning
from report.console import Table
from report.savings import CHUNKED_TTM, EVERYTHING, PRUNED, PUBLISHED, TTM_ALONE, UNPRUNED, grouped, saving
from report.stored import LEARNED, Result, newest_first
from report.tables import number, percent, ratio, scaled

EVEN = 0.03
"""Within this of its peer nothing is called faster or slower."""
MAIN = 128
"""Frames of the main setting; else the longest clip that was measured."""
NOWHERE = "nowhere measured"
LEARNING = "What the Combiners learn"


@dataclass(frozen=True)
class Found:
    """What rows say about a claim."""

    number: str
    peer: str
    fails: str
    rows: list[Row] = field(default_factory=list)  # what it was computed from


@dataclass(frozen=True)
class Spec:
    """A claim and how it is computed; None where the rows do not hold it."""

    claim: str
    suite: str
    filter: str
    compute: Callable[[list[Row]], Found | None]

    @property
    def command(self) -> str:
        return f'python bench/run.py --only {self.suite} --filter "{self.suite}/{self.filter}"'


@dataclass(frozen=True)
class Claim:
    """A line of the table."""

    claim: str
    number: str
    peer: str
    fails: str
    command: str
    suite: str
    where: str = ""  # device and dtype
    file: str = ""
    commit: str = ""
    state: str = "not measured"
    why: str = ""  # of the state
    rows: list[Row] = field(default_factory=list)
    fresh: bool = False  # of the run that has just ended

    @property
    def measured(self) -> bool:
        return bool(self.file)


def ttm_of_transformer(rows: list[Row]) -> Found | None:
    """FLOPs of a whole model with TTM, against the deepest Transformer Combiner; its peers are all other Combiners."""
    case = _at_main(grouped(rows, "every Combiner "))
    ttm, deep = case.get(TTM_ALONE), case.get("Transformer, 6 layers", case.get("Transformer"))
    if not ttm or not deep or not ttm.flops or not deep.flops:
        return None
    peers = {name: row for name, row in case.items() if row.flops and not name.startswith(TTM_ALONE)}
    saved = {name: saving(row.flops, ttm.flops) or 0.0 for name, row in peers.items()}
    least, *few = sorted(saved, key=lambda name: saved[name])
    few = [f"{name} {saved[name]:.1f} %" for name in (least, *few) if saved[name] < 1]
    ends = " to ".join(dict.fromkeys((few[0], few[-1]))) if few else ""
    return Found(
        f"{percent(saving(deep.flops, ttm.flops))} of {scaled(deep.flops)} at {_frames(deep)}",
        f"{least}: {percent(saved[least])}",
        f"under 1 % against {len(few)} of {len(saved)} Combiners: {ends}" if few else NOWHERE,
        [*case.values()],
    )


def published(rows: list[Row]) -> Found | None:
    """Which depth of the Transformer Combiner makes TTM save what was published."""
    case = _at_main(grouped(rows, "TTM share "))
    ttm = case.get(TTM_ALONE)
    depths = {row.detail["layers"]: row for name, row in case.items() if name.endswith("layers") and row.flops}
    if not ttm or not ttm.flops or not depths:
        return None
    found = {layers: saving(row.flops, ttm.flops) or 0.0 for layers, row in sorted(depths.items())}
    texts = [f"{value:.1f} % at {layers} layers" for layers, value in found.items()]
    between = min(found.values()) <= PUBLISHED <= max(found.values())
    return Found(
        ", ".join(texts),
        f"published: {PUBLISHED:.0f} %, setting not stated",
        "its setting is not known" if between else f"{PUBLISHED:.0f} % is not between them",
        [ttm, *depths.values()],
    )


def work_of_everything(rows: list[Row]) -> Found | None:
    """FLOPs of chunks + TTM against everything at once, at the longest clip."""
    cases = _complete(grouped(rows, "work "), "flops", EVERYTHING, CHUNKED_TTM)
    if not cases:
        return None
    longest = cases[-1]
    saved = [(saving(case[EVERYTHING].flops, case[CHUNKED_TTM].flops) or 0.0, case) for case in cases]
    ttm = longest[CHUNKED_TTM].flops or 0
    peers = {name: row.flops for name, row in longest.items() if name not in (EVERYTHING, CHUNKED_TTM) and row.flops}
    best = min(peers, key=lambda name: peers[name], default="")
    losing = [f"{percent(value)} at {_length(case)}" for value, case in saved if value <= 0]
    losing += [f"{name} takes {percent(saving(ttm, flops))} less" for name, flops in peers.items() if flops < ttm]
    return Found(
        f"{percent(saved[-1][0])} of {scaled(longest[EVERYTHING].flops)} at {_length(longest)}",
        f"{best}: {percent(saving(longest[EVERYTHING].flops, peers[best]))}" if best else "none",
        "; ".join(losing) or f"{NOWHERE}; least {percent(min(value for value, _ in saved))}",
        [row for case in cases for row in case.values()],
    )


def time_of_everything(rows: list[Row], prefix: str) -> Found | None:
    """Time and memory of chunks + TTM against everything at once, at the longest clip.

    Args:
        prefix: of the cases: one clip or several, forward or a training step.
    """
    cases = _complete(grouped(rows, prefix), "speedup", CHUNKED_TTM)
    if not cases:
        return None
    longest = cases[-1]
    ttm, whole = longest[CHUNKED_TTM], longest.get(EVERYTHING)
    memory = saving(whole.peak_bytes, ttm.peak_bytes) if whole else None
    held = "" if memory is None else f", {percent(abs(memory))} {'less' if memory >= 0 else 'more'} memory"
    speeds = [(case[CHUNKED_TTM].speedup or 0.0, case) for case in cases]
    losing = [f"{ratio(value)} at {_length(case)}" for value, case in speeds if value < 1 - EVEN]
    peers = {name: row.speedup or 0.0 for name, row in longest.items() if name not in (EVERYTHING, CHUNKED_TTM)}
    best = max(peers, key=lambda name: peers[name], default="")
    faster = [name for name, value in peers.items() if value > (1 + EVEN) * speeds[-1][0]]
    losing += [f"{name} is {ratio(peers[name] / speeds[-1][0])} as fast" for name in faster]
    return Found(
        f"{ratio(ttm.speedup)} the speed{held} at {_length(longest)} (preset {ttm.detail['preset']})",
        f"{best}: {ratio(peers[best])}" if best else "none",
        "; ".join(losing) or f"{NOWHERE}; least {ratio(min(value for value, _ in speeds))}",
        [row for case in cases for row in case.values()],
    )


def same_weights(rows: list[Row]) -> Found | None:
    """Parameters of the model that took the shortest and the longest clip."""
    sizes = {
        row.detail["frames"]: row
        for case in grouped(rows, "work ").values()
        if (row := case.get(CHUNKED_TTM)) and row.detail.get("parameters")
    }
    if len(sizes) < 2:
        return None
    first, last = min(sizes), max(sizes)
    new = sizes[last].detail["parameters"] - sizes[first].detail["parameters"]
    return Found(
        f"{new} new parameters from {first} to {last} frames, of {scaled(sizes[first].detail['parameters'])}",
        f"{EVERYTHING}: none either, at its cost",
        NOWHERE if new == 0 else f"{new} parameters are new",
        [sizes[first], sizes[last]],
    )


def last_m(rows: list[Row]) -> Found | None:
    """What the last Combiner layer saves when it is computed for m tokens a chunk alone: counted and timed."""
    cases = grouped(rows, "last-m pruning ").values()
    counted = [case for case in cases if _good(case, "flops", PRUNED, UNPRUNED) and case[PRUNED].mode == "count"]
    timed = [case for case in cases if _good(case, "speedup", PRUNED)]
    if not counted or not timed:
        return None
    flops = [(saving(case[UNPRUNED].flops, case[PRUNED].flops) or 0.0, case[PRUNED].case) for case in counted]
    least, most = min(flops), max(flops)
    speeds = [case[PRUNED].speedup or 0.0 for case in timed]
    slower = [case[PRUNED].case for case in timed if (case[PRUNED].speedup or 0.0) < 1 - EVEN]
    return Found(
        f"{least[0]:.1f} to {most[0]:.1f} % of the Combiner's FLOPs; {_range(speeds)} the speed",
        UNPRUNED,
        f"slower: {', '.join(slower)}" if slower else f"{NOWHERE}; least at {least[1].removeprefix('last-m pruning ')}",
        [row for case in cases for row in case.values()],
    )


def against_peers(
    rows: list[Row],
    prefix: str,
    *,
    impl: str = "",
    modes: tuple[str, ...] = (),
    keep: Callable[[Row], bool] = lambda row: True,
) -> Found | None:
    """Our fastest variant of every case against its baseline and against the best peer.

    Args:
        prefix: of the cases; impl: of the variants of ours; modes: empty: all; keep: which rows are meant.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        ours = row.role == "ours" and row.impl.startswith(impl) and row.impl != row.baseline
        if ours and row.case.startswith(prefix) and (not modes or row.mode in modes) and keep(row):
            groups.setdefault((row.case, row.mode, row.baseline), []).append(row)
    usable = [[row for row in group if _finite(row.speedup) and _finite(row.against_best)] for group in groups.values()]
    best = [max(group, key=lambda row: row.against_best or 0.0) for group in usable if group]
    if not best:
        return None
    slower = [row for row in best if (row.against_best or 0.0) < 1 - EVEN]
    fails = NOWHERE
    if slower:
        worst = min(slower, key=lambda row: row.against_best or 0.0)
        what = " ".join(part for part in (worst.case, worst.mode) if part)
        fails = f"{len(slower)} of {len(best)} cases: {ratio(worst.against_best)} {worst.best_peer} ({what})"
    over_baseline = f"{_range(row.speedup for row in best)} {_most(row.baseline for row in best)}"
    over_best = f"{_range(row.against_best for row in best)} {_most(row.best_peer for row in best)}"
    return Found(
        over_baseline,
        "the same" if over_best == over_baseline else over_best,
        fails,
        [row for row in rows if any((row.case, row.mode) == (one.case, one.mode) for one in best)],
    )


def constant_step(rows: list[Row]) -> Found | None:
    """Time and memory of a step late in a stream over one early in it."""
    steps = [row for row in rows if row.case.startswith("stream ") and row.impl.startswith("chunk ")]
    late = [row for row in steps if row.impl != row.baseline and _finite(row.speedup)]
    early = next((row for row in steps if late and row.impl == late[-1].baseline), None)
    if not late or early is None or not early.peak_bytes:
        return None
    last = late[-1]
    time, memory = 1 / (last.speedup or math.nan), (last.peak_bytes or 0) / early.peak_bytes
    grown = [name for name, value in (("time", time), ("memory", memory)) if value > 1 + EVEN]
    return Found(
        f"{ratio(time)} the time and {ratio(memory)} the memory of {early.impl} at {last.impl}",
        "none: attention to all earlier chunks grows by its nature",
        f"{' and '.join(grown)} grow" if grown else NOWHERE,
        steps,
    )


def hours(rows: list[Row]) -> Found | None:
    """A stream of many hours: memory of the process, time of a chunk, answers against those of the whole clip."""
    row = next((row for row in rows if row.case == "hours" and "growth" in row.detail), None)
    if row is None or not _finite(row.detail["growth"]) or not _finite(row.detail["old_over_young"]):
        return None
    detail = row.detail
    growth, slower = detail["growth"], detail["old_over_young"]
    wrong = [f"{detail['answers_different']} answers differ"] if detail["answers_different"] else []
    wrong += [f"memory grows by {growth:.1%}"] if growth > EVEN else []
    wrong += [f"an old stream takes {ratio(slower)}"] if slower > 1 + EVEN else []
    return Found(
        f"{ratio(slower)} the time of a young stream, process {growth:+.1%}, after {row.shape.split(', ')[-1]}",
        f"the whole clip: {detail['answers_compared']} answers compared",
        "; ".join(wrong) or NOWHERE,
        [row],
    )


def answers(rows: list[Row]) -> Found | None:
    """How often the model in the package is right about new clips."""
    whole = next((row for row in rows if row.impl == "all" and "share" in row.detail), None)
    if whole is None:
        return None
    worst = min((row for row in rows if row is not whole), key=lambda row: row.detail["share"], default=whole)
    return Found(
        f"{percent(100 * whole.detail['share'])} of {whole.detail['count']} on {whole.case}",
        f"guessed: {percent(100 * whole.detail['guessed'])}",
        f"worst: {worst.impl}, {percent(100 * worst.detail['share'])}; knows nothing but its world",
        rows,
    )


def _whole(row: Row) -> bool:
    return not row.detail.get("window")


SPECS = (
    Spec("TTM saves FLOPs of the model with a Transformer Combiner", "savings", "every Combiner", ttm_of_transformer),
    Spec("TTM saves what was published", "savings", "TTM share", published),
    Spec("Chunks save FLOPs against everything at once", "savings", "work", work_of_everything),
    Spec(
        "Chunks save time and memory against everything at once",
        "savings",
        "time",
        partial(time_of_everything, prefix="time "),
    ),
    Spec("512 frames need no new parameter", "savings", "work", same_weights),
    Spec("Last-m pruning saves work", "savings", "last-m", last_m),
    Spec("The model in the package answers", "embedded", "", answers),
    Spec(
        "chunked_attention, all earlier chunks",
        "attention",
        "",
        partial(against_peers, prefix="", modes=("fwd", "fwd+bwd"), keep=_whole),
    ),
    Spec(
        "chunked_attention, a window of chunks",
        "attention",
        "model 16x448 D64 window",
        partial(against_peers, prefix="", modes=("fwd", "fwd+bwd"), keep=lambda row: not _whole(row)),
    ),
    Spec("combiner_project", "combiner", "project", partial(against_peers, prefix="project ")),
    Spec("Last Combiner layer for m tokens", "combiner", "last layer", partial(against_peers, prefix="last layer ")),
    Spec("ttm_scan", "ttm", "scan", partial(against_peers, prefix="scan ")),
    Spec("ttm_scan, recurrence alone", "ttm", "recurrence", partial(against_peers, prefix="recurrence ")),
    Spec("ttm_read, latent queries", "ttm", "latent-query", partial(against_peers, prefix="latent-query ")),
    Spec("ttm_write, erase and add", "ttm", "erase-add", partial(against_peers, prefix="erase-add ")),
    Spec("A stream's step stays as it was", "ttm", "stream", constant_step),
    Spec("extract_tubes", "tubes", "cut", partial(against_peers, prefix="cut ")),
    Spec("extract_tubes and projection", "tubes", "tokens", partial(against_peers, prefix="tokens ")),
    Spec("Training step, Transformer", "step", "", partial(against_peers, prefix="", impl="mirasol, Transformer")),
    Spec("Training step, TTM", "step", "", partial(against_peers, prefix="", impl="mirasol, TTM")),
    Spec("Decoding, a token", "decode", "step", partial(against_peers, prefix="step, ")),
    Spec("A question to a stream, first token", "stream", "a question", partial(against_peers, prefix="a question ")),
    Spec("A stream of hours stays as it was", "stream", "hours", hours),
)


def claims(results: list[Result], learned: dict[str, Any] | None, specs: Iterable[Spec] = SPECS) -> list[Claim]:
    """Every claim for every device and dtype that has rows of it; the newest result that holds it counts.

    A claim that no result holds is there all the same, and says so.
    """
    lines: list[Claim] = []
    for spec in specs:
        found_at: dict[tuple[str, str], Claim] = {}
        for result in newest_first(results):
            if spec.suite not in result.suites or result.kind in found_at:
                continue
            rows = [row for row in result.rows if row.suite == spec.suite]
            broken = [row for row in rows if row.status == "FAIL" and row.case.startswith(spec.filter)]
            found = spec.compute([row for row in rows if row.status == "ok"])
            if found is None and not broken:
                continue
            found = found or Found("not measured", "–", NOWHERE)
            fails = f"FAIL: {broken[0].case} {broken[0].impl}: {broken[0].reason}" if broken else found.fails
            state, why = result.state
            about = (spec.command, spec.suite, result.where, result.file, result.commit, state, why)
            texts = (spec.claim, found.number, found.peer, fails)
            found_at[result.kind] = Claim(*texts, *about, rows=found.rows, fresh=result.fresh)
        unmeasured = Claim(spec.claim, "not measured", "–", "–", spec.command, spec.suite)
        lines += [found_at[kind] for kind in sorted(found_at, key=_order)] or [unmeasured]
    return [*lines, *_learned(learned)]


def _order(kind: tuple[str, str]) -> tuple[bool, str, str]:
    """The CPU before GPUs, what was not asked for in a dtype before what was."""
    return kind[0] != "cpu", *kind


def _learned(study: dict[str, Any] | None) -> list[Claim]:
    command = "python bench/learn.py --full"
    told = learning.claims(study) if study is not None else []
    if study is None or not told:
        return [Claim(LEARNING, "not measured", "–", "–", command, "learn")]
    state, why = learning.state(study)
    about: dict[str, Any] = dict(command=command, suite="learn", file=LEARNED, commit=learning.commits(study))
    return [Claim(**one, **about, state=state, why=why) for one in told]


def table(lines: list[Claim]) -> Table:
    """The claims as the end of a run shows them."""
    columns = ["claim", "number", "strongest peer", "where it fails", "measured", "again by"]
    grid = []
    for one in lines:
        source = ["this run" if one.fresh else one.file, one.where, one.commit, one.state]
        text = "; ".join(dict.fromkeys(part for part in source if part)) if one.measured else one.state
        grid.append([one.claim, one.number, one.peer, one.fails, text, one.command.removeprefix("python ")])
    notes = [
        f"x: times as fast as the named, the fastest variant of ours in each case; within {EVEN:.0%} counts as even",
        *(f"{one.file or one.claim}: {one.state}: {one.why}" for one in _worth_saying(lines)),
    ]
    return Table("Claims", columns, grid, len(columns), notes, wrap=30)


def _worth_saying(lines: list[Claim]) -> list[Claim]:
    """One claim for each file whose results are not of the code at hand."""
    return list({(one.file, one.fresh): one for one in lines if one.why}.values())


def _good(case: dict[str, Row], value: str, *names: str) -> bool:
    return all(name in case and _finite(getattr(case[name], value)) for name in names)


def _complete(cases: dict[str, dict[str, Row]], value: str, *names: str) -> list[dict[str, Row]]:
    """Cases that hold a usable value of all named variants, from the shortest clip to the longest."""
    whole = [case for case in cases.values() if _good(case, value, *names)]
    return sorted(whole, key=lambda case: case[names[-1]].detail["frames"])


def _at_main(cases: dict[str, dict[str, Row]]) -> dict[str, Row]:
    """The case of the main setting, else of the longest clip; empty where there is none."""
    by_frames = {next(iter(case.values())).detail["frames"]: case for case in cases.values()}
    return by_frames.get(MAIN) or (by_frames[max(by_frames)] if by_frames else {})


def _frames(row: Row) -> str:
    return f"{row.detail['frames']} frames (preset {row.detail['preset']})"


def _length(case: dict[str, Row]) -> str:
    """ "512 frames", "16 frames x 4 clips" """
    name = next(iter(case.values())).case
    return name.partition(" ")[2]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value != 0


def _range(values: Iterable[float | None]) -> str:
    ordered = sorted(value for value in values if value is not None)
    low, high = number(ordered[0]), number(ordered[-1])
    return f"{low}x" if low == high else f"{low} to {high}x"


def _most(names: Iterable[str]) -> str:
    """The commonest name, and how many others there are."""
    (name, _), *others = Counter(names).most_common()
    return f"{name}{f' (or {len(others)} others)' if len(others) > 1 else ' (or another)' if others else ''}"
