"""What the numbers of 04 say of laws for l(t), in words computed from them."""

from c2f_utils import stats
from c2f_utils.report.words import UNCHECKED, capital, difference_words, outcome


def law_pairs(results: dict, a: str, b: str, metric: str) -> tuple[list[float], list[float], list[str]]:
    """Final values of two laws on the seeds both have, and those seeds; `rollout_tokens` counts as a metric."""
    found: tuple[list, list, list] = ([], [], [])
    laws = results.get("laws") or {}
    first, second = (laws.get(name, {}).get("seeds", {}) for name in (a, b))
    for seed in first:
        if seed in second:
            values = [
                run[metric] if metric in run else (run.get("final") or {}).get(metric)
                for run in (first[seed], second[seed])
            ]
            if None not in values:
                found[0].append(values[0])
                found[1].append(values[1])
                found[2].append(seed)
    return found


def law_against_law(results: dict, a: str, b: str) -> list[str]:
    """Quality and rollout tokens of law a against law b over their common seeds; with one seed no verdict."""
    laws = results.get("laws") or {}
    names = [laws.get(name, {}).get("label") or name for name in (a, b)]
    missing = [name for name in (a, b) if name not in laws]
    if missing:
        return [f"No comparison of {names[0]} with {names[1]}: {' and '.join(missing)} was not run."]
    metric = "utility"
    values = law_pairs(results, a, b, metric)
    prefix = ""
    if not values[2]:
        metric, prefix = "reward", f"(Utility is not available: {UNCHECKED}.) "
        values = law_pairs(results, a, b, metric)
    if not values[2]:
        return [f"No comparison of {names[0]} with {names[1]}: they share no seed with a measured result."]
    seeds = len(values[2])
    gap = stats.seed_interval([x - y for x, y in zip(values[0], values[1], strict=True)])
    tokens = law_pairs(results, a, b, "rollout_tokens")
    ratio = stats.log_ratio_interval(tokens[0], tokens[1]) if tokens[2] and min(*tokens[0], *tokens[1]) > 0 else None
    cost = ""
    if ratio:
        bounds = "" if ratio.low is None else f" (95 % interval {ratio.low:.2f} to {ratio.high:.2f})"
        cost = f"; it generated {ratio.value:.2f} times the tokens{bounds}"
    if gap.low is None:
        relation = "above" if gap.value > 0 else "below" if gap.value < 0 else "from"
        said = f"On one seed the {metric} of {names[0]} is {abs(gap.value):.3f} {relation} that of {names[1]}"
        return [f"{prefix}{said}; one seed allows no verdict{cost}."]
    numbers = f"{difference_words(*gap[:3])} over {seeds} seeds"
    verdict = {
        "better": f"{capital(names[0])} is better than {names[1]} on {metric}: {numbers}",
        "worse": f"{capital(names[0])} is worse than {names[1]} on {metric}: {numbers}",
        "tie": f"{capital(names[0])} and {names[1]} cannot be told apart on {metric}: {numbers}",
    }[outcome(gap.low, gap.high)]
    return [f"{prefix}{verdict}{cost}."]


def linear_against_logistic(results: dict) -> list[str]:
    """Do the signals of the law of 03, `logistic` unless set otherwise, buy anything over a plain linear ramp?"""
    words = law_against_law(results, "logistic", "clock_linear") + _limit_gap(results)
    utility = law_pairs(results, "logistic", "clock_linear", "utility")
    values = utility if utility[2] else law_pairs(results, "logistic", "clock_linear", "reward")
    if len(values[2]) < 2:
        return words
    gap = stats.seed_interval([x - y for x, y in zip(values[0], values[1], strict=True)])
    law = _law_of_03(results)
    return words + [
        {
            "better": f"The signals of {law} buy quality here that a linear ramp does not.",
            "worse": f"A plain linear ramp, which reads no signal, does better here than {law}.",
            "tie": "No advantage of the signals over a plain linear ramp can be measured here.",
        }[outcome(gap.low, gap.high)]
    ]


def _limit_gap(results: dict) -> list[str]:
    """How far apart the limits of the law of 03 and of the linear ramp ever were, over all seeds (tokens)."""
    laws = results.get("laws") or {}
    seeds = [(laws.get(name) or {}).get("seeds") or {} for name in ("logistic", "clock_linear")]
    paths = [(a.get("limits"), seeds[1][s].get("limits")) for s, a in seeds[0].items() if s in seeds[1]]
    gaps = [abs(x - y) for a, b in paths if a and b for x, y in zip(a, b, strict=False)]
    if not gaps:
        return []
    largest = max(limit for pair in paths for path in pair for limit in path or [])
    words = f"The limits of the two were never more than {max(gaps)} tokens apart, of at most {largest}"
    same = max(gaps) <= 0.1 * largest
    alike = f"{words}: {_law_of_03(results)} behaved like a linear ramp."
    return [alike if same else f"{words}: the laws took different paths."]


def _law_of_03(results: dict) -> str:
    entry = (results.get("laws") or {}).get("logistic") or {}
    return f"the {(entry.get('law') or {}).get('name', 'logistic')} law"


def schedules(results: dict) -> list[str]:
    """Every sentence about stage 04."""
    return law_against_law(results, "logistic", "fixed_long") + linear_against_logistic(results)
