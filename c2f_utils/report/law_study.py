"""Which law for l(t) is robust when nobody knows the right length? Conditions, clocks and measures of the study.

Question: a clock that is right for one task is wrong for another; does one law with one set of constants stay near the
best clock everywhere? Inputs: finished runs (`benchmarks/law_runs.py` makes them, one per condition, law and seed).
Outputs: mean utility over the budget, normalised regret, tokens and processor seconds to a target. The conditions
differ in how long an answer may or should be; they, the grid of clocks and the measures are our design, nothing here
is the paper's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from c2f_utils import stats
from c2f_utils.settings.laws import Law

START = 24  # tokens; where clocks and laws begin
EVALUATED = 256  # validation problems of one evaluation
EVALUATION_LIMIT = 144  # tokens, or the condition's maximum if that is less; nothing later in an answer is judged
BUDGET = 60_000  # rollout tokens over which mean utility is taken
LONG = 110_000  # rollout tokens of runs that are compared by their cost to a target
MARKS = (7_000, 14_000, 22_000, 33_000, 46_000, BUDGET, 70_000, 80_000, 95_000, LONG)
UTILITY_PRICE = 0.01  # utility per token where tokens cost; the reward's 0.006 below is about that in its deviations


@dataclass(frozen=True)
class Condition:
    """What decides how long an answer should be: largest limit (tokens), operations per problem, what reward pays."""

    maximum: int
    operations: tuple[int, int] = (3, 5)
    token_price: float = 0.0  # normalised reward per token, subtracted; utility then pays UTILITY_PRICE as well
    length_bonus: float = 0.0  # normalised reward per token, added: a reward that loves length
    quality: float = 1.0  # weight of the reward model; 0 leaves a reward for length alone
    known: bool = False  # reward: the checker up to the first result, instead of a reward model
    terminates: bool = False  # the base has also read answers that all stop at their result
    complete: bool = False  # and all of them work every step, so that they are long
    noise: float = 0.0  # deviation of what is added to every prefix that a law sees, in the reward's; pay has none
    learned: bool = False  # known: the reward is a model trained on pairs that this checker ranked

    @property
    def right_length(self) -> int | None:
        """Tokens of a complete analysis with its result, where that is all the reward pays for; else None.

        An opening (4 tokens), the start (4), ten per operation, the result (4).
        """
        return 12 + 10 * self.operations[0] if self.known else None


# The first four are one task under four maxima: a law that does not read the maximum takes the same path in all of
# them (until it reaches it), a clock does not. The others change how long an answer should be.
CONDITIONS = {
    "l_max 96": Condition(96),
    "l_max 144": Condition(144),
    "l_max 288": Condition(288),
    "l_max 576": Condition(576),
    "short problems": Condition(288, operations=(3, 3)),
    "long problems": Condition(288, operations=(5, 5)),
    "price per token": Condition(288, token_price=0.006),
    "loves length": Condition(288, length_bonus=0.01),
    "base that ends": Condition(288, terminates=True),
}
# A base that already writes long answers *and* ends them, whose useful length (62 tokens) is over twice the first
# limit: does growing the limit from below unlearn what the base could do?
UNLEARNING = {"long answers that end": Condition(288, operations=(5, 5), terminates=True, complete=True)}
ROOMY = ("l_max 576", "short problems")  # the maximum is over twice the useful length; cost to a target is compared
HACKED = {"length alone": Condition(288, length_bonus=0.02, quality=0.0)}
KNOWN = {
    "known length 42": Condition(288, operations=(3, 3), known=True),
    "known length 62": Condition(288, operations=(5, 5), known=True),
}
# The same where prefixes are noisy, and where reward and law read a model of the checker in its place.
NOISY = {
    f"{name}, noise {noise}": replace(condition, noise=noise)
    for noise in (0.5, 1.0)
    for name, condition in KNOWN.items()
}
LEARNED = {f"{name}, learned": replace(condition, learned=True) for name, condition in KNOWN.items()}
ALL = CONDITIONS | UNLEARNING | HACKED | KNOWN | NOISY | LEARNED


def grid(maximum: int) -> dict[str, Law]:
    """The clocks that a law has to hold its own against: shape, duration (iterations), first limit, all ending at
    `maximum`."""
    clocks = {"fixed long": Law(name="fixed", limit=maximum)}
    for shape, duration, start in (
        ("linear", 9, START), ("linear", 18, START), ("linear", 36, START), ("linear", 18, 64),
        ("geometric", 9, START), ("geometric", 18, START), ("geometric", 36, START),
    ):  # fmt: skip
        name = f"{shape} {duration} from {start}"
        clocks[name] = Law(name="clock", shape=shape, start=min(start, maximum), maximum=maximum, duration=duration)
    return clocks


def agnostic(maximum: int) -> dict[str, Law]:
    """Clocks that do not know how long the condition allows: constant growth per iteration, cut off at `maximum`."""
    found = {}
    for percent in (8, 12, 18):
        duration = max(1, round(math.log(maximum / START) / math.log1p(percent / 100)))
        clock = Law(name="clock", shape="geometric", start=START, maximum=maximum, duration=duration)
        found[f"grow {percent} %"] = clock
    return found


def laws(maximum: int) -> dict[str, Law]:
    """The closed-loop laws of the study, each with one set of constants for all conditions."""
    found = {name: Law(name=name, start=START, maximum=maximum) for name in ("useful", "tail", "gated", "probe")}
    return found | {"logistic": Law(name="logistic", start=START, maximum=maximum, step=max(1, maximum // 18))}


AVERAGED = ", averaged cut"  # what marks an arm whose cut answers are worth the mean over their last prefixes


def averaged(maximum: int) -> dict[str, Law]:
    """A law and a clock that run a second time with `coarse.cut: average`, to tell that rule from the law."""
    return {name + AVERAGED: {**laws(maximum), **agnostic(maximum)}[name] for name in ("useful", "grow 12 %")}


class Arm(NamedTuple):
    """A law, what it changes in `coarse` beside it, and the witness that it is kept from hearing."""

    law: Law
    changes: dict[str, object] = {}
    deaf: str = ""


def rivals(maximum: int) -> dict[str, Arm]:
    """What others do about length beside (or in place of) moving the limit, with constants that no condition was tuned
    on, and what they are compared with: growth of 12 %, fixed-long and `useful` under the plain rule.

    Our reading of DAPO (soft overlong punishment, masked cuts, clip-higher), LACONIC (dual price), a shrinking budget
    (arXiv 2508.08940) and T-PPO (continued cuts).
    """
    grow, long = agnostic(maximum)["grow 12 %"], Law(name="fixed", limit=maximum)
    shrinking = Law(name="clock", shape="linear", start=maximum, maximum=max(START, maximum // 4), duration=18)
    return {
        "grow 12 %": Arm(grow),
        "fixed long": Arm(long),
        "useful": Arm(laws(maximum)["useful"]),
        "averaged cut": Arm(grow, {"cut": "average"}),
        "soft overlong": Arm(grow, {"overlong": 1.0}),
        "masked cut": Arm(grow, {"cut": "mask"}),
        "continued cut": Arm(grow, {"cut": "continue"}),
        "dual price": Arm(long, {"length_budget": maximum // 2}),
        "shrinking clock": Arm(shrinking),
        "clip-higher": Arm(grow, {"clip_high": 0.28}),
    }


# What `useful` hears instead of each of its witnesses (given the limit) where that one is kept from it: what says
# nothing against growing.
WITNESSES = {
    "tail return": lambda limit: {"tail_return": 1.0},
    "repetition": lambda limit: {"tail_repetition": 0.0},
    "useful length": lambda limit: {"useful_length": float(limit)},
}


def witnesses(condition: str) -> dict[str, Arm]:
    """`useful` whole and with one witness less, where the right length is known or there is none; under noise whole
    alone, under a learned reward beside growth of 12 %. Empty for other conditions."""
    maximum = ALL[condition].maximum
    useful, grow = laws(maximum)["useful"], agnostic(maximum)["grow 12 %"]
    whole = {"useful": Arm(useful)}
    if condition in NOISY:
        return whole
    without = {f"useful without {name}": Arm(useful, deaf=name) for name in WITNESSES}
    if condition in LEARNED:
        return whole | without | {"grow 12 %": Arm(grow)}
    return whole | without if condition in KNOWN or condition in HACKED else {}


# --- measures on finished runs: {condition: {law: {seed: run}}} -----------------------------------------------------


def mean_utility(run: dict, budget: int = BUDGET) -> float:
    """Utility averaged over the tokens from 0 to `budget`, linear between evaluations."""
    tokens, values = run["curve"]["tokens"], run["curve"]["utility"]
    inside = sorted({0, budget, *(t for t in tokens if t < budget)})
    return float(np.trapezoid(np.interp(inside, tokens, values), inside) / budget)


def within(run: dict, budget: int) -> dict[str, list]:
    """The curve up to the first evaluation at or after `budget` tokens, so that longer runs have no advantage."""
    tokens = run["curve"]["tokens"]
    end = next((i + 1 for i, t in enumerate(tokens) if t >= budget), len(tokens))
    return {key: values[:end] for key, values in run["curve"].items()}


def cost_to(run: dict, target: float, unit: str = "tokens", budget: int = BUDGET) -> tuple[float, bool]:
    """(tokens or processor seconds until two evaluations in a row reach `target`, whether they did by `budget`).

    A run that never does costs the whole budget, in seconds what it took to spend that.
    """
    previous, curve = False, within(run, budget)
    for cost, utility in zip(curve[unit], curve["utility"], strict=True):
        reached = utility >= target
        if reached and previous:
            return float(min(cost, budget) if unit == "tokens" else cost), True
        previous = reached
    return float(budget if unit == "tokens" else np.interp(budget, curve["tokens"], curve["seconds"])), False


def complete_seeds(laws: dict[str, dict]) -> list[str]:
    """Seeds that every law of one condition has; only those are compared."""
    return sorted(set.intersection(*(set(by_seed) for by_seed in laws.values())), key=int) if laws else []


def regrets(laws: dict[str, dict], clocks: Sequence[str]) -> dict[str, dict]:
    """Per law of one condition: normalised regret of mean utility against the best of `clocks`, with its uncertainty.

    regret = mean over seeds of (best - law) / mean over seeds of (best - start), where best is the clock of the highest
    mean over the seeds that all clocks have; a law is compared on those of them that it has. The interval is Student's
    over seeds (paired), p is by sign flips; negative is better than every clock. Laws without a seed are left out.
    Raises C2FError (by `stats`) where the clocks have none in common.
    """
    seeds = complete_seeds({name: laws[name] for name in clocks})
    area = {name: {s: mean_utility(run) for s, run in by_seed.items()} for name, by_seed in laws.items()}
    best = max(clocks, key=lambda name: np.mean([area[name][s] for s in seeds]))
    start = [laws[best][s]["curve"]["utility"][0] for s in seeds]
    scale = float(np.mean([area[best][s] for s in seeds]) - np.mean(start))
    found = {}
    for name, values in area.items():
        gaps = [area[best][s] - values[s] for s in seeds if s in values]
        if gaps:
            lost = stats.seed_interval([gap / scale for gap in gaps])
            p = stats.sign_flip(gaps) if name != best else 1.0
            found[name] = {"regret": lost.value, "low": lost.low, "high": lost.high, "p": p, "n": lost.n, "best": best}
    return found


def savings(
    laws: dict[str, dict],
    law: str,
    clocks: Sequence[str],
    share: float = 0.95,
    unit: str = "tokens",
    budget: int = BUDGET,
) -> dict:
    """Cost of `law` over the cheapest of `clocks` to reach `share` of what that clock gains, paired by seed.

    Cheapest by the mean log cost over seeds. A run that never gets there costs its whole budget of tokens, and in
    seconds as much as the dearest run of its seed; where many miss, ratios are drawn to 1. The target of a seed is
    start + share * (best final utility of the clocks' seed means - start). Returns ratio with interval, p of the log
    ratio, how many seeds of each never got there, and `beyond`: the share of the clock's tokens until then that lie
    beyond the limit where the law ends, mean over seeds. A law that goes with the clock and stays at that limit could
    save no more, if every iteration taught as much.
    """
    seeds = complete_seeds({name: laws[name] for name in (law, *clocks)})

    def final(name: str) -> np.ndarray:
        return np.array([np.mean(within(laws[name][s], budget)["utility"][-2:]) for s in seeds])

    start = np.array([laws[law][s]["curve"]["utility"][0] for s in seeds])
    goal = max((final(name) for name in clocks), key=lambda values: values.mean())
    targets = start + share * (goal - start)
    found = {
        name: [cost_to(laws[name][s], t, unit, budget) for s, t in zip(seeds, targets, strict=True)]
        for name in (law, *clocks)
    }
    if unit != "tokens":  # a run that stopped early without arriving must not look cheap
        ceiling = [max(found[name][i][0] for name in found) for i in range(len(seeds))]
        found = {n: [(c if ok else top, ok) for (c, ok), top in zip(f, ceiling, strict=True)] for n, f in found.items()}
    cheapest = min(clocks, key=lambda name: np.mean([math.log(cost) for cost, _ in found[name]]))
    ours, theirs = ([cost for cost, _ in found[name]] for name in (law, cheapest))
    ratio = stats.log_ratio_interval(ours, theirs)
    tokens = [cost_to(laws[cheapest][s], t, "tokens", budget)[0] for s, t in zip(seeds, targets, strict=True)]
    ends = [laws[law][s]["limits"][-1] for s in seeds]
    paths = [_spent(laws[cheapest][s]["limits"], t) for s, t in zip(seeds, tokens, strict=True)]
    beyond = np.mean([np.maximum(0, path - end).sum() / path.sum() for path, end in zip(paths, ends, strict=True)])
    return {
        "clock": cheapest, "ratio": ratio.value, "low": ratio.low, "high": ratio.high, "n": ratio.n,
        "p": stats.sign_flip([math.log(a / b) for a, b in zip(ours, theirs, strict=True)]),
        "missed": sum(not reached for _, reached in found[law]),
        "clock_missed": sum(not reached for _, reached in found[cheapest]), "beyond": float(beyond),
    }  # fmt: skip


def _spent(path: Sequence[int], tokens: float, prompts: int = 64) -> np.ndarray:
    """The limits of the iterations that `tokens` rollout tokens paid for, if every answer was cut; at least one."""
    limits = np.array(path[:-1] or path)
    return limits[: 1 + int(np.searchsorted(prompts * limits.cumsum(), tokens))]


def differences(mine: dict[str, dict], other: dict[str, dict], measure) -> dict:
    """`measure(run)` of one arm minus that of another, paired by seed: mean with t-interval, sign-flip p, n.

    Raises C2FError (by `stats`) without a common seed.
    """
    seeds = sorted(mine.keys() & other.keys(), key=int)
    gaps = [measure(mine[s]) - measure(other[s]) for s in seeds]
    found = stats.seed_interval(gaps)
    return {"difference": found.value, "low": found.low, "high": found.high, "p": stats.sign_flip(gaps), "n": found.n}


def last_utility(run: dict) -> float:
    """Mean utility of the last two evaluations."""
    return float(np.mean(run["curve"]["utility"][-2:]))
