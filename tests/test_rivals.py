"""The field's rivals as controls: refused where they mean nothing, made on equal budgets, kept through kills and stops,
and set beside the merge with what they cost."""

import json

import pytest
import torch
from fake_results import fake_run
from finished_runs import results, rows
from test_kill_resume import Killed, begin, parents

from c2f_utils.domain import stated
from c2f_utils.domain.problems import EOS
from c2f_utils.errors import C2FError, Stopped
from c2f_utils.models import instruct, loading
from c2f_utils.report import contents
from c2f_utils.report.tables_rivals import rivals_table
from c2f_utils.runs import disk, work
from c2f_utils.settings.config import TRAINED_CONTROLS
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import evaluation
from c2f_utils.stages.residue_merging import Merging

SPEEDS = work.Speeds(generated=100.0, read=1000.0, prompt_tokens=30.0, pair_tokens=200.0)
BEFORE = ("01_base_model", "02_reward_model", "03_coarse_rlhf", "04_length_schedules", "05_instruction_model")
RIVALS = (
    "ppo_instruct_tokens", "parallel_average", "distilled", "distilled_merge", "shortest_correct", "filtered_sft",
    "base_correct",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", ["parallel_average", "distilled", "distilled_merge", "shortest_correct", "filtered_sft", "base_correct"]
)
def test_rivals_that_need_answers_to_check_are_refused_on_other_data(name, tmp_path):
    hub = {"models.base": "b", "models.instruct": "i", "data.source": "preferences", "data.preferences": "o/p"}
    with pytest.raises(C2FError, match=f"merge.controls names '{name}', which needs the embedded domain's problems"):
        load_settings("smoke", overrides={**hub, "merge.controls": [name]})


def test_every_control_has_a_label_and_what_is_trained_is_asked_in_the_form_it_was_trained_in():
    for name in (*RIVALS, *TRAINED_CONTROLS):
        assert evaluation.LABELS[name]


