"""Length bias of reward models, measured on held-out pairs whose scores are known anyway.

Question: does a reward model pay for length, and for more of it than the labels (or the true quality) justify? Input:
scores, answer lengths and, on the embedded domain, true utilities of held-out pairs. Output: one row of figures per
model, each with a bootstrap interval over pairs. A good model may well score longer answers higher: what tells bias
from merit is the comparison with the labels, the accuracy where the better answer is the shorter one, and the slope at
equal utility, which needs the exact checker.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from c2f_utils import stats
from c2f_utils.errors import C2FError


@dataclass(frozen=True)
class ScoredPairs:
    """Held-out pairs as one reward model scored them; arrays are [pairs, 2], the labelled winner first.

    `scores` are normalised rewards, `tokens` answer lengths without the prompt; `utilities` are None where no checker
    exists. Raises C2FError when the shapes differ or there is no pair.
    """

    scores: np.ndarray
    tokens: np.ndarray
    utilities: np.ndarray | None = None

    def __post_init__(self) -> None:
        shapes = [np.shape(a) for a in (self.scores, self.tokens, self.utilities) if a is not None]
        if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][1] != 2 or not shapes[0][0]:
            raise C2FError(f"scored pairs have shapes {shapes}; expected [pairs, 2] for all, with at least one pair")


def report(model: str, pairs: ScoredPairs, resamples: int = 1000) -> dict:
    """The length bias of one model: a row of figures {"value", "low", "high"}, null where the data define none.

    pearson, spearman: score and length over all answers. slope_per_10_tokens: reward (z-score) per 10 tokens;
    slope_given_utility: the same with utility held fixed (least squares on both). longer_preferred: share of pairs of
    unequal length whose longer answer scores higher; longer_labelled: whose longer answer the label prefers;
    excess: their difference. accuracy_longer, accuracy_shorter: share ranked right where the better answer is the
    longer or the shorter one. `better_by` says what decides "better": the utility where it is known, else the label.
    """
    scores, tokens = np.asarray(pairs.scores, float), np.asarray(pairs.tokens, float)
    utilities = None if pairs.utilities is None else np.asarray(pairs.utilities, float)
    score, length = scores[:, 0] - scores[:, 1], tokens[:, 0] - tokens[:, 1]
    better = np.ones(len(score)) if utilities is None else utilities[:, 0] - utilities[:, 1]

    def found(statistic, *columns: np.ndarray) -> dict | None:
        interval = stats.bootstrap(statistic, *columns, resamples=resamples)
        return interval and interval.bounds()

    return {
        "model": model,
        "pairs": len(score),
        "better_by": "label" if utilities is None else "utility",
        "pearson": found(_pearson, tokens, scores),
        "spearman": found(_spearman, tokens, scores),
        "slope_per_10_tokens": found(lambda t, s: 10 * _slope(t, s), tokens, scores),
        "slope_given_utility": None
        if utilities is None
        else found(lambda t, s, u: 10 * _slope_given(t, s, u), tokens, scores, utilities),
        "longer_preferred": found(_longer_preferred, length, score),
        "longer_labelled": found(lambda t: _longer_preferred(t, np.ones_like(t)), length),
        "excess": found(lambda t, s: _longer_preferred(t, s) - _longer_preferred(t, np.ones_like(t)), length, score),
        "accuracy_longer": found(lambda s, b, t: _agreement(s, b, t * b > 0), score, better, length),
        "accuracy_shorter": found(lambda s, b, t: _agreement(s, b, t * b < 0), score, better, length),
    }


def tokens_of(pairs: Sequence[tuple[list[int], list[int]]], prompt_tokens: Sequence[int]) -> np.ndarray:
    """Answer lengths [pairs, 2] of pairs of full token sequences, given the lengths of their prompts."""
    return np.array([[len(ids) - n for ids in pair] for pair, n in zip(pairs, prompt_tokens, strict=True)], float)


# --- statistics of many draws at once: arrays are [draws, pairs] or [draws, pairs, 2], results [draws] ---------------


def _flat(*arrays: np.ndarray) -> list[np.ndarray]:
    return [array.reshape(len(array), -1) for array in arrays]


def _covariance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x * y).mean(-1) - x.mean(-1) * y.mean(-1)


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = _flat(x, y)
    variances = _covariance(x, x) * _covariance(y, y)
    # Rounding leaves a tiny variance where all values are equal.
    return np.where(variances > 1e-12, _covariance(x, y) / np.sqrt(np.maximum(variances, 1e-300)), np.nan)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _pearson(*(rankdata(array, axis=-1) for array in _flat(x, y)))


def _slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = _flat(x, y)
    variance = _covariance(x, x)
    return np.where(variance > 1e-12, _covariance(x, y) / variance, np.nan)


def _slope_given(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Coefficient of x in the least-squares fit of y on x and z."""
    x, y, z = _flat(x, y, z)
    xx, zz, xz = _covariance(x, x), _covariance(z, z), _covariance(x, z)
    determinant = xx * zz - xz**2
    slope = (_covariance(x, y) * zz - _covariance(z, y) * xz) / determinant
    return np.where(determinant > 1e-9 * xx * zz, slope, np.nan)


def _longer_preferred(length: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Share of pairs of unequal length whose longer answer has the higher score; a tie of scores counts half."""
    return _agreement(length, score, length != 0)


def _agreement(a: np.ndarray, b: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Share of the chosen pairs in which two differences have one sign; a zero counts half."""
    return (((1 + np.sign(a * b)) / 2) * among).sum(-1) / among.sum(-1)
