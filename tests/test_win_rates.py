"""Win rates: each way on verdicts whose truth is known, and the length-controlled one against published values."""

import gzip
import math

import numpy as np
import pandas as pd
import pytest
from judged_pairs import row, verdicts
from scipy.optimize import minimize
from scipy.stats import spearmanr

from c2f_utils.errors import C2FError
from c2f_utils.measure.regression import logistic
from c2f_utils.measure.style_control import markup, style_controlled
from c2f_utils.measure.win_rates import LEAST_OVERLAP, win_rates

TWO = {"strengths": {"x": 0.5, "y": 0.0}, "pairs": [("x", "y")]}


def only(rows, baseline="y", **options) -> dict:
    (found,) = win_rates(rows, baseline, **options)
    return found


def published(folder) -> tuple[list[dict], pd.DataFrame]:
    """Verdict rows of the published annotations (lengths in characters), and the leaderboard."""
    with gzip.open(folder / "alpaca_eval" / "annotations.csv.gz", "rt") as file:
        table = pd.read_csv(file)
    rows = [
        {
            "question": prompt, "model_a": model, "model_b": "baseline", "order": "ab", "p_a": preference,
            "tokens_a": chars, "tokens_b": others, "judge": "published",
        }
        for model, prompt, preference, chars, others in table.itertuples(index=False, name=None)
    ]  # fmt: skip
    board = pd.read_csv(folder / "alpaca_eval" / "leaderboard.csv")
    return rows, board.drop_duplicates("model").set_index("model")


def test_published_length_controlled_win_rates_are_met_from_the_annotations_alone(real_data):
    rows, board = published(real_data)
    found = {row["model"]: row for row in win_rates(rows, "baseline", resamples=20)}
    assert set(found) == set(board.index)
    raw = pd.Series({name: 100 * row["raw"]["value"] for name, row in found.items()})
    assert (raw - board["win_rate"]).abs().max() < 0.01
    ours = pd.Series({name: 100 * row["length_controlled"]["value"] for name, row in found.items()})[board.index]
    theirs = board["length_controlled_win_rate"]
    assert (ours - theirs).abs().mean() <= 1.5
    assert spearmanr(ours, theirs)[0] >= 0.975
    assert (ours - theirs).abs().mean() < (raw - theirs).abs().mean() / 3


def test_few_models_make_a_pool(real_data):
    rows, board = published(real_data)
    names = board.index.to_numpy()
    errors = []
    for seed in range(4):
        chosen = set(np.random.default_rng(seed).choice(names, 4, replace=False))
        found = win_rates([row for row in rows if row["model_a"] in chosen], "baseline", resamples=2)
        errors += [
            100 * row["length_controlled"]["value"] - board["length_controlled_win_rate"][row["model"]] for row in found
        ]
    assert np.abs(errors).mean() < 2.5


def test_the_raw_rate_is_the_mean_preference_and_agreement_counts_only_what_both_orders_say():
    rows = [
        row(0.9), row(0.8, order="ba"),  # a win
        row(0.9, question=2), row(0.2, question=2, order="ba"),  # flips
        row(0.3, question=3), row(0.52, question=3, order="ba"),  # a loss and a tie
        row(0.1, question=4), row(0.2, question=4, order="ba"),  # a loss
        row(0.6, question=5), row(None, question=5, order="ba"),  # in one order only
        row(None, question=6), row(None, question=6, order="ba"),
    ]  # fmt: skip
    found = only(rows)
    assert found["raw"]["value"] == pytest.approx(np.mean([0.85, 0.55, 0.41, 0.15, 0.6]))
    assert found["swap_consistent"]["value"] == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert (found["questions"], found["pairs"], found["failed"]) == (5, 5, 1)
    turned = only([each | {"model_a": "y", "model_b": "x"} for each in rows], "x")
    assert turned["raw"] == pytest.approx(found["raw"]), "the names of the sides decide nothing"
    other = only(rows, "x")
    assert other["model"] == "y" and other["raw"]["value"] == pytest.approx(1 - found["raw"]["value"])
    assert (other["tokens"], other["baseline_tokens"]) == (20, 10)
    assert only([row(0.7)])["swap_consistent"] is None, "nothing was asked in both orders"


def test_a_judge_that_looks_at_the_place_only_finds_nobody_better():
    found = only(verdicts(**TWO | {"strengths": {"x": 0, "y": 0}}, lengths={"x": 50, "y": 50}, place=3.0))
    assert found["raw"]["value"] == pytest.approx(0.5) and found["swap_consistent"]["value"] == 0.5


