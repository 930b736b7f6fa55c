"""What the residue carries, kind by kind: what RL added to the base, what instruction tuning changed, and what the
merge brings back.

A residue `coarse - base` holds what RL added; what the base knew cancels in it, also where instruction tuning lost it.
The interpolation of instruct and coarse actor keeps both, rambling included, and stands beside the merge. All figures
are those of notebook 06 on validation problems, sampled at T = 1.
"""

from collections.abc import Mapping

import pandas as pd

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


def carried_table(results: Mapping) -> pd.DataFrame:
    """One row per kind of problem (one for all where they are of one kind): first-answer accuracy of each model and the
    changes between them; missing where 06 did not answer."""
    measured = {name: row for name, row in _measured(results).items() if row}
    kinds = sorted({kind for row in measured.values() for kind in row.get("by_kind") or {}}) or ["all"]
    rows = []
    for kind in kinds:
        values = {name: (row.get("by_kind") or {}).get(kind, row).get(METRIC) for name, row in measured.items()}
        row = {"problems": kind, **{name: values.get(name) for name in COLUMNS}}
        for change, (a, b) in CHANGES.items():
            row[change] = None if None in (row[a], row[b]) else row[a] - row[b]
        rows.append(row)
    return pd.DataFrame(rows, columns=["problems", *COLUMNS, *CHANGES]).dropna(axis=1, how="all")


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
    """What RL added and how much of it the merge brings back, in one sentence without a verdict: no intervals are
    recorded."""
    frame = carried_table(results)
    if not {"added by RL", "brought back by the merge"} <= {*frame.columns}:
        return "What the residue carries was not measured: a checker is needed."
    parts = []
    for row in frame.to_dict("records"):
        said = f"{row['problems']}: RL added {row['added by RL']:+.3f}"
        if row.get("SFT, where forced") is not None:
            said += f", with forced analysis instruct minus base {row['SFT, where forced']:+.3f}"
        said += f", the merge gives instruct {row['brought back by the merge']:+.3f}"
        if row.get("by interpolation") is not None:
            said += f", interpolation with coarse {row['by interpolation']:+.3f}"
        parts.append(said)
    return f"First-answer accuracy, no intervals recorded; {'; '.join(parts)}."
