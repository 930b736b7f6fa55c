"""What many answers to one problem can find: pass@k without bias, and the vote of a majority.

Inputs are counts and stated results of a checker, problem by problem. Intervals (95 %) resample problems, whose answers
stay together. Guessing counts as well: where few results are possible, pass@k of blind guesses is high, and any figure
is read beside it (`guessing`).
"""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from c2f_utils import stats
from c2f_utils.errors import C2FError
from c2f_utils.stats import Interval


def pass_at(right: int, samples: int, k: int) -> float:
    """Chance that k of the `samples` answers, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimate of pass@k (Chen et al. 2021), as a product that neither overflows nor cancels. Raises C2FError
    unless 0 <= right <= samples and 1 <= k <= samples.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise C2FError(
            f"pass@{k} of {right} right among {samples}; expected 0 <= right <= samples and 1 <= k <= samples"
        )
    if samples - right < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(samples - right + 1, samples + 1)))


def guessing(choices: int, k: int) -> float:
    """pass@k of blind guesses among `choices` equally likely results."""
    return 1.0 - (1.0 - 1.0 / choices) ** k


def majority(votes: Sequence[Hashable | None], gold: Hashable) -> float:
    """Whether the most frequent result is right: 1, 0, or 1/m where m results tie and one of them is; an answer without
    a result (None) has no vote."""
    counts = Counter(vote for vote in votes if vote is not None)
    best = [result for result, count in counts.items() if count == max(counts.values())]
    return 1.0 / len(best) if gold in best else 0.0


def majority_at(votes: Sequence[Hashable | None], gold: Hashable, k: int) -> float:
    """Mean of `majority` over the whole groups of k consecutive votes: unbiased, since no vote is used twice."""
    groups = [votes[start : start + k] for start in range(0, len(votes) - k + 1, k)]
    if not groups:
        raise C2FError(f"a majority of {k} among {len(votes)} answers; expected 1 <= k <= answers")
    return sum(majority(group, gold) for group in groups) / len(groups)


def powers_to(samples: int) -> list[int]:
    """The values of k that are shown: 1, 2, 4, ... and the number of answers itself."""
    return sorted({2**power for power in range(samples.bit_length())} | {samples})


def mean(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean over problems with its interval; no bounds for a single problem."""
    found = stats.bootstrap(lambda column: column.mean(1), values, seed=seed)
    return found if found.n > 1 else found._replace(low=None, high=None)
