"""What 07 writes is what its schema says, whatever ran; and what is not is named by its place."""

import copy
import json
import re

import pytest
from fake_results import fake_run

from c2f_utils.errors import C2FError
from c2f_utils.files import read_json, read_jsonl
from c2f_utils.report import schema


@pytest.fixture
def found(tmp_path) -> dict:
    return read_json(fake_run(tmp_path) / "07_evaluation" / "results.json")


def test_a_finished_run_keeps_to_the_schema_with_every_part(smoke_run):
    found = read_json(smoke_run / "07_evaluation" / "results.json")
    schema.check(found)
    assert {"tasks", "retention", "sampling", "dialogue", "redundancy", "gains"} <= set(found)


def test_the_prompts_on_which_fine_and_instruct_differ_most_are_kept_for_every_main_model(smoke_run):
    rows = read_jsonl(smoke_run / "07_evaluation" / "disagreements.jsonl")
    asked = {name: [row["prompt"] for row in rows if row["model"] == name] for name in ("base", "coarse", "fine")}
    assert len({tuple(prompts) for prompts in asked.values()}) == 1 and len(asked["fine"]) <= 10
    gains = [
        (a["utility"] or 0) - (b["utility"] or 0)
        for a, b in zip(*([r for r in rows if r["model"] == m] for m in ("fine", "instruct")), strict=True)
    ]
    assert all(gains) and gains[: sum(g < 0 for g in gains)] == sorted(g for g in gains if g < 0)


@pytest.mark.parametrize("checker", [True, False])
def test_runs_with_a_checker_and_without_keep_to_it(tmp_path, checker):
    schema.check(read_json(fake_run(tmp_path, checker=checker) / "07_evaluation" / "results.json"))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("models.fine.sampled_t1.eos_rate", 1.5, "models.fine.sampled_t1.eos_rate"),
        ("models.fine.sampled_t1.mean_tokens", None, "models.fine.sampled_t1.mean_tokens"),
        ("models.fine.role", "best", "models.fine.role"),
        ("paired.0.p", -1, "paired.0.p"),
        ("paired.0.b", "nobody", "nobody: no such model"),
        ("limit", 0, "limit"),
        ("extra", 1, "extra"),
        ("wordlist", {"tokens": 1, "models": {"fine": [{"value": 0.5, "low": 0.6, "high": 0.7}]}}, "not in order"),
    ],
)
def test_what_is_not_as_07_writes_it_is_named_by_its_place(found, place, value, said):
    changed = copy.deepcopy(found)
    *way, last = place.split(".")
    there = changed
    for key in way:
        there = there[int(key) if key.isdecimal() else key]
    there[last] = value
    with pytest.raises(C2FError, match=re.escape(said)):
        schema.check(json.loads(json.dumps(changed)))


@pytest.mark.parametrize("nothing", [None, [], 3, {}])
def test_what_is_no_result_is_refused(nothing):
    with pytest.raises(C2FError, match="no results of 07_evaluation"):
        schema.check(nothing)
