"""What a judge pays for besides quality: length and position; and how often it ties, fails, or agrees with another.

Printed with every result of a judge. Input: verdict rows (`verdict_pairs`). Output: plain figures with intervals over
questions. A preference for longer answers is no bias where they are better: the figures say what to look at, and the
null checks (identical answers, an answer with its own paragraph twice) say what is wrong.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from c2f_utils import stats
from c2f_utils.measure import verdict_pairs
from c2f_utils.measure.style_control import fit

QUINTILES = 5


def panel(rows: Sequence[Mapping], resamples: int = 1000, seed: int = 0) -> dict:
    """{"judges": one row per judge, "agreement": one row per two judges with pairs in common}.

    A judge's row: `judge`, `questions`, `pairs`, `verdicts`, and as {"value", "low", "high"} (None where nothing
    defines them) `longer_wins`: share of pairs of unequal length that the longer answer wins (by the mean of both
    orders; a tie counts half); `length`: logits per doubling of the relative length, models held fixed;
    `flips`: share of pairs in which the two orders name opposite winners; `first_wins`: share of verdicts for the
    answer shown first, in pairs read in both orders (1/2 is fair, a tie counts half); `ties`: share of the verdicts
    read; `failures`: share of verdicts that could not be read. `by_ratio`: `longer_wins` by quintile of the ratio
    longer/shorter, rows {"from", "to", "ratio" (the median), "pairs", "value", "low", "high"}.

    Agreement: {"judges": [two], "pairs", "kappa": Cohen's, of the verdicts a, tie, b of both orders together}. Shares
    of exactly 0 or 1 have Wilson's interval over questions. Raises C2FError for rows that are no verdicts.
    """
    table = verdict_pairs.pairs(rows)
    by_judge = dict(list(table.groupby("judge", sort=False)))
    return {
        "judges": [_judge(name, mine, resamples, seed) for name, mine in by_judge.items()],
        "agreement": [
            {"judges": list(names)} | found
            for names in combinations(by_judge, 2)
            if (found := _agreement(*(by_judge[name] for name in names), resamples, seed))
        ],
    }


def _judge(name: str, table: pd.DataFrame, resamples: int, seed: int) -> dict:
    winner, a, b = verdict_pairs.decided(table["p"]), table["tokens_a"].to_numpy(), table["tokens_b"].to_numpy()
    longer = np.where(a > b, winner, 1 - winner)
    longer[a == b] = np.nan
    ratio = (np.maximum(a, b) + 1) / (np.minimum(a, b) + 1)  # an answer may be empty
    bins = _quintiles(ratio, np.isfinite(longer))
    ab, ba = verdict_pairs.decided(table["p_ab"]), verdict_pairs.decided(table["p_ba"])
    orders, read = np.stack([ab, ba]), np.isfinite(ab) & np.isfinite(ba)
    # Each share is a sum over a sum, per pair; whole questions are resampled.
    above = {
        "longer_wins": np.nan_to_num(longer), "flips": read & (np.abs(ab - ba) == 1),
        "first_wins": np.where(read, ab + 1 - ba, 0), "ties": (orders == 0.5).sum(0), "failures": table["unread"],
    }  # fmt: skip
    below = {
        "longer_wins": np.isfinite(longer), "flips": read, "first_wins": 2 * read, "ties": np.isfinite(orders).sum(0),
        "failures": table["asked"],
    }  # fmt: skip
    for number, mask in enumerate(bins):
        above[f"quintile {number}"], below[f"quintile {number}"] = np.where(mask, np.nan_to_num(longer), 0), mask
    found = _shares(above, below, table["question"], resamples, seed)
    return {
        "judge": name, "questions": table["question"].nunique(), "pairs": len(table),
        "verdicts": int(table["asked"].sum()), "length": _per_doubling(table.dropna(subset="p"), resamples, seed),
        **{key: value for key, value in found.items() if not key.startswith("quintile")},
        "by_ratio": [
            {"from": float(ratio[mask].min()), "to": float(ratio[mask].max()), "ratio": float(np.median(ratio[mask])),
             "pairs": int(mask.sum()), **found[f"quintile {number}"]}
            for number, mask in enumerate(bins)
        ],
    }  # fmt: skip


def _shares(above: dict, below: dict, questions: pd.Series, resamples: int, seed: int) -> dict[str, dict | None]:
    over, under = (np.column_stack([np.asarray(v, float) for v in side.values()]) for side in (above, below))
    intervals = stats.clustered_bootstrap(lambda w: (w @ over) / (w @ under), questions, resamples, seed)
    found = {}
    for number, (name, interval) in enumerate(zip(above, intervals, strict=True)):
        if interval and interval.value in (0, 1):
            counted = questions[under[:, number] > 0].nunique()
            interval = stats.wilson(interval.value * counted, counted)
        found[name] = interval and interval.bounds()
    return found


def _quintiles(ratio: np.ndarray, among: np.ndarray) -> list[np.ndarray]:
    """Masks of the fifths by rank; equal ratios fall into the same one, so that there may be fewer."""
    if not among.any():
        return []
    edges = np.quantile(ratio[among], np.arange(1, QUINTILES) / QUINTILES)
    place = np.searchsorted(edges, ratio, side="left")
    return [mask for number in range(QUINTILES) if (mask := among & (place == number)).any()]


def _per_doubling(judged: pd.DataFrame, resamples: int, seed: int) -> dict | None:
    """The coefficient of log2(tokens_a / tokens_b) beside a column for every model."""
    if judged.empty or (judged["tokens_a"] == judged["tokens_b"]).all():
        return None
    doublings = np.log2((judged["tokens_a"] + 1) / (judged["tokens_b"] + 1)).to_numpy()
    models = sorted({*judged["model_a"], *judged["model_b"]})[1:]
    return fit(judged, models, {"length": doublings}, resamples, seed)[-1].bounds()


def _agreement(one: pd.DataFrame, other: pd.DataFrame, resamples: int, seed: int) -> dict | None:
    both = one.merge(other, on=["question", "turn", "model_a", "model_b"], suffixes=("", "_other"))
    said = verdict_pairs.agreed(both["p_ab"], both["p_ba"])
    answered = verdict_pairs.agreed(both["p_ab_other"], both["p_ba_other"])
    known = np.isfinite(said) & np.isfinite(answered)
    if not known.any():
        return None
    first, second = ((values[known, None] == [0, 0.5, 1]).astype(float) for values in (said, answered))
    same = (first * second).sum(1)

    def kappa(weights: np.ndarray) -> np.ndarray:
        total = weights.sum(1)
        expected = ((weights @ first) * (weights @ second)).sum(1) / total**2
        return ((weights @ same / total - expected) / (1 - expected))[:, None]

    found = stats.clustered_bootstrap(kappa, both["question"][known], resamples, seed)[0]
    return {"pairs": int(known.sum()), "kappa": found and found.bounds()}
