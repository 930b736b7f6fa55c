"""Tables of what judges said and what they pay for: win rates three ways, the bias panel, and the length-matched merge.

Inputs are the plain rows that `measure` makes of verdicts (`win_rates`, `style_control`, `bias_panel`,
`length_matched`); without any, a table is empty. Every share comes with its 95 % interval over questions.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

FIGURES = {
    "longer_wins": "longer answer wins (share)",
    "length": "length (logits per doubling)",
    "flips": "orders name opposite winners (share)",
    "first_wins": "answer shown first wins (share)",
    "ties": "ties (share)",
    "failures": "not readable (share)",
}
_RATES = {"raw": "raw", "swap_consistent": "both orders", "length_controlled": "length-controlled"}


def _spread(name: str, interval: Mapping | None) -> dict[str, float | None]:
    """An interval as three columns."""
    interval = interval or {}
    return {name: interval.get("value"), f"{name}, low": interval.get("low"), f"{name}, high": interval.get("high")}


def _ratio(tokens: float | None, others: float | None) -> float | None:
    return tokens / others if tokens is not None and others else None


def _table(rows: list[dict], columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns))


def _interval_columns(*names: str) -> list[str]:
    return [column for name in names for column in _spread(name, None)]


def win_rate_table(found: Sequence[Mapping]) -> pd.DataFrame:
    """One row per judge and model: raw, swap-consistent and length-controlled win rate against the baseline.

    `overlap` is the share of pairs in which the model is the shorter one; `detectable` the smallest difference from 1/2
    that so many verdicts would find (power 80 %); `length_ratio` the mean length over the baseline's. The remark says
    why there is no length-controlled rate, or that it is doubtful.
    """
    rows = []
    for row in found:
        controlled = row["length_controlled"]
        rows.append({
            "model": row["model"], "baseline": row["baseline"], "judge": row["judge"], "questions": row["questions"],
            "not readable": row["failed"],
            **{k: v for name, words in _RATES.items() for k, v in _spread(words, row[name]).items()},
            "overlap": controlled["overlap"], "detectable": row["detectable"],
            "mean_tokens": row["tokens"], "length_ratio": _ratio(row["tokens"], row["baseline_tokens"]),
            "remark": controlled["refused"] or controlled["note"],
        })  # fmt: skip
    columns = ["model", "baseline", "judge", "questions", "not readable", *_interval_columns(*_RATES.values())]
    return _table(rows, [*columns, "overlap", "detectable", "mean_tokens", "length_ratio", "remark"])


def style_table(found: Sequence[Mapping]) -> pd.DataFrame:
    """Per judge, every model's chance against the reference as judged and at equal style."""
    rows = [
        {"model": row["model"], "judge": judge["judge"], "questions": judge["questions"]}
        | _spread("as judged", row["raw"])
        | _spread("at equal style", row["controlled"])
        for judge in found
        for row in judge["models"]
    ]
    return _table(rows, ["model", "judge", "questions", *_interval_columns("as judged", "at equal style")])


def panel_table(panel: Mapping) -> pd.DataFrame:
    """The bias panel: one row per judge and figure."""
    rows = [
        {"judge": row["judge"], "figure": words, **(row[name] or {}), "pairs": row["pairs"]}
        for row in panel.get("judges") or []
        for name, words in FIGURES.items()
    ]
    return _table(rows, ("judge", "figure", "value", "low", "high", "pairs"))


def agreement_table(panel: Mapping) -> pd.DataFrame:
    """Cohen's kappa of every two judges on the pairs that both have judged."""
    rows = [
        {"judge": row["judges"][0], "other judge": row["judges"][1], "pairs": row["pairs"]}
        | _spread("kappa", row["kappa"])
        for row in panel.get("agreement") or []
    ]
    return _table(rows, ["judge", "other judge", "pairs", *_interval_columns("kappa")])


def length_matched_table(found: Mapping[str, Mapping]) -> pd.DataFrame:
    """The merge at other models' lengths, {name of the model: what `length_matched` found}; one row per metric.

    Where the merge never has that length, one row says so.
    """
    rows = []
    for name, row in found.items():
        start = {"compared with": name, "tokens": row["tokens"], "coefficient": row["coefficient"]}
        rows += [start | {"metric": metric} | dict(values) for metric, values in row["metrics"].items()]
        if row["refused"]:
            rows.append(start | {"remark": row["refused"]})
    columns = ("compared with", "tokens", "coefficient", "metric", "merge", "other", "difference", "remark")
    return _table(rows, columns)
