"""The bias panel finds what a made-up judge pays for, and says nothing where it pays for nothing."""

import numpy as np
import pytest
from judged_pairs import row, verdicts

from c2f_utils.measure import verdict_pairs
from c2f_utils.measure.bias_panel import panel

EVEN = {"strengths": {"x": 0.0, "y": 0.0}, "lengths": {"x": 80, "y": 80}, "pairs": [("x", "y")], "noise": 0.7}


def of(rows, **options) -> dict:
    (found,) = panel(rows, **options)["judges"]
    return found


def test_a_fair_judge_pays_for_neither_length_nor_place():
    found = of(verdicts(**EVEN))
    for name, fair in (("longer_wins", 0.5), ("first_wins", 0.5), ("length", 0.0)):
        assert found[name]["low"] <= fair <= found[name]["high"], name
    assert found["flips"]["value"] == 0.0 and found["failures"]["value"] == 0.0
    assert found["flips"]["high"] == pytest.approx(0.019, abs=0.001), "Wilson's: none of 200 questions is not never"


def test_pay_for_length_is_found_with_its_size_and_grows_with_the_ratio():
    found = of(verdicts(**EVEN, length=0.8, questions=400))
    assert found["longer_wins"]["low"] > 0.65 and found["length"]["low"] < 0.8 < found["length"]["high"]
    bins = found["by_ratio"]
    assert len(bins) == 5 and bins[0]["value"] + 0.2 < bins[-1]["value"]
    assert [each["from"] for each in bins[1:]] >= [each["to"] for each in bins[:-1]]
    assert sum(each["pairs"] for each in bins) <= 400 and min(each["pairs"] for each in bins) > 60
    for each in bins:
        assert each["low"] <= each["value"] <= each["high"] and each["from"] <= each["ratio"] <= each["to"]


def test_a_better_model_that_writes_more_does_not_pose_as_pay_for_length():
    better = EVEN | {"strengths": {"x": 1.5, "y": 0.0}, "lengths": {"x": 200, "y": 60}}
    found = of(verdicts(**better))
    assert found["longer_wins"]["low"] > 0.6
    assert found["length"]["low"] < 0.0 < found["length"]["high"], "models held fixed"


def test_pay_for_the_first_place_is_found_as_flips_and_as_first_wins():
    found = of(verdicts(**EVEN, place=1.0))
    assert found["first_wins"]["low"] > 0.7 and found["flips"]["low"] > 0.4


def test_figures_by_hand():
    rows = [
        row(0.9), row(0.3, order="ba"),  # flips: the first shown wins both
        row(0.5, question=2), row(0.8, question=2, order="ba"),  # a tie and a win of x, shown second
        row(0.2, question=3), row(None, question=3, order="ba"),
        row(0.9, question=4, tokens_b=10),  # equal lengths, one order
    ]  # fmt: skip
    found = of(rows)
    assert (found["questions"], found["pairs"], found["verdicts"]) == (4, 4, 7)
    assert found["flips"]["value"] == pytest.approx(1 / 2) and found["first_wins"]["value"] == pytest.approx(2.5 / 4)
    assert found["ties"]["value"] == pytest.approx(1 / 6) and found["failures"]["value"] == pytest.approx(1 / 7)
    assert found["longer_wins"]["value"] == pytest.approx((0 + 0 + 1) / 3), "means .6, .65 and .2 for the shorter x"


def test_a_pair_reads_the_same_whichever_model_is_named_first():
    rows = [row(0.9), row(0.3, order="ba"), row(0.6, question=2), row(0.8, question=2, order="ba")]
    named = [
        each | {
            "model_a": "y", "model_b": "x", "p_a": 1 - each["p_a"], "tokens_a": 20, "tokens_b": 10,
            "order": {"ab": "ba", "ba": "ab"}[each["order"]],
        }
        for each in rows
    ]  # fmt: skip
    one, other = verdict_pairs.pairs(rows), verdict_pairs.pairs(named)
    assert one.drop(columns=["p_ab", "p_ba", "p"]).equals(other.drop(columns=["p_ab", "p_ba", "p"]))
    assert one[["p_ab", "p_ba", "p"]].to_numpy() == pytest.approx(other[["p_ab", "p_ba", "p"]].to_numpy())
    assert one[["p_ab", "p_ba"]].to_numpy().tolist() == [[0.9, 0.3], [0.6, 0.8]]
    assert of(rows)["first_wins"] == of(named)["first_wins"] == of(rows[:2] + named[2:])["first_wins"]
    turned = verdict_pairs.against(one, "x")
    assert turned[["model_a", "model_b", "tokens_a", "tokens_b"]].to_numpy().tolist() == [["y", "x", 20, 10]] * 2
    assert turned[["p_ab", "p_ba", "p"]].to_numpy() == pytest.approx(np.array([[0.7, 0.1, 0.4], [0.2, 0.4, 0.3]]))


def test_what_nothing_defines_is_null():
    found = of([row(None), row(None, order="ba", question=2)])
    assert found["failures"]["value"] == 1.0 and found["failures"]["low"] < 1.0
    assert [found[name] for name in ("longer_wins", "flips", "first_wins", "ties", "length")] == [None] * 5
    assert found["by_ratio"] == []
    same = of([row(0.7, tokens_b=10), row(0.7, tokens_b=10, order="ba")])
    assert same["longer_wins"] is None and same["length"] is None and same["flips"]["value"] == 0.0


def test_turns_and_pairs_of_a_question_are_no_further_evidence():
    rows = verdicts(**EVEN, questions=60)
    copies = [each | {"turn": turn} for each in rows for turn in range(1, 5)]
    once, four = of(rows), of(copies)
    for name in ("longer_wins", "first_wins"):
        assert four[name]["high"] - four[name]["low"] == pytest.approx(once[name]["high"] - once[name]["low"], rel=0.15)


def test_kappa_is_one_for_the_same_verdicts_zero_for_chance_and_the_librarys():
    rng = np.random.default_rng(0)

    def judge(name: str, said) -> list[dict]:
        return [
            row(float(p), question=i, order=order, judge=name) for i, p in enumerate(said) for order in ("ab", "ba")
        ]

    first, other = rng.choice([0.1, 0.5, 0.9], (2, 300), p=[0.5, 0.2, 0.3])
    (same,) = panel(judge("one", first) + judge("two", first))["agreement"]
    assert same["kappa"]["value"] == pytest.approx(1.0) and same["pairs"] == 300 and same["judges"] == ["one", "two"]
    mixed = np.where(rng.random(300) < 0.5, first, other)
    chance, half = (panel(judge("one", first) + judge("two", x))["agreement"][0]["kappa"] for x in (other, mixed))
    assert chance["low"] < 0 < chance["high"] and half["low"] > 0.3
    table = np.array([[np.mean((first == a) & (mixed == b)) for b in (0.1, 0.5, 0.9)] for a in (0.1, 0.5, 0.9)])
    expected = table.sum(0) @ table.sum(1)
    assert half["value"] == pytest.approx((np.trace(table) - expected) / (1 - expected))
    assert panel(judge("one", first) + [row(0.5, question="elsewhere", judge="two")])["agreement"] == []
