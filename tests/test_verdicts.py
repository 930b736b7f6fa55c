"""Promises of the sentences: each outcome, ties and nulls, follow from the numbers alone."""

import copy
import json
import re

import pytest
from fake_results import fake_run

from c2f_utils.report import verdicts as v
from c2f_utils.report import verdicts_laws


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    run = fake_run(tmp_path_factory.mktemp("run"))
    return {path.parent.name: json.loads(path.read_text()) for path in run.glob("*/results.json")}


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((0.02, 0.2), "better"),
        ((-0.2, -0.02), "worse"),
        ((-0.02, 0.2), "tie"),
        ((-0.02, 0.2, 0.1), "tie"),
        ((-0.02, 0.05, 0.1), "equivalent"),
        ((0.01, 0.05, 0.1), "equivalent"),
        ((0.0, 0.0, 0.1), "tie"),
        ((None, None), "unknown"),
    ],
)
def test_an_interval_decides_and_without_one_nothing_does(numbers, expected):
    assert v.outcome(*numbers) == expected


def test_a_comparison_recorded_the_other_way_round_is_turned():
    row = {
        "a": "coarse",
        "b": "fine",
        "metric": "m",
        "decoding": "d",
        "difference": -0.3,
        "low": -0.4,
        "high": -0.1,
        "p": 0.01,
    }
    found = v.paired_row([row], "fine", "coarse", "m", "d")
    assert (found["difference"], found["low"], found["high"]) == (0.3, 0.1, 0.4)
    assert v.paired_row([row], "fine", "base", "m", "d") is None
    assert v.paired_row([row], "fine", "coarse", "m", "greedy") is None
    assert v.paired_row([row | {"low": None, "high": None}], "fine", "coarse", "m", "d")["low"] is None


@pytest.mark.parametrize(
    ("values", "interval", "start"),
    [
        ((0.8, 0.4), (0.3, 0.5), "Fine is better than Coarse on reward"),
        ((0.4, 0.8), (-0.5, -0.3), "Fine is worse than Coarse on reward"),
        ((0.8, 0.79), (-0.05, 0.17), "Fine and Coarse cannot be told apart on reward"),
        ((0.8, 0.79), (-0.05, 0.07), "Fine and Coarse are equivalent within 0.1 on reward"),
        ((0.8, 0.4), (None, None), "Fine and Coarse are not compared on reward"),
    ],
)
def test_parents_every_way(values, interval, start):
    said = v.parent_sentence("Fine", "Coarse", "reward", values, interval)
    assert said.startswith(start)
    assert ("no interval recorded" in said) == (interval[0] is None)


@pytest.mark.parametrize(
    ("values", "interval", "words"),
    [
        ((0.8, 0.4), (0.3, 0.5), "The method beats the control “PPO”"),
        ((0.4, 0.8), (-0.5, -0.3), "The control “PPO” is better than the method"),
        ((0.8, 0.79), (-0.05, 0.07), "The method and the control “PPO” cannot be told apart"),
    ],
)
def test_controls_all_three_ways(values, interval, words):
    said = v.control_sentence("PPO", "accuracy_last", values, interval)
    assert said.startswith(words) and f"interval {interval[0]:+.3f} to {interval[1]:+.3f}" in said


def models(fine: float | None, coarse: float | None, paired=()) -> dict:
    def row(value):
        return {"accuracy_last": value, "accuracy_first": value, "reward": 0.5}

    return {
        "models": {
            "fine": {"label": "Fine", "role": "fine", "sampled_t1": row(fine)},
            "coarse": {"label": "Coarse", "role": "coarse", "sampled_t1": row(coarse)},
        },
        "paired": list(paired),
    }


def test_both_first_and_last_answers_are_compared_with_every_other_model(results):
    said = v.fine_against_all(results["07_evaluation"])
    assert len(said) == 2 * 9
    for label in ("Base", "Instruct", "Coarse Actor", "“PPO on instruct”", "“Residue of fixed-long”"):
        for kind in ("last", "first"):
            about = rf"{label}( cannot be told apart| are equivalent within 0.02)? on {kind}-answer accuracy: "
            assert sum(bool(re.search(about, line)) for line in said) == 1, label


def test_without_the_checker_the_reward_is_compared_and_that_is_said():
    said = v.fine_against_all(models(None, None))
    assert said[0].startswith("Accuracy is not available") and "on reward" in said[1] and len(said) == 2
    assert "not measured" in " ".join(v.fine_against_all(models(0.5, None)))
    assert v.fine_against_all({}) == ["The merged model was not evaluated, so nothing is said about it."]


