"""The merged model against every other model of 07: one row per comparison, corrected for their number; in words and as
a table.

The verdict of a row is that of its paired interval over prompts; what Holm's correction takes back is a tie.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from c2f_utils import stats
from c2f_utils.report import gate
from c2f_utils.report.results import METRICS, RIGHT_OR_WRONG, bounds
from c2f_utils.report.words import UNCHECKED, capital, outcome

NOT_EVALUATED = "The merged model was not evaluated, so nothing is said about it."
_PARENTS = ("instruct", "coarse")


class Comparison(NamedTuple):
    """Fine minus one other model on one metric; None where nothing was recorded."""

    other: str
    label: str
    role: str
    metric: str
    fine: float | None
    value: float | None
    difference: float | None
    low: float | None
    high: float | None
    p_holm: float | None
    verdict: str  # better | worse | tie | equivalent | unknown | unmeasured
    taken_back: bool  # by Holm's correction


def paired_row(paired: Iterable[dict], a: str, b: str, metric: str, decoding: str) -> dict | None:
    """The recorded paired comparison a - b, turned round if it was recorded as b - a; None when there is none."""
    for row in paired:
        if row.get("metric") != metric or row.get("decoding") != decoding or row.get("difference") is None:
            continue
        if (row["a"], row["b"]) == (a, b):
            return row
        if (row["a"], row["b"]) == (b, a):
            low, high = row.get("high"), row.get("low")
            turned = {"low": None if low is None else -low, "high": None if high is None else -high}
            return {**row, "a": a, "b": b, "difference": -row["difference"], **turned}
    return None


def comparisons(results: dict, decoding: str = "sampled_t1") -> list[Comparison]:
    """Fine against its parents, the base and every control on last- and first-answer accuracy, or on the reward where
    the checker scored nothing; [] where fine was not evaluated."""
    models, paired = results.get("models") or {}, results.get("paired") or []
    fine = (models.get("fine") or {}).get(decoding)
    if not fine:
        return []
    scored = [metric for metric in ("accuracy_last", "accuracy_first") if fine.get(metric) is not None]
    others = [name for name, model in models.items() if name != "fine" and model.get("role") != "other form"]
    pairs = [(other, metric) for metric in scored or ["reward"] for other in others]
    rows = {pair: paired_row(paired, "fine", *pair, decoding) or {} for pair in pairs}
    tested = [pair for pair in pairs if rows[pair].get("p") is not None]
    adjusted = dict(zip(tested, stats.holm([rows[pair]["p"] for pair in tested]), strict=True))
    found = []
    for other, metric in pairs:
        row, mine, theirs = rows[other, metric], fine.get(metric), (models[other].get(decoding) or {}).get(metric)
        ends, p = (row.get("low"), row.get("high")), adjusted.get((other, metric))
        verdict = "unmeasured" if None in (mine, theirs) else outcome(*ends, METRICS[metric].margin)
        taken_back = verdict in ("better", "worse") and p is not None and p > 0.05
        difference = None if verdict == "unmeasured" else row.get("difference", mine - theirs)
        names = other, models[other].get("label") or other, models[other].get("role") or "control"
        verdict = "tie" if taken_back else verdict
        found.append(Comparison(*names, metric, mine, theirs, difference, *ends, p, verdict, taken_back))
    return found


def sentences(results: dict, decoding: str = "sampled_t1") -> list[str]:
    """Who beats the merged model, whom it beats, and from whom it cannot be told apart, one sentence each; then where
    first answers give another verdict than last ones."""
    rows = comparisons(results, decoding)
    if not rows:
        return [NOT_EVALUATED]
    if not gate.open_to(results):
        return [gate.HELD_BACK]
    name = f"The {results['models']['fine'].get('label') or 'fine actor'}"
    metric, tested = rows[0].metric, sum(row.p_holm is not None for row in rows)
    main = [row for row in rows if row.metric == metric]
    on = f"on {METRICS[metric].words}"
    wordings = {
        "worse": f"Better than {name[:1].lower()}{name[1:]} {on}: {{}}.",
        "better": f"{name} is better {on} than {{}}.",
        "tie": f"{name} cannot be told apart {on} from {{}}.",
        "equivalent": f"{name} is equivalent within {METRICS[metric].margin:g} {on} to {{}}.",
        "unknown": f"{name} is not compared {on}, for want of an interval, with {{}}.",
        "unmeasured": f"{capital(METRICS[metric].words)} was not measured, so nothing is compared, of {{}}.",
    }
    said = []
    if metric == "reward":
        said.append(f"Accuracy is not available ({UNCHECKED}); the reward is compared instead: it can favour length.")
    for verdict, wording in wordings.items():
        if group := _ordered([row for row in main if row.verdict == verdict]):
            said.append(wording.format(_listed(group)))
    if tested:
        said[-1] = f"{said[-1][:-1]}; verdicts are those after Holm's correction over {tested} comparisons."
    said += _otherwise(rows, main)
    return said


def _otherwise(rows: Sequence[Comparison], main: Sequence[Comparison]) -> list[str]:
    """One sentence on the models of which first answers give another verdict than last ones."""
    verdicts = {row.other: row.verdict for row in main}
    differing = [row for row in rows if row not in main and row.verdict != verdicts[row.other]]
    words = {
        "better": "better than", "worse": "worse than", "tie": "not told apart from", "equivalent": "equivalent to",
        "unknown": "not compared with", "unmeasured": "not compared with",
    }  # fmt: skip
    listed = "; ".join(f"{words[row.verdict]} {_named(row, '95 % interval ')}" for row in differing)
    return [f"By {METRICS[differing[0].metric].words} the verdict is another: fine is {listed}."] if differing else []


def _ordered(rows: list[Comparison]) -> list[Comparison]:
    """Parents first, then the largest difference."""
    return sorted(rows, key=lambda row: (row.other not in _PARENTS, -abs(row.difference or 0)))


def _listed(rows: Sequence[Comparison]) -> str:
    """The other models with the difference and its interval, which the first of them explains."""
    return ", ".join(_named(row, "" if number else "95 % interval ") for number, row in enumerate(rows))


def _named(row: Comparison, explained: str) -> str:
    name = f"“{row.label}”"
    if row.difference is None:
        return name
    if row.low is None or row.high is None:
        return f"{name} (difference {row.difference:+.3f}, no interval recorded)"
    lost = "; the correction takes it back" if row.taken_back else ""
    shown = f"{'difference ' if explained else ''}{row.difference:+.3f}, {explained}{row.low:+.3f} to {row.high:+.3f}"
    return f"{name} ({shown}{lost})"


_VERDICTS = {
    "better": "fine is better", "worse": "fine is worse", "tie": "cannot be told apart", "unknown": "no interval",
    "equivalent": "equivalent", "unmeasured": "not measured",
}  # fmt: skip


def table(results: dict, decoding: str = "sampled_t1") -> pd.DataFrame:
    """Every comparison as a row: fine minus the other model with its interval, Holm's p, and the verdict."""
    rows = [
        {"fine minus": row.label, "role": row.role, "metric": row.metric, "fine": row.fine, "other": row.value}
        | {"difference": row.difference, "low": row.low, "high": row.high, "p_holm": row.p_holm}
        | {"verdict": _VERDICTS[row.verdict]}
        for row in comparisons(results, decoding)
    ]
    columns = ["fine minus", "role", "metric", "fine", "other", "difference", "low", "high", "p_holm", "verdict"]
    return pd.DataFrame(rows, columns=columns)


