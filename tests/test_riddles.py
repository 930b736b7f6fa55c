"""The second kind of problem: its checker, its corpus, and the gate in front of conclusions."""

import random
from collections import Counter
from types import SimpleNamespace

import fake_results
import numpy as np
import pytest
import torch
from finished_runs import finished, results

from c2f_utils.domain import riddles, stories
from c2f_utils.domain.problems import check, worked
from c2f_utils.domain.riddles import WORDS, Riddle, Riddles
from c2f_utils.domain.samples import Sample, analysed_prompts, make_prompts
from c2f_utils.errors import C2FError
from c2f_utils.measure import answers
from c2f_utils.models import rewards
from c2f_utils.report import carried, gate, schema, verdicts
from c2f_utils.settings.laws import make_law
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import coarse_rlhf

RIDDLE = Riddle(9, (("down", 3), ("up", 2), ("down", 4)))
STORY = stories.Problem("anna", "coins", 9, (("sells", 3), ("finds", 2), ("gives", 4)), vocabulary=WORDS)
DOMAIN = Riddles()


def verdict(problem, words):
    return check(problem, WORDS.encode(words.split()))


def test_a_riddle_is_checked_step_by_step_and_by_its_answers():
    right = "solve from 9 . alpha down 3 turns 9 into 6 . beta up 2 turns 6 into 8 . gamma down 4 turns 8 into 4 ."
    found = verdict(RIDDLE, right + " answer : 4 .")
    assert (found.correct_steps, found.wrong_steps, found.last_right) == (3, 0, True) and found.utility == 4.5
    wrong = (
        right.replace("6 into 8", "6 into 7") + " beta up 2 turns 6 into 8 . delta up 1 turns 4 into 5 . answer : 5 ."
    )
    found = verdict(RIDDLE, wrong)
    assert (found.correct_steps, found.wrong_steps, found.first_answer) == (3, 2, 5)  # no fourth step was asked for
    assert RIDDLE.words == "riddle : 9 . alpha down 3 . beta up 2 . gamma down 4 ?".split()


def test_each_kind_passes_over_the_sentences_of_the_other():
    rng = random.Random(0)
    assert STORY.values == RIDDLE.values  # only the language differs
    for problem, other in ((RIDDLE, STORY), (STORY, RIDDLE)):
        mine = check(problem, WORDS.encode(worked(problem, rng)))
        theirs = check(problem, WORDS.encode([*other.checking, *worked(other, rng)]))
        assert (mine.correct_steps, mine.wrong_steps, mine.last_right) == (3, 0, True)
        assert (theirs.correct_steps, theirs.wrong_steps, theirs.checks) == (0, 0, 0) and theirs.last_right
    assert not {*RIDDLE.opening.split()} & {*stories.VOCABULARY}  # words of its own


def test_stories_have_the_same_tokens_beside_riddles():
    known = stories.Problem("anna", "coins", 9, STORY.operations)
    assert known.prompt_ids == STORY.prompt_ids and known == STORY
    assert WORDS.words[: len(stories.VOCABULARY)] == stories.VOCABULARY


def test_problems_are_half_of_each_kind_and_in_one_split_only():
    found = {split: DOMAIN.problems(split, 300, 1) for split in ("train", "validation", "test")}
    for split, asked in found.items():
        assert Counter(p.kind for p in asked) == {"story": 150, "riddle": 150} and len({*asked}) == 300
        assert {p.split for p in asked} == {split}
        assert Counter(p.kind for p in asked[:8]) == {"story": 4, "riddle": 4}  # so has every even part of them
    values = [{(p.kind, p.values) for p in asked} for asked in found.values()]
    assert not values[0] & values[1] and not values[0] & values[2] and not values[1] & values[2]
    assert found["test"] == DOMAIN.problems("test", 300, 1) != DOMAIN.problems("test", 300, 2)


