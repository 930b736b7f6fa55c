"""Win rates of models against a baseline: as judged, as both orders agree, and at equal length.

Input: verdict rows (`verdict_pairs`). Output: one plain row per judge and model. A raw win rate pays for length where
the judge does; a length-controlled one asks a regression what it would be at equal length, which is an extrapolation
for a model that is always longer: it is refused then. What a merge can do instead is to have that length:
`length_matched`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from c2f_utils import stats
from c2f_utils.measure import verdict_pairs
from c2f_utils.measure.regression import FREE, logistic, sigmoid

LENGTH, DIFFICULTY = -1.44, 0.92  # medians of published coefficients, see `length_controlled`
RIDGE = 0.1
LEAST_OVERLAP = 0.05


def win_rates(rows: Sequence[Mapping], baseline: str, resamples: int = 1000, seed: int = 0) -> list[dict]:
    """One row per judge and model that was compared with `baseline`, best first within a judge.

    `judge`, `model`, `baseline`; `questions` and `pairs` judged, `failed` pairs without any readable verdict;
    `raw`, `swap_consistent`: {"value", "low", "high"}, shares in [0, 1], intervals over questions (None where nothing
    was judged, or never in both orders); `length_controlled`: see there; `detectable`: the smallest difference from
    1/2 that so many verdicts would find with a probability of 80 %; `tokens`, `baseline_tokens`: mean lengths. Raises
    C2FError for rows that are no verdicts or never name the baseline.
    """
    found = []
    for judge, table in verdict_pairs.against(verdict_pairs.pairs(rows), baseline).groupby("judge", sort=False):
        mine = []
        for model, all_pairs in table.groupby("model_a", sort=False):
            judged = all_pairs.dropna(subset="p")
            both = judged.dropna(subset=["p_ab", "p_ba"])
            said = verdict_pairs.agreed(both["p_ab"], both["p_ba"])
            mine.append({
                "judge": judge, "model": model, "baseline": baseline,
                "questions": judged["question"].nunique(), "pairs": len(judged), "failed": len(all_pairs) - len(judged),
                "raw": _mean(judged["p"].to_numpy(), judged["question"], resamples, seed),
                "swap_consistent": _mean(said, both["question"], resamples, seed),
                "length_controlled": length_controlled(judged, difficulty(table, model), resamples, seed),
                "detectable": stats.smallest_detectable(judged["p"] - 0.5, list(judged["question"]))
                if len(judged) else None,
                "tokens": _finite(all_pairs["tokens_a"].mean()),
                "baseline_tokens": _finite(all_pairs["tokens_b"].mean()),
            })  # fmt: skip
        found += sorted(mine, key=lambda row: -(row["raw"]["value"] if row["raw"] else -1))
    return found


def _mean(values: np.ndarray, questions: pd.Series, resamples: int, seed: int) -> dict | None:
    if not len(values):
        return None
    found = stats.clustered_bootstrap(lambda w: (w @ values / w.sum(1))[:, None], questions, resamples, seed)
    return found[0].bounds()


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def difficulty(table: pd.DataFrame, model: str) -> pd.Series | None:
    """How easily the other models win each (question, turn) against the same baseline: log odds of their mean
    preference, with half a win and half a loss added. None without other models."""
    others = (
        table[table["model_a"] != model].dropna(subset="p").groupby(["question", "turn"])["p"].agg(["sum", "count"])
    )
    return None if others.empty else np.log((others["sum"] + 0.5) / (others["count"] - others["sum"] + 0.5))


def length_controlled(
    judged: pd.DataFrame, difficulties: pd.Series | None = None, resamples: int = 1000, seed: int = 0
) -> dict:
    """The win rate of one model (model a of all pairs) at equal length, estimated from how preferences go with length.

    The model is AlpacaEval 2's (Dubois et al. 2024, arXiv 2404.04475): preference = sigmoid(theta + length *
    tanh((tokens_b - tokens_a) / s) + difficulty * d), s the standard deviation of the difference, d the z-scored
    difficulty of a question; the result is the mean preference with the length term at zero. The published fit leans
    on data that are not at hand here (its own difficulties, two baselines made to be short and long). Its place is
    taken by a ridge towards the medians of its published coefficients, -1.44 and 0.92, over 143 models: mean
    cross-entropy plus RIDGE / 2 times the squared distance. The difficulties come from the other models judged.

    What is known of it: on 30 published models, others than those 143, it is off by 1.4 points on average and by 4.3
    at most; with RIDGE from 0.05 to 0.3 by 1.5 to 1.2 on average. The verdicts themselves, cross-validated, would ask
    for a smaller RIDGE, which is further from the published values: the prior is an assumption. It was learnt from
    one judge (GPT-4 Turbo) and one baseline and need not hold for others.

    `value`, `low`, `high` (refitted in every resample of questions; difficulties and s stay); `overlap`, `longer`: the
    shares of pairs in which the model is the shorter and the longer one; `length`, `difficulty`: the coefficients with
    their intervals; `refused`: why there is no value, else None. It is refused below an overlap of 5 %; `note` says
    when the model is hardly ever the longer one, which rests on the prior as much.
    """
    delta = (judged["tokens_b"] - judged["tokens_a"]).to_numpy(float)
    found: dict = dict.fromkeys(
        ("value", "low", "high", "overlap", "longer", "length", "difficulty", "refused", "note")
    )
    if not len(judged):
        return found | {"refused": "nothing was judged"}
    found |= {"overlap": float((delta > 0).mean()), "longer": float((delta < 0).mean())}
    if found["overlap"] < LEAST_OVERLAP and found["longer"] > 0:
        words = f"shorter than the baseline in {found['overlap']:.1%} of pairs, below {LEAST_OVERLAP:.0%}"
        return found | {"refused": words + ": equal length is an extrapolation"}
    spread = delta.std()
    length = np.tanh(delta / spread) if spread else np.sign(delta)
    columns, mean, ridge = [np.ones(len(delta)), length], [0.0, LENGTH], RIDGE * len(delta)
    precision = [FREE, ridge]
    hard = None if difficulties is None else _standardised(judged, difficulties)
    if hard is not None:
        columns, mean, precision = [*columns, hard], [*mean, DIFFICULTY], [*precision, ridge]
    features, labels = np.stack(columns, axis=1), judged["p"].to_numpy()

    def controlled(weights: np.ndarray) -> np.ndarray:
        fitted = logistic(features, labels, weights, np.array(mean), np.array(precision))
        equal = fitted.copy()
        equal[:, 1] = 0.0
        rates = (weights * sigmoid(equal @ features.T)).sum(1) / weights.sum(1)
        return np.column_stack([rates, fitted[:, 1:]])

    rate, *coefficients = stats.clustered_bootstrap(controlled, judged["question"], resamples, seed)
    if found["longer"] < LEAST_OVERLAP < found["overlap"]:
        found["note"] = f"longer than the baseline in {found['longer']:.1%} of pairs only: rests on the prior"
    for name, coefficient in zip(("length", "difficulty"), coefficients, strict=False):
        found[name] = coefficient.bounds()
    return found | rate.bounds()


def _standardised(judged: pd.DataFrame, difficulties: pd.Series) -> np.ndarray | None:
    """z-scored difficulty per pair, 0 where nobody else answered; None where all questions are alike."""
    values = difficulties.reindex(pd.MultiIndex.from_frame(judged[["question", "turn"]])).to_numpy()
    spread = np.nanstd(values) if np.isfinite(values).any() else 0.0
    return np.nan_to_num((values - np.nanmean(values)) / spread) if spread > 1e-9 else None
