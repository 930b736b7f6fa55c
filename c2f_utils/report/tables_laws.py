"""Tables of notebooks 04 and 09: what laws cost, what they bought at equal length, and the study over conditions.

Inputs: stage 04 (its results and metrics), or the content of a study's JSON, {"runs": {condition: {law: {seed: run}}}}.
Outputs: DataFrames with the interval over seeds beside every mean; one seed gives no interval.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from c2f_utils import stats
from c2f_utils.files import read_jsonl
from c2f_utils.report import law_study
from c2f_utils.report.results import laws_of, load, target_tokens

REFERENCE = "fixed_long"


def cost_table(source: object, share: float = 0.95, metric: str = "utility") -> pd.DataFrame:
    """Rollout tokens and seconds of each law until it has made `share` of fixed-long's gain in `metric`.

    Means over the seeds that got there; where all did, the geometric mean of the ratio to fixed-long with its
    t-interval over seeds. Seconds are wall time of the iterations without evaluations, as this machine was loaded; NaN
    where the metrics of a law are not at hand (the law of 03, when another run lent it).
    """
    results, place = load(source, "04_length_schedules")
    laws = laws_of(results)
    frame = target_tokens(laws, metric, share)
    clocks = _clocks(place) if place else {}
    frame["seconds"] = [
        _at(clocks.get((law, seed)), tokens)
        for law, seed, tokens in zip(frame["law"], frame["seed"], frame["tokens"], strict=True)
    ]
    rows = []
    for law, mine in frame.groupby("law", sort=False):
        row = {"law": mine["label"].iloc[0], "seeds": len(mine), "reached": int(mine["tokens"].notna().sum())}
        for unit in ("tokens", "seconds"):
            row |= {unit: mine[unit].mean(), **_ratio(frame, law, unit)}
        rows.append(row)
    columns = ["law", "seeds", "reached"] + [
        u + e for u in ("tokens", "seconds") for e in ("", " ratio", " low", " high")
    ]
    return pd.DataFrame(rows, columns=columns)


def _clocks(place: Path) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Cumulative (rollout tokens, seconds) by law and seed, from the stage's metrics and those of 03 beside it."""
    rows = read_jsonl(place / "metrics.jsonl") if (place / "metrics.jsonl").is_file() else []
    before = place.parent / "03_coarse_rlhf" / "metrics.jsonl"
    if before.is_file() and (place / "config.json").is_file():
        from c2f_utils.files import read_json
        from c2f_utils.report.results import LAW_OF_03

        seed = read_json(place / "config.json")["settings"]["seed"]
        rows += [{"law": LAW_OF_03, "seed": seed, **row} for row in read_jsonl(before)]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if "seconds" in row and "rollout_tokens" in row:
            found.setdefault((row["law"], str(row["seed"])), []).append((row["rollout_tokens"], row["seconds"]))
    return {key: (np.array([t for t, _ in v]), np.cumsum([s for _, s in v])) for key, v in found.items()}


def _at(clock: tuple[np.ndarray, np.ndarray] | None, tokens: float) -> float:
    if clock is None or not np.isfinite(tokens):
        return float("nan")
    return float(np.interp(tokens, np.append(0, clock[0]), np.append(0, clock[1])))


def _ratio(frame: pd.DataFrame, law: str, unit: str) -> dict[str, float | None]:
    """Ratio to fixed-long, where both got there on every seed."""
    by_seed = frame.pivot(index="seed", columns="law", values=unit)
    mine = frame[frame["law"] == law]
    both = by_seed[[law, REFERENCE]].dropna() if REFERENCE in by_seed and law != REFERENCE else by_seed.iloc[:0]
    if len(both) < len(mine):  # a mean over the lucky seeds alone would flatter
        return dict.fromkeys((f"{unit} ratio", f"{unit} low", f"{unit} high"))
    found = stats.log_ratio_interval(both[law].tolist(), both[REFERENCE].tolist())
    return {f"{unit} ratio": found.value, f"{unit} low": found.low, f"{unit} high": found.high}


def prefix_reward_table(source: object) -> pd.DataFrame:
    """Mean reward of the final answers cut after fixed numbers of tokens, law by law (mean over seeds)."""
    results, _ = load(source, "04_length_schedules")
    rows = []
    for law in laws_of(results).values():
        found = [run["prefix_rewards"] for run in law["seeds"].values() if run.get("prefix_rewards")]
        if found:
            means = {f"first {k} tokens": np.mean([row[k] for row in found]) for k in found[0]}
            rows.append({"law": law["label"], "seeds": len(found), **means})
    return pd.DataFrame(rows)


