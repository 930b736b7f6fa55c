"""Dialogues in 07: FastChat's files, resumed without asking twice, and tables that name what is wrong with a judge."""

import copy
import json
import sys

import pytest
from fake_results import fake_run
from finished_runs import evaluation_beside

from c2f_utils.errors import C2FError, Stopped
from c2f_utils.files import read_json, read_jsonl, write_json
from c2f_utils.measure import judges as measured
from c2f_utils.measure.dialogues import read_answers, read_pair_judgements, read_questions
from c2f_utils.report import tables_dialogue, typeset
from c2f_utils.settings.config import Settings
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import data
from c2f_utils.stages.dialogue import Dialogues
from c2f_utils.stages.inputs import Inputs

OWN = ["one turn", "two turns"]


@pytest.fixture
def asked(smoke_run, tmp_path, monkeypatch):
    """A function that has two models of the finished run answer dialogues in a run of its own."""
    begun = evaluation_beside(smoke_run, tmp_path, monkeypatch)

    def ask(**overrides) -> Dialogues:
        run, inputs = begun({f"judge.{key}": value for key, value in overrides.items()})
        part = Dialogues(run, inputs)
        for name, model in (("base", inputs.base()), ("fine", inputs.instruct())):
            part.add(name, model, "raw")
        return part

    return ask


def test_models_answer_two_turns_offline_and_everything_is_in_fastchats_files(asked):
    part = asked()
    found = part.results()
    folder = part.run.here.dir / "dialogue"
    questions = read_questions(folder / "question.jsonl", OWN)
    assert [len(q.turns) for q in questions] == [1, 1, 2, 2]
    name, answers = read_answers(folder / "model_answer" / "fine.jsonl", questions, empty=True)
    assert name == "fine" and {place: len(said) for place, said in answers.items()} == {1: 1, 2: 1, 3: 2, 4: 2}
    assert set(part.said) == {"base", "fine"}
    rows = read_jsonl(folder / "verdict_rows.jsonl")
    assert len(rows) == 2 * 6 and all(row["ok"] and 0 <= row["p_a"] <= 1 for row in rows)
    judged = read_pair_judgements(folder / "model_judgment" / "heuristic_pair_base.jsonl", questions)
    assert [measured.outcome(row["p_a"]) for row in judged] == [measured.outcome(row["p_a"]) for row in rows]
    against = found["against"]["base"]
    assert against["pairs"] == 6 == sum(part["pairs"] for part in against["by_turn"].values())
    assert set(found["judge"]["checks"]) == {"identical", "repeated", "constant"}
    assert found["judge"]["fit"] is False, "the heuristic carries no claim, whatever it passes"
    json.dumps(found, allow_nan=False)


def test_the_second_question_is_put_after_the_models_own_first_answer(asked, monkeypatch):
    put, sampled = [], Inputs.answers
    monkeypatch.setattr(Inputs, "answers", lambda self, model, prompts, *a: (
        put.append([p.text for p in prompts]) or sampled(self, model, prompts, *a)
    ))  # fmt: skip
    part = asked()
    question = part.questions[2]
    first = part.said["fine"][question.id].answers[0]
    assert put[3][0] == " ".join(text for text in (question.turns[0], first, question.turns[1]) if text)


def test_a_stage_stopped_among_the_verdicts_asks_for_none_of_them_again(asked, monkeypatch):
    heard = []
    opinions = measured.HeuristicJudge.opinions

    def counting(self, cases):
        for case, opinion in opinions(self, cases):
            heard.append(case.key(self.id))
            yield case, opinion

    monkeypatch.setattr(measured.HeuristicJudge, "opinions", counting)
    part = asked()
    (part.run.dir / "STOP").touch()
    with pytest.raises(Stopped):
        part.results()
    (part.run.dir / "STOP").unlink()
    assert len(heard) == 1
    found = asked().results()
    assert len(heard) == len(set(heard)) == len(read_jsonl(part.run.here.dir / "dialogue" / "verdicts.jsonl"))
    assert asked().results() == found and len(heard) == len(set(heard))


def test_a_reward_judge_is_trained_on_pairs_of_its_own(asked):
    part = asked(name="reward", pairs=24, grading=["pairwise", "single"], against=["base"])
    found = part.results()
    assert found["judge"]["id"].startswith("reward:") and found["judge"]["trained"] == {
        "pairs": 24,
        "from": "new pairs",
    }
    assert found["against"]["base"]["swap_consistency"] == 1
    assert found["judge"]["checks"]["identical"]["value"] == 1
    assert found["grades"]["fine"]["graded"] == 6 and found["grades"]["fine"]["mean"] is not None


def test_pairs_of_the_judge_are_none_of_02(asked):
    inputs = asked(name="reward", pairs=24).inputs
    settings, tokenizer = inputs.settings, inputs.tokenizer
    mine, where = data.fresh_pairs(settings, inputs.base(), tokenizer)
    theirs = data.embedded_pairs(
        settings, inputs.base(), tokenizer, settings.reward.pairs + settings.reward.held_out_pairs, settings.seed
    )
    known = {tuple(pair.problem.prompt_ids) for pair in theirs}
    assert where == "new pairs" and len(mine) == 24
    assert not any(tuple(chosen[: len(ids)]) == ids for chosen, _ in mine for ids in known)


def test_a_problem_that_02_has_a_pair_of_is_left_out(asked, monkeypatch):
    inputs = asked(name="reward", pairs=24).inputs
    settings = inputs.settings
    monkeypatch.setattr(data, "JUDGE_SEED", 0)  # the very pairs of 02
    assert data.fresh_pairs(settings, inputs.base(), inputs.tokenizer)[0] == []


