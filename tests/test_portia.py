"""PORTIA: nothing of an answer is lost, parts are aligned as they should be, and flipped pairs get a second look."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from c2f_utils.measure import judge_prompts, portia
from c2f_utils.measure.judges import Case, Dialogue, Opinion, Pair, Question, Verdicts, verdict_rows
from c2f_utils.measure.second_look import second_look

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
QUESTION = Question("q", "writing", ("What do insects do?",))


class Placed:
    """Prefers what stands first, unless it is shown one of the `trusted` alignments: then a's answer."""

    name = id = "placed"

    def __init__(self, *trusted: portia.Parts):
        self.trusted, self.heard = trusted, []

    def opinions(self, cases):
        for case in cases:
            self.heard.append(case.parts)
            swapped = case.shown[0] == (B,)
            parts = case.parts and tuple(map(list, case.parts[::-1] if swapped else case.parts))
            yield case, Opinion((0.2 if swapped else 0.9) if parts in self.trusted else 0.9)


def looked_twice(judge, tmp_path, answers=((A, B),)):
    """The rows of pairs of answers before and after a second look, and its counts."""
    asked = [
        Pair(replace(QUESTION, id=f"q{n}"), 1, ("a", "b"), tuple(Dialogue((text,), (5,)) for text in both))
        for n, both in enumerate(answers)
    ]
    verdicts = Verdicts(tmp_path / "verdicts.jsonl")
    rows = verdict_rows(asked, judge, verdicts)
    return rows, *second_look(asked, rows, judge, verdicts)


def test_alignments_that_show_whole_answers_or_nothing_new_are_not_asked_about():
    assert [name for name, _ in portia.ways(A, B)] == ["length", "meaning"]
    assert portia.ways("yes", "no") == [] and len(portia.ways("One. Two. Three.", "Uno. Due. Tre.")) == 1


@pytest.mark.parametrize("by", ["length", "meaning"])
def test_a_flipped_pair_is_settled_by_the_first_alignment_that_agrees(by, tmp_path):
    judge = Placed(dict(portia.ways(A, B))[by])
    rows, after, found = looked_twice(judge, tmp_path)
    assert found["flipped"] == found["settled"] == 1 and found["by"] == {"length": 0, "meaning": 0} | {by: 1}
    assert [row["p_a"] for row in rows] == [0.9, pytest.approx(0.1)], "the first verdicts stay what they were"
    assert [row["p_a"] for row in after] == [pytest.approx(0.85)] * 2
    assert (found["wins"], found["swap_consistency"]) == (1, 1)
    assert len(judge.heard) == (4 if by == "length" else 6)


def test_a_pair_on_which_both_orders_agree_is_not_asked_about_again(tmp_path):
    judge = Placed()
    judge.opinions = lambda cases: ((case, Opinion(0.8 if case.shown[0] == (A,) else 0.1)) for case in cases)
    rows, after, found = looked_twice(judge, tmp_path)
    assert after == rows and found["flipped"] == 0 and found["wins"] == 1


def test_who_always_likes_the_first_leaves_a_tie_and_what_has_no_parts_is_left_alone(tmp_path):
    judge = Placed()
    rows, after, found = looked_twice(judge, tmp_path, ((A, B), ("yes", "no")))
    assert after == rows and (found["flipped"], found["settled"], found["ties"]) == (2, 0, 2)
    assert len(judge.heard) == 4 + 4
    assert looked_twice(judge, tmp_path)[2]["flipped"] == 1 and len(judge.heard) == 4 + 4, "nothing is asked twice"


def test_what_cannot_be_read_is_not_settled(tmp_path):
    judge = Placed()
    judge.opinions = lambda cases: ((case, Opinion(None if case.parts else 0.9)) for case in cases)
    _, _, found = looked_twice(judge, tmp_path)
    assert (found["flipped"], found["settled"], found["ties"]) == (1, 0, 1)


@pytest.mark.parametrize("turn", [1, 2])
def test_a_judge_that_reads_text_sees_part_beside_part_and_no_whole_answer_of_that_turn(turn):
    question = Question("q", "math", ("First?", "Second?"), ("r1", "r2"))
    shown = (("x", A), ("y", B)) if turn == 2 else ((A,), (B,))
    parts = tuple(map(tuple, portia.by_length(A, B)))
    system, user = judge_prompts.messages(Case(question, turn, shown, parts), judge_prompts.defaults())
    assert portia.merged(*parts) in user["content"] and A not in user["content"] and "judge each" in system["content"]
    assert user["content"].count("# Reference answer") == turn and ("# Answer 1 of A" in user["content"]) == (turn == 2)