# --- the study over conditions --------------------------------------------------------------------------------------


def clocks_of(laws: dict, condition: str) -> tuple[list[str], list[str]]:
    """(clocks of the grid, clocks that do not know the maximum) among the laws that one condition has."""
    maximum = law_study.ALL[condition].maximum
    return [n for n in law_study.grid(maximum) if n in laws], [n for n in law_study.agnostic(maximum) if n in laws]


def regret_table(study: dict) -> pd.DataFrame:
    """One row per condition and law: normalised regret against the best clock, t-interval over seeds, sign-flip p."""
    rows = []
    for condition, laws in study["runs"].items():
        tied, free = clocks_of(laws, condition)
        clocks = {name: laws[name] for name in (*tied, *free)}
        if condition not in law_study.CONDITIONS or not law_study.complete_seeds(clocks) or not tied:
            continue
        kind = dict.fromkeys(tied, "clock") | dict.fromkeys(free, "agnostic clock")
        kind |= {name: "averaged cut" for name in laws if name.endswith(law_study.AVERAGED)}
        for name, found in law_study.regrets(laws, list(clocks)).items():
            rows.append({"condition": condition, "law": name, "kind": kind.get(name, "law"), **found})
    return pd.DataFrame(rows, columns=["condition", "law", "kind", "regret", "low", "high", "p", "n", "best"])


def worst_table(study: dict) -> pd.DataFrame:
    """Per law: worst normalised regret over all conditions, where, its interval there, and the mean; best law first.

    "up to" is the largest upper bound of any condition, which is what a worst case may reach. Schedules that ran in
    some conditions only come last: their worst is a maximum over fewer.
    """
    frame = regret_table(study)
    rows = []
    for law, mine in frame.groupby("law", sort=False):
        worst = mine.loc[mine["regret"].idxmax()]
        rows.append({
            "law": law, "kind": worst["kind"], "conditions": len(mine), "worst regret": worst["regret"],
            "low": worst["low"], "high": worst["high"], "where": worst["condition"], "up to": mine["high"].max(),
            "mean": mine["regret"].mean(),
        })  # fmt: skip
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows)
    table["_missing"] = frame["condition"].nunique() - table["conditions"]
    return table.sort_values(["_missing", "worst regret"], ignore_index=True).drop(columns="_missing")


def savings_table(study: dict, law: str, share: float = 0.95) -> pd.DataFrame:
    """Cost of one law to `share` of what clocks gain, over the cheapest clock of each family, with how many missed.

    An arm with averaged cuts is also compared with the clock under that rule.
    """
    rows = []
    for condition, laws in study["runs"].items():
        if condition not in law_study.CONDITIONS or law not in laws:
            continue
        tied, free = clocks_of(laws, condition)
        roomy = law_study.LONG if condition in law_study.ROOMY else law_study.BUDGET
        families = {"knows the maximum": (tied, law_study.BUDGET), "agnostic": (free, roomy)}
        if law.endswith(law_study.AVERAGED):
            twin = [f"{name}{law_study.AVERAGED}" for name in free if f"{name}{law_study.AVERAGED}" in laws]
            families["agnostic, averaged cut"] = ([name for name in twin if name != law], roomy)
        for family, (names, budget) in families.items():
            common = names and law_study.complete_seeds({name: laws[name] for name in (law, *names)})
            for unit in ("tokens", "seconds") if common else ():
                found = law_study.savings(laws, law, names, share, unit, budget)
                rows.append({"condition": condition, "against": family, "unit": unit, "budget": budget, **found})
    return pd.DataFrame(rows)


def equal_quality_table(study: dict, threads: int = 2) -> pd.DataFrame:
    """Tokens and seconds of each arm of `benchmarks/time_to_target.py` to the same utility, code and law apart.

    Tokens as a share of fixed-long's (every answer counted as cut); `times faster: law` over our own fixed-long,
    `in all` over TRL's PPO, of which `code` is fixed-long's part. Geometric means with t-intervals over seeds.
    """
    rows, clock = [], f"{threads} threads"
    whole = study["arms"]["fixed_long"][clock]
    for arm, found in study["arms"].items():
        spent = [[sum(run[name]["limits"]) for run in study["runs"].values()] for name in (arm, "fixed_long")]
        tokens = stats.log_ratio_interval(*spent)
        law = stats.log_ratio_interval(whole["seconds"], found[clock]["seconds"])
        row = {"arm": arm, "seeds": found["n"], "missed": found["missed"], "tokens": tokens.value}
        row |= {"tokens low": tokens.low, "tokens high": tokens.high, "times faster: code": whole["times_less"]}
        row |= {"law": law.value, "law low": law.low, "law high": law.high, "in all": found[clock]["times_less"]}
        rows.append(row)
    return pd.DataFrame(rows)


