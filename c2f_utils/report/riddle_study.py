"""The riddles over seeds: the gate, the comparisons that were registered, and every arm with what it costs.

Seeds, arms, endpoint and what will be said: `benchmarks/preregistered/riddles.md`. Data: what `benchmarks/riddles.py`
gathered, by seed the `gate` and for every model its metrics on `all` problems, by kind, and its `cost`.
"""

import math
from collections.abc import Mapping

import pandas as pd

from c2f_utils import stats
from c2f_utils.report import carried
from c2f_utils.report.gate import NEW

DECODING = "sampled_t1"
LEAST_PASSED = 0.75  # of the seeds: fewer, and the setting decides nothing
_FORCED = "instruct_forced"
RIVALS = (
    "ppo_instruct_tokens", "coarse_interpolation", "distilled", "shortest_correct", "filtered_sft", "parallel_average",
)  # fmt: skip
# Question, first model, second model, metric.
REGISTERED = (
    ("does RL on the base add it?", "coarse", _FORCED, "accuracy_first"),
    ("does the merge carry it over?", "fine", _FORCED, "accuracy_last"),
    *(("is it worth its place?", "fine", rival, "accuracy_last") for rival in RIVALS),
)
KINDS = ("story", NEW)
_SHOWN = ("accuracy_last", "accuracy_first")
PANELS = (*(f"accuracy_last, {kind}" for kind in KINDS), "utility", "tokens")
_OVER_ALL = ("utility", "mean_tokens", "eos_rate")
_COSTS = ("rl_tokens", "sft_tokens", "seconds")


def passed(study: Mapping) -> dict[str, bool]:
    """Whether the gate holds, by seed."""
    return {seed: all(row["passed"] for row in found["gate"]) for seed, found in study["seeds"].items()}


def decides(study: Mapping) -> bool:
    """Whether enough seeds pass the gate for a claim."""
    held = passed(study)
    return bool(held) and sum(held.values()) >= LEAST_PASSED * len(held)


def gate_table(study: Mapping) -> pd.DataFrame:
    """One row per seed: what the gate measured, and whether it holds."""
    return pd.DataFrame(
        [
            {"seed": int(seed), **{row["name"]: row["value"] for row in found["gate"]}, "holds": passed(study)[seed]}
            for seed, found in study["seeds"].items()
        ]
    )


def registered_table(study: Mapping, passing_only: bool = False) -> pd.DataFrame:
    """The registered comparisons on riddles: mean difference over seeds with its t-interval and Holm's p over all of
    them, and the verdict; with `passing_only` of the seeds that pass the gate."""
    held = passed(study)
    seeds = [seed for seed in study["seeds"] if held[seed] or not passing_only]
    rows = []
    for question, first, second, metric in REGISTERED:
        gaps = [_value(study, seed, first, metric) - _value(study, seed, second, metric) for seed in seeds]
        found = stats.seed_interval(gaps)
        p = stats.t_test(gaps) if len(gaps) > 1 else math.nan
        rows.append({"question": question, "model": first, "minus": second, "metric": metric} | _bounds(found, p))
    for row, p in zip(rows, stats.holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
        apart = p <= 0.05 and row["low"] is not None and row["low"] * row["high"] > 0
        row["verdict"] = ("higher" if row["difference"] > 0 else "lower") if apart else "cannot be told apart"
    return pd.DataFrame(rows)


def as_runs(study: Mapping) -> tuple[list[dict], list[str]]:
    """The seeds as results of 07 whose accuracies are named by kind, and the seeds' names: for `figures.seed_forest`
    with `PANELS`."""
    runs = []
    for found in study["seeds"].values():
        models = {}
        for name, row in found["models"].items():
            by_kind = {f"{metric}, {kind}": row[kind][metric] for kind in KINDS for metric in _SHOWN}
            models[name] = {"label": row["label"], "role": row["role"], DECODING: row["all"] | by_kind}
        runs.append({"models": models})
    return runs, [f"seed {seed}" for seed in study["seeds"]]


def carried_over_seeds(study: Mapping) -> pd.DataFrame:
    """What RL added, what instruction tuning lost and what the merge brings back, kind by kind: mean of the changes of
    `carried.carried_table` over seeds with t-intervals."""
    each = pd.concat([pd.DataFrame(found["carried"]) for found in study["seeds"].values()])
    rows = []
    for kind, mine in each.groupby("problems", sort=False):
        for change in carried.CHANGES:
            found = stats.seed_interval(mine[change].tolist())
            rows.append({"problems": kind, "change": change, "mean": found.value, "low": found.low, "high": found.high})
    return pd.DataFrame(rows)


def arms_table(study: Mapping) -> pd.DataFrame:
    """One row per model that every seed has, best on riddles first: means over seeds, and what it costs."""
    seeds = list(study["seeds"].values())
    rows = []
    for name in _shared(study):
        mine = [found["models"][name] for found in seeds]
        row = {"model": mine[0]["label"]}
        row |= {f"{metric}, {kind}": _mean(each[kind][metric] for each in mine) for kind in KINDS for metric in _SHOWN}
        row |= {metric: _mean(each["all"][metric] for each in mine) for metric in _OVER_ALL}
        rows.append(row | {key: _mean(each["cost"].get(key) for each in mine) for key in _COSTS})
    return pd.DataFrame(rows).sort_values(f"accuracy_last, {NEW}", ascending=False, ignore_index=True)


def differences_table(study: Mapping) -> pd.DataFrame:
    """Fine minus every other model, in the order of `arms_table`: mean over seeds with its t-interval, uncorrected."""
    runs, _ = as_runs(study)
    rows = []
    for name in _shared(study):
        row = {"fine minus": runs[0]["models"][name]["label"]}
        for metric in (*PANELS[:-1], *_OVER_ALL[1:]):
            pairs = [[run["models"][model][DECODING][metric] for model in ("fine", name)] for run in runs]
            found = stats.seed_interval([a - b for a, b in pairs])
            bounds = "" if found.low is None else f" ({found.low:+.2f}, {found.high:+.2f})"
            row[metric] = f"{found.value:+.2f}{bounds}"
        rows.append(row)
    frame = pd.DataFrame(rows).set_index("fine minus")
    others = [model for model in arms_table(study)["model"] if model != runs[0]["models"]["fine"]["label"]]
    return frame.loc[others].reset_index()


def _shared(study: Mapping) -> list[str]:
    """Models that every seed has."""
    first, *others = (found["models"] for found in study["seeds"].values())
    return [name for name in first if all(name in models for models in others)]


def _value(study: Mapping, seed: str, model: str, metric: str) -> float:
    return study["seeds"][seed]["models"][model][NEW][metric]


def _mean(values) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _bounds(found: stats.Interval, p: float) -> dict[str, float | None]:
    return {"difference": found.value, "low": found.low, "high": found.high, "p": p, "seeds": found.n}


TABLES = (gate_table, registered_table, arms_table, differences_table, carried_over_seeds)