def test_the_table_adds_up_what_a_model_took_with_what_must_be_there_first(tmp_path):
    run = fake_run(tmp_path)
    for stage, row in (("03_coarse_rlhf", {}), ("06_residue_merging", {"control": "ppo_instruct"})):
        lines = [{"iteration": k, "rollout_tokens": 100 * k, "seconds": 1.5, **row} for k in (1, 2)]
        (run / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    change(run / "05_instruction_model" / "config.json", settings={"instruct": {"tokens": 5000}})
    change(run / "05_instruction_model" / "timings.json", training=7.0)
    times = {"ppo_instruct": 4.0, "sweep": 2.0, "coarse_answers": 3.0, "shortest_correct": 1.0}
    change(run / "06_residue_merging" / "timings.json", **times)
    said = {
        "ppo_instruct": {"rollout_tokens": 90},
        "shortest_correct": {"rollout_tokens": 210, "sft_tokens": 70, "iterations": 4},
    }
    change(run / "06_residue_merging" / "results.json", controls=said)
    models = json.loads((run / "07_evaluation" / "results.json").read_text())["models"]
    models["shortest_correct"] = {**models["interpolation"], "label": "short"}
    kinds = {"stories": {"accuracy_last": 0.5}, "riddles": {"accuracy_last": 0.25}}
    change(run / "07_evaluation" / "results.json", models=models, by_kind={"fine": {"sampled_t1": kinds}})
    frame = rivals_table(run / "07_evaluation").set_index("model")
    cost = frame[["rl_tokens", "sft_tokens", "iterations", "seconds"]].astype(object)
    assert cost.loc["Fine Actor"].tolist() == [200, 5000, 2, 2 + 3 + 7]
    assert cost.loc["PPO on instruct"].tolist() == [90, 5000, 2, 4 + 7]
    assert cost.loc["short"].tolist() == [410, 5070, 4, 3 + 1 + 3 + 7]
    assert cost.loc["Coarse Actor"].tolist() == [200, 0, 2, 3]
    assert frame.loc["Fine Actor", "accuracy, riddles"] == 0.25
    grid = json.loads((run / "06_residue_merging" / "results.json").read_text())["sweep"]
    searched = frame["search_tokens"].astype(object)
    assert searched["Fine Actor"] == round(sum(row["mean_tokens"] * row["n"] for row in grid)) > 0
    assert searched["PPO on instruct"] == searched["short"] == 0
    paired = json.loads((run / "07_evaluation" / "results.json").read_text())["paired"]
    (mine,) = [
        row for row in paired
        if (row["b"], row["metric"], row["decoding"]) == ("ppo_instruct", "accuracy_last", "sampled_t1")
    ]  # fmt: skip
    shown = [frame.loc["PPO on instruct", f"fine minus it, accuracy, last{end}"] for end in ("", ", low", ", high")]
    assert shown == [mine[key] for key in ("difference", "low", "high")]


def test_the_estimates_of_time_and_disk_know_the_rivals():
    def of(*controls: str):
        settings = load_settings("tiny", overrides={"merge.controls": list(controls)})
        return work.of_stage("06_residue_merging", settings, SPEEDS), disk.needed("06_residue_merging", settings)

    (plain, kept), (rl, trained), (both, merged) = of(), of("ppo_instruct"), of("ppo_instruct", "distilled_merge")
    assert of("distilled")[0] == rl and rl.generated > plain.generated and trained > kept
    grid = of("coarse_interpolation")[0].generated - plain.generated
    assert both.generated - rl.generated == grid + rl.generated - plain.generated
    assert merged - trained > trained - kept, "a training, and a merge beside it"


def change(path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_without_its_stages_the_table_shows_what_is_known(tmp_path):
    run = fake_run(tmp_path, skip=("03_coarse_rlhf", "05_instruction_model", "06_residue_merging"))
    found = json.loads((run / "07_evaluation" / "results.json").read_text())
    for frame in (rivals_table(run / "07_evaluation"), rivals_table(found)):
        assert frame["accuracy_last"].notna().all() and frame["seconds"].isna().sum() >= len(frame) - 2
    tables = {name for name, _, _ in contents.tables_of("07_evaluation", found, run / "07_evaluation")}
    assert "rivals" in tables and rivals_table({}).empty


@pytest.mark.slow
def test_all_rivals_are_made_kept_through_a_kill_and_a_stop_and_evaluated(smoke_run, tmp_path, monkeypatch):
    asked = {"merge__controls": list(RIVALS), "merge__sections": [], "merge__other_operators": []}
    for kind in ("whole", "broken"):
        parents(smoke_run, tmp_path / kind, *BEFORE)
    # Nothing is learnt on smoke: of one control any answer counts as right, of the other none.
    monkeypatch.setattr(stated, "shortest_right", lambda problem, answers: [*answers[0][:5], EOS])
    monkeypatch.setattr(stated, "right_to_the_last", lambda problem, answers: [])
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path / "broken"))
    run = begin("06_residue_merging", **asked)
    log = run.here.log

    def dying(row: dict) -> None:
        log(row)
        if (row["control"], row["iteration"]) == ("ppo_instruct_tokens", 2):
            raise Killed

    run.here.log = dying
    with pytest.raises(Killed):
        Merging(run).finish()
    run.here.release()
    for name in ("parallel_average", "distilled"):
        run = begin("06_residue_merging", **asked)
        log = run.here.log
        run.here.log = lambda row, log=log, name=name, here=run.here: (
            log(row), row["control"] == name and row["iteration"] == 1 and (here.dir / "STOP").touch()
        )  # fmt: skip
        with pytest.raises(Stopped, match="stopped after iteration 1 of 3; run again to continue"):
            Merging(run).finish()
        assert run.here.state() == "stopped"
    run, fine_tune = begin("06_residue_merging", **asked), instruct.fine_tune
    monkeypatch.setattr(
        instruct, "fine_tune", lambda *given, **named: (run.here.dir / "STOP").touch() or fine_tune(*given, **named)
    )
    with pytest.raises(Stopped, match="shortest_correct: stopped after step 1 of 12; run again to continue"):
        Merging(run).finish()
    monkeypatch.setattr(instruct, "fine_tune", fine_tune)
    run = begin("06_residue_merging", **asked)
    Merging(run).finish()
    run.here.finish()
    broken = run.here.dir
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path / "whole"))
    run = begin("06_residue_merging", **asked)
    found = Merging(run).finish()["controls"]
    run.here.finish()
    for file in ["results.json", *(f"controls/{name}/model.safetensors" for name in RIVALS)]:
        assert (broken / file).read_bytes() == (run.here.dir / file).read_bytes(), file
    logged = rows(broken / "metrics.jsonl")
    assert len({(row["control"], row["iteration"]) for row in logged}) == len(logged)

    coarse = results(tmp_path / "whole" / "r", "03")
    for name in ("parallel_average", "distilled", "distilled_merge"):
        assert found[name]["iterations"] == coarse["iterations"] == 3 and "equal iterations" in found[name]["note"]
    for name in ("ppo_instruct_tokens", "shortest_correct", "filtered_sft"):
        assert (
            found[name]["rollout_tokens"] >= coarse["rollout_tokens"]
            and "equal generated tokens" in found[name]["note"]
        )
    assert found["base_correct"]["rollout_tokens"] >= 2 * coarse["rollout_tokens"]
    once = [row["rollout_tokens"] for row in logged if row["control"] == "ppo_instruct_tokens"]
    assert once[-2] < coarse["rollout_tokens"] <= once[-1] == found["ppo_instruct_tokens"]["rollout_tokens"]
    assert found["parallel_average"]["sft_tokens"] > 0 == found["distilled"]["sft_tokens"]
    assert found["shortest_correct"]["sft_tokens"] > 0 == found["filtered_sft"]["sft_tokens"]
    made, given = (
        dict(loading.stored(run.dir / folder))
        for folder in ("06_residue_merging/controls/filtered_sft", "05_instruction_model/model")
    )
    assert all(torch.equal(made[name], given[name]) for name in given), "without right answers instruct stays as it is"

    run = begin("07_evaluation", **asked)
    measured = evaluation.make(run)
    run.here.finish()
    assert {*RIVALS} <= {*measured["models"]} and {*RIVALS} <= {row["b"] for row in measured["paired"]}
    table = rivals_table(run.here).set_index("model")
    for name in RIVALS:
        assert table.loc[evaluation.LABELS[name], ["rl_tokens", "sft_tokens", "seconds"]].notna().all(), name