def test_what_does_not_survive_holm_is_no_difference():
    def pair(metric, p):
        same = {"a": "fine", "b": "coarse", "decoding": "sampled_t1", "difference": 0.1, "low": 0.01, "high": 0.2}
        return same | {"metric": metric, "p": p}

    weak = v.fine_against_all(models(0.6, 0.5, [pair("accuracy_last", 0.04), pair("accuracy_first", 0.04)]))
    assert all(line.startswith("Fine and Coarse cannot be told apart on") for line in weak)
    assert all("which Holm's correction over 2 comparisons takes back (p = 0.080)" in line for line in weak)
    strong = v.fine_against_all(models(0.6, 0.5, [pair("accuracy_last", 0.001), pair("accuracy_first", 0.001)]))
    assert all("Fine is better than Coarse" in line and "Holm" not in line for line in strong)


def test_the_reward_is_judged_by_its_paired_interval_and_never_by_its_sign():
    def reward(low, high):
        row = {"a": "fine", "b": "coarse", "metric": "reward", "decoding": "sampled_t1", "difference": 0.001}
        found = models(None, None, [row | {"low": low, "high": high, "p": 0.5}])
        found["models"]["fine"]["sampled_t1"]["reward"] += 0.001
        return v.fine_against_all(found)[1]

    assert reward(-0.3, 0.302).startswith("Fine and Coarse cannot be told apart on reward: 0.501 against 0.500")
    assert reward(-0.03, 0.032).startswith("Fine and Coarse are equivalent within 0.1 on reward")
    unpaired = models(None, None)  # a run of a time when rewards were not paired
    unpaired["models"]["fine"]["sampled_t1"]["reward"] += 0.001
    said = v.fine_against_all(unpaired)[1]
    assert said.startswith("Fine and Coarse are not compared on reward") and "no interval recorded" in said


def test_rambling_follows_from_length_and_ending():
    long = {"eos_rate": 0.02, "mean_tokens": 159, "rep4": 0.4, "accuracy_first": 0.6, "accuracy_last": 0.4}
    short = {"eos_rate": 0.9, "mean_tokens": 40, "accuracy_first": 0.4, "accuracy_last": 0.6}
    instruct = {"mean_tokens": 21}
    assert (
        "rambles: 159 tokens" in v.rambling(long, instruct)[0]
        and "costs it right answers" in v.rambling(long, instruct)[1]
    )
    assert (
        "does not ramble" in v.rambling(short, instruct)[0] and "mends wrong answers" in v.rambling(short, instruct)[1]
    )
    assert "does not ramble" in v.rambling({**long, "eos_rate": 0.9}, instruct)[0]
    assert "changes little" in v.rambling({**long, "accuracy_last": 0.6}, instruct)[1]
    assert "not known" in v.rambling({**long, "eos_rate": None}, instruct)[0]
    assert "rambles" in v.rambling({"eos_rate": 0.0, "mean_tokens": 9}, {"mean_tokens": 0})[0]


@pytest.mark.parametrize(
    ("mine", "theirs", "word"), [(3, 1, "more analytical than"), (1, 3, "less"), (1, 1, "within 0.1 of")]
)
def test_more_analytical_only_when_it_takes_more_correct_steps(mine, theirs, word):
    coarse = {"eos_rate": 0.0, "mean_tokens": 100, "correct_steps": mine}
    assert word in v.rambling(coarse, {"mean_tokens": 20}, {"correct_steps": theirs})[-1]
    assert len(v.rambling(coarse, {"mean_tokens": 20}, {"correct_steps": None})) == 1


def test_before_there_is_an_instruction_model_another_one_is_named_as_the_measure():
    said = v.rambling({"eos_rate": 0.02, "mean_tokens": 150}, {"mean_tokens": 100}, reference="base")[0]
    assert said.startswith("The Coarse Actor rambles: 150 tokens on average (1.5 times the base's)")


def test_an_operator_is_named_with_its_numbers():
    assert v.operator_name({"name": "ties", "density": 0.3, "seed": 1}) == "ties (density 0.3)"
    assert v.operator_name({"name": "residue"}) == v.operator_name("residue") == "residue"
    assert v.operator_name(None) is None