SERVED = {"name": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1"}


@pytest.mark.parametrize(
    "overrides, said",
    [
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl cannot be read"),
        ({"name": "local", "model": "/no/such/folder"}, "judge.model = '/no/such/folder' does not exist"),
        (SERVED | {"calls": 3}, "judge.calls = 3, and .* verdicts are asked for"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_asked(asked, overrides, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", object())
    with pytest.raises(C2FError, match=said):
        asked(**overrides)


def test_without_the_package_nothing_is_asked(asked, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(C2FError, match="needs the package openai"):
        asked(**SERVED)


def test_the_cost_is_printed_before_anything_is_asked(asked, capsys, monkeypatch):
    asked(name="openai", model="m", base_url="http://127.0.0.1:9/v1", questions=2, price_input=1.0)
    said = capsys.readouterr().out
    assert "2 questions, 3 turns" in said and "calls to m at http://127.0.0.1:9/v1, about" in said and "prices" in said


def test_a_model_that_is_not_compared_is_named(asked):
    with pytest.raises(C2FError, match="judge.against names best; 07 compares fine with base, instruct, coarse, "):
        asked(against=["best"])


@pytest.mark.parametrize(
    "judge, said",
    [
        ({"name": "openai"}, "model is null, and name = 'openai' needs one"),
        ({"name": "openai", "model": "m", "base_url": "localhost"}, "base_url = 'localhost': name = 'openai' needs"),
        ({"name": "openai", "model": "m", "base_url": "http://me:secret@host"}, "base_url holds a name or a password"),
        ({"references": "r.jsonl"}, "references need prompts"),
    ],
)
def test_a_judge_that_is_not_named_whole_is_refused(judge, said):
    with pytest.raises(C2FError, match=said):
        load_settings("smoke", overrides={"judge": judge})


def test_a_run_from_before_there_were_judges_counts_with_their_defaults():
    settings = load_settings("tiny")
    now = settings.for_stage("07_evaluation")
    before = {key: value for key, value in now.items() if key != "judge"}
    assert Settings.recorded(before, "07_evaluation") == now
    assert Settings.recorded(settings.for_stage("02_reward_model"), "02_reward_model").keys() == {
        "profile", "seed", "models", "data", "reward",
    }  # fmt: skip
    assert Settings.recorded({}, "07_evaluation") == {}


CHECK = {"value": 1.0, "required": "ties in at least 95%", "passed": True, "n": 4, "failed": 0}
PART = {
    "wins": 9, "losses": 1, "ties": 2, "failed": 0, "pairs": 12, "judged": 12, "win_rate": 0.8, "low": 0.55,
    "high": 0.95, "mean_p_a": 0.7, "swap_consistency": 0.9, "first_wins": 0.5, "verdicts_failed": 2, "tokens_a": 10.0,
    "tokens_b": 20.0,
}  # fmt: skip
FOUND = {
    "judge": {"name": "reward", "id": "reward:x", "checks": {"identical": CHECK, "repeated": CHECK}, "fit": True,
              "trained": {"pairs": 600, "from": "new pairs"}},
    "questions": {"from": "test problems", "n": 8, "turns": 12, "faulty_references": 0},
    "against": {"coarse": PART | {"by_category": {"<b>$x$": PART}, "by_turn": {"1": PART}}},
    "grades": {},
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """A function that writes 07's results with these dialogues and returns the stage's folder."""
    stage = fake_run(tmp_path) / "07_evaluation"

    def write(dialogue: dict | None):
        found = read_json(stage / "results.json")
        write_json(stage / "results.json", {**found, **({"dialogue": dialogue} if dialogue else {})})
        return stage

    return write


def test_tables_carry_the_judge_and_what_it_fails(results):
    table = tables_dialogue.win_table(results(FOUND))
    assert table.loc[0, "fine against"] == "Coarse Actor" and table.loc[0, "judge"] == "reward"
    assert "Fine is preferred to Coarse Actor." in tables_dialogue.in_words(results(FOUND))
    assert "2 verdicts could not be read" in tables_dialogue.in_words(results(FOUND))
    failing = copy.deepcopy(FOUND)
    failing["judge"] |= {"fit": False}
    failing["judge"]["checks"]["repeated"]["passed"] = failing["judge"]["checks"]["identical"]["passed"] = False
    stage = results(failing)
    for table in (tables_dialogue.win_table(stage), tables_dialogue.check_table(stage)):
        assert set(table["judge"]) == {"reward (fails identical, repeated)"}
    said = tables_dialogue.in_words(stage)
    assert "preferred" not in said and said.endswith("Nothing is claimed from this judge's verdicts.")
    heuristic = FOUND | {"judge": FOUND["judge"] | {"name": "heuristic", "fit": False, "trained": None}}
    assert tables_dialogue.win_table(results(heuristic)).loc[0, "judge"] == "heuristic (for dry runs only)"


def test_categories_of_a_file_become_no_markup(results):
    table = tables_dialogue.win_table(results(FOUND), by="category")
    assert "<b>" not in typeset.html(table) and "&lt;b&gt;" in typeset.html(table)
    assert list(tables_dialogue.win_table(results(FOUND), by="turn")["turn"]) == ["1"]


def test_results_without_dialogues_give_empty_tables_and_a_sentence(results):
    stage = results(None)
    for table in (
        tables_dialogue.win_table(stage),
        tables_dialogue.check_table(stage),
        tables_dialogue.grade_table(stage),
    ):
        assert table.empty and "judge" in table
    assert tables_dialogue.in_words(stage).startswith("No dialogues were judged")
