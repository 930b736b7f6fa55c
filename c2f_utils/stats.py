"""Small-sample statistics for paired comparisons over prompts and over seeds.

Two kinds of uncertainty are kept apart: over prompts for one pair of models (bootstrap, McNemar, sign test, Wilson),
where all rows of a prompt (orders, turns, samples) are one cluster, and over training seeds (t-interval, sign flips).
Every function is deterministic for a given seed. Intervals are two-sided, 95 % by default.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from c2f_utils.errors import C2FError

# Rows x resamples drawn at a time: bounds the index array to 16 MB whatever the number of prompts.
_BLOCK = 2_000_000


class Difference(NamedTuple):
    """Mean of a - b with its interval, two-sided p and the number of pairs."""

    difference: float
    low: float
    high: float
    p: float
    n: int


class Interval(NamedTuple):
    """An estimate with its interval; the bounds are None where one value gives none."""

    value: float
    low: float | None
    high: float | None
    n: int

    def bounds(self) -> dict[str, float | None]:
        """Value and bounds, for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


class Discordance(NamedTuple):
    """How often only one of two models was right (or the better one), and the exact two-sided p."""

    only_a: int
    only_b: int
    p: float


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Sequence | None = None,
) -> Difference:
    """Percentile interval and two-sided p of mean(a) - mean(b), resampling prompts (or `clusters` of rows) in pairs.

    `a` and `b` hold one value per row for the same rows in the same order. With `clusters` (one label per row, e.g. the
    prompt when it was sampled several times) whole clusters are drawn. p counts resamples on the far side of zero,
    doubled, and is never below 1/(resamples + 1). Raises C2FError for unequal lengths, no rows, or missing values.
    """
    difference, means = _paired_means(a, b, resamples, seed, clusters)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # Rounding can leave 1e-18 where a resample is exactly tied.
    means[np.abs(means) < 1e-12] = 0.0
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (beyond + 1) / (resamples + 1)) if beyond < resamples else 1.0
    return Difference(float(difference.mean()), float(low), float(high), float(p), len(difference))


def equivalence(
    a: Sequence[float],
    b: Sequence[float],
    margin: float,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Sequence | None = None,
) -> Difference:
    """Two one-sided tests (Schuirmann 1987) that mean(a) - mean(b) lies within `margin` on both sides of zero.

    p is the larger of both one-sided bootstrap p values: below 1 - level, the two are equivalent for whoever accepts
    the margin. The interval is the one that goes with it, of level 2 * level - 1 (90 % by default). Everything else as
    in `paired_bootstrap`. Raises C2FError for a margin that is not positive.
    """
    if not margin > 0:
        raise C2FError(
            f"the margin of equivalence is {margin}; expected the largest difference that nobody cares about"
        )
    difference, means = _paired_means(a, b, resamples, seed, clusters)
    low, high = np.quantile(means, [1 - level, level])
    p = (max((means <= -margin).sum(), (means >= margin).sum()) + 1) / (resamples + 1)
    return Difference(float(difference.mean()), float(low), float(high), float(p), len(difference))


def smallest_detectable(
    differences: Sequence[float], clusters: Sequence | None = None, power: float = 0.8, level: float = 0.95
) -> float | None:
    """The true mean difference that a comparison of this size would find with probability `power`.

    (z of `level` + z of `power`) times the clustered standard error of the mean; `differences` are those of the rows
    (for a win rate: preference - 0.5). None for a single cluster. Source: Miller 2024, arXiv 2411.00640.
    """
    from scipy.special import ndtri

    numbers = _numbers("differences", differences)
    sums, counts = _by_cluster(numbers - numbers.mean(), clusters)
    if len(sums) < 2:
        return None
    error = math.sqrt(float((sums**2).sum()) * len(sums) / (len(sums) - 1)) / float(counts.sum())
    return float(ndtri((1 + level) / 2) + ndtri(power)) * error


def detectable_within(low: float, high: float, power: float = 0.8, level: float = 0.95) -> float:
    """The true difference that a comparison with this interval would find with probability `power`: its standard error
    is read off the interval's width, as if it were normal (see `smallest_detectable`)."""
    from scipy.special import ndtri

    z = float(ndtri((1 + level) / 2))
    return (z + float(ndtri(power))) * (high - low) / (2 * z)


