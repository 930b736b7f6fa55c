"""The riddles over seeds: the gate, the comparisons that were registered, and every arm with what it costs.

Seeds, arms, endpoint and what will be said: `benchmarks/preregistered/riddles.md`. Data: what `benchmarks/riddles.py`
gathered, by seed the `gate`, the `floor` (what the best constant guess gets of the riddles), and for every model by
decoding its metrics on `all` problems and by kind, and its `cost`.
"""

import math
from collections.abc import Mapping

import pandas as pd

from c2f_utils import stats
from c2f_utils.report import carried
from c2f_utils.report.gate import NEW

DECODING = "sampled_t1"
SEEDS, LEAST_PASSED = 8, 6  # as registered: fewer that pass the gate, and the setting decides nothing
_FORCED = "instruct_forced"
RIVALS = (
    "ppo_instruct_tokens", "coarse_interpolation", "distilled", "shortest_correct", "filtered_sft", "parallel_average",
)  # fmt: skip
# Question, first model, second model, metric.
REGISTERED = (
    *(("is it worth its place?", "fine", rival, "accuracy_last") for rival in RIVALS),
    ("does RL on the base add it?", "coarse", _FORCED, "accuracy_first"),
    ("does the merge carry it over?", "fine", _FORCED, "accuracy_last"),
)
# What the registered ones leave open, asked after seeds were seen (the teacher after all eight): no claim is made from
# them.
FURTHER = (
    ("did RL from instruct only need more tokens?", "coarse", "ppo_instruct_tokens", "accuracy_first"),
    ("does RL add to what forcing finds in the base?", "coarse", "base_forced", "accuracy_first"),
    ("does the merge hold it, and not the habit?", "fine_forced", _FORCED, "accuracy_last"),
    ("was RL needed for the teacher?", "base_correct", "shortest_correct", "accuracy_last"),
    ("is it the recipe?", "best_recipe", _FORCED, "accuracy_last"),
    ("is it the recipe?", "best_recipe", "shortest_correct", "accuracy_last"),
)
KINDS = ("story", NEW)
_SHOWN = ("accuracy_last", "accuracy_first")
PANELS = (*(f"accuracy_last, {kind}" for kind in KINDS), "utility", "tokens")
_OVER_ALL = ("utility", "mean_tokens", "eos_rate")
COSTS = ("rl_tokens", "sft_tokens", "search_tokens", "seconds")


def passed(study: Mapping) -> dict[str, bool]:
    """Whether the gate holds, by seed."""
    return {seed: all(row["passed"] for row in found["gate"]) for seed, found in study["seeds"].items()}


def decides(study: Mapping) -> bool:
    """Whether all seeds are there and enough of them pass the gate for a claim."""
    held = passed(study)
    return len(held) == SEEDS and sum(held.values()) >= LEAST_PASSED


def gate_table(study: Mapping) -> pd.DataFrame:
    """One row per seed: what the gate measured, and whether it holds."""
    return pd.DataFrame(
        [
            {"seed": int(seed), **{row["name"]: row["value"] for row in found["gate"]}, "holds": passed(study)[seed]}
            for seed, found in study["seeds"].items()
        ]
    )


def registered_table(study: Mapping, passing_only: bool = False, decoding: str = DECODING) -> pd.DataFrame:
    """The registered comparisons on riddles, the merge against its rivals first and of these the losses: mean
    difference over seeds with its t-interval and Holm's p over all of them, on how many seeds the first is higher,
    and the verdict; with `passing_only` of the seeds that pass the gate. `p_flip` is uncorrected, by sign flips: it
    assumes no shape."""
    held = passed(study)
    seeds = [seed for seed in study["seeds"] if held[seed] or not passing_only]
    rows = [_compared(study, seeds, comparison, decoding) for comparison in REGISTERED]
    for row, p in zip(rows, stats.holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
        apart = p <= 0.05 and row["low"] is not None and row["low"] * row["high"] > 0
        row["verdict"] = ("higher" if row["difference"] > 0 else "lower") if apart else "cannot be told apart"
    rivals = len(RIVALS)
    return pd.DataFrame(sorted(rows[:rivals], key=lambda row: row["difference"]) + rows[rivals:])


def greedy_table(study: Mapping) -> pd.DataFrame:
    """The same comparisons under greedy decoding, which were not registered."""
    return registered_table(study, decoding="greedy")


def further_table(study: Mapping) -> pd.DataFrame:
    """What was asked only after the first seeds were seen, under both decodings and without a verdict."""
    known, seeds = _shared(study), list(study["seeds"])
    return pd.DataFrame(
        [
            {"decoding": decoding} | _compared(study, seeds, comparison, decoding)
            for decoding in (DECODING, "greedy")
            for comparison in FURTHER
            if {comparison[1], comparison[2]} <= {*known}
        ]
    )


def _compared(study: Mapping, seeds: list[str], comparison: tuple[str, str, str, str], decoding: str) -> dict:
    question, first, second, metric = comparison
    labels = {name: row["label"] for name, row in study["seeds"][seeds[0]]["models"].items()}
    pairs = [[_value(study, seed, name, metric, decoding) for name in (first, second)] for seed in seeds]
    gaps = [a - b for a, b in pairs]
    found = stats.seed_interval(gaps)
    several = len(gaps) > 1
    return {
        "question": question, "model": labels[first], "minus": labels[second], "metric": metric,
        "difference": found.value, "low": found.low, "high": found.high,
        "higher on": f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}",
        "p": stats.t_test(gaps) if several else math.nan, "p_flip": stats.sign_flip(gaps) if several else math.nan,
    }  # fmt: skip


