"""Promises of the repetition measures."""

import math
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


# Everything at every prefix


@given(TOKENS, st.integers(1, 5), st.integers(0, 40))
def test_repeats_up_to_a_prefix_are_rep_n_of_the_prefix(tokens, n, prefix):
    found = r.repeats(tokens, n)[: max(0, min(prefix, len(tokens)) - n + 1)]
    assert (found.mean() if len(found) else 0.0) == pytest.approx(r.rep_n(tokens[:prefix], n))


def naive_self_bleu(parts: list[list], n: int = 4) -> float:
    """As the papers write it: every part against all others."""
    scores = []
    for index, part in enumerate(parts):
        others = parts[:index] + parts[index + 1 :]
        logs = 0.0
        for order in range(1, n + 1):
            grams = [tuple(part[i : i + order]) for i in range(len(part) - order + 1)]
            matched = 0
            for gram in set(grams):
                most = max(
                    sum(tuple(other[i : i + order]) == gram for i in range(len(other) - order + 1)) for other in others
                )
                matched += min(grams.count(gram), most)
            logs += math.log((matched or 0.1) / max(1, len(grams))) / n
        nearest = min((len(other) for other in others), key=lambda size: (abs(size - len(part)), size))
        scores.append(math.exp(logs + min(0.0, 1 - nearest / len(part))))
    return sum(scores) / len(scores)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=2, max_size=6))
def test_self_bleu_is_the_mean_of_bleu_against_all_others(parts):
    assert r.self_bleu(parts) == pytest.approx(naive_self_bleu(parts))


def test_self_bleu_of_one_sentence_said_twice_is_one_and_of_strangers_small():
    same = "the answer is 7 .".split()
    assert r.self_bleu([same, same]) == 1
    assert r.self_bleu([same, "nobody knows how many".split()]) < 0.1
    assert r.self_bleu([same]) == r.self_bleu([]) == r.self_bleu([same, []]) == 0


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=12).map(" ".join), max_size=8),
       st.sampled_from([0.3, 0.5, 0.8, 1.0]))  # fmt: skip
def test_near_duplicates_are_those_that_comparing_all_pairs_finds(parts, threshold):
    sets = [frozenset(zip(w, w[1:], strict=False)) for w in (part.split() for part in parts) if len(w) >= 4]
    found = [any(len(a & b) / len(a | b) >= threshold for b in sets[:i]) for i, a in enumerate(sets)]
    assert r.near_duplicate_rate(parts, threshold) == pytest.approx(sum(found) / len(found) if found else 0.0)


def test_a_profile_has_each_measure_at_each_prefix_over_the_answers_long_enough():
    loop = "we look again . ".split() * 10
    fresh = [f"w{i}" for i in range(24)]
    rows = {row["prefix"]: row for row in r.profile([loop, fresh], " ".join, (32, 8, 16))}
    assert list(rows) == [8, 16, 32, None]
    assert [row["n"] for row in rows.values()] == [2, 2, 1, 2]
    assert rows[None]["tokens"] == (40 + 24) / 2 and rows[16]["tokens"] == 16
    for prefix, row in rows.items():
        texts = [a[:prefix] for a in (loop, fresh) if len(a) >= (prefix or 0)]
        for n in (2, 3, 4):
            assert row[f"rep{n}"] == pytest.approx(np.mean([r.rep_n(a, n) for a in texts]))
        assert row["distinct1"] == pytest.approx(np.mean([r.distinct_n(a, 1) for a in texts]))
        diversity = [r.distinct_n(a, 2) * r.distinct_n(a, 3) * r.distinct_n(a, 4) for a in texts]
        assert row["diversity"] == pytest.approx(np.mean(diversity))
        assert row["gzip_ratio"] == pytest.approx(np.mean([r.gzip_ratio(" ".join(a)) for a in texts]))
        assert row["loop_tail"] == pytest.approx(np.mean([r.loop_tail(a).tokens / len(a) for a in texts]))
        near = [r.near_duplicate_rate(r.sentences(" ".join(a))) for a in texts]
        assert row["near_duplicates"] == pytest.approx(np.mean(near))
        bleu = [r.self_bleu([part.split() for part in r.sentences(" ".join(a))]) for a in texts]
        assert row["sentence_bleu"] == pytest.approx(np.mean(bleu))
        assert row["self_bleu"] is None, "two answers are too few to compare with any other number"
    # New content: of the 4-grams that end in tokens 9 to 16, none is new in the loop and all are elsewhere.
    assert rows[16]["new_content"] == 0.5 and rows[8]["new_content"] == pytest.approx((4 / 5 + 1) / 2)
    assert rows[32]["new_content"] == 0 and rows[None]["new_content"] is None


def test_a_prefix_that_no_answer_reaches_has_no_numbers_and_empty_answers_no_repeats():
    short, whole = r.profile([[], [1, 2]], str, (4,))
    assert short["n"] == 0 and all(short[name] is None for name in (*r.MEASURES, "self_bleu"))
    assert whole["n"] == 2 and whole["rep4"] == whole["loop_tail"] == 0 and whole["tokens"] == 1


def test_answers_are_compared_with_each_other_in_equal_number():
    words = np.random.default_rng(0).integers(0, 30, (r.COMPARED + 40, 20)).tolist()
    more, fewer = (r.profile(words[:n], str, (10,))[0]["self_bleu"] for n in (r.COMPARED + 40, r.COMPARED))
    assert more == fewer == r.self_bleu([answer[:10] for answer in words[: r.COMPARED]])


@pytest.mark.slow
def test_ten_thousand_answers_of_512_tokens_take_half_a_minute():
    rng = np.random.default_rng(0)
    text = [f"w{i}" for i in rng.zipf(1.3, 4_000_000) % 2000]
    answers, at = [], 0
    for _ in range(10_000):
        answer: list[str] = []
        while len(answer) < 512:
            end = at + int(rng.integers(5, 20))
            answer += [*text[at:end], "."] * (1 + (rng.random() < 0.1))
            at = end % 3_900_000
        answers.append(answer[:512])
    start = time.process_time()
    r.profile(answers, " ".join, (128, 256, 512))
    assert time.process_time() - start < 90, "30 s on an idle core"
