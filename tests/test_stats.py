"""Promises of the statistics, against brute force and published values."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from c2f_utils import stats
from c2f_utils.errors import C2FError


def test_paired_bootstrap_agrees_with_full_enumeration_of_resamples():
    a, b = np.array([1.0, 0, 1, 1, 0]), np.array([0.0, 0, 1, 0, 1])
    d = a - b
    means = np.array([d[list(rows)].mean() for rows in product(range(5), repeat=5)])
    found = stats.paired_bootstrap(a, b, resamples=40_000)
    assert found.difference == pytest.approx(d.mean()) and found.n == 5
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist())
    assert found.p == pytest.approx(2 * (means <= 1e-12).mean(), abs=0.015)


def test_paired_bootstrap_is_seeded_pairs_rows_and_sees_a_shift():
    rng = np.random.default_rng(1)
    prompt = rng.normal(0, 5, 256)
    a, b = prompt + 0.3 + rng.normal(0, 0.5, 256), prompt + rng.normal(0, 0.5, 256)
    found = stats.paired_bootstrap(a, b)
    assert found == stats.paired_bootstrap(a, b) != stats.paired_bootstrap(a, b, seed=1)
    assert 0.2 < found.low < 0.3 < found.high < 0.5 and found.p < 0.001  # unpaired the half width would be 0.9
    half = 1.96 * np.std(a - b) / 16
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05), "95 % of a normal distribution"
    mirrored = stats.paired_bootstrap(b, a)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_paired_bootstrap_claims_as_much_one_way_as_the_other():
    a, b = np.random.default_rng(2).normal(0, 1, (2, 40)) + [[0.5], [0.0]]
    assert stats.paired_bootstrap(a, b).p == stats.paired_bootstrap(b, a).p < 0.1


def test_paired_bootstrap_of_identical_models_claims_nothing():
    assert stats.paired_bootstrap([1, 0, 1], [1, 0, 1]) == (0.0, 0.0, 0.0, 1.0, 3)


def test_bootstrap_over_clusters_does_not_take_copies_for_evidence():
    rng = np.random.default_rng(0)
    a = rng.normal(0.2, 1, 40)
    once = stats.paired_bootstrap(a, np.zeros(40))
    copies = stats.paired_bootstrap(np.repeat(a, 8), np.zeros(320), clusters=np.repeat(np.arange(40), 8))
    naive = stats.paired_bootstrap(np.repeat(a, 8), np.zeros(320))
    assert copies.high - copies.low == pytest.approx(once.high - once.low, rel=0.02)
    assert naive.high - naive.low < 0.5 * (copies.high - copies.low)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([1, 0], [1], "lengths 2 and 1"),
        ([], [], "empty"),
        ([1, None], [0, 1], "1 missing"),
        ([1, math.inf], [0, 1], "1 missing"),
    ],
)
def test_unpaired_or_missing_values_are_refused(a, b, words):
    with pytest.raises(C2FError, match=words):
        stats.paired_bootstrap(a, b)


def test_clusters_need_one_label_per_row():
    with pytest.raises(C2FError, match="one label per row"):
        stats.paired_bootstrap([1, 2], [0, 0], clusters=[0])


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(7)
    hits = 0
    for seed in range(200):
        a = rng.random(100) < 0.6
        b = rng.random(100) < 0.5
        found = stats.paired_bootstrap(a.astype(float), b.astype(float), resamples=1000, seed=seed)
        hits += found.low <= 0.1 <= found.high
    assert 180 <= hits <= 199


@settings(deadline=None)  # the first call imports scipy
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5), st.integers(0, 5))
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b, both, neither):
    from scipy.stats import binomtest

    a = [1] * only_a + [0] * only_b + [1] * both + [0] * neither
    b = [0] * only_a + [1] * only_b + [1] * both + [0] * neither
    if not a:
        return
    found = stats.mcnemar(a, b)
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert (found.only_a, found.only_b) == (only_a, only_b) and found.p == pytest.approx(expected)


def test_wilson_matches_the_library_and_its_edges():
    from scipy.stats import binomtest

    for k, n in [(0, 10), (10, 10), (7, 10), (166, 256)]:
        expected = binomtest(k, n).proportion_ci(method="wilson")
        assert stats.wilson(k, n)[1:3] == pytest.approx((expected.low, expected.high))
    assert stats.wilson(0, 0)[1:3] == (0.0, 1.0)
    with pytest.raises(C2FError, match="11 successes of 10"):
        stats.wilson(11, 10)


def test_holm_by_hand_and_in_the_given_order():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_t_interval_over_three_seeds_is_the_textbook_one():
    found = stats.seed_interval([0.79, 0.75, 0.83])
    half = 4.302653 * 0.04 / math.sqrt(3)
    assert found == pytest.approx((0.79, 0.79 - half, 0.79 + half, 3))
    assert stats.seed_interval([0.5]) == (0.5, None, None, 1)


def test_log_ratio_interval_is_symmetric_in_ratio():
    a, b = [80.0, 85.0, 81.0], [145.0, 144.0, 146.0]
    found, back = stats.log_ratio_interval(a, b), stats.log_ratio_interval(b, a)
    assert found.value == pytest.approx((80 * 85 * 81 / (145 * 144 * 146)) ** (1 / 3))
    assert (found.low, found.high) == pytest.approx((1 / back.high, 1 / back.low))
    assert found.low < found.value < found.high < 0.65
    with pytest.raises(C2FError, match="positive"):
        stats.log_ratio_interval([1.0, 0.0], [1.0, 1.0])


def test_sign_flip_is_exact_for_few_and_close_for_many():
    assert stats.sign_flip([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    assert stats.sign_flip([0.1] * 5) == pytest.approx(2 / 32)
    assert stats.sign_flip([1.0, -1.0]) == 1.0
    rng = np.random.default_rng(0)
    d = rng.normal(0.4, 1, 12)
    exact, sampled = stats.sign_flip(d), stats.sign_flip(np.append(d, 0.0))  # a zero changes n, not the distribution
    assert sampled == pytest.approx(exact, abs=0.02)
    assert stats.sign_flip(np.ones(40)) == pytest.approx(1 / 10_001)


def test_a_sign_flip_sees_a_loss_as_well_as_a_gain():
    gains = np.random.default_rng(3).normal(1.0, 1, 20)
    for few in (gains[:8], gains):
        assert stats.sign_flip(-few) == pytest.approx(stats.sign_flip(few), abs=0.02) and stats.sign_flip(few) < 0.5


def test_first_crossing_interpolates_between_snapshots():
    assert stats.first_crossing([10, 20, 30], [0.0, 1.0, 3.0], 2.0) == pytest.approx(25.0)
    assert stats.first_crossing([10, 20], [1.0, 2.0], 0.5) == 10.0
    assert stats.first_crossing([10, 20], [1.0, 2.0], 2.5) is None


def test_sign_test_is_the_exact_binomial_test_and_leaves_ties_out():
    from scipy.stats import binomtest

    found = stats.sign_test([0.4, 0.1, -2.0, 0.0, 3.0, 0.0, 1.0])
    assert (found.only_a, found.only_b) == (4, 1) and found.p == pytest.approx(binomtest(4, 5).pvalue)
    assert stats.sign_test([0.0, 0.0]).p == 1.0


# Several thousand intervals at once: 1,000 data sets of 200 prompts, 1,000 resamples each.


def intervals(draw, resamples: int = 1000, **options) -> np.ndarray:
    """Bounds [1000, 2] of the paired intervals of simulated data sets; `draw` gives the values of both models."""
    rng = np.random.default_rng(11)
    return np.array([stats.paired_bootstrap(*draw(rng), resamples, seed, **options)[1:3] for seed in range(1000)])


def covered(bounds: np.ndarray, truth: float) -> float:
    return float(((bounds[:, 0] <= truth) & (truth <= bounds[:, 1])).mean())


def test_intervals_of_shares_cover_at_their_nominal_rate():
    rates = (0.6, 0.45)
    assert 0.93 <= covered(intervals(lambda rng: [(rng.random(200) < p).astype(float) for p in rates]), 0.15) <= 0.97


@pytest.mark.slow
def test_intervals_of_skewed_values_cover_at_their_nominal_rate():
    assert 0.93 <= covered(intervals(lambda rng: rng.exponential((2.0, 1.0), (200, 2)).T), 1.0) <= 0.97


@pytest.mark.slow
def test_intervals_over_clusters_cover_at_their_nominal_rate_and_those_over_rows_do_not():
    """Four samples of each of 200 prompts, whose difficulty they share."""
    prompts = np.repeat(np.arange(200), 4)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        gain = np.repeat(rng.normal(0.2, 1, 200), 4) + rng.normal(0, 0.5, 800)
        return gain, np.zeros(800)

    clustered, naive = covered(intervals(draw, clusters=prompts), 0.2), covered(intervals(draw, 200), 0.2)
    assert 0.93 <= clustered <= 0.97 and naive < 0.8, (clustered, naive)


def test_intervals_of_two_identical_models_contain_zero():
    def draw(rng: np.random.Generator) -> np.ndarray:
        difficulty = rng.random(200)
        return (rng.random((2, 200)) < difficulty).astype(float)

    assert covered(intervals(draw), 0.0) >= 0.93


def test_equivalence_is_claimed_within_the_margin_and_not_for_want_of_data():
    rng = np.random.default_rng(5)
    many, few = rng.normal(0.01, 0.3, (2, 2000)), rng.normal(0.01, 0.3, (2, 20))
    assert stats.equivalence(*many, margin=0.05).p < 0.05 < stats.equivalence(*few, margin=0.05).p
    assert stats.equivalence(*many, margin=0.001).p > 0.05
    assert stats.equivalence(many[0] + 0.2, many[1], margin=0.05).p > 0.99
    found, paired = stats.equivalence(*many, margin=0.05), stats.paired_bootstrap(*many)
    assert paired.low < found.low < found.difference == paired.difference < found.high < paired.high
    half = 1.6449 * np.std(many[0] - many[1]) / np.sqrt(2000)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05), "90 % of a normal distribution"
    with pytest.raises(C2FError, match="margin of equivalence is 0"):
        stats.equivalence([1], [1], margin=0)


def test_two_models_that_differ_by_the_margin_are_seldom_called_equivalent():
    rng = np.random.default_rng(6)
    claims = [stats.equivalence(rng.normal(0.3, 1, 200), np.zeros(200), 0.3, 400, seed).p < 0.05 for seed in range(500)]
    assert 0.02 <= np.mean(claims) <= 0.08


def test_the_smallest_detectable_difference_is_found_as_often_as_it_says():
    assert stats.smallest_detectable([0.5, -0.5] * 40) == pytest.approx(0.157, abs=0.001), "80 even verdicts"
    assert stats.smallest_detectable([1.0, 0.0]) == pytest.approx((1.959964 + 0.841621) * 0.5), "one degree of freedom"
    rng = np.random.default_rng(8)
    wanted = stats.smallest_detectable(rng.normal(0, 1, 20_000)) * math.sqrt(20_000 / 100)
    found = [stats.paired_bootstrap(rng.normal(wanted, 1, 100), np.zeros(100), 400, i).low > 0 for i in range(500)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)
    values = rng.normal(0, 1, 50)
    copies = stats.smallest_detectable(np.repeat(values, 6), clusters=np.repeat(np.arange(50), 6))
    assert copies == pytest.approx(stats.smallest_detectable(values)), "copies of a prompt detect no more"
    assert stats.smallest_detectable([1.0, 2.0], clusters=["q", "q"]) is None


def test_clustered_bootstrap_is_the_paired_one_for_means_and_takes_several_statistics():
    rng = np.random.default_rng(9)
    prompts = rng.integers(0, 40, 300)
    values = rng.normal(0.3, 1, 300) + prompts / 40

    def means(weights: np.ndarray) -> np.ndarray:
        mean = weights @ values / weights.sum(1)
        return np.stack([mean, -mean, np.full_like(mean, np.nan)], axis=1)

    one, other, none = stats.clustered_bootstrap(means, prompts, resamples=4000)
    paired = stats.paired_bootstrap(values, np.zeros(300), clusters=prompts)
    assert one.value == pytest.approx(paired.difference) and one.n == len(set(prompts))
    assert (one.low, one.high) == pytest.approx((paired.low, paired.high), abs=0.02)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low)) and none is None
    with pytest.raises(C2FError, match="no rows to resample"):
        stats.clustered_bootstrap(means, [])


def test_the_t_test_is_the_librarys():
    from scipy import stats as library

    rng = np.random.default_rng(3)
    for size in (2, 5, 16):
        differences = rng.normal(0.3, 1, size)
        assert stats.t_test(differences) == pytest.approx(library.ttest_1samp(differences, 0).pvalue)
    assert stats.t_test([0.0, 0.0]) == 1 and stats.t_test([0.5, 0.5]) == 0
    with pytest.raises(C2FError, match="expected at least 2"):
        stats.t_test([0.5])


def test_what_an_interval_could_detect_is_what_its_differences_could():
    differences = np.random.default_rng(4).normal(0.2, 1, 400)
    error = differences.std(ddof=1) / math.sqrt(400)
    for level, z in ((0.95, 1.959964), (0.9, 1.644854)):
        found = stats.detectable_within(0.2 - z * error, 0.2 + z * error, level=level)
        assert found == pytest.approx(stats.smallest_detectable(differences, level=level), rel=1e-4)
    assert stats.detectable_within(0, 0.4, power=0.9) > stats.detectable_within(0, 0.4) > 0.2
