"""Promises of the sentences: each outcome, ties and nulls, follow from the numbers alone."""

import copy
import json

import pytest
from fake_results import fake_run

from c2f_utils.report import against, verdicts_laws
from c2f_utils.report import verdicts as v


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


def pair(metric: str, low: float, high: float, p: float | None = None) -> dict:
    same = {"a": "fine", "b": "coarse", "decoding": "sampled_t1", "difference": 0.1}
    return same | {"metric": metric, "low": low, "high": high, "p": p}


def test_every_other_model_is_in_exactly_one_group_and_in_the_table_for_both_answers(results):
    found = results["07_evaluation"]
    said = " ".join(line for line in against.sentences(found) if "verdict is another" not in line)
    assert len(against.table(found)) == 2 * 9 and len(against.sentences(found)) <= 4
    for label in ("Base", "Instruct", "Coarse Actor", "PPO on instruct", "Residue of fixed-long"):
        assert said.count(f"“{label}”") == 1, label


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((0.3, 0.5), "The Fine is better on last-answer accuracy than “Coarse” (difference +0.100, 95 % interval +0.3"),
        ((-0.5, -0.3), "Better than the Fine on last-answer accuracy: “Coarse”"),
        ((-0.05, 0.17), "The Fine cannot be told apart on last-answer accuracy from “Coarse”"),
        ((-0.01, 0.01), "The Fine is equivalent within 0.02 on last-answer accuracy to “Coarse”"),
        ((None, None), "The Fine is not compared on last-answer accuracy, for want of an interval, with “Coarse”"),
    ],
)
def test_fine_against_another_model_every_way(interval, said):
    found = models(0.6, 0.5, [pair("accuracy_last", *interval), pair("accuracy_first", *interval)])
    assert len(against.sentences(found)) == 1 and against.sentences(found)[0].startswith(said)


def test_who_beats_the_method_is_said_first(results):
    found = copy.deepcopy(results["07_evaluation"])
    for row in found["paired"]:
        if row["b"] == "ppo_instruct":
            row.update(difference=-0.2, low=-0.3, high=-0.1, p=0.0002)
    assert against.sentences(found)[0].startswith("Better than the Fine Actor on last-answer accuracy: “PPO on instr")


def test_without_the_checker_the_reward_is_compared_and_that_is_said():
    said = against.sentences(models(None, None))
    assert said[0].startswith("Accuracy is not available") and "on reward" in said[1] and len(said) == 2
    assert "not measured" in " ".join(against.sentences(models(0.5, None)))
    assert against.sentences({}) == ["The merged model was not evaluated, so nothing is said about it."]


def test_what_does_not_survive_holm_is_no_difference():
    def said(p):
        both = [pair(metric, 0.01, 0.2, p) for metric in ("accuracy_last", "accuracy_first")]
        return against.sentences(models(0.6, 0.5, both))[0]

    assert "cannot be told apart" in said(0.04) and "the correction takes it back" in said(0.04)
    assert "is better" in said(0.001) and "takes it back" not in said(0.001)
    assert said(0.04).endswith("verdicts are those after Holm's correction over 2 comparisons.")


def test_first_answers_are_mentioned_where_their_verdict_is_another():
    rows = [pair("accuracy_last", 0.01, 0.2), pair("accuracy_first", -0.2, 0.2)]
    said = against.sentences(models(0.6, 0.5, rows))
    assert said[1].startswith("By first-answer accuracy the verdict is another: fine is not told apart from “Coarse”")
    assert "interval -0.200 to +0.200" in said[1]


def test_the_reward_is_judged_by_its_paired_interval_and_never_by_its_sign():
    def reward(*interval):
        return against.sentences(models(None, None, [pair("reward", *interval, 0.5)]))[1]

    assert "cannot be told apart on reward" in reward(-0.3, 0.302)
    assert "equivalent within 0.1 on reward" in reward(-0.03, 0.032)


@pytest.mark.parametrize("profile, said", [("smoke", [v.DRY]), ("tiny", ["A verdict."])])
def test_a_dry_run_has_one_sentence_and_no_verdict(tmp_path, profile, said):
    (tmp_path / "config.json").write_text(json.dumps({"settings": {"profile": profile}}))
    assert v.unless_dry(tmp_path, ["A verdict."]) == said


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


def test_conciseness_in_both_directions_with_intervals_and_with_nulls():
    a = {"mean_tokens": 54, "rep4": 0.04, "eos_rate": 0.97, "n": 100}
    b = {"mean_tokens": 159, "rep4": 0.41, "eos_rate": 0.02, "n": 100}
    down = [pair("tokens", -110, -100) | {"difference": -105}, pair("rep4", -0.1, 0.1)]
    said = v.conciseness(a, b, down)
    assert said[0] == (
        "The merge lowers the length: from 159.0 to 54.0 tokens, difference -105.0, 95 % interval -110.0 to -100.0."
    )
    assert said[1].startswith("It cannot be told whether the merge changes the share of repeated 4-grams")
    assert "97 % (95 % interval 92 % to 99 %) end by themselves" in said[2]
    assert "The merge raises the length" in v.conciseness(b, a, [pair("tokens", 100, 110)])[0]
    assert "no interval recorded" in v.conciseness(a, b)[0] and "not measured" in v.conciseness({}, b)[0]


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
    assert ", no interval recorded." in said
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
