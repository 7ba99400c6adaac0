"""The tables of the savings suite, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from core.rows import Row
from mirasol.cost.fits import MOST
from report import tables as report
from report.console import Table

SUITE = "savings"
EVERYTHING, CHUNKED, CHUNKED_TTM = "everything at once", "chunks + Transformer", "chunks + TTM"
POOLED, RESAMPLED = "everything at once, pooled", "everything at once, Perceiver"
MODELS = {
    EVERYTHING: "everything",
    POOLED: "pooled",
    RESAMPLED: "Perceiver",
    CHUNKED: "Transformer",
    CHUNKED_TTM: "TTM",
}
"""What is compared, and the word that heads its column."""
TTM_ALONE = "TTM"
PRUNED, UNPRUNED = "last m only", "all, then slice"
PUBLISHED = 18.0
"""Percent of compute that the TTM Combiner saves, as published for Mirasol3B without the setting."""
MISSING = Row("", "", "", status="–")
ABOUT_MODELS = (
    "everything, pooled, Perceiver: the whole clip at once in one Transformer, all its tokens or what these leave; "
    f"Transformer, TTM: {CHUNKED}, {CHUNKED_TTM}"
)


def tables(rows: list[Row]) -> list[Table]:
    """Work, memory and time of all models, shares of TTM, every Combiner, pruning, attention; those that have rows."""
    drawn = [
        _work(rows),
        _step_work(rows),
        _step_memory(rows),
        _texts(rows),
        _shares(rows),
        _every_combiner(rows),
        *(_footprint(case) for case in grouped(rows, "memory ").values()),
        _measured(rows),
        _pruning(rows),
        _attention(rows),
        _times(rows, "time ", "one forward pass of one clip"),
        _times(rows, "batch ", "one forward pass of several clips"),
        _times(rows, "step ", "one training step: forward, backward, AdamW"),
        _peaks(rows),
    ]
    found = [table for table in drawn if table.rows]
    failures = report.troubles(rows)
    if failures:
        found.append(Table("Rows that failed or were skipped", ["why"], [[line] for line in failures]))
    return found


def headline(rows: list[Row]) -> str:
    """What TTM saves at the longest clip that was counted, and at the longest that was timed."""
    parts = []
    for prefix, what in (("work ", "counted"), ("time ", "measured")):
        whole = [case for case in grouped(rows, prefix).values() if _complete(case, prefix)]
        if not whole:
            continue
        case = max(whole, key=lambda case: case[EVERYTHING].detail["frames"])
        everything, ttm = case[EVERYTHING], case[CHUNKED_TTM]
        where = f"at {everything.detail['frames']} frames (preset {everything.detail['preset']}, {what})"
        if prefix == "work ":
            parts.append(f"{report.percent(saving(everything.flops, ttm.flops))} fewer FLOPs {where}")
        else:
            parts.append(f"{report.ratio(ttm.speedup)} the speed {where}")
    return f"{CHUNKED_TTM} against {EVERYTHING}: {'; '.join(parts)}" if parts else ""


def _complete(case: dict[str, Row], prefix: str) -> bool:
    both = [case[name] for name in (EVERYTHING, CHUNKED_TTM) if name in case and case[name].status == "ok"]
    return len(both) == 2 and all(row.flops if prefix == "work " else row.median_ms for row in both)


def saving(before: float | None, after: float | None) -> float | None:
    """Percent saved."""
    return None if not before or after is None else 100 * (1 - after / before)


def grouped(rows: Iterable[Row], prefix: str) -> dict[str, dict[str, Row]]:
    """Rows of the cases whose name begins so: case -> implementation -> row."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.impl and row.case.startswith(prefix):  # else the case raised, and has nothing to show
            found.setdefault(row.case, {})[row.impl] = row
    return found


def _of(rows: dict[str, Row], *names: str) -> tuple[Row, ...]:
    return tuple(rows.get(name, MISSING) for name in names)


def _preset(rows: list[Row], prefix: str) -> str:
    return next((row.shape for row in rows if row.case.startswith(prefix)), "")


def _of_models(
    rows: list[Row], prefix: str, key: str, value: Callable[[Row], float | None], show: Callable[[float | None], str]
) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: `value` of every model, and what TTM saves of the others'."""
    lines = []
    for case in grouped(rows, prefix).values():
        values = [value(row) if row is not MISSING else None for row in _of(case, *MODELS)]
        known = next(iter(case.values()))
        saved = [report.percent(saving(other, values[-1])) for other in values[:-1]]
        lines.append([str(known.detail[key]), *map(show, values), *saved])
    words = list(MODELS.values())
    return [*words, f"TTM saves of {words[0]}", *(f"of {word}" for word in words[1:-1])], lines