def test_conciseness_in_both_directions_and_with_nulls():
    a, b = {"mean_tokens": 54, "rep4": 0.04, "eos_rate": 0.97}, {"mean_tokens": 159, "rep4": 0.41, "eos_rate": 0.02}
    assert "lowers the length from 159 to 54 tokens (0.34 times)" in v.conciseness(a, b)[0]
    assert "raises the length" in v.conciseness(b, a)[0] and "less often" in v.conciseness(b, a)[2]
    assert "leaves" in v.conciseness(a, a)[1] and "ends as often" in v.conciseness(a, a)[2]
    assert "not measured" in v.conciseness({}, b)[0]
    assert v.conciseness(a, {**b, "rep4": 0.0})[1].endswith("to 0.040.")


@pytest.mark.parametrize(
    ("fine", "word"), [(0.1, "less redundant"), (0.6, "more redundant"), (0.41, "within 0.02 of the Coarse Actor")]
)
def test_redundancy_is_compared_at_the_longest_prefix_both_reach(fine, word):
    coarse = [
        {"prefix": 32, "rep4": 0.9, "n": 256},
        {"prefix": 64, "rep4": 0.4, "n": 250},
        {"prefix": 128, "rep4": 0.5, "n": 9},
    ]
    mine = [{"prefix": 64, "rep4": fine, "n": 140}, {"prefix": 128, "rep4": 0.0, "n": 2}]
    said = v.at_fixed_prefixes({"prefix_redundancy": {"fine": mine, "coarse": coarse}})[0]
    assert "first 64 tokens" in said and word in said and "(n 140)" in said
    few = v.at_fixed_prefixes({"prefix_redundancy": {"fine": mine[1:], "coarse": coarse}})[0]
    assert "not compared" in few and "not compared" in v.at_fixed_prefixes({})[0]


@pytest.mark.parametrize(
    ("reward", "accuracy", "said"),
    [
        (-0.8, 0.4, "disagree: the reward model prefers the Coarse Actor"),
        (0.8, -0.4, "disagree: the reward model prefers the Fine Actor"),
        (0.8, 0.4, "are not shown to disagree"),
        (-0.001, 0.4, "are not shown to disagree"),
    ],
)
def test_reward_and_accuracy_disagree_only_where_both_intervals_say_so(reward, accuracy, said):
    def row(metric, difference):
        shared = {"a": "fine", "b": "coarse", "metric": metric, "decoding": "sampled_t1", "difference": difference}
        return shared | {"low": difference - 0.1, "high": difference + 0.1}

    paired = [row("reward", reward), row("accuracy_last", accuracy)]
    assert said in v.reward_against_accuracy({"paired": paired})[0]
    assert v.reward_against_accuracy({"paired": paired[1:]}) == []


def laws(logistic, linear, long=(3.0, 3.0, 3.0), metric="utility") -> dict:
    def law(label, values, tokens):
        seeds = {str(k): {"rollout_tokens": tokens, "final": {metric: x}} for k, x in enumerate(values)}
        return {"label": label, "seeds": seeds}

    made = {"logistic": law("logistic", logistic, 80), "clock_linear": law("linear", linear, 82)}
    return {"laws": made | {"fixed_long": law("long", long, 145)}}


@pytest.mark.parametrize(
    ("logistic", "linear", "verdict", "lesson"),
    [
        ((3.0, 3.1, 3.2), (2.0, 2.2, 2.1), "Logistic is better than linear", "buy quality here"),
        (
            (2.0, 2.2, 2.1),
            (3.0, 3.1, 3.2),
            "Logistic is worse than linear",
            "linear ramp, which reads no signal, does better",
        ),
        ((3.0, 2.9, 3.1), (2.9, 3.1, 3.0), "cannot be told apart", "No advantage"),
        ((3.0, 3.0), (3.0, 3.0), "cannot be told apart", "No advantage"),
    ],
)
def test_logistic_against_linear_all_three_ways(logistic, linear, verdict, lesson):
    said = verdicts_laws.linear_against_logistic(laws(logistic, linear))
    assert verdict in said[0] and "0.98 times the tokens" in said[0] and lesson in said[1]


def test_one_seed_allows_no_verdict():
    said = verdicts_laws.linear_against_logistic(laws((3.0,), (2.0,)))
    assert len(said) == 1 and "1.000 above" in said[0] and "one seed allows no verdict" in said[0]
    assert "below" in verdicts_laws.linear_against_logistic(laws((1.0,), (2.0,)))[0]