def test_equal_length_is_where_a_long_model_loses_what_its_length_bought():
    long = {"x": 100, "y": 60}
    bought = only(verdicts(**TWO, lengths=long, length=1.0, noise=0.5))
    plain = only(verdicts(**TWO, lengths=long, length=0.0, noise=0.5))
    merit = 1 / (1 + math.exp(-0.5))
    assert bought["raw"]["value"] > 0.7 > plain["raw"]["value"]
    assert bought["length_controlled"]["value"] == pytest.approx(merit, abs=0.06)
    controlled = bought["length_controlled"]
    assert controlled["low"] < controlled["value"] < controlled["high"] and controlled["length"]["value"] < -1
    assert controlled["refused"] is None and 0.05 < controlled["overlap"] < 0.5
    assert controlled["overlap"] + controlled["longer"] == pytest.approx(1, abs=0.05)


def test_the_interval_at_equal_length_comes_from_refitting():
    """With the length term at zero and no difficulty every question is predicted alike: without a refit there would be
    no interval at all. It covers about as widely as the raw rate's."""
    found = only(verdicts(**TWO, lengths={"x": 110, "y": 50}, length=1.0, noise=2.0))
    raw, controlled = found["raw"], found["length_controlled"]
    assert controlled["length"]["high"] - controlled["length"]["low"] > 0.05
    assert controlled["high"] - controlled["low"] > 0.7 * (raw["high"] - raw["low"])


def test_always_longer_is_refused_and_always_shorter_is_said():
    longer = only(verdicts(**TWO, lengths={"x": 3000, "y": 50}))["length_controlled"]
    assert longer["overlap"] < LEAST_OVERLAP and longer["value"] is None and longer["low"] is None
    assert "below 5%" in longer["refused"] and longer["note"] is None
    shorter = only(verdicts(**TWO, lengths={"x": 50, "y": 3000}))["length_controlled"]
    assert shorter["value"] is not None and "rests on the prior" in shorter["note"]
    same = [each | {"tokens_b": each["tokens_a"]} for each in verdicts(**TWO, lengths={"x": 50, "y": 50})]
    found = only(same)
    assert found["length_controlled"]["value"] == pytest.approx(found["raw"]["value"], abs=0.01)


def test_questions_hard_for_others_explain_losses():
    """Both models fail on the same half of the questions; the difficulty is learnt from the other one."""
    rows = []
    for question in range(100):
        for name in ("x", "z"):
            p = 0.1 if question % 2 else 0.9
            rows.append(row(p, question=question, model_a=name, tokens_a=10 + question % 7, tokens_b=12))
    found = win_rates(rows, "y")
    assert [each["length_controlled"]["difficulty"]["low"] > 1 for each in found] == [True, True]
    assert only([each for each in rows if each["model_a"] == "x"])["length_controlled"]["difficulty"] is None


def test_what_so_many_verdicts_could_find_is_said():
    few, many = (only(verdicts(**TWO, lengths={"x": 50, "y": 50}, questions=n, noise=1)) for n in (50, 800))
    assert few["detectable"] == pytest.approx(4 * many["detectable"], rel=0.25)


def test_judges_are_kept_apart_and_the_best_model_comes_first():
    three = {"strengths": {"x": 0.2, "z": 1.0, "y": 0.0}, "lengths": dict.fromkeys("xyz", 50)}
    rows = verdicts(**three, pairs=[("x", "y"), ("y", "z")]) + verdicts(**TWO, lengths={"x": 5, "y": 5}, judge="b")
    assert [(each["judge"], each["model"]) for each in win_rates(rows, "y")] == [
        ("judge", "z"), ("judge", "x"), ("b", "x"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"p_a": 1.2}, "p_a is 1.2"),
        ({"p_a": float("nan")}, "p_a is nan"),
        ({"order": "first"}, "expected 'ab' or 'ba'"),
        ({"tokens_a": -1}, "expected numbers of tokens"),
    ],
)
def test_rows_that_are_no_verdicts_are_refused(changes, words):
    with pytest.raises(C2FError, match=words):
        win_rates([row(0.5), row(0.5) | changes], "y")


def test_missing_fields_missing_rows_and_a_baseline_nobody_met_are_refused():
    with pytest.raises(C2FError, match="2 of 2 .*\n.*row 1: no p_a, judge"):
        win_rates([{k: v for k, v in row(0.5).items() if k not in ("p_a", "judge")}] * 2, "y")
    with pytest.raises(C2FError, match="at least one row"):
        win_rates([], "y")
    with pytest.raises(C2FError, match="no verdict names 'instruct'; expected one of 'x', 'y'"):
        win_rates([row(0.5)], "instruct")


# The regression


def test_the_regression_finds_the_minimum_for_every_draw():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(0, 1, (60, 3)), rng.random(60)
    weights = rng.integers(0, 4, (5, 60)).astype(float)
    mean, precision = np.array([0.3, -1.0, 0.0]), np.array([2.0, 5.0, 0.01])
    found = logistic(features, labels, weights, mean, precision)
    for draw, coefficients in zip(weights, found, strict=True):

        def loss(b, draw=draw):
            z = features @ b
            return draw @ (np.logaddexp(0, z) - labels * z) + (precision / 2) @ (b - mean) ** 2

        assert coefficients == pytest.approx(minimize(loss, mean, tol=1e-12).x, abs=1e-4)