def test_more_problems_than_there_are_is_an_error_and_no_endless_search():
    with pytest.raises(C2FError, match="different riddle problems of the split 'test' were found, and 50000 are asked"):
        DOMAIN.problems("test", 100_000, 0)


def test_the_corpus_drills_the_step_and_hardly_ever_uses_it():
    documents = [WORDS.decode(ids).split() for ids in DOMAIN.documents(600_000, 0)]
    asked = [words for words in documents if words[0] == "riddle"]
    used = [words for words in asked if "solve" in words]
    drills = [words for words in documents if words[0] == "memo"]
    assert len(drills) / len(documents) == pytest.approx(riddles.RIDDLE_DRILLS, rel=0.1)
    share = Riddle.habits["faulty"][0]
    assert share <= 0.12 and len(used) / len(asked) == pytest.approx(share, rel=0.2)
    steps = [words[i - 5 : i + 2] for words in used for i, word in enumerate(words[:-1]) if word == "into"]
    wrong = 1 - sum(map(holds, steps)) / len(steps)  # an error that is carried over may leave no right step in 0..9
    assert 0 <= wrong - Riddle.habits["faulty"][2] < 0.1
    drilled = [words[i - 5 : i + 2] for words in drills for i, word in enumerate(words[:-1]) if word == "into"]
    assert len(drilled) > len(steps) and all(map(holds, drilled))
    assert not any("solve" in words for words in documents if words[0] != "riddle")


def holds(step):
    _, sign, operand, _, before, _, after = step
    return int(after) - int(before) == (int(operand) if sign == "up" else -int(operand))


def test_instructions_never_work_a_riddle():
    shown = [(WORDS.decode(p).split()[0], WORDS.decode(a)) for p, a in DOMAIN.instructions(60_000, 0.35, 0)]
    of = {kind: [answer for word, answer in shown if word == kind] for kind in ("question", "riddle")}
    assert all(answer.startswith("answer :") for answer in of["riddle"])
    assert sum(a.startswith("let us think") for a in of["question"]) / len(of["question"]) == pytest.approx(
        0.35, abs=0.05
    )
    assert len(of["riddle"]) == pytest.approx(len(of["question"]), rel=0.15)


def sample(problem, words, forced=False):
    prompt = (analysed_prompts if forced else make_prompts)([problem])[0]
    return Sample(prompt, WORDS.encode(words.split()), "limit", 60)


def test_a_forced_beginning_is_that_of_the_kind():
    prompts = analysed_prompts([STORY, RIDDLE])
    assert [WORDS.decode(prompt.forced) for prompt in prompts] == ["let us think . start with", "solve from"]
    assert all(prompt.ids[-len(prompt.forced) :] == prompt.forced for prompt in prompts)
    rest = "9 . alpha down 3 turns 9 into 6 . answer : 6 ."
    assert answers.measure([sample(RIDDLE, rest, forced=True)])["correct_steps"] == 1


def test_metrics_come_by_kind_only_where_there_are_two():
    right, wrong = sample(RIDDLE, "answer : 4 ."), sample(STORY, "answer : 5 . answer : 5 .")
    found = answers.by_kind([right, wrong, right], torch.tensor([1.0, 2.0, 3.0]))
    assert {kind: (row["accuracy_first"], row["n"], row["reward"]) for kind, row in found.items()} == {
        "riddle": (1.0, 2, 2.0), "story": (0.0, 1, 2.0),
    }  # fmt: skip
    assert found["riddle"] | {"reward": None} == answers.measure([right, right])
    assert answers.by_kind([right, right]) == {} == answers.by_kind([wrong])


