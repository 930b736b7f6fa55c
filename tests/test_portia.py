"""PORTIA: nothing of an answer is lost, parts are aligned as they should be, and flipped pairs get a second look."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from c2f_utils.measure import portia

PIECES = [
    "One two. ", "Three! ", "four", "\n\n", "```py\na. b\n\nc\n```\n", "```", "1. ", "e.g. ", "«Ja?» ", "好。", " ",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


@settings(deadline=None, max_examples=150)
@given(TEXTS, TEXTS, st.integers(1, 5))
def test_parts_put_together_are_the_answers_and_equally_many(a, b, k):
    assert "".join(portia.segments(a)) == a
    for split in (portia.by_length, portia.by_meaning):
        first, second = split(a, b, k)
        assert ("".join(first), "".join(second)) == (a, b)
        assert len(first) == len(second) <= k
        assert len(first) == min(k, len(portia.segments(a)), len(portia.segments(b)))
        assert all(first + second) or not (a and b), "no part is empty"


def test_sentences_and_lines_end_segments_and_code_and_numbers_do_not():
    text = 'It is 3.5 m. "Really?" Yes:\n1. first\n2. second\n```\nx = 1. \n\ny\n```\nDone'
    assert portia.segments(text) == [
        "It is 3.5 m. ", '"Really?" ', "Yes:\n", "1. first\n", "2. second\n", "```\nx = 1. \n\ny\n```\n", "Done",
    ]  # fmt: skip
    assert portia.segments("open ```\na. \nb.\n") == ["open ```\na. \nb.\n"], "a block that is never closed is code"
    assert portia.segments("") == [""]


def test_length_alignment_cuts_at_the_ends_nearest_to_equal_parts():
    a = "".join(f"Sentence number {i}. " for i in range(9))
    first, second = portia.by_length(a, "Short. " * 3 + "And one that is rather much longer than the others were.")
    assert [part.count(".") for part in first] == [3, 3, 3]
    assert second[0] == "Short. Short. Short. "[: len(second[0])] and len(second) == 3


def test_semantic_alignment_brings_together_what_says_alike():
    one = ["Ants build hills. ", "Bees make honey and wax. ", "Wasps sting people badly. "]
    other = ["Ants build tall hills. ", "Bees make honey. ", "Bees make wax. ", "Bees dance. ", "Wasps sting. "]
    first, second = portia.by_meaning("".join(one), "".join(other))
    assert first == one and second == [other[0], "".join(other[1:4]), other[4]]
    assert portia.by_length("".join(one), "".join(other)) != (first, second)


def words(text: str) -> list[str]:
    return sorted(text.lower().replace(".", " ").split())


def overlap(a: str, b: str) -> float:
    left, right = words(a), words(b)
    common = sum(min(left.count(word), right.count(word)) for word in set(left))
    return 2 * common / (len(left) + len(right))


@pytest.mark.parametrize("seed", range(5))
def test_semantic_alignment_is_the_best_of_all_cuts(seed):
    rng = np.random.default_rng(seed)
    a, b = (["".join(f"{w} " for w in rng.choice(list("pqrst"), 3)) + "end. " for _ in range(6)] for _ in range(2))

    def parts(pieces, cuts):
        return ["".join(pieces[i:j]) for i, j in zip((0, *cuts), (*cuts, 6), strict=True)]

    best = max(
        sum(map(overlap, parts(a, i), parts(b, j)))
        for i in combinations(range(1, 6), 2)
        for j in combinations(range(1, 6), 2)
    )
    found = portia.by_meaning("".join(a), "".join(b))
    assert sum(map(overlap, *found)) == pytest.approx(best)


def test_a_long_answer_is_aligned_in_few_segments():
    a, b = ("".join(f"Word{(i * step) % 91} again. " for i in range(300)) for step in (1, 7))
    first, second = portia.by_meaning(a, b)
    assert "".join(first) == a and "".join(second) == b and len(first) == 3


def test_the_merged_text_shows_part_beside_part():
    assert portia.merged(["a1. ", "a2."], ["b1\n", "b2"]) == (
        "[Answer A, part 1]\na1. \n[Answer B, part 1]\nb1\n[Answer A, part 2]\na2.\n[Answer B, part 2]\nb2"
    )


A, B = "Ants build. Bees hum. Wasps sting people.", "Ants build tall hills here. Bees hum. Bees hum. Wasps sting."


def test_a_pair_on_which_both_orders_agree_is_asked_about_once():
    found = portia.resolve(A, B, lambda first, second: 0.8 if "".join(first) == A else 0.1)
    assert found == {"p_a": pytest.approx(0.85), "by": "whole", "asked": 2}


@pytest.mark.parametrize(
    ("parts_wanted", "by"), [(portia.by_length(A, B), "length"), (portia.by_meaning(A, B), "meaning")]
)
def test_a_flipped_pair_is_settled_by_the_first_alignment_that_agrees(parts_wanted, by):
    def ask(first, second):
        if (first, second) == parts_wanted:
            return 0.9
        return 0.2 if (second, first) == parts_wanted else 0.9

    assert portia.by_length(A, B) != portia.by_meaning(A, B)
    assert portia.resolve(A, B, ask) == {"p_a": pytest.approx(0.85), "by": by, "asked": 4 if by == "length" else 6}


def test_who_always_likes_the_first_or_says_nothing_leaves_a_tie():
    assert portia.resolve(A, B, lambda first, second: 0.9) == {"p_a": 0.5, "by": None, "asked": 6}
    assert portia.resolve(A, B, lambda first, second: None)["by"] is None
    assert portia.resolve("yes", "no", lambda first, second: 0.9) == {"p_a": 0.5, "by": None, "asked": 2}, "no parts"
    assert portia.resolve(A, B, lambda first, second: 0.5)["by"] == "whole", "a tie both ways is agreement"
