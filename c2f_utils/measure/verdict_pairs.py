"""Verdict rows of a judge, read into pairs: what both orders say together of two answers.

A verdict row is a mapping with `question`, `model_a`, `model_b`, `order` ("ab": a's answer was shown first, or "ba"),
`p_a` (preference for a's answer in [0, 1], whichever was shown first; null where no verdict could be read), `tokens_a`,
`tokens_b` and `judge`, and `turn` where there are several. A pair is one question (and turn) answered by two
models and judged by one judge.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from c2f_utils.errors import C2FError, problems

TIE = 0.05  # a preference within 0.5 +- TIE is a tie: a judge's own noise is no smaller
NEEDED = ("question", "model_a", "model_b", "order", "p_a", "tokens_a", "tokens_b", "judge")
_PAIR = ["judge", "question", "turn", "model_a", "model_b"]
_OTHER_SIDE = {"model_a": "model_b", "model_b": "model_a", "tokens_a": "tokens_b", "tokens_b": "tokens_a"}


def decided(preference: np.ndarray) -> np.ndarray:
    """1 where a preference is for the answer, 0 where it is against, 1/2 for a tie; NaN stays NaN."""
    preference = np.asarray(preference, float)
    tied = np.abs(preference - 0.5) <= TIE + 1e-12
    return np.where(np.isnan(preference), np.nan, np.where(tied, 0.5, preference > 0.5))


def agreed(ab: np.ndarray, ba: np.ndarray) -> np.ndarray:
    """What both orders say together: 1 or 0 where they agree on a winner, else 1/2; NaN where one could not be read."""
    first, second = decided(ab), decided(ba)
    return np.where(np.isnan(first + second), np.nan, np.where(first == second, first, 0.5))


def frame(rows: Sequence[Mapping]) -> pd.DataFrame:
    """Verdict rows as a table, one row each, with `p_a` NaN where no verdict could be read.

    Raises C2FError, all problems at once, for missing fields, a preference outside [0, 1], an unknown order, or lengths
    that are no counts; and where there is no row.
    """
    if not rows:
        raise C2FError("there is no verdict; expected at least one row: let a judge compare two models first")
    wrong = [f"row {i}: {words}" for i, row in enumerate(rows, start=1) if (words := _wrong(row))]
    if wrong:
        raise problems(f"{len(wrong)} of {len(rows)} verdict rows cannot be used", wrong[:10])
    table = pd.DataFrame.from_records([{name: row[name] for name in NEEDED} for row in rows])
    table["question"] = [str(row["question"]) for row in rows]
    table["turn"] = [row.get("turn") or 1 for row in rows]
    return table.astype({"p_a": float, "tokens_a": float, "tokens_b": float})


def _wrong(row: Mapping) -> str | None:
    missing = [name for name in NEEDED if name not in row]
    if missing:
        return f"no {', '.join(missing)}"
    if row["order"] not in ("ab", "ba"):
        return f"order is {row['order']!r}; expected 'ab' or 'ba'"
    if row["p_a"] is not None and not 0 <= row["p_a"] <= 1:
        return f"p_a is {row['p_a']}; expected a preference in [0, 1], or null"
    if not min(row["tokens_a"], row["tokens_b"]) >= 0:
        return f"lengths are {row['tokens_a']} and {row['tokens_b']}; expected numbers of tokens"
    return None


def pairs(rows: Sequence[Mapping]) -> pd.DataFrame:
    """One row per pair: its `judge`, `question`, `turn`, models and tokens, and the preference for model a.

    `p_ab` and `p_ba` are the preferences by order, `p` their mean (of the one that could be read, if only one could;
    NaN for none); `asked` and `unread` count verdicts and those that could not be read. Several verdicts on one order
    are averaged. The two names stand in alphabetical order, whichever was model a in the rows.
    """
    table = frame(rows)
    swap = table["model_a"] > table["model_b"]
    turned = table[swap].rename(columns=_OTHER_SIDE)
    turned = turned.assign(p_a=1 - turned["p_a"], order=turned["order"].map({"ab": "ba", "ba": "ab"}))
    table = pd.concat([table[~swap], turned[table.columns]]).sort_index()
    found = table.groupby(_PAIR, sort=False)[["tokens_a", "tokens_b"]].mean()
    found["asked"] = table.groupby(_PAIR, sort=False).size()
    found["unread"] = table["p_a"].isna().groupby([table[name] for name in _PAIR], sort=False).sum()
    orders = table.pivot_table(index=_PAIR, columns="order", values="p_a", aggfunc="mean", sort=False)
    orders = orders.reindex(index=found.index, columns=["ab", "ba"])
    found["p_ab"], found["p_ba"], found["p"] = orders["ab"], orders["ba"], orders.mean(axis=1)
    return found.reset_index()


def against(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """The pairs in which `baseline` took part, turned so that it is model b. Raises C2FError where there is none."""
    found = table[(table["model_a"] == baseline) | (table["model_b"] == baseline)]
    if found.empty:
        names = sorted({*table["model_a"], *table["model_b"]})
        raise C2FError(f"no verdict names {baseline!r}; expected one of {', '.join(map(repr, names))}")
    swap = (found["model_a"] == baseline) & (found["model_b"] != baseline)
    turned = found[swap].rename(columns=_OTHER_SIDE)
    # What was shown first is now the other model's answer.
    turned = turned.assign(p_ab=1 - found["p_ba"][swap], p_ba=1 - found["p_ab"][swap], p=1 - found["p"][swap])
    return pd.concat([found[~swap], turned[found.columns]]).sort_index()
