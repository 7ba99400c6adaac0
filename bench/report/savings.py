"""The tables of the savings suite, from its rows."""

from __future__ import annotations

from collections.abc import Iterable

from core.rows import Row
from report import tables as report
from report.console import Table

SUITE = "savings"
EVERYTHING, CHUNKED, CHUNKED_TTM = "everything at once", "chunks + Transformer", "chunks + TTM"
TTM_ALONE = "TTM"
PRUNED, UNPRUNED = "last m only", "all, then slice"
PUBLISHED = 18.0
"""Percent of compute that the TTM Combiner saves, as published for Mirasol3B without the setting."""
MISSING = Row("", "", "", status="–")


def tables(rows: list[Row]) -> list[Table]:
    """Work, shares of TTM, every Combiner, pruning, attention, and the sweep; those that have rows."""
    drawn = [
        _work(rows),
        _shares(rows),
        _every_combiner(rows),
        _pruning(rows),
        _attention(rows),
        _times(rows),
        _memory(rows),
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
            memory = report.percent(saving(everything.peak_bytes, ttm.peak_bytes))
            parts.append(f"{report.ratio(ttm.speedup)} the speed with {memory} less memory {where}")
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
        if row.case.startswith(prefix):
            found.setdefault(row.case, {})[row.impl] = row
    return found


def _of(rows: dict[str, Row], *names: str) -> tuple[Row, ...]:
    return tuple(rows.get(name, MISSING) for name in names)


def _preset(rows: list[Row], prefix: str) -> str:
    return next((row.shape for row in rows if row.case.startswith(prefix)), "")


def _work(rows: list[Row]) -> Table:
    lines = []
    for case in grouped(rows, "work ").values():
        a, b, c = _of(case, EVERYTHING, CHUNKED, CHUNKED_TTM)
        known = next(iter(case.values()))
        exact = all(row.flops == row.flops_model for row in case.values())
        lines.append(
            [
                str(known.detail["frames"]),
                *(report.scaled(row.flops) for row in (a, b, c)),
                report.percent(saving(a.flops, b.flops)),
                report.percent(saving(a.flops, c.flops)),
                report.percent(saving(b.flops, c.flops)),
                "equal" if exact else "DIFFER",
            ]
        )
    models = ["(a) everything", "(b) Transformer", "(c) TTM"]
    columns = ["frames", *models, "b saves of a", "c of a", "c of b", "cost model"]
    notes = [
        f"(a) {EVERYTHING} in one Transformer; (b) {CHUNKED} Combiner, all earlier chunks; (c) {CHUNKED_TTM} Combiner",
        "counted by torch.utils.flop_counter as the model runs, and by the analytic cost model (mirasol.cost)",
    ]
    return Table(f"FLOPs of one forward pass of one clip: preset {_preset(rows, 'work ')}", columns, lines, notes=notes)


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
            lines.append(
                [
                    str(row.detail["frames"]),
                    row.impl,
                    row.detail["sees"],
                    report.scaled(row.flops),
                    report.scaled(alone),
                    report.percent(100 * alone / row.flops if alone is not None and row.flops else None),
                    report.ratio(row.flops / ttm.flops if row.flops and ttm.flops else None),
                    report.ratio(alone / ttm_alone if alone is not None and ttm_alone else None),
                ]
            )
    columns = [
        "frames",
        "Combiner",
        "sees",
        "whole model",
        "Combiner",
        "its share",
        "whole of TTM's",
        "Combiner of TTM's",
    ]
    notes = [
        "counted, and equal to the cost model; below 1x: costs less than TTM",
        "pooling and one layer over one chunk cost a whole model about what TTM does; unlike them it remembers",
        "operations alone: what the models learn is not compared here",
    ]
    title = f"FLOPs of one forward pass with every Combiner: preset {_preset(rows, 'every Combiner ')}"
    return Table(title, columns, lines, 3, notes)


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


def _times(rows: list[Row]) -> Table:
    lines = []
    for case in grouped(rows, "time ").values():
        a, b, c = _of(case, EVERYTHING, CHUNKED, CHUNKED_TTM)
        known = next(iter(case.values()))
        b_over_c = c.speedup / b.speedup if b.speedup and c.speedup else None
        lines.append(
            [
                str(known.detail["frames"]),
                *(report.time_range(row) for row in (a, b, c)),
                *(report.ratio(value) for value in (b.speedup, c.speedup, b_over_c)),
                str(max(row.n for row in case.values())),
            ]
        )
    columns = ["frames", "(a) ms (p20–p80)", "(b) ms", "(c) ms", "a / b", "a / c", "b / c", "n"]
    device = next((f"{row.device}, {row.dtype}" for row in rows if row.case.startswith("time ")), "")
    notes = [
        "every ratio from one process, on the same clip, in turns, n rounds; the encoders, alike in all, are included"
    ]
    title = f"Time of one forward pass of one clip: preset {_preset(rows, 'time ')}; {device}"
    return Table(title, columns, lines, notes=notes)


def _memory(rows: list[Row]) -> Table:
    lines = []
    for case in grouped(rows, "time ").values():
        models = _of(case, EVERYTHING, CHUNKED, CHUNKED_TTM)
        known = next(iter(case.values()))
        a, b, c = (row.peak_bytes for row in models)
        lines.append(
            [
                str(known.detail["frames"]),
                *(report.mebibytes(size) for size in (a, b, c)),
                *(report.ratio(a / size) if a and size else "–" for size in (b, c)),
            ]
        )
    columns = ["frames", "(a) everything", "(b) Transformer", "(c) TTM", "a / b", "a / c"]
    notes = ["beyond weights and the clip itself; counted from PyTorch's allocator, exact"]
    return Table(f"Peak memory of the same forward pass: preset {_preset(rows, 'time ')}", columns, lines, notes=notes)