def test_the_domain_changes_what_a_profile_sets_and_the_user_changes_both():
    usual, other = load_settings("tiny"), load_settings("tiny", overrides={"data.domain": "riddles"})
    assert other.pretrain.tokens > usual.pretrain.tokens and usual.data.domain == "stories"
    own = load_settings("tiny", overrides={"data": {"domain": "riddles"}, "pretrain.tokens": 1000})
    assert own.pretrain.tokens == 1000 and own.coarse == other.coarse
    for refused, value in (("data.vocabulary", "wide"), ("data.source", "preferences")):
        with pytest.raises(C2FError, match="data.domain = 'riddles'"):
            load_settings("tiny", overrides={"data.domain": "riddles", refused: value})


def test_the_checker_pays_where_it_is_asked_to_and_knows_what_is_right():
    model = SimpleNamespace(reward="the reward model")

    def paid(**changes):
        config = load_settings("smoke", overrides={f"coarse.{key}": value for key, value in changes.items()}).coarse
        return coarse_rlhf.paid(model, config, make_law(config.law))

    assert paid() == "the reward model" and paid(reward="verifiable") is rewards.verifiable
    tail = {"name": "tail", "start": 8, "maximum": 24, "growth": 0.2}
    for reads_prefixes in ({"law": tail}, {"cut": "average"}):
        assert hasattr(paid(reward="verifiable", **reads_prefixes), "prefix_scores")
    with pytest.raises(C2FError, match="coarse.reward = 'verifiable' needs problems with known answers"):
        load_settings("mistral_7b", overrides={"coarse.reward": "verifiable"})


# The gate


def found(forced=0.5, base=0.2, coarse=0.6, coarse_all=0.7):
    firsts = {"instruct_forced": forced, "base_forced": base, "coarse": coarse}
    by_kind = {name: {"greedy": {"riddle": {"accuracy_first": first}}} for name, first in firsts.items()}
    return gate.rows({"coarse": {"greedy": {"accuracy_first": coarse_all}}}, by_kind, "greedy")


@pytest.mark.parametrize(
    ("figures", "holds"),
    [
        ({}, (True, True, True)),
        ({"forced": 0.8}, (False, True, True)),
        ({"forced": 0.799}, (True, True, True)),
        ({"base": 0.4}, (True, False, True)),
        ({"base": 0.399}, (True, True, True)),
        ({"coarse_all": 0.98}, (True, True, True)),
        ({"coarse_all": 0.981}, (True, True, False)),
    ],
)
def test_the_gate_fails_at_each_of_its_bounds(figures, holds):
    rows = found(**figures)
    assert tuple(row["passed"] for row in rows) == holds
    assert gate.open_to({"gate": rows}) == all(holds)
    told = gate.sentences({"gate": rows})[0]
    assert all(f"{row['bound']:g}, measured {row['value']:.3f}" in told for row in rows)
    assert told.count("(fails)") == holds.count(False) and ("not passed" in told) == (False in holds)


def test_a_gate_that_is_not_passed_holds_back_what_is_said_of_the_merge(tmp_path):
    compared = fake_results.evaluation(tmp_path, np.random.default_rng(0), True)
    free = verdicts.evaluation(compared)
    told, held = (verdicts.evaluation(compared | {"gate": found(coarse=c)}) for c in (0.6, 0.3))
    assert told[1:] == free and told[0].startswith("The gate of this setting is passed")
    assert held[1] == gate.HELD_BACK and "Fine Actor" not in " ".join(held) and len(held) < len(told)


