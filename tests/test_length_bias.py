"""The length-bias report: right on scores whose bias is known, blind to merit, and kept for every reward model."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from c2f_utils import stats
from c2f_utils.errors import C2FError
from c2f_utils.measure.length_bias import ScoredPairs, report, tokens_of

FIGURES = (
    "pearson", "spearman", "slope_per_10_tokens", "slope_given_utility", "longer_preferred", "longer_labelled",
    "excess", "accuracy_longer", "accuracy_shorter",
)  # fmt: skip


def pairs(merit: float, per_token: float, count: int = 300, seed: int = 0, noise: float = 0.2) -> ScoredPairs:
    """Scores that pay `merit` per point of utility and `per_token`; longer answers are somewhat better, as in life."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 145, (count, 2)).astype(float)
    utilities = rng.normal(0, 1, (count, 2)) + tokens / 100
    scores = merit * utilities + per_token * tokens + rng.normal(0, noise, (count, 2))
    order = np.argsort(-utilities, axis=1)  # the labelled winner first
    return ScoredPairs(*(np.take_along_axis(a, order, axis=1) for a in (scores, tokens, utilities)))


def test_the_slope_at_equal_utility_tells_merit_from_bias():
    fair, biased = report("fair", pairs(1.0, 0.0)), report("biased", pairs(1.0, 0.02))
    assert fair["slope_per_10_tokens"]["low"] > 0.03, "longer answers are better, so a fair score goes with length"
    assert fair["slope_given_utility"]["low"] < 0 < fair["slope_given_utility"]["high"]
    assert biased["slope_given_utility"]["low"] < 0.2 < biased["slope_given_utility"]["high"]
    assert biased["slope_given_utility"]["low"] > 0.15


def test_a_score_that_is_length_prefers_every_longer_answer_and_is_wrong_where_the_better_one_is_shorter():
    found = report("length", pairs(0.0, 1.0, noise=0.0))
    assert found["longer_preferred"]["value"] == 1.0 and found["pearson"]["value"] == pytest.approx(1.0)
    assert found["accuracy_longer"]["value"] == 1.0 and found["accuracy_shorter"]["value"] == 0.0
    labelled = found["longer_labelled"]
    assert 0.5 < labelled["value"] < 0.8
    assert found["excess"]["value"] == pytest.approx(1 - labelled["value"]) and found["excess"]["low"] > 0.2
    perfect = report("utility", pairs(1.0, 0.0, noise=0.0))
    assert perfect["excess"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert perfect["accuracy_shorter"]["value"] == perfect["accuracy_longer"]["value"] == 1.0


def test_figures_agree_with_the_libraries_and_lie_in_their_intervals():
    given = pairs(0.5, 0.01, 80)
    found = report("m", given)
    flat = given.tokens.ravel(), given.scores.ravel()
    assert found["pearson"]["value"] == pytest.approx(scipy_stats.pearsonr(*flat)[0])
    assert found["spearman"]["value"] == pytest.approx(scipy_stats.spearmanr(*flat)[0])
    assert found["slope_per_10_tokens"]["value"] == pytest.approx(10 * scipy_stats.linregress(*flat).slope)
    design = np.column_stack([flat[0], given.utilities.ravel(), np.ones(160)])
    exact = np.linalg.lstsq(design, flat[1], rcond=None)[0][0]
    assert found["slope_given_utility"]["value"] == pytest.approx(10 * exact)
    for name in FIGURES:
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"], name
    assert found == report("m", given), "the same pairs give the same intervals"


def test_the_two_answers_of_a_pair_are_no_two_pieces_of_evidence():
    """Resampling pairs must widen the interval where both answers of a pair share their error."""
    rng = np.random.default_rng(0)
    tokens = np.repeat(rng.integers(5, 145, (200, 1)).astype(float), 2, axis=1) + rng.integers(0, 2, (200, 2))
    scores = np.repeat(rng.normal(0, 1, (200, 1)), 2, axis=1) + 0.01 * tokens
    found = report("m", ScoredPairs(scores, tokens))["pearson"]
    split = report("m", ScoredPairs(scores.reshape(-1, 1).repeat(2, 1), tokens.reshape(-1, 1).repeat(2, 1)))["pearson"]
    assert found["high"] - found["low"] > 1.25 * (split["high"] - split["low"])


def test_what_the_data_do_not_define_is_null_and_without_a_checker_the_label_decides():
    scores = np.array([[1.0, 0.5], [0.2, 0.1], [0.0, 3.0]])
    found = report("m", ScoredPairs(scores, np.full((3, 2), 16.0)))
    assert found["better_by"] == "label" and found["slope_given_utility"] is None
    assert [name for name in FIGURES if found[name] is not None] == []
    found = report("m", ScoredPairs(scores, np.array([[9.0, 3.0], [2.0, 3.0], [4.0, 5.0]])))
    assert found["accuracy_longer"]["value"] == 1.0 and found["accuracy_shorter"]["value"] == 0.5
    assert found["longer_labelled"]["value"] == pytest.approx(1 / 3)


def test_lengths_are_those_of_the_answers():
    assert tokens_of([([1, 2, 3, 4], [1, 2, 9]), ([5, 6], [5, 7, 8])], [2, 1]).tolist() == [[2, 1], [1, 2]]


@pytest.mark.parametrize("shape", [(0, 2), (3, 3), (4,)])
def test_what_is_no_pair_is_refused(shape):
    with pytest.raises(C2FError, match="expected .pairs, 2. for all"):
        ScoredPairs(np.zeros(shape), np.zeros(shape))


def test_bootstrap_refuses_unequal_columns_and_covers_as_often_as_it_says():
    with pytest.raises(C2FError, match=r"columns have \[2, 3\] rows"):
        stats.bootstrap(lambda a, b: a.mean(-1), [1, 2], [1, 2, 3])
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        found = stats.bootstrap(lambda x: x.mean(-1), rng.normal(3, 1, 60), resamples=400, seed=seed)
        held += found.low <= 3 <= found.high
    assert 0.89 <= held / 200 <= 0.98