def _work(rows: list[Row]) -> Table:
    columns, lines = _of_models(rows, "work ", "frames", lambda row: row.flops, report.scaled)
    for line, case in zip(lines, grouped(rows, "work ").values(), strict=True):
        line.append("equal" if all(row.flops == row.flops_model for row in case.values()) else "DIFFER")
    notes = [
        ABOUT_MODELS,
        "counted by torch.utils.flop_counter as the model runs, and by the analytic cost model (mirasol.cost)",
    ]
    title = f"FLOPs of one forward pass of one clip: preset {_preset(rows, 'work ')}"
    return Table(title, ["frames", *columns, "cost model"], lines, notes=notes)


def _step_work(rows: list[Row]) -> Table:
    columns, lines = _of_models(rows, "work ", "frames", lambda row: row.detail["step_flops"], report.scaled)
    notes = ["three forward passes, the losses' heads included, by the cost model; what is checkpointed counts once"]
    title = f"FLOPs of one training step with one clip: preset {_preset(rows, 'work ')}"
    return Table(title, ["frames", *columns], lines, notes=notes)


def _step_memory(rows: list[Row]) -> Table:
    """The same lengths twice: blocks kept, and checkpointed."""
    lines, columns = [], []
    for name, key in (("kept", "step_bytes"), ("checkpointed", "checkpointed_bytes")):
        columns, found = _of_models(rows, "work ", "frames", lambda row, key=key: row.detail[key], gigabytes)  # type: ignore[misc]
        lines += [[line[0], name, *line[1:]] for line in found]
    notes = [
        "predicted: the most that a step holds beside weights and AdamW's moments, gradients included; bfloat16 by "
        "autocast; within 12 % of what PyTorch allocates, measured below"
    ]
    title = f"Peak memory of one training step with one clip: preset {_preset(rows, 'work ')}"
    return Table(title, ["frames", "blocks", *columns], lines, 2, notes)


def _texts(rows: list[Row]) -> Table:
    columns, lines = _of_models(rows, "text of ", "text_tokens", lambda row: row.flops, report.scaled)
    frames = next((row.detail["frames"] for row in rows if row.case.startswith("text of ")), "")
    notes = ["342 tokens: 256 words in subwords, as elsewhere; 1450: as many words in bytes"]
    return Table(f"The same forward pass, {frames} frames, by tokens of text", ["tokens", *columns], lines, notes=notes)


def _shares(rows: list[Row]) -> Table:
    lines, closest = [], ""
    for case in grouped(rows, "TTM share ").values():
        ttm = {row.detail["part"]: row for name, row in case.items() if name.startswith("TTM")}
        whole_models = [row for row in case.values() if row.detail["part"] == "whole model"]
        depths = [row for row in whole_models if row.impl.startswith("Transformer")]
        for row in depths:
            alone = case.get(f"{row.impl}, Combiner alone", MISSING)
            whole = saving(row.flops, ttm.get("whole model", MISSING).flops)
            of_combiner = saving(alone.flops, ttm.get("Combiner", MISSING).flops)
            marks = f"{PUBLISHED:.0f} %" if row.detail["frames"] == 128 else ""
            lines.append(
                [
                    str(row.detail["frames"]),
                    str(row.detail["layers"]),
                    report.scaled(row.flops),
                    report.scaled(ttm.get("whole model", MISSING).flops),
                    report.percent(whole),
                    report.percent(of_combiner),
                    marks,
                ]
            )
        closest = closest or _between(depths, ttm.get("whole model", MISSING))
    columns = ["frames", "Combiner layers", "Transformer", "TTM", "whole model", "Combiner alone", "published"]
    notes = [f"published: {PUBLISHED:.0f} % less compute, setting not stated; the main one has 128 frames in 16 chunks"]
    notes += [closest] if closest else []
    return Table("FLOPs that TTM saves against the causal-Transformer Combiner", columns, lines, 2, notes)


def _every_combiner(rows: list[Row]) -> Table:
    """What each Combiner costs, alone and with its model, against TTM."""
    lines = []
    for case in grouped(rows, "every Combiner ").values():
        ttm = case.get(TTM_ALONE, MISSING)
        for row in case.values():
            alone, ttm_alone = row.detail.get("combiner_flops"), ttm.detail.get("combiner_flops")
            parameters = row.detail.get("parameters", {})
            lines.append(
                [
                    str(row.detail["frames"]),
                    row.impl,
                    row.detail["sees"],
                    report.scaled(parameters.get("combiner")),
                    report.scaled(sum(parameters.values()) or None),
                    report.scaled(alone),
                    report.scaled(row.flops),
                    report.scaled(row.detail.get("step_flops")),
                    report.ratio(alone / ttm_alone if alone is not None and ttm_alone else None),
                    report.ratio(row.flops / ttm.flops if row.flops and ttm.flops else None),
                    report.percent(saving(row.flops, ttm.flops)),
                ]
            )
    columns = ["frames", "Combiner", "sees", "parameters", "in all", "Combiner", "whole model", "training step"]
    columns += ["Combiner of TTM's", "whole of TTM's", "TTM saves"]
    notes = [
        "FLOPs of a forward pass, counted and equal to the cost model; of a step: three forward passes with the losses",
        "below 1x, and less than 0 % saved: costs less than TTM",
        "pooling and one layer over one chunk cost a whole model about what TTM does; unlike them it remembers",
        "operations alone: what the models learn is not compared here",
    ]
    title = f"FLOPs and parameters with every Combiner: preset {_preset(rows, 'every Combiner ')}"
    return Table(title, columns, lines, 3, notes)