def registered_table(study: dict, threads: int = 2) -> pd.DataFrame:
    """The comparisons of `benchmarks/preregistered/time_to_target.md` on its results: ratios of tokens and of priced
    seconds over seeds, and of the tokens that were generated, where they have been counted.

    Primary ones carry Holm's p, on tokens. The best clock of a seed is the one of the lowest mean log tokens on the
    other seeds. `missed`: seeds on which the arm never reached its target and counts its whole budget.
    """
    runs, timed = list(study["runs"]), f"{threads} threads"
    spent = {arm: [math.log(sum(study["runs"][run][arm]["limits"])) for run in runs] for arm in study["arms"]}
    took = {arm: [math.log(value) for value in found[timed]["seconds"]] for arm, found in study["arms"].items()}
    counted = {
        arm: [math.log(study["runs"][run][arm]["generated"]) for run in runs]
        for arm in study["arms"]
        if all("generated" in study["runs"][run][arm] for run in runs)
    }
    clocks, chosen = [arm for arm in spent if arm.split()[0] in ("linear", "geometric")], []
    for k in range(len(runs)):
        chosen.append(min(clocks, key=lambda arm: np.mean(np.delete(spent[arm], k))))
    for costs in (spent, took, counted):
        if {*chosen} <= costs.keys():
            costs[_BEST] = [costs[arm][k] for k, arm in enumerate(chosen)]
    rows = []
    for kind, arm, against in _REGISTERED:
        row = {"kind": kind, "arm": arm, "against": against}
        for name, costs in (("tokens", spent), ("seconds", took), ("generated", counted)):
            if not {arm, against} <= costs.keys():
                continue
            gaps = np.subtract(costs[arm], costs[against]).tolist()
            found = stats.seed_interval(gaps)
            row |= {
                name: math.exp(found.value),
                f"{name} low": math.exp(found.low),
                f"{name} high": math.exp(found.high),
            }
            row |= {"p": stats.t_test(gaps)} if name == "tokens" else {}
        missed = sum(not each[arm]["reached"] for each in study["runs"].values())
        rows.append(row | {"seeds": len(runs), "missed": missed})
    primary = [row for row in rows if row["kind"] == "primary"]
    for row, p in zip(primary, stats.holm([row["p"] for row in primary]), strict=True):
        row["p_holm"] = p
    return pd.DataFrame(rows)


_LINEAR, _USEFUL = "linear clock, averaged cut", "useful, averaged cut"
_BEST = "best clock of the other seeds"
_REGISTERED = (
    ("primary", _LINEAR, "fixed_long"),
    ("primary", _USEFUL, "fixed_long"),
    ("primary", _USEFUL, _LINEAR),
    ("secondary", _LINEAR, "fixed_long, averaged cut"),
    ("secondary", _USEFUL, "fixed_long, averaged cut"),
    ("secondary", "fixed_long, averaged cut", "fixed_long"),
    ("secondary", _USEFUL, _BEST),
)


def registered_utility(study: dict) -> stats.Interval:
    """Final utility (mean of the last two evaluations) of the linear clock with averaged cuts minus fixed-long's."""
    gaps = [
        float(np.mean(row[_LINEAR]["utility"][-2:]) - np.mean(row["fixed_long"]["utility"][-2:]))
        for row in study["runs"].values()
    ]
    return stats.seed_interval(gaps)


def last_table(study: dict, against: str = "grow 12 %") -> pd.DataFrame:
    """Utility at the end of the longer runs, law by law, and its difference to one clock's, paired by seed."""
    rows = []
    for condition in law_study.ROOMY:
        laws = study["runs"].get(condition, {})
        for law, by_seed in laws.items():
            long = {seed: run for seed, run in by_seed.items() if run["curve"]["tokens"][-1] >= law_study.LONG}
            if not long or against not in laws or not long.keys() & laws[against].keys():
                continue
            mean = np.mean([law_study.last_utility(run) for run in long.values()])
            row = {"condition": condition, "law": law, "utility at the end": mean}
            rows.append(row | law_study.differences(long, laws[against], law_study.last_utility))
    return pd.DataFrame(rows)