def as_runs(study: Mapping) -> tuple[list[dict], list[str]]:
    """The seeds as results of 07 whose accuracies are named by kind, and the seeds' names: for `figures.seed_forest`
    with `PANELS`."""
    runs = []
    for found in study["seeds"].values():
        models = {}
        for name, row in found["models"].items():
            seen = row[DECODING]
            by_kind = {f"{metric}, {kind}": seen[kind][metric] for kind in KINDS for metric in _SHOWN}
            models[name] = {"label": row["label"], "role": row["role"], DECODING: seen["all"] | by_kind}
        runs.append({"models": models})
    return runs, [f"seed {seed}" for seed in study["seeds"]]


def carried_over_seeds(study: Mapping) -> pd.DataFrame:
    """What RL added, what instruction tuning changed and what the merge brings back, kind by kind: mean of the changes
    of `carried.carried_table` over seeds with t-intervals."""
    each = pd.concat([pd.DataFrame(found["carried"]) for found in study["seeds"].values()])
    rows = []
    for kind, mine in each.groupby("problems", sort=False):
        for change in carried.CHANGES:
            found = stats.seed_interval(mine[change].tolist())
            rows.append({"problems": kind, "change": change, "mean": found.value, "low": found.low, "high": found.high})
    return pd.DataFrame(rows)


def arms_table(study: Mapping) -> pd.DataFrame:
    """One row per model that every seed has, best on riddles first: means over seeds, and what it costs. Right steps
    tell who analyses riddles; the best constant guess gets `floor` of them right."""
    seeds = list(study["seeds"].values())
    rows = []
    for name in _shared(study):
        mine = [found["models"][name] for found in seeds]
        row = {"model": mine[0]["label"]}
        for kind in KINDS:
            row |= {f"{metric}, {kind}": _mean(each[DECODING][kind][metric] for each in mine) for metric in _SHOWN}
        row[f"right steps, {NEW}"] = _mean(each[DECODING][NEW]["correct_steps"] for each in mine)
        row |= {metric: _mean(each[DECODING]["all"][metric] for each in mine) for metric in _OVER_ALL}
        rows.append(row | {key: _mean(each["cost"].get(key) for each in mine) for key in COSTS})
    return pd.DataFrame(rows).sort_values(f"accuracy_last, {NEW}", ascending=False, ignore_index=True)


def floor(study: Mapping) -> float:
    """Share of riddles that the best constant guess gets right, mean over seeds."""
    return _mean(found["floor"] for found in study["seeds"].values())


def differences_table(study: Mapping) -> pd.DataFrame:
    """Fine minus every other model, in the order of `arms_table`: mean over seeds with its t-interval, uncorrected."""
    runs, _ = as_runs(study)
    rows = []
    for name in _shared(study):
        row = {"fine minus": runs[0]["models"][name]["label"]}
        for metric in (*PANELS[:-1], *_OVER_ALL[1:]):
            pairs = [[run["models"][model][DECODING][metric] for model in ("fine", name)] for run in runs]
            found = stats.seed_interval([a - b for a, b in pairs])
            row |= {metric: found.value, f"{metric} low": found.low, f"{metric} high": found.high}
        rows.append(row)
    frame = pd.DataFrame(rows).set_index("fine minus")
    others = [model for model in arms_table(study)["model"] if model != runs[0]["models"]["fine"]["label"]]
    return frame.loc[others].reset_index()


def _shared(study: Mapping) -> list[str]:
    """Models that every seed has."""
    first, *others = (found["models"] for found in study["seeds"].values())
    return [name for name in first if all(name in models for models in others)]


def _value(study: Mapping, seed: str, model: str, metric: str, decoding: str) -> float:
    return study["seeds"][seed]["models"][model][decoding][NEW][metric]


def _mean(values) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


TABLES = (
    gate_table, registered_table, greedy_table, further_table, arms_table, differences_table, carried_over_seeds,
)  # fmt: skip
