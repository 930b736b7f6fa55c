"""pass@k without bias, votes with ties as fractions, and what blind guesses would reach."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from c2f_utils.errors import C2FError
from c2f_utils.measure import sampling as s


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_answer(right, data):
    k = data.draw(st.integers(1, len(right)))
    subsets = list(combinations(right, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert s.pass_at(sum(right), len(right), k) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "k", "p"), [(6, 1, 0.3), (6, 4, 0.3), (5, 5, 0.1), (9, 2, 0.8)])
def test_pass_at_k_has_no_bias(n, k, p):
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * s.pass_at(c, n, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k)


def test_pass_at_k_neither_overflows_nor_cancels():
    assert s.pass_at(1, 100_000, 1) == pytest.approx(1e-5, rel=1e-9)
    assert s.pass_at(3, 5000, 2500) == pytest.approx(1 - math.comb(4997, 2500) / math.comb(5000, 2500))
    assert [s.pass_at(c, 8, 8) for c in (0, 1, 8)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("right", "n", "k"), [(5, 4, 1), (-1, 4, 1), (1, 4, 0), (1, 4, 5)])
def test_impossible_counts_are_refused(right, n, k):
    with pytest.raises(C2FError, match=f"pass@{k} of {right} right among {n}"):
        s.pass_at(right, n, k)


def test_a_vote_counts_ties_as_fractions_and_leaves_out_who_says_nothing():
    assert s.majority([7, 7, 3], 7) == 1 and s.majority([7, 3, 3], 7) == 0
    assert s.majority([7, 3], 7) == 1 / 2 and s.majority([7, 3, 5], 3) == 1 / 3 and s.majority([7, 3], 5) == 0
    assert s.majority([None, None, 4], 4) == 1 and s.majority([None, None], 4) == 0 and s.majority([], 4) == 0


def test_votes_are_taken_in_groups_that_share_none():
    votes = [7, 7, 3, 3, 7]
    assert s.majority_at(votes, 7, 1) == 3 / 5
    assert s.majority_at(votes, 7, 2) == 1 / 2, "7 7, then 3 3; the last vote has no group"
    assert s.majority_at(votes, 7, 5) == 1
    with pytest.raises(C2FError, match="a majority of 6 among 5"):
        s.majority_at(votes, 7, 6)


def test_blind_guesses_reach_what_the_line_of_guessing_says():
    rng, choices, samples = np.random.default_rng(0), 15, 32
    guesses = rng.integers(0, choices, (4000, samples))
    for k in (1, 8, 32):
        found = s.mean([s.pass_at(int((row == 4).sum()), samples, k) for row in guesses])
        assert found.low <= s.guessing(choices, k) <= found.high
    assert s.guessing(15, 32) > 0.85, "on a small domain a high pass@32 may be luck"


def test_intervals_are_over_problems_and_one_problem_has_none():
    few, many = s.mean([0.0, 1.0, 0.0, 1.0]), s.mean([0.0, 1.0] * 200)
    assert few.value == many.value == 0.5 and many.high - many.low < few.high - few.low
    assert s.mean([0.5]) == (0.5, None, None, 1)


def test_k_doubles_up_to_all_answers():
    assert s.powers_to(32) == [1, 2, 4, 8, 16, 32] and s.powers_to(12) == [1, 2, 4, 8, 12] and s.powers_to(1) == [1]
