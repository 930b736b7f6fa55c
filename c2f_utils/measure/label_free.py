"""Choosing a merge's coefficient without labels: what each rule would take, and what that costs against the checker.

Inputs are what every coefficient of a grid was measured by; nothing here reads a model. The rules:

- `agreement_majority`, `agreement_draws`: answers that agree (with the majority over all coefficients, or with a second
  answer of the same merge) against the perplexity of the answers under the instruction model;
- `dots`: agreement of two answers against the perplexity of the prompts under the merge itself, the two objectives that
  the code of DoTS (arXiv 2605.00610) searches by; which point of its front is taken is left to the reader there;
- `reward`: mean reward of answers to held-out prompts minus a price per token;
- `blind`: no choice at all, the mean over the grid: what a rule must beat;
- `checker`: utility minus a price per token (`score`), the choice that labels allow.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from c2f_utils.errors import C2FError
from c2f_utils.measure.sampling import majority

# Rule -> what is to be high, what is to be low; both are keys of a row.
AGAINST = {
    "agreement_majority": ("agreement_majority", "perplexity"),
    "agreement_draws": ("agreement_draws", "perplexity"),
    "dots": ("agreement_draws", "prompt_perplexity"),
}


def agreement(first: Sequence[Hashable | None], second: Sequence[Hashable | None]) -> float:
    """Share of prompts on which two answers state the same result; one without a result (None) agrees with none."""
    if not first or len(first) != len(second):
        raise C2FError(f"{len(first)} answers are compared with {len(second)}; expected one of each per prompt")
    return sum(a is not None and a == b for a, b in zip(first, second, strict=True)) / len(first)


def agreement_with_majority(votes: Sequence[Sequence[Hashable | None]]) -> list[float]:
    """Per coefficient the share of prompts on which its result is the most frequent one over all coefficients; 1/m of
    a prompt where m results tie. `votes` [coefficients][prompts]."""
    prompts = list(zip(*votes, strict=True))
    if not prompts:
        raise C2FError("agreement of no answers; expected at least one coefficient and one prompt")
    return [sum(majority(prompt, prompt[k]) for prompt in prompts) / len(prompts) for k in range(len(votes))]


def nearest_to_ideal(high: Sequence[float], perplexity: Sequence[float]) -> int:
    """Index of the point nearest to the largest `high` at the lowest log-perplexity, each scaled to 0..1 over the
    points; the first of equal ones. Such a point is Pareto-optimal."""
    gain, cost = _scaled(np.asarray(high, dtype=float)), _scaled(np.log(perplexity))
    return int(np.argmin(np.hypot(gain.max() - gain, cost)))


def _scaled(values: np.ndarray) -> np.ndarray:
    spread = np.ptp(values)
    return (values - values.min()) / spread if spread else np.zeros(len(values))


def choices(rows: Sequence[Mapping], token_price: float) -> dict[str, int | None]:
    """The index of the row that each rule takes, the checker's last; None where a rule lacks what it needs.

    A row has `agreement_majority`, `agreement_draws`, `perplexity`, `prompt_perplexity`, `reward`, `mean_tokens` and
    `score`; what is not known is None. `token_price` is in units of reward per token.
    """

    def column(key: str) -> list[float] | None:
        values = [row[key] for row in rows]
        return None if None in values else values

    found: dict[str, int | None] = {}
    for rule, (high, low) in AGAINST.items():
        gains, costs = column(high), column(low)
        found[rule] = nearest_to_ideal(gains, costs) if gains and costs else None
    paid = column("reward") and [row["reward"] - token_price * row["mean_tokens"] for row in rows]
    for rule, scores in (("reward", paid), ("checker", column("score"))):
        found[rule] = scores.index(max(scores)) if scores else None
    return found


def regrets(
    coefficients: Sequence[float], chosen: Mapping[str, int | None], judged: Sequence[Mapping] | None
) -> list[dict]:
    """One row per rule: the coefficient, whether it is the checker's (`same`), and by how much the checker's choice is
    better in utility (`regret_utility`) and in utility minus the price of tokens (`regret_score`).

    `judged` are `utility` and `score` per coefficient on answers that no rule has chosen by; what is lost may be below
    zero there. Without a checker regrets and `same` are None. `blind` is a coefficient drawn from the grid.
    """
    best = chosen["checker"]
    known = judged is not None and best is not None

    def lost(metric: str, indices: Sequence[int]) -> float:
        return judged[best][metric] - sum(judged[k][metric] for k in indices) / len(indices)

    rows = []
    for rule, index in {**chosen, "blind": None}.items():
        taken = range(len(coefficients)) if rule == "blind" else [index]
        each = known and None not in taken
        rows.append(
            {
                "rule": rule,
                "coefficient": None if index is None else coefficients[index],
                "same": sum(k == best for k in taken) / len(taken) if each else None,
                "regret_utility": lost("utility", taken) if each else None,
                "regret_score": lost("score", taken) if each else None,
            }
        )
    return rows