def averaging_table(study: dict) -> pd.DataFrame:
    """What crediting cut answers by the mean over their last prefixes adds to mean utility over the budget."""
    rows = []
    for condition, laws in study["runs"].items():
        for law in laws:
            plain = law.removesuffix(law_study.AVERAGED)
            if plain == law or plain not in laws or not laws[plain].keys() & laws[law].keys():
                continue
            row = {"condition": condition, "law": plain}
            rows.append(row | law_study.differences(laws[law], laws[plain], law_study.mean_utility))
    return pd.DataFrame(rows)


def ends_table(study: dict, laws: Sequence[str] = ()) -> pd.DataFrame:
    """Last limits where the reward pays for length alone, and where the right length is known; one row per law."""
    rows = []
    for name in law_study.HACKED | law_study.KNOWN | law_study.NOISY | law_study.LEARNED:
        for law, by_seed in study["runs"].get(name, {}).items():
            if laws and law not in laws:
                continue
            last = [run["limits"][-1] for run in by_seed.values()]
            condition = law_study.ALL[name]
            right = condition.right_length
            off = max(abs(value / right - 1) for value in last) if right else None
            rows.append({
                "condition": name, "law": law, "seeds": len(last), "shortest end": min(last), "longest end": max(last),
                "right length": right, "furthest off": off,
            })  # fmt: skip
    return pd.DataFrame(rows)


def arms_table(study: dict, against: str = "grow 12 %") -> pd.DataFrame:
    """One row per condition and arm: its mean utility over the budget minus that of `against`, paired by seed, with its
    t-interval, how its runs end (means of the last evaluation; the last limit in tokens), and what they took:
    iterations and processor seconds, of whole runs, which beyond the budget some studies have."""
    rows = []
    for condition, arms in study["runs"].items():
        for arm, found in arms.items():
            by_seed = {seed: run for seed, run in found.items() if seed in arms.get(against, {})}
            if not by_seed:
                continue
            row = {"condition": condition, "arm": arm, "mean utility": _mean(by_seed, law_study.mean_utility)}
            if arm != against:
                row |= law_study.differences(by_seed, arms[against], law_study.mean_utility)
            ends = {"utility": law_study.last_utility, "limit": lambda run: run["limits"][-1]}
            for key in ("mean_tokens", "eos_rate"):  # which an earlier study did not keep
                ends[key] = lambda run, key=key: run["curve"].get(key, [float("nan")])[-1]
            row |= {f"last {name}": _mean(by_seed, of) for name, of in ends.items()}
            row["iterations"] = _mean(by_seed, lambda run: len(run["limits"]) - 1)
            rows.append(row | {"seconds": _mean(by_seed, lambda run: run["curve"]["seconds"][-1])})
    return pd.DataFrame(rows)


def arms_overall(study: dict, against: str = "grow 12 %") -> pd.DataFrame:
    """One row per arm: its difference in mean utility to `against`, first averaged over conditions within a seed, with
    its t-interval over seeds, p of a t-test and Holm's over the arms; best arm first.

    `higher` and `lower` count the conditions whose own interval, uncorrected, excludes 0. Conditions are those in which
    both arms have two seeds in common, seeds those that both have in all of these.
    """
    frame, rows = arms_table(study, against), []
    for arm in dict.fromkeys(name for arms in study["runs"].values() for name in arms):
        pairs = [(arms.get(arm, {}), arms.get(against, {})) for arms in study["runs"].values()]
        pairs = [(a, b) for a, b in pairs if len(a.keys() & b.keys()) > 1]
        seeds = sorted(set.intersection(*({*a} & {*b} for a, b in pairs)), key=int) if pairs else []
        if arm == against or len(seeds) < 2:
            continue
        gaps = [
            float(np.mean([law_study.mean_utility(a[s]) - law_study.mean_utility(b[s]) for a, b in pairs]))
            for s in seeds
        ]
        found, mine = stats.seed_interval(gaps), frame[frame["arm"] == arm]
        worst = mine.loc[mine["difference"].idxmin()]
        rows.append({
            "arm": arm, "difference": found.value, "low": found.low, "high": found.high, "p": stats.t_test(gaps),
            "seeds": found.n, "conditions": len(pairs), "higher": int((mine["low"] > 0).sum()),
            "lower": int((mine["high"] < 0).sum()), "worst": worst["difference"], "where": worst["condition"],
        })  # fmt: skip
    for row, p in zip(rows, stats.holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return pd.DataFrame(sorted(rows, key=lambda row: -row["difference"]))


def _mean(by_seed: dict[str, dict], measure) -> float:
    return float(np.mean([measure(run) for run in by_seed.values()]))
