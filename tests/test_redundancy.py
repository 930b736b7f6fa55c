"""Promises of the repetition measures."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from c2f_utils import redundancy as r

TOKENS = st.lists(st.integers(0, 3), max_size=40)


def test_rep_n_counts_repeats_by_hand():
    # 4-grams of 1 2 3 4 1 2 3 4: 1234 2341 3412 4123 1234 -> one of five is a repeat
    assert r.rep_n([1, 2, 3, 4, 1, 2, 3, 4], 4) == pytest.approx(1 / 5)
    assert r.distinct_n([1, 2, 3, 4, 1, 2, 3, 4], 4) == pytest.approx(4 / 5)
    assert r.rep_n(list("ababab"), 2) == pytest.approx(3 / 5)
    assert r.rep_n([1, 2, 3], 4) == 0.0
    with pytest.raises(ValueError, match="n is 0"):
        r.rep_n([1], 0)


def test_rep4_at_a_prefix_ignores_what_comes_later_and_answers_that_are_too_short():
    answer = list(range(32)) + [0, 1, 2, 3] * 10
    assert r.rep4_at(answer, 32) == 0.0
    assert r.rep4_at(answer, 64) > 0.3
    assert r.rep4_at(answer, 73) is None
    assert r.rep4_at(answer, 72) == r.rep_n(answer, 4)


@given(TOKENS, st.integers(1, 5))
def test_rep_n_is_the_brute_force_count(tokens, n):
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    expected = sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams) if grams else 0.0
    assert r.rep_n(tokens, n) == pytest.approx(expected)


@given(TOKENS, st.integers(1, 4))
def test_repeated_spans_marks_exactly_the_tokens_of_later_occurrences(tokens, n):
    expected = np.zeros(len(tokens), bool)
    for i in range(len(tokens) - n + 1):
        if any(tokens[j : j + n] == tokens[i : i + n] for j in range(i)):
            expected[i : i + n] = True
    assert (r.repeated_spans(tokens, n) == expected).all()


@given(TOKENS)
def test_loop_tail_is_the_longest_periodic_end(tokens):
    best = (0, 0)
    for length in range(2, len(tokens) + 1):
        end = tokens[-length:]
        for period in range(1, length // 2 + 1):
            if end[period:] == end[:-period] and length > best[1]:
                best = (period, length)
    assert r.loop_tail(tokens) == best


def test_loop_tail_finds_an_endless_sentence():
    words = "so it is . check again . check again . check again ."
    assert r.loop_tail(words.split()) == (3, 10)  # with the full stop before the first round
    assert r.loop_tail([1, 2, 3, 4]) == (0, 0)


def test_sentences_keep_numbers_whole_and_count_repeats():
    text = "It costs 3.5 coins. Check .  check .\nAnswer : 7 . check ."
    assert r.sentences(text) == ["it costs 3.5 coins.", "check .", "check .", "answer : 7 .", "check ."]
    assert r.duplicate_sentence_share(r.sentences(text)) == pytest.approx(2 / 5)
    assert r.duplicate_sentence_share([]) == 0.0


def test_near_duplicates_need_four_words_and_close_wording():
    long = "first anna sells one red coin and then she has three more coins left ."
    close = "first anna sells one red coin and then she has three more coins left"
    assert r.near_duplicate_rate([long, close]) == pytest.approx(1 / 2)
    assert r.near_duplicate_rate([long, "second bob buys two apples and has nine of them ."]) == 0.0
    assert r.near_duplicate_rate(["let us check", "let us check"]) == 0.0
    assert r.near_duplicate_rate([long, long, long]) == pytest.approx(2 / 3)


def test_gzip_ratio_rises_with_repetition_and_does_not_depend_on_the_clock():
    varied = " ".join(map(str, range(200)))
    looped = "let us check . " * 50
    assert r.gzip_ratio(looped) > 3 * r.gzip_ratio(varied)
    first = r.gzip_ratio(varied)
    time.sleep(1.1)  # a time stamp in the header would have changed by now
    assert r.gzip_ratio(varied) == first
    assert r.gzip_ratio("") == 0.0


def test_a_prefix_counts_only_the_answers_that_are_long_enough():
    assert r.prefix_table([list(range(40)), [1, 2, 3, 4] * 20, [5]], (32, 64, 128)) == [
        {"prefix": 32, "rep4": pytest.approx((0 + (1 - 4 / 29)) / 2), "n": 2},
        {"prefix": 64, "rep4": pytest.approx(1 - 4 / 61), "n": 1},
        {"prefix": 128, "rep4": None, "n": 0},
    ]


def test_thousands_of_answers_take_seconds_at_most():
    answers = np.random.default_rng(0).integers(0, 96, (2000, 160)).tolist()
    start = time.process_time()
    r.prefix_table(answers, (32, 64, 128))
    for answer in answers:
        r.loop_tail(answer), r.repeated_spans(answer)
    assert time.process_time() - start < 5