def bootstrap(
    statistic: Callable[..., np.ndarray],
    *columns: Sequence | np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """A statistic with its percentile interval over resampled rows; None where the data do not define it.

    Columns are [rows] or [rows, k], where the k values of a row stay together (two answers to one prompt).
    `statistic` takes them as [draws, rows(, k)] and returns [draws], NaN where a draw does not define it; such draws
    are left out of the interval. Raises C2FError for columns of unequal length or without rows.
    """
    arrays = [np.asarray(column, dtype=float) for column in columns]
    size = len(arrays[0])
    if not size or any(len(array) != size for array in arrays):
        raise C2FError(f"columns have {[len(array) for array in arrays]} rows; expected equally many and at least one")
    rng = np.random.default_rng(seed)
    draws = []
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(*(array[None] for array in arrays))[0])
        if not math.isfinite(value):
            return None
        for start in range(0, resamples, step := max(1, _BLOCK // max(array.size for array in arrays))):
            rows = rng.integers(0, size, (min(step, resamples - start), size))
            draws.append(statistic(*(array[rows] for array in arrays)))
    found = np.concatenate(draws)
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]) if len(found) else (None, None)
    return Interval(value, None if low is None else float(low), None if high is None else float(high), size)


def clustered_bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    clusters: Sequence,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Interval | None]:
    """Statistics of rows with percentile intervals over resampled clusters, all of them from the same draws.

    `clusters` labels the rows. `statistic` takes weights [draws, rows], how often each row was drawn, and returns
    [draws, statistics], NaN where a draw does not define one; what the data themselves do not define is None. n is the
    number of clusters. Raises C2FError without rows.
    """
    if not len(clusters):
        raise C2FError("there are no rows to resample; expected at least one")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    size = int(index.max()) + 1
    rng = np.random.default_rng(seed)
    draws = []
    with np.errstate(invalid="ignore", divide="ignore"):
        values = statistic(np.ones((1, len(index))))[0]
        for start in range(0, resamples, step := max(1, _BLOCK // len(index))):
            count = min(step, resamples - start)
            drawn = rng.integers(0, size, (count, size)) + size * np.arange(count)[:, None]
            times = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
            draws.append(statistic(times[:, index].astype(float)))
    found: list[Interval | None] = []
    for value, column in zip(values, np.concatenate(draws).T, strict=True):
        column = column[np.isfinite(column)]
        low, high = np.quantile(column, [(1 - level) / 2, (1 + level) / 2]) if len(column) else (np.nan, np.nan)
        found.append(Interval(float(value), float(low), float(high), size) if math.isfinite(value) else None)
    return found


def mcnemar(a_right: Sequence[bool], b_right: Sequence[bool]) -> Discordance:
    """McNemar's exact (binomial) test on the prompts where exactly one of two models is right."""
    first, second = _numbers("a", a_right).astype(bool), _numbers("b", b_right).astype(bool)
    if len(first) != len(second):
        raise C2FError(f"paired answers have lengths {len(first)} and {len(second)}; expected the same prompts in both")
    return _discordance(int((first & ~second).sum()), int((second & ~first).sum()))


def sign_test(differences: Sequence[float]) -> Discordance:
    """The exact sign test: on how many prompts a is above b and below it, and the p of that many; ties are left out."""
    numbers = _numbers("differences", differences)
    return _discordance(int((numbers > 0).sum()), int((numbers < 0).sum()))


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion; (0, 1) for n = 0. Source: Wilson 1927."""
    from scipy.special import ndtri

    if n < 0 or not 0 <= successes <= max(n, 0):
        raise C2FError(f"{successes} successes of {n}; expected 0 <= successes <= n")
    if n == 0:
        return Interval(float("nan"), 0.0, 1.0, 0)
    z = float(ndtri((1 + level) / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values in the given order (family-wise error over all of them)."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    result = np.empty(len(p))
    result[order] = adjusted
    return result.tolist()


def seed_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean over training seeds with Student's t-interval; bounds are None for a single seed."""
    numbers = _numbers("values", values)
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Interval(mean, None, None, len(numbers))
    half = _t_quantile(len(numbers) - 1, level) * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Interval(mean, mean - half, mean + half, len(numbers))


def t_test(differences: Sequence[float]) -> float:
    """Two-sided p of Student's paired t-test that the mean difference is 0; 1 where all differences are 0."""
    from scipy.special import stdtr

    numbers = _numbers("differences", differences)
    if len(numbers) < 2:
        raise C2FError(f"a t-test of {len(numbers)} difference(s); expected at least 2")
    error = float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    if error == 0:
        return 1.0 if numbers[0] == 0 else 0.0
    return float(2 * stdtr(len(numbers) - 1, -abs(float(numbers.mean())) / error))


def log_ratio_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Geometric mean of a/b over pairs (seeds) with the t-interval of the paired log ratios; all values positive."""
    first, second = _numbers("a", a), _numbers("b", b)
    if len(first) != len(second) or (first <= 0).any() or (second <= 0).any():
        raise C2FError("a ratio over seeds needs equally many positive values on both sides")
    found = seed_interval(np.log(first / second), level)
    low, high = (None if bound is None else math.exp(bound) for bound in (found.low, found.high))
    return Interval(math.exp(found.value), low, high, found.n)


def sign_flip(differences: Sequence[float], resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided sign-flip permutation p of a mean difference; all 2^n flips when n <= 12, else a seeded sample."""
    numbers = _numbers("differences", differences)
    size, slack = len(numbers), 1e-12 * np.abs(numbers).sum()
    observed = abs(numbers.sum()) - slack
    if size <= 12:
        flips = np.array(list(product((1.0, -1.0), repeat=size)))
        return float((np.abs(flips @ numbers) >= observed).mean())
    rng = np.random.default_rng(seed)
    beyond = done = 0
    while done < resamples:
        rows = min(resamples - done, max(1, _BLOCK // size))
        beyond += int((np.abs(rng.choice((1.0, -1.0), (rows, size)) @ numbers) >= observed).sum())
        done += rows
    return (beyond + 1) / (resamples + 1)


def first_crossing(x: Sequence[float], y: Sequence[float], target: float) -> float | None:
    """Smallest x at which y, linear between its points, reaches `target`; None when it never does."""
    previous = None
    for here, value in zip(x, y, strict=True):
        if value >= target:
            if previous is None:
                return float(here)
            x0, y0 = previous
            return float(x0 + (here - x0) * (target - y0) / (value - y0))
        previous = (here, value)
    return None


def _paired_means(
    a: Sequence[float], b: Sequence[float], resamples: int, seed: int, clusters: Sequence | None
) -> tuple[np.ndarray, np.ndarray]:
    """Differences a - b [rows] and their mean in every resample [resamples]."""
    first, second = _numbers("a", a), _numbers("b", b)
    if len(first) != len(second):
        raise C2FError(f"paired values have lengths {len(first)} and {len(second)}; expected the same prompts in both")
    sums, counts = _by_cluster(first - second, clusters)
    rng = np.random.default_rng(seed)
    size = len(sums)
    draws = []
    for start in range(0, resamples, step := max(1, _BLOCK // size)):
        rows = rng.integers(0, size, (min(step, resamples - start), size))
        draws.append(sums[rows].sum(1) / counts[rows].sum(1))
    return first - second, np.concatenate(draws)


def _by_cluster(values: np.ndarray, clusters: Sequence | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums and numbers of values per cluster; every value is its own without labels."""
    if clusters is None:
        return values, np.ones(len(values))
    if len(clusters) != len(values):
        raise C2FError(f"{len(clusters)} cluster labels for {len(values)} rows; expected one label per row")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def _discordance(above: int, below: int) -> Discordance:
    from scipy.special import bdtr

    total = above + below
    p = min(1.0, 2 * float(bdtr(min(above, below), total, 0.5))) if total else 1.0
    return Discordance(above, below, p)


def _t_quantile(freedom: int, level: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + level) / 2))


def _numbers(name: str, values: Sequence[float]) -> np.ndarray:
    if len(values) == 0:
        raise C2FError(f"{name} is empty; expected at least one value")
    numbers = np.array([np.nan if value is None else value for value in values], dtype=float)
    if not np.isfinite(numbers).all():
        bad = int((~np.isfinite(numbers)).sum())
        raise C2FError(f"{name} holds {bad} missing or infinite values of {len(numbers)}; drop those prompts first")
    return numbers