def test_the_law_of_03_is_called_by_its_name():
    found = laws((3.0, 3.1, 3.2), (2.0, 2.2, 2.1))
    found["laws"]["logistic"]["law"] = {"name": "useful"}
    for entry in found["laws"].values():
        for run in entry["seeds"].values():
            run["limits"] = [8, 16]
    said = " ".join(verdicts_laws.linear_against_logistic(found))
    assert "the useful law behaved like" in said and "signals of the useful law" in said and "logistic" not in said


def test_laws_that_were_not_run_or_not_checked_are_named():
    missing = laws((3.0,), (3.0,))
    del missing["laws"]["clock_linear"]
    assert "clock_linear was not run" in verdicts_laws.linear_against_logistic(missing)[0]
    unchecked = verdicts_laws.schedules(laws((3.0, 2.0), (3.0, 2.0), (3.0, 2.0), metric="reward"))
    assert all("Utility is not available" in line and "on reward" in line for line in unchecked[:2])
    apart = laws((3.0,), (3.0,))
    apart["laws"]["clock_linear"]["seeds"] = {"7": apart["laws"]["clock_linear"]["seeds"]["0"]}
    assert "share no seed" in verdicts_laws.linear_against_logistic(apart)[0]


@pytest.mark.parametrize(
    ("accuracy", "word"), [(0.74, "ranks better"), (0.3, "ranks worse"), (0.51, "does not rank better")]
)
def test_the_reward_model_is_held_against_chance(accuracy, word):
    assert word in v.reward_model({"pair_accuracy": accuracy, "n_pairs": 400})[0]
    both = v.reward_model({"pair_accuracy": accuracy, "n_pairs": 9999, "held_out_pairs": 400})[0]
    assert "of 400 held-out pairs" in both, "training pairs are no evidence"
    assert "not tried" in v.reward_model({"pair_accuracy": None, "n_pairs": 0})[0]


@pytest.mark.parametrize(
    ("pearson", "partial", "first", "second"),
    [
        (0.5, 0.3, "longer answers higher", "still prefers length"),
        (-0.5, -0.3, "shorter answers higher", "prefers brevity"),
        (0.0, 0.0, "hardly depends on length", "hardly matters"),
        (0.5, None, "longer", "not known"),
    ],
)
def test_length_bias_in_words(pearson, partial, first, second):
    said = v.reward_model({"length_bias": {"pearson": pearson, "partial_given_utility": partial}})
    assert first in said[1] and second in said[2]


def test_merge_says_whether_the_optimum_lies_inside_and_whether_an_operator_is_better(results):
    found = copy.deepcopy(results["06_residue_merging"])
    said = " ".join(v.merging(found))
    assert "inside the range" in said and "No other operator scores better than residue" in said
    found["sweep"][-1]["score"] = 99.0
    found["operators"][1]["score"] = 99.0
    said = " ".join(v.merging(found))
    assert (
        "at the edge" in said and "not the one that scores best" in said and "than residue: linear, by at most " in said
    )
    assert v.merging({"sweep": []}) == ["No coefficient was chosen by score."]


def test_everything_covers_the_stages_at_hand(results):
    assert set(v.everything(results)) == {
        "02_reward_model",
        "04_length_schedules",
        "06_residue_merging",
        "07_evaluation",
    }
    assert v.everything({"07_evaluation": None}) == {}


def variant(name: str, difference: float, half: float) -> dict:
    return {"name": name, "score": 1.0, "difference": difference, "low": difference - half, "high": difference + half}


def test_parts_are_said_to_carry_the_behaviour_only_where_leaving_them_out_costs_beyond_the_interval():
    results = {
        "chosen": {"operator": {"name": "residue"}, "coefficient": 0.5},
        "sweep": [{"coefficient": c, "score": s} for c, s in ((0.3, 1.0), (0.5, 2.0), (0.7, 1.5))],
        "layers": [
            variant("without mlp", -0.8, 0.2),
            variant("without attention", -0.1, 0.2),
            variant("only mlp", -1, 0.1),
        ],
        "depths": [variant("rising", 0.3, 0.1), variant("falling", 0.1, 0.2)],
    }
    words = " ".join(v.merging(results))
    assert "Without the residue in mlp the score falls" in words and "in attention cannot be told" in words
    assert "rising" in words and "falling" not in words
    results["depths"] = [variant("rising", 0.1, 0.2)]
    assert "None of 4 variants" in " ".join(v.merging(results))
