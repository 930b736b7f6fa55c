"""07's tasks: asked of every model once, kept across a kill, compared in pairs, shown in tables; old runs have none."""

import json
from types import SimpleNamespace

import pytest
from finished_runs import results as results_of
from test_suites import command_line, reported
from tiny_models import TOKENIZER, causal

from c2f_utils import stats
from c2f_utils.domain import stories
from c2f_utils.errors import C2FError
from c2f_utils.measure import suites
from c2f_utils.report import tables_tasks, typeset
from c2f_utils.runs.stage import Stage
from c2f_utils.settings.config import Settings
from c2f_utils.settings.load import load_settings
from c2f_utils.settings.task_suites import wanted
from c2f_utils.stages.tasks import Tasks

NAME = "07_evaluation"


def part(outputs, tokenizer=TOKENIZER, **changes) -> Tasks:
    settings = load_settings("smoke", overrides={f"tasks.{key}": value for key, value in changes.items()})
    run = SimpleNamespace(settings=settings, here=Stage(outputs / "r" / NAME, settings))
    forms = ["raw", "template"] if tokenizer.chat_template else ["raw"]
    inputs = SimpleNamespace(
        instruct_forms=forms, tokenizer=TOKENIZER, instruct_tokenizer=tokenizer, instruct_source="instruct"
    )
    return Tasks(run, inputs)


@pytest.fixture
def asked(monkeypatch):
    """Names of the tasks that lm-eval was asked for."""
    names, ask = [], suites.ask

    def counted(task, *others):
        names.append(task.name)
        return ask(task, *others)

    monkeypatch.setattr(suites, "ask", counted)
    return names


def test_a_killed_part_asks_only_for_what_is_missing(outputs, asked, monkeypatch):
    whole, ask = part(outputs / "whole"), suites.ask
    for number, name in enumerate(("base", "fine")):
        whole.add(name, causal(number), "raw")

    def killed(*given):
        if len(asked) == 7:
            raise KeyboardInterrupt
        return ask(*given)

    monkeypatch.setattr(suites, "ask", killed)
    first = part(outputs / "killed")
    first.add("base", causal(0), "raw")
    with pytest.raises(KeyboardInterrupt):
        first.add("fine", causal(1), "raw")
    monkeypatch.setattr(suites, "ask", ask)
    asked.clear()
    again = part(outputs / "killed")
    for number, name in enumerate(("base", "fine")):
        again.add(name, causal(number), "raw")
    assert asked == ["c2f_generation"]
    assert again.results() == whole.results()


def test_its_problems_are_asked_nowhere_else_in_07(outputs):
    here = part(outputs)
    rows = [json.loads(line) for line in (here.folder / "embedded" / "c2f_generation.jsonl").read_text().splitlines()]
    settings = here.run.settings
    others = stories.problems("test", settings.data.test_prompts, settings.seed)
    assert len(rows) == settings.data.test_prompts == len({row["question"] for row in rows})
    assert not {row["question"] for row in rows} & {" ".join(problem.words) for problem in others}


def test_forms_are_columns(outputs, asked):
    tokenizer = stories.make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}answer :"
    here = part(outputs, tokenizer)
    for name, form in (("fine", "raw"), ("fine_template", "template"), ("base", "raw")):
        here.add(name, causal(), form)
    found = here.results()
    assert {(row["model"], row["template"]) for row in found["rows"]} == {
        ("fine", False), ("fine", True), ("base", False)
    }  # fmt: skip
    assert asked == ["c2f_choice", "c2f_generation"] * 2, "base has the weights of fine here: asked once"
    frame = tables_tasks.task_table({"tasks": found})
    fine = frame[frame["model"] == "fine"]
    assert {"raw", "raw_low", "raw_high", "template", "template_low", "template_high"} <= set(frame.columns)
    assert fine[["raw", "template"]].notna().all().all() and frame[frame["model"] == "base"]["template"].isna().all()
    only = part(outputs, tokenizer, template="template")
    only.add("base", causal(), "raw")
    assert only.results()["rows"] == []
    with pytest.raises(C2FError, match="tasks.template = 'template'"):
        part(outputs, template="template")