def _footprint(case: dict[str, Row]) -> Table:
    """Memory of a step and of a stream with every Combiner, and the longest clips that fit."""
    known = next(iter(case.values()))
    gpus = list(known.detail["trained"])
    lines = []
    for row in case.values():
        detail, stream = row.detail, row.detail.get("stream")
        lines.append(
            [
                row.impl,
                report.scaled(detail["parameters"]),
                gigabytes(detail["step_bytes"]),
                gigabytes(detail["checkpointed_bytes"]),
                *(_frames(chunks, row) for gpu in gpus for chunks in detail["trained"][gpu]),
                megabytes(stream["bounded"]) if stream else "cannot stream",
                megabytes(stream["combiner_bounded"]) if stream else "",
                megabytes(stream["a_chunk"]) if stream else "",
                megabytes(stream["combiner_a_chunk"]) if stream else "",
                *(_hours(detail["streamed"][gpu], row) if stream else "" for gpu in gpus),
            ]
        )
    columns = ["Combiner", "parameters", f"step, {known.detail['frames']} frames", "checkpointed"]
    columns += [name for gpu in gpus for name in (f"longest, {gpu}", "checkpointed")]
    columns += ["stream, windows", "its Combiner", "a chunk adds", "to its Combiner"]
    columns += [f"longest stream, {gpu}" for gpu in gpus]
    notes = [
        "all of it predicted by the cost model, in bfloat16: nothing on this table was measured on a GPU",
        "step: beside weights and AdamW's moments, one clip; longest: frames of the clip that can be trained on",
        "stream, windows: state of a stream whose parts see the last 64 chunks: constant, however long it runs",
        "a chunk adds: to a stream that remembers everything; the keys and values behind the Combiner grow with each",
        "longest stream: that remembers everything; what it keeps doubles its room when it is full: powers of 2",
    ]
    return Table(f"Memory of training and streaming: preset {known.shape}", columns, lines, notes=notes)


def _frames(chunks: int, row: Row) -> str:
    return f"{chunks * row.detail['frames_per_chunk']}" if chunks else "none"


def _hours(chunks: int, row: Row) -> str:
    if not chunks:
        return "none"
    return "any" if chunks >= MOST else f"{chunks * row.detail['seconds_per_chunk'] / 3600:.2g} h"


def _measured(rows: list[Row]) -> Table:
    case = grouped(rows, "measured memory").get("measured memory", {})
    lines = []
    for name, row in case.items():
        again = case.get(f"{name}, checkpointed")
        if again is None:
            continue
        cells = [name]
        for one in (row, again):
            predicted = one.detail["predicted_bytes"]
            over = report.percent(100 * (predicted / one.peak_bytes - 1) if one.peak_bytes else None)
            cells += [report.mebibytes(one.peak_bytes), report.mebibytes(predicted), over]
        kept, said = row.detail.get("stream_bytes"), row.detail.get("stream_predicted")
        lines.append([*cells, report.mebibytes(kept), "equal" if kept == said else "DIFFER"])
    columns = ["Combiner", "kept, measured", "predicted", "off by", "checkpointed, measured", "predicted", "off by"]
    columns += ["stream, measured", "predicted"]
    notes = ["the most that forward and backward hold beside weights, by PyTorch's allocator; float32"]
    title = f"The cost model of memory against what is allocated: preset {_preset(rows, 'measured memory')}"
    return Table(title, columns, lines, notes=notes)


def _between(depths: list[Row], ttm: Row) -> str:
    """Which depths of the Transformer Combiner bracket the published figure, at 128 frames."""
    if not depths or depths[0].detail["frames"] != 128:
        return ""
    figures = [(row.detail["layers"], saving(row.flops, ttm.flops) or 0.0) for row in depths]
    below = [entry for entry in figures if entry[1] <= PUBLISHED]
    above = [entry for entry in figures if entry[1] > PUBLISHED]
    if not below or not above:
        return ""
    (low, less), (high, more) = below[-1], above[0]
    return f"at 128 frames {PUBLISHED:.0f} % lies between {low} layers ({less:.1f} %) and {high} layers ({more:.1f} %)"