# Every model with its intervals

_RULE = (
    "Bold: better than every other row beyond the interval, that of the paired difference where one is recorded, else "
    "where intervals do not overlap; nothing is bold where none is."
)


def with_intervals(frame: pd.DataFrame, results: dict, decoding: str) -> pd.DataFrame:
    """A table of models (`tables.model_table`) with each metric's 95 % interval beside it as far as one is known, and
    what is best beyond it marked for `typeset`: the intervals of 07, or Wilson's for shares of answers."""
    names = [name for name, model in (results.get("models") or {}).items() if model.get(decoding)]
    recorded = [((results.get("intervals") or {}).get(name) or {}).get(decoding) or {} for name in names]
    columns: dict[str, object] = {}
    best, wilson = set(), False
    for column in frame.columns:
        columns[column] = frame[column]
        ends = _ends(frame, column, recorded)
        if any(ends):
            columns |= _bounds(column, ends)
            wilson |= column in RIGHT_OR_WRONG and not all(column in each for each in recorded)
            best |= {(row, column) for row in _best(column, frame[column], ends, names, results, decoding)}
    made = pd.DataFrame(columns)
    made.attrs = {"best": best, "note": (("Shares of answers: Wilson. " if wilson else "") + _RULE).strip()}
    return made


def shares_with_intervals(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of answers' metrics with Wilson's interval beside each share whose n is known."""
    columns: dict[str, object] = {}
    for column in frame.columns:
        columns[column] = frame[column]
        if any(ends := _ends(frame, column, [{}] * len(frame))):
            columns |= _bounds(column, ends)
    return pd.DataFrame(columns)


def _ends(frame: pd.DataFrame, column: str, recorded: Sequence[Mapping]) -> list[tuple[float, float] | None]:
    """The bounds of every row's value, None where none are known."""
    rows = [{key: None if pd.isna(row[key]) else row[key] for key in {column, "n"}} for row in frame.to_dict("records")]
    return [bounds(row, column, known) for row, known in zip(rows, recorded, strict=True)]


def _bounds(column: str, ends: Sequence[tuple[float, float] | None]) -> dict[str, list]:
    return {f"{column}, {end}": [each and each[k] for each in ends] for k, end in enumerate(("low", "high"))}


def _best(metric: str, values: pd.Series, ends: list, names: list[str], results: dict, decoding: str) -> list[int]:
    """The row that is better than each other one beyond the interval, if there is one."""
    less = METRICS[metric].less_is_better
    known = [row for row, value in enumerate(values) if not pd.isna(value)]
    if less is None or len(known) < 2:
        return []
    sign = -1 if less else 1
    top = max(known, key=lambda row: sign * values.iloc[row])
    for row in known:
        if row == top:
            continue
        pair = paired_row(results.get("paired") or [], names[top], names[row], metric, decoding)
        if pair and pair.get("low") is not None:
            ahead = sign * pair["low"] > 0 and sign * pair["high"] > 0
        elif ends[top] is None or ends[row] is None:
            ahead = False
        else:
            ahead = ends[top][1] < ends[row][0] if less else ends[top][0] > ends[row][1]
        if not ahead:
            return []
    return [top]
