"""What the residue carries, kind by kind: what RL added to the base, what instruction tuning changed, and what the
merge brings back.

A residue `coarse - base` holds what RL added; what the base knew cancels in it, also where instruction tuning lost it.
The interpolation of instruct and coarse actor keeps both, rambling included, and stands beside the merge. All figures
are those of notebook 06 on validation problems, sampled at T = 1.
"""

from collections.abc import Mapping

import pandas as pd

from c2f_utils import stats

METRIC = "accuracy_first"  # rambling on spoils last answers, and is not the question here
BASE, INSTRUCT, COARSE, FINE, BETWEEN = "base", "instruct", "coarse", "fine", "lerp to coarse"
FORCED = ", forced"
COLUMNS = (BASE, BASE + FORCED, COARSE, INSTRUCT, INSTRUCT + FORCED, FINE, BETWEEN)
CHANGES = {
    "added by RL": (COARSE, BASE),
    "SFT, where forced": (INSTRUCT + FORCED, BASE + FORCED),
    "brought back by the merge": (FINE, INSTRUCT),
    "by interpolation": (BETWEEN, INSTRUCT),
}
_SAID = {
    "added by RL": "RL added", "SFT, where forced": "with forced analysis instruct minus base",
    "brought back by the merge": "the merge gives instruct", "by interpolation": "interpolation with coarse",
}  # fmt: skip


def carried_table(results: Mapping) -> pd.DataFrame:
    """One row per kind of problem (one for all where they are of one kind): first-answer accuracy of each model and the
    changes between them; missing where 06 did not answer."""
    rows = []
    for kind, models in _by_kind(results).items():
        row = {"problems": kind, **{name: models.get(name, {}).get(METRIC) for name in COLUMNS}}
        for change, (a, b) in CHANGES.items():
            row[change] = None if None in (row[a], row[b]) else row[a] - row[b]
        rows.append(row)
    return pd.DataFrame(rows, columns=["problems", *COLUMNS, *CHANGES]).dropna(axis=1, how="all")


def changes_table(results: Mapping) -> pd.DataFrame:
    """One row per kind of problem and change: first-answer accuracy of both models, their difference and its 95 %
    interval over problems (paired bootstrap), which is missing where 06 did not keep the single answers.

    Merges were chosen on these problems: their rows flatter.
    """
    rows = []
    for kind, models in _by_kind(results).items():
        for change, (a, b) in CHANGES.items():
            if not {a, b} <= models.keys() or None in (models[a].get(METRIC), models[b].get(METRIC)):
                continue
            row = {"problems": kind, "change": change, "of": a, "accuracy": models[a][METRIC], "minus": b}
            row |= {"its accuracy": models[b][METRIC], "difference": models[a][METRIC] - models[b][METRIC]}
            single = [[int(mark) for mark in models[name].get("first_right") or ""] for name in (a, b)]
            if single[0] and len(single[0]) == len(single[1]):
                found = stats.paired_bootstrap(*single, resamples=2000)
                row |= {"low": found.low, "high": found.high}
            rows.append(row)
    return pd.DataFrame(rows)


def _by_kind(results: Mapping) -> dict[str, dict[str, dict]]:
    """What 06 measured of each model, by kind of problem and model."""
    measured = {name: row for name, row in _measured(results).items() if row}
    kinds = sorted({kind for row in measured.values() for kind in row.get("by_kind") or {}}) or ["all"]
    return {k: {name: (row.get("by_kind") or {}).get(k, row) for name, row in measured.items()} for k in kinds}


def _measured(results: Mapping) -> dict[str, dict | None]:
    parents, forced = results.get("parents") or {}, results.get("forced") or {}
    between = (results.get("controls") or {}).get("coarse_interpolation") or {}
    alike = next((row for row in results.get("operators") or [] if row.get("operator") == "lerp"), None)
    return {
        **{name: parents.get(name) for name in (BASE, INSTRUCT, COARSE)},
        **{name + FORCED: forced.get(name) for name in (BASE, INSTRUCT)},
        FINE: _at(results.get("sweep"), (results.get("chosen") or {}).get("coefficient")),
        BETWEEN: _at(between.get("sweep"), between.get("coefficient")) or alike,  # the same formula
    }


def _at(sweep: list[dict] | None, coefficient: float | None) -> dict | None:
    return next((row for row in sweep or [] if row["coefficient"] == coefficient), None)


def in_words(results: Mapping) -> str:
    """What RL added and how much of it the merge brings back, with intervals over problems where they are recorded."""
    frame = changes_table(results)
    if frame.empty or not {"added by RL", "brought back by the merge"} <= {*frame["change"]}:
        return "What the residue carries was not measured: a checker is needed."
    known = "low" in frame and frame["low"].notna().all()
    parts = []
    for kind, mine in frame.groupby("problems", sort=False):
        said = []
        for row in mine.to_dict("records"):
            interval = f" ({row['low']:+.2f} to {row['high']:+.2f})" if known else ""
            said.append(f"{_SAID[row['change']]} {row['difference']:+.3f}{interval}")
        parts.append(f"{kind}: {', '.join(said)}")
    recorded = "no intervals recorded"
    if known:
        recorded = "95 % intervals over problems (on which merges were chosen, so theirs flatter)"
    return f"First-answer accuracy, {recorded}; {'; '.join(parts)}."