def _pruning(rows: list[Row]) -> Table:
    lines = []
    for case in grouped(rows, "last-m pruning ").values():
        pruned, whole = _of(case, PRUNED, UNPRUNED)
        known = next(iter(case.values()))
        promised = saving(whole.flops, pruned.flops)
        found = 100 * (1 - 1 / pruned.speedup) if pruned.speedup and whole.median_ms else None
        kept = report.percent(100 * found / promised) if found is not None and promised else ""
        lines.append(
            [
                f"{known.shape}, {known.detail['chunks']} chunks",
                report.scaled(whole.flops),
                report.scaled(pruned.flops),
                report.percent(promised),
                report.time_range(whole) if known.mode != "count" else "",
                report.time_range(pruned) if known.mode != "count" else "",
                report.percent(found) if found is not None else "",
                kept,
                str(pruned.n or ""),
            ]
        )
    columns = ["Combiner", "FLOPs, all", "last m", "saved", "ms, all", "ms, last m", "saved", "of promised", "n"]
    return Table("Last-m pruning: the last Combiner layer for m tokens a chunk, exact", columns, lines)


def _attention(rows: list[Row]) -> Table:
    from cases.attention import DENSE, FULL, OURS

    lines = []
    for case in grouped(rows, "chunk-causal attention ").values():
        names = [name for name in case if name.startswith("mirasol")] or [OURS]
        full, dense, *ours = _of(case, FULL, DENSE, *names)
        for row in ours:
            against_full = full.speedup / row.speedup if full.speedup and row.speedup else None
            lines.append(
                [
                    f"{row.detail.get('chunks')} x {row.detail.get('tokens')}",
                    report.percent(saving(full.flops, row.flops)),
                    report.time_range(full),
                    report.time_range(dense),
                    report.time_range(row),
                    report.ratio(1 / against_full if against_full else None),
                    report.ratio(row.speedup),
                    *(report.mebibytes(r.peak_bytes) for r in (full, dense, row)),
                    str(row.n),
                ]
            )
    columns = ["chunks x tokens", "FLOPs saved", "ms, full", "ms, dense mask", "ms, mirasol", "x full", "x masked"]
    notes = [
        "full attention sees the future, which a predicting model must not; a dense mask hides it and saves nothing"
    ]
    return Table(
        f"Chunk-causal attention of the Combiner: {_preset(rows, 'chunk-causal')}",
        [*columns, "memory, full", "masked", "mirasol", "n"],
        lines,
        notes=notes,
    )


def _times(rows: list[Row], prefix: str, what: str) -> Table:
    lines = []
    for case in grouped(rows, prefix).values():
        models = _of(case, *MODELS)
        known = next(iter(case.values()))
        ttm = models[-1].speedup
        ratios = [ttm / row.speedup if ttm and row.speedup else None for row in models[:-1]]
        lines.append(
            [
                f"{known.detail['frames']} x {known.detail.get('clips', 1)}",
                *(report.time_range(row) for row in models),
                *map(report.ratio, ratios),
                str(max(row.n for row in case.values())),
            ]
        )
    words = list(MODELS.values())
    columns = ["frames x clips", f"{words[0]} (p20–p80)", *words[1:], *(f"{word} / TTM" for word in words[:-1]), "n"]
    device = next((f"{row.device}, {row.dtype}" for row in rows if row.case.startswith(prefix)), "")
    notes = [
        "every ratio from one process, on the same clips, in turns, n rounds; the encoders, alike in all, are included"
    ]
    return Table(f"Time of {what}: preset {_preset(rows, prefix)}; {device}", columns, lines, notes=notes)


def _peaks(rows: list[Row]) -> Table:
    """What the steps that were timed held."""
    lines = []
    for case in grouped(rows, "step ").values():
        models = _of(case, *MODELS)
        known = next(iter(case.values()))
        cells = []
        for row in models:
            predicted = row.detail.get("predicted_bytes")
            both = f" ({report.mebibytes(predicted)})" if predicted else ""
            cells.append(f"{report.mebibytes(row.peak_bytes)}{both}")
        lines.append([f"{known.detail['frames']} x {known.detail['clips']}", *cells])
    notes = ["beside weights, AdamW's moments and the clips; from PyTorch's allocator, exact; predicted in brackets"]
    title = f"Peak memory of the same training steps: preset {_preset(rows, 'step ')}"
    return Table(title, ["frames x clips", *MODELS.values()], lines, notes=notes)


def gigabytes(value: float | None) -> str:
    return "–" if value is None else f"{report.number(value / 1e9)} GB"


def megabytes(value: float | None) -> str:
    return "–" if value is None else f"{report.number(value / 1e6)} MB"