def test_a_model_that_always_wins_has_a_finite_rating():
    found = logistic(np.ones((50, 1)), np.ones(50), np.ones((1, 50)), np.zeros(1), np.array([0.01]))
    assert 4 < found[0, 0] < 12


# Style


THREE = {
    "strengths": {"base": 0.0, "fine": 0.8, "instruct": 0.0}, "lengths": {"base": 60, "fine": 60, "instruct": 120},
    "pairs": [("fine", "instruct"), ("base", "instruct"), ("fine", "base")],
}  # fmt: skip


def test_at_equal_style_length_buys_nothing_and_every_model_keeps_its_column():
    (found,) = style_controlled(verdicts(**THREE, length=1.0, noise=0.3), "instruct", resamples=200)
    models = {each["model"]: each for each in found["models"]}
    assert set(models) == {"base", "fine"}
    assert models["base"]["raw"]["value"] < 0.35 and models["fine"]["raw"]["value"] < 0.5
    assert models["base"]["controlled"]["value"] == pytest.approx(0.5, abs=0.06)
    assert models["fine"]["controlled"]["value"] == pytest.approx(1 / (1 + math.exp(-0.8)), abs=0.06)
    assert found["style"]["length"]["low"] > 0.3
    (fair,) = style_controlled(verdicts(**THREE, noise=0.3), "instruct", resamples=200)
    assert fair["style"]["length"]["low"] < 0 < fair["style"]["length"]["high"]


def test_which_model_is_a_changes_no_rating():
    rows = verdicts(**THREE, length=0.5, noise=0.5, questions=60)
    swapped = [
        each | {
            "model_a": each["model_b"], "model_b": each["model_a"], "tokens_a": each["tokens_b"],
            "tokens_b": each["tokens_a"], "p_a": 1 - each["p_a"], "order": {"ab": "ba", "ba": "ab"}[each["order"]],
        }
        for each in rows
    ]  # fmt: skip
    renamed = {"base": "z", "fine": "m", "instruct": "a"}  # and neither does the alphabet
    there = [each | {side: renamed[each[side]] for side in ("model_a", "model_b")} for each in rows]
    one, two, three = (
        style_controlled(given, name, resamples=20)[0]
        for given, name in ((rows, "instruct"), (swapped, "instruct"), (there, "a"))
    )
    assert one["style"]["length"]["value"] == pytest.approx(two["style"]["length"]["value"])
    assert one["style"]["length"]["value"] == pytest.approx(three["style"]["length"]["value"])
    by_name = {renamed[each["model"]]: each["controlled"]["value"] for each in one["models"]}
    assert by_name == pytest.approx({each["model"]: each["controlled"]["value"] for each in three["models"]})


def test_intervals_of_ratings_do_not_narrow_with_copies_of_verdicts():
    rows = verdicts(**THREE, noise=1.0, questions=60)
    copies = [each | {"turn": turn} for each in rows for turn in (1, 2, 3)]
    (once,), (thrice,) = (style_controlled(each, "instruct", resamples=300) for each in (rows, copies))
    for a, b in zip(once["models"], thrice["models"], strict=True):
        widths = [each["controlled"]["high"] - each["controlled"]["low"] for each in (a, b)]
        assert widths[1] == pytest.approx(widths[0], rel=0.15)


def test_markup_is_counted_outside_code():
    text = "# Title\n\n- one\n- **two**\n1. three\n\n```\n# comment\n- no item\n```\nA **bold** end, 2 * 3 * 4.\n"
    assert markup(text) == {"headers": 1, "lists": 3, "bold": 2}
    assert markup("plain") == {"headers": 0, "lists": 0, "bold": 0}


def test_a_judge_that_pays_for_headers_is_found_out_by_the_texts():
    rows, texts = [], {}
    rng = np.random.default_rng(3)
    for question in range(150):
        headed = rng.random(2) < (0.7, 0.3)
        for name, has in zip("xy", headed, strict=True):
            texts[name, str(question), 1] = "# Head\nwords" if has else "words"
        p = 0.5 + 0.3 * (float(headed[0]) - float(headed[1]))
        rows.append(row(p, question=question, tokens_a=20, tokens_b=20))
    (found,) = style_controlled(rows, "y", texts, resamples=100)
    assert set(found["style"]) == {"length", "headers", "lists", "bold"}
    assert found["style"]["headers"]["low"] > 0.5 and abs(found["style"]["bold"]["value"]) < 1e-6
    assert found["models"][0]["raw"]["value"] > 0.55
    assert found["models"][0]["controlled"]["value"] == pytest.approx(0.5, abs=0.02)
    del texts["x", "3", 1]
    with pytest.raises(C2FError, match="1 judged answers have no text"):
        style_controlled(rows, "y", texts)
