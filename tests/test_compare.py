"""Runs against each other: seeds of one experiment are told from arms, and what differs is named with both values."""

import json

import pytest
from fake_results import fake_run

from c2f_utils.__main__ import main
from c2f_utils.report import build, compare
from c2f_utils.report.style import ResultFigure


def change(run, stage: str, file: str, **fields) -> None:
    path = run / stage / f"{file}.json"
    found = json.loads(path.read_text())
    for dotted, value in fields.items():
        part = found
        *places, last = dotted.split("__")
        for place in places:
            part = part.setdefault(place, {})
        part[last] = value
    path.write_text(json.dumps(found))


def more_iterations(run, count: int) -> None:
    change(run, "03_coarse_rlhf", "config", settings__coarse__iterations=count)


def test_runs_that_differ_in_their_seed_alone_are_one_experiment(outputs):
    runs = [fake_run(outputs, name, seed) for name, seed in (("a", 1), ("b", 2), ("c", 3), ("d", 4))]
    assert compare.arms(runs) == [runs]
    more_iterations(runs[1], 30)
    more_iterations(runs[3], 30)
    assert compare.arms(runs) == [[runs[0], runs[2]], [runs[1], runs[3]]]
    change(runs[2], "03_coarse_rlhf", "provenance", words__law="Doubling(limit=8), code ab12")
    assert len(compare.arms(runs)) == 3
    table = compare.settings([runs[0], runs[2]])
    assert table.values.tolist() == [["own law", "03", "not set", "Doubling(limit=8), code ab12"]]


def test_a_setting_that_one_version_did_not_have_counts_with_its_default(outputs):
    old, new = fake_run(outputs, "old"), fake_run(outputs, "new", 1)
    change(old, "03_coarse_rlhf", "config", settings__coarse={"iterations": 9})
    change(new, "03_coarse_rlhf", "config", settings__coarse={"iterations": 9, "clip": 0.2})
    assert compare.arms([old, new]) == [[old, new]]
    change(new, "03_coarse_rlhf", "config", settings__coarse__clip=0.3)
    assert compare.settings([old, new]).values.tolist() == [["coarse.clip", "03", "0.2", "0.3"]]


def test_a_report_averages_over_seeds_only(outputs, monkeypatch):
    monkeypatch.setattr(build._Builder, "_figure", lambda *_: None)  # a private seam, for time
    runs = [fake_run(outputs, f"s{seed}", seed) for seed in (1, 2, 3)]
    more_iterations(runs[1], 30)
    out = build.build(runs[0], outputs / "report", runs=runs).parent
    text = (out / "report.md").read_text()
    assert "these are 2 experiments, not seeds of one" in text
    assert "### Experiment 1: s1, s3" in text and "### Experiment 2: s2" in text
    headers = [path.read_text().splitlines()[0] for path in (out / "tables").glob("runs_[12]_[sg]*.csv")]
    assert set(headers) == {"model,metric,s1,s3,mean,low,high", "model,metric,s2,mean,low,high"}
    assert "2 training seeds (1, 3)" in text, "the other experiment's seed is none of them"
    assert "| coarse.iterations | 03 | 17 | 30 | 17 |" in text


def test_two_runs_are_viewed_and_any_other_number_is_not(outputs):
    a, b = fake_run(outputs, "a", 1), fake_run(outputs, "b", 1)
    more_iterations(b, 30)
    table, paired, figure = compare.view(a, ["b"])
    assert list(table["setting"]) == ["coarse.iterations"] and isinstance(figure, ResultFigure)
    assert set(figure.data["run"]) == {"a", "b"}
    rows = paired.set_index(["model", "metric"])
    assert rows.loc[("fine", "tokens"), "difference"] == 0 and set(paired["n"]) == {2}
    assert len(compare.view(outputs / "empty", ["a", "b"])) == 3, "the report's own run may hold nothing"
    assert compare.view(a, []) == compare.view(a, ["absent"]) == compare.view(a, ["b", fake_run(outputs, "c")]) == []


def test_problems_that_only_one_run_answered_are_not_paired(outputs):
    a, b = fake_run(outputs, "a"), fake_run(outputs, "b")
    path = b / "07_evaluation" / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["tokens"] += 5
        row["prompt"] = "another" if "anna" in row["prompt"] else row["prompt"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare.paired([a, b]).set_index(["model", "metric"]).loc[("fine", "tokens")]
    assert (found["difference"], found["n"]) == (-5, 1)


def test_the_command_names_settings_and_numbers_that_differ_and_identical_stages(outputs, capsys):
    a, b = fake_run(outputs, "a", 1), fake_run(outputs, "b", 1)
    more_iterations(b, 30)
    change(b, "03_coarse_rlhf", "results", final__accuracy_last=0.125)
    results = json.loads((b / "03_coarse_rlhf" / "results.json").read_text())
    results["curve"][2]["reward"] += 1
    results["curve"][1]["reward"] += 0.5
    (b / "03_coarse_rlhf" / "results.json").write_text(json.dumps(results))
    (b / "07_evaluation" / "results.json").unlink()
    assert main(["diff", "a", "b"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == ["settings that differ: a | b", "  coarse.iterations (in 03): 17 | 30",
                        "results that differ: a | b"]  # fmt: skip
    before = json.loads((a / "03_coarse_rlhf" / "results.json").read_text())
    count = len(compare.numbers(before))
    at = said.index(f"  03_coarse_rlhf: 3 of {count} numbers differ")
    assert said[at + 1] == f"    final.accuracy_last: {before['final']['accuracy_last']} | 0.125"
    assert said[at + 2].startswith("    curve: 2 of ") and "furthest apart curve[2].reward: " in said[at + 2]
    assert "  01_base_model: identical" in said and "  07_evaluation: only in a" in said
    assert main(["diff", "a", "b", "--all"]) == 0
    every = capsys.readouterr().out
    assert "    curve[1].reward: " in every and "    curve[2].reward: " in every


def test_rows_with_a_name_are_found_by_it_wherever_they_stand():
    rows = [{"name": "only mlp", "score": 1.0}, {"name": "all", "score": 2.0}]
    assert compare.numbers({"layers": rows}) == compare.numbers({"layers": rows[::-1]})
    assert compare.numbers({"layers": rows})["layers[only mlp].score"] == 1.0
    assert compare.numbers([rows[0], rows[0], 3, True]) == {"[0].score": 1.0, "[1].score": 1.0, "[2]": 3}


@pytest.mark.parametrize("pair", [("a", "absent"), ("absent", "a")])
def test_a_run_that_is_not_there_is_refused_with_those_that_are(outputs, capsys, pair):
    fake_run(outputs, "a")
    assert main(["diff", *pair]) == 2
    said = capsys.readouterr().err
    assert "there is no run 'absent' with results" in said and "there are: a" in said