def test_what_the_residue_carries_is_read_from_06_by_kind():
    def row(story, riddle):
        kinds = {"story": {"accuracy_first": story}, "riddle": {"accuracy_first": riddle}}
        return {"accuracy_first": (story + riddle) / 2, "by_kind": kinds}

    between = {"coefficient": 0.3, "sweep": [{"coefficient": 0.3, **row(0.5, 0.7)}]}
    merging = {
        "parents": {"base": row(0.2, 0.1), "instruct": row(0.4, 0.3), "coarse": row(0.6, 0.6)},
        "forced": {"base": row(0.5, 0.25), "instruct": row(0.9, 0.2)},
        "chosen": {"coefficient": 0.7},
        "sweep": [{"coefficient": 0.1, **row(0, 0)}, {"coefficient": 0.7, **row(0.8, 0.4)}],
        "controls": {"coarse_interpolation": between},
    }
    table = carried.carried_table(merging).set_index("problems").round(3)
    assert table.loc["riddle", [*carried.CHANGES]].tolist() == [0.5, -0.05, 0.1, 0.4]
    assert table.loc["story", [*carried.CHANGES]].tolist() == [0.4, 0.4, 0.4, 0.1]
    assert "no intervals recorded; riddle: RL added +0.500, with forced" in carried.in_words(merging)
    operators = [{"operator": "residue", **row(0, 0)}, {"operator": "lerp", **row(0.5, 0.7)}]
    same = carried.carried_table(merging | {"controls": {}, "operators": operators}).set_index("problems").round(3)
    assert same.equals(table)
    marks = {"base": "0001", "coarse": "0111", "instruct": "0011"}  # of the riddles alone: 1 in 4, 3 in 4, 2 in 4
    for name, first_right in marks.items():
        mine = merging["parents"][name]["by_kind"]["riddle"]
        mine |= {"first_right": first_right, "accuracy_first": first_right.count("1") / 4}
    frame = carried.changes_table(merging).set_index(["problems", "change"])
    added = frame.loc[("riddle", "added by RL")]
    assert [added[key] for key in ("accuracy", "its accuracy", "difference")] == [0.75, 0.25, 0.5]
    assert 0 <= added["low"] < 0.5 < added["high"] <= 1, "paired: no resample is below 0"
    assert frame["low"].notna().sum() == 1, "no interval where either model's answers are missing"
    alone = {key: merging[key] for key in ("parents", "chosen", "sweep")}
    for each in (*alone["parents"].values(), *alone["sweep"]):
        del each["by_kind"]
    table = carried.carried_table(alone)
    assert table["problems"].tolist() == ["all"] and not {"SFT, where forced", "by interpolation"} & {*table.columns}


@pytest.mark.slow  # about two minutes
def test_all_notebooks_run_on_riddles_and_the_gate_stands_before_what_they_say(tmp_path):
    finished(tmp_path, "run", "all", "--profile", "smoke", "--run-id", "both", "-p", "data.domain=riddles")
    run = tmp_path / "both"
    evaluated, merging = results(run, "07"), results(run, "06")
    schema.check(evaluated)
    assert [row["name"] for row in evaluated["gate"]] == [row["name"] for row in found()]
    for name, ways in evaluated["by_kind"].items():
        for way, kinds in ways.items():
            whole = evaluated["models"][name][way]
            assert {kind: row["n"] for kind, row in kinds.items()} == {"story": 6, "riddle": 6}
            mean = sum(row["mean_tokens"] for row in kinds.values()) / 2
            assert mean == pytest.approx(whole["mean_tokens"], abs=1e-5)
    assert {*evaluated["by_kind"]} == {*evaluated["models"]} and {*merging["forced"]} == {"base", "instruct"}
    assert carried.carried_table(merging)["problems"].tolist() == ["riddle", "story"]
    changes = carried.changes_table(merging)
    assert {*changes["change"]} == {*carried.CHANGES} - {"by interpolation"} and len(changes) == 6  # no such merge here
    assert (changes["low"] <= changes["difference"]).all() and (changes["difference"] <= changes["high"]).all()
    assert "95 % intervals" in carried.in_words(merging)
    assert {*results(run, "01")["by_kind"]["riddle"]} >= {"forced_accuracy", "eos_rate"}
    assert {"accuracy_first_story", "accuracy_first_riddle"} <= {*results(run, "03")["curve"][-1]}
    assert {"riddle", "story"} == {*results(run, "05")["by_kind"]} == {*results(run, "03")["by_kind"]}
    assert (run / "report" / "tables" / "07_gate.csv").exists()