def test_scores_intervals_and_differences_are_those_of_the_kept_rows(outputs):
    here = part(outputs)
    for number, name in enumerate(("base", "fine")):
        here.add(name, causal(number), "raw")
    found = here.results()
    values = {}
    for row in found["rows"]:
        place = outputs / "r" / NAME / row["samples"]
        kept = [json.loads(line) for line in place.read_text().splitlines()]
        values[row["model"], row["task"]] = mine = [each["metrics"][row["metric"]] for each in kept]
        assert row["score"] == pytest.approx(sum(mine) / len(mine)) and row["n"] == len(mine) == 12
        assert row["low"] == pytest.approx(stats.wilson(sum(mine), 12).low, abs=1e-6)
        assert {"doc", "doc_hash", "prompt_hash", "prompt", "response", "target"} <= set(kept[0])
    paired = {row["task"]: row for row in found["paired"]}
    assert len(paired) == len(found["paired"]) == 2
    for task, row in paired.items():
        wanted = stats.paired_bootstrap(values["fine", task], values["base", task])
        assert (row["a"], row["b"], row["low"], row["p"]) == ("fine", "base", wanted.low, wanted.p)
    mean = next(row for row in found["means"] if row["model"] == "base")
    assert mean["tasks"] == ["c2f_choice", "c2f_generation"] and mean["n"] == 24
    assert mean["score"] == pytest.approx(sum(values["base", t][i] for t in paired for i in range(12)) / 24, abs=1e-6)
    assert 0 <= mean["low"] <= mean["score"] <= mean["high"] <= 1


def paired(task: str, other: str, difference: float, p: float) -> dict:
    low, high = (difference - 0.05, difference + 0.05) if p < 0.05 else (-0.1, 0.1)
    return {
        "a": "fine", "b": other, "task": task, "template": False, "difference": difference, "low": low, "high": high,
        "p": p, "n": 50,
    }  # fmt: skip


def test_what_is_said_survives_the_correction_over_all_tasks_and_models():
    row = {"suite": "general_11", "task": "piqa", "model": "fine", "template": False, "score": 0.5, "cut_prompts": 3}
    found = {
        "rows": [row],
        "paired": [
            paired("piqa", "base", 0.2, 0.001),
            paired("piqa", "coarse", -0.1, 0.03),
            paired("x", "o", 0.0, 0.9),
        ],
    }
    results = {"tasks": found, "models": {"base": {"label": "the base, transcript"}}}
    said = "\n".join(tables_tasks.sentences(results))
    assert "On piqa (raw) fine scores higher than the base: difference +0.200" in said
    assert "In 1 of 2 comparisons" in said and "lower" not in said and "the paper's eleven are not known" in said
    assert "piqa: 3 prompts did not fit" in said
    frame = tables_tasks.paired_task_table(results)
    assert frame["p_holm"].tolist() == stats.holm([0.001, 0.03, 0.9])


def test_results_without_tasks_give_empty_tables_and_a_sentence():
    for results in ({}, {"tasks": {}}, {"tasks": None}, {"tasks": {"rows": [], "paired": [], "means": []}}):
        assert tables_tasks.task_table(results).empty and tables_tasks.paired_task_table(results).empty
        assert tables_tasks.sentences(results) == [tables_tasks.NO_TASKS]
        assert typeset.markdown(tables_tasks.task_table(results))


def test_a_run_from_before_there_were_tasks_counts_with_their_defaults(outputs):
    for profile in ("smoke", "tiny", "mistral_7b"):
        settings = load_settings(profile)
        wanted = settings.for_stage(NAME)
        old = {name: value for name, value in wanted.items() if name != "tasks"}
        assert Settings.recorded(old, NAME) == wanted
        changed = load_settings(profile, overrides={"tasks.suites": []})
        assert Settings.recorded(old, NAME) != changed.for_stage(NAME)
    settings = load_settings("smoke")
    stage = Stage(outputs / "r" / NAME, settings)
    stage.begin()
    stage.save_results({"models": {}})
    stage.finish()
    config = json.loads(stage.path("config.json").read_text())
    del config["settings"]["tasks"]
    stage.path("config.json").write_text(json.dumps(config))
    assert Stage(stage.dir, settings).done


def test_without_suites_there_is_no_part_and_hub_data_has_none_of_its_own():
    for settings in (load_settings("smoke", overrides={"tasks.suites": []}), load_settings("mistral_7b")):
        assert not wanted(settings.tasks, settings.embedded)
    usual = load_settings("smoke")
    assert wanted(usual.tasks, usual.embedded)


@pytest.mark.slow
def test_a_finished_run_holds_the_numbers_of_lm_evals_command_line(smoke_run, tmp_path):
    """The trained models of the embedded domain, with the task files that the run left behind."""
    rows = results_of(smoke_run, NAME)["tasks"]["rows"]
    for name, folder in (("fine", "06_residue_merging/model"), ("instruct", "05_instruction_model/model")):
        mine = {row["task"]: row["metrics"] for row in rows if row["model"] == name}
        (tmp_path / name).mkdir()
        told = ["--model_args", f"pretrained={smoke_run / folder},dtype=float32", "--batch_size", "64"]
        assert mine == reported(command_line(smoke_run / NAME / "tasks" / "embedded", tmp_path / name, *told))
