"""Run directories: what is loaded, continued, refused or set aside, and that nothing finished is lost."""

import json
import math
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from c2f_utils.errors import C2FError
from c2f_utils.files import read_json, read_jsonl
from c2f_utils.runs import locks, registry
from c2f_utils.runs import stage as stage_room
from c2f_utils.runs.run import PARENTS, Run
from c2f_utils.runs.stage import Stage, run_folder
from c2f_utils.settings.load import load_settings

BASE = "01_base_model"
pytestmark = pytest.mark.usefixtures("outputs")


def open_run(run_id: str = "a", profile: str = "smoke", **overrides) -> Run:
    return Run(load_settings(profile, run_id=run_id, overrides=overrides))


def make(run: Run, name: str = BASE, results: dict | None = None) -> Stage:
    """Run a stage to its end with the given results."""
    stage = run.stage(name)
    inputs, parents = run.inputs(name)
    stage.begin(inputs, parents=parents)
    stage.save_results(results or {"loss": 1.0})
    stage.finish()
    return stage


def child(code: str) -> subprocess.Popen:
    """Another Python process that runs `code` and says what it prints."""
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)


BEGIN = """
    from c2f_utils.runs.run import Run
    from c2f_utils.settings.load import load_settings
    stage = Run(load_settings("smoke", run_id="a")).stage("01_base_model")
    try:
        stage.begin(threads=3)
        print("begun", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    {then}
"""


def test_a_finished_stage_is_loaded_and_left_as_it_is():
    run = open_run()
    make(run)
    before = {path.name: path.read_bytes() for path in run.stage(BASE).dir.iterdir()}
    again = run.stage(BASE)
    assert again.done and again.begin() == "load"
    again.note(alarms=["must not be written"])
    assert again.finish() == "done"
    assert {path.name: path.read_bytes() for path in again.dir.iterdir()} == before


def test_other_settings_are_refused_naming_the_keys_and_both_values():
    make(open_run())
    other = open_run(**{"pretrain.tokens": 123_456}).stage(BASE)
    assert not other.done
    with pytest.raises(C2FError, match=r"pretrain\.tokens: \d+ there, 123456 here(.|\n)*01_base_model\.old-1"):
        other.begin()


def test_overwrite_sets_the_old_stage_aside_and_keeps_every_earlier_one():
    for tokens in (1000, 2000, 3000):
        stage = open_run(**{"pretrain.tokens": tokens}).stage(BASE)
        stage.begin(overwrite=True)
        stage.save_results({"tokens": tokens})
        stage.finish()
    kept = {path.name: read_json(path / "results.json")["tokens"] for path in run_folder("a").glob("01_*")}
    assert kept == {BASE: 3000, f"{BASE}.old-1": 1000, f"{BASE}.old-2": 2000}
    assert [item.name for item in registry.stages("a")] == [BASE], "old stages are no one's parents"


def test_overwrite_with_the_same_settings_loads():
    make(open_run())
    assert open_run().stage(BASE).begin(overwrite=True) == "load"


def test_a_killed_stage_is_continued_with_its_checkpoints_and_thread_count():
    process = child(BEGIN.format(then="stage.path('checkpoints', 'x').touch(); import time; time.sleep(60)"))
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    process.kill()
    process.wait()
    stage = open_run().stage(BASE)
    assert stage.state() == "lost"
    assert stage.begin(threads=1) == "continue"
    assert (stage.dir / "checkpoints" / "x").exists()
    assert stage.threads == 3 == stage.config()["threads"]
    assert len(stage.provenance()["sessions"]) == 2
    assert stage.finish() == "done"


def test_a_stage_at_work_in_another_process_is_refused():
    process = child(BEGIN.format(then="input()"))
    try:
        assert process.stdout.readline() == "begun\n"
        with pytest.raises(C2FError, match=f"process {process.pid} .*choose another run_id"):
            open_run().stage(BASE).begin()
    finally:
        process.kill()
        process.wait()


def test_of_many_processes_that_start_at_once_exactly_one_wins():
    processes = [child(BEGIN.format(then="import time; time.sleep(4)")) for _ in range(4)]
    answers = [process.stdout.readline() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    assert sum(answer == "begun\n" for answer in answers) == 1, answers
    assert sum(answer.startswith("C2FError") for answer in answers) == 3, answers


def test_a_reused_process_number_does_not_hold_a_claim(tmp_path):
    path = tmp_path / "claim"
    path.write_text(json.dumps(locks.owner() | {"born": "1", "pid": os.getppid()}))
    assert locks.take(path, heartbeat_age=0.0) is None


@pytest.mark.parametrize(("age", "free"), [(locks.LOST - 1, False), (locks.LOST + 1, True), (None, True)])
def test_a_claim_from_another_machine_lasts_as_long_as_its_heartbeat(tmp_path, age, free):
    path = tmp_path / "claim"
    path.write_text(json.dumps(locks.owner() | {"host": "elsewhere"}))
    assert (locks.take(path, heartbeat_age=age) is None) == free


def test_beginning_again_in_one_process_silences_the_first_heartbeat(monkeypatch):
    monkeypatch.setattr(stage_room, "HEARTBEAT", 0.02)
    others = set(threading.enumerate())  # stages that other tests of this session left at work
    run = open_run()
    first, second = run.stage(BASE), run.stage(BASE)
    first.begin()
    second.begin()
    second.note(alarms=["mine"])
    time.sleep(0.1)
    assert second.status()["alarms"] == ["mine"]
    second.finish()
    time.sleep(0.1)
    assert second.state() == "done"
    assert not [item for item in set(threading.enumerate()) - others if "_keep_beating" in item.name]


def test_the_heartbeat_advances_while_the_stage_works(monkeypatch):
    monkeypatch.setattr(stage_room, "HEARTBEAT", 0.02)
    stage = open_run().stage(BASE)
    stage.begin()
    first = stage.status()["heartbeat"]
    time.sleep(0.3)
    assert stage.status()["heartbeat"] > first and stage.status()["peak_mb"] > 5
    stage.finish()


@pytest.mark.parametrize("where", ["stage", "run"])
def test_a_stop_file_ends_the_stage_as_stopped_and_the_next_start_continues(where):
    run = open_run()
    stage = run.stage(BASE)
    stage.begin()
    assert not stage.stop_requested()
    (stage.dir if where == "stage" else run.dir).joinpath("STOP").touch()
    assert stage.stop_requested()
    assert stage.finish() == "stopped" and not stage.done
    again = run.stage(BASE)
    assert again.begin() == "continue" and not again.stop_requested()
    again.finish()


def test_a_stop_that_nobody_asked_about_does_not_undo_finished_work():
    stage = open_run().stage(BASE)
    stage.begin()
    (stage.dir / "STOP").touch()
    assert stage.finish() == "done"


def test_a_missing_parent_is_refused_naming_the_notebook_and_the_command():
    with pytest.raises(C2FError, match="first: c2f run 01 --profile smoke --seed 0 --run-id a"):
        open_run().inputs("02_reward_model")
    with pytest.raises(C2FError) as caught:
        open_run().inputs("03_coarse_rlhf")
    assert "01_base_model" in str(caught.value) and "02_reward_model" in str(caught.value), "all missing ones at once"


def test_a_parent_comes_from_the_same_run_before_any_other(capsys):
    make(open_run("a"), results={"loss": 1.0})
    make(open_run("b"), results={"loss": 2.0})
    assert open_run("a").parent(BASE).run_id == "a"
    assert capsys.readouterr().out == ""


def test_a_parent_of_another_run_must_match_profile_and_seed_and_is_printed(capsys):
    make(open_run("tiny-run", profile="tiny"))
    make(Run(load_settings("smoke", seed=1, run_id="seed1")))
    with pytest.raises(C2FError, match="no finished 01_base_model"):
        open_run("new").parent(BASE)
    make(open_run("old"))
    make(open_run("odd", **{"pretrain.tokens": 999}))
    assert open_run("new").parent(BASE).run_id == "old", "equal settings come before a later finish"
    assert "01_base_model: from run 'old'" in capsys.readouterr().out


def test_an_actor_of_the_users_own_law_is_lent_to_no_other_run():
    from c2f_utils.runs.provenance import fingerprint

    name = "05_instruction_model"  # any stage will do; 03 is the one that records these inputs
    for run_id, law in (("usual", registry.OF_SETTINGS), ("own", {"source": "class Doubling ..."})):
        stage = open_run(run_id).stage(name)
        stage.begin({"law": fingerprint(law), "reward": fingerprint(registry.OF_SETTINGS)})
        stage.save_results({"loss": 1.0})
        stage.finish()
    assert open_run("third").parent(name).run_id == "usual", "though the other finished later"
    assert open_run("own").parent(name).run_id == "own", "in its own run it is the one meant"
    assert registry.own_parts(open_run("own").stage(name)) == ["law"]


def test_a_run_keeps_to_one_profile_and_seed():
    run = open_run("t1", profile="tiny")
    make(run)
    run.refuse_mixture("02_reward_model")
    other = Run(load_settings("smoke", run_id="t1", seed=3))
    with pytest.raises(C2FError, match=r"run 't1' holds profile tiny, seed 0; 02_reward_model asks for smoke, seed 3: "
                       r"add --profile tiny --seed 0 .* or choose another run_id"):  # fmt: skip
        other.refuse_mixture("02_reward_model")
    for about_no_run in ("00_environment_and_data", "09_studies"):
        other.refuse_mixture(about_no_run)


def test_a_changed_parent_counts_as_another_input():
    run = open_run()
    make(run)
    make(run, "02_reward_model")
    base = open_run().stage(BASE)
    base.save_results({"loss": 0.5})
    with pytest.raises(C2FError, match="input 01_base_model: its settings or results have changed"):
        later = open_run()
        later.stage("02_reward_model").begin(later.inputs("02_reward_model")[0])


def test_06_is_refused_before_work_where_04_lacks_the_law_of_its_control():
    lacking = {"schedules": {"laws": {"fixed_long": None}}}
    names = [name for name in PARENTS["06_residue_merging"]]
    said = (
        r"04_length_schedules has no law 'fixed_long' .*set merge.controls to \['interpolation', 'random_residue', 'ppo"
    )
    with pytest.raises(C2FError, match=said):
        open_run(**lacking).inputs("06_residue_merging", expected=names)
    without = {"merge.controls": ["interpolation"]}
    assert open_run(**lacking, **without).inputs("06_residue_merging", expected=names) == ({}, {})
    assert open_run().inputs("06_residue_merging", expected=names) == ({}, {})
    for name in names:
        make(open_run(**lacking), name)
    with pytest.raises(C2FError, match=said):  # what 04 was made with counts, not what the settings say now
        open_run().inputs("06_residue_merging")


def test_a_setting_that_did_not_exist_then_and_has_its_default_now_changes_nothing():
    stage = make(open_run())
    config = stage.config()
    del config["settings"]["models"]["instruct_revision"], config["settings"]["data"]["max_prompt_tokens"]
    (stage.dir / "config.json").write_text(json.dumps(config))
    assert open_run().stage(BASE).begin() == "load"
    with pytest.raises(C2FError, match="data.max_prompt_tokens: 64 there, 65 here"):
        open_run(**{"data.max_prompt_tokens": 65}).stage(BASE).plan()


def test_a_stage_stays_with_the_parent_it_was_made_from():
    make(open_run("first"), results={"loss": 1.0})
    make(open_run("mine"), "02_reward_model")
    make(open_run("second"), results={"loss": 2.0})
    inputs, origins = open_run("mine").inputs("02_reward_model")
    assert origins == {BASE: "first"}
    assert open_run("mine").stage("02_reward_model").begin(inputs) == "load"


def test_a_changed_data_file_is_refused_once_recorded():
    run = open_run()
    stage = run.stage(BASE)
    stage.begin()
    stage.add_input("data:pairs.jsonl", "aaaa")
    stage.finish()
    again = run.stage(BASE)
    again.begin()
    again.add_input("data:pairs.jsonl", "aaaa")
    with pytest.raises(C2FError, match=r"another data:pairs.jsonl \(aaaa then, bbbb now\)"):
        again.add_input("data:pairs.jsonl", "bbbb")


def test_the_report_is_redone_whenever_it_is_asked_for():
    run = open_run()
    make(run, "08_report")
    stage = run.stage("08_report")
    assert stage.begin({"anything": "new"}) == "redo" and not stage.loaded
    stage.finish()


def test_the_look_at_the_machine_is_never_in_the_way_of_another_profile():
    make(open_run(), "00_environment_and_data")
    for profile in ("tiny", "smoke"):
        stage = open_run(profile=profile).stage("00_environment_and_data")
        assert stage.begin() == "redo"
        stage.finish()
        assert stage.config()["settings"]["profile"] == profile


@pytest.mark.parametrize("run_id", ["", "..", "a/b", "../x", ".hidden", "a b", "é", "a" * 65, "x\n"])
def test_a_run_id_that_is_no_safe_folder_name_is_refused(run_id):
    with pytest.raises(C2FError, match="run_id"):
        run_folder(run_id)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path / "file"))
    with pytest.raises(C2FError, match="cannot be written.*C2F_OUTPUTS"):
        open_run().stage(BASE).begin()


def test_a_full_disk_is_refused_before_anything_is_written(monkeypatch):
    monkeypatch.setenv("C2F_MIN_FREE_MB", "1e12")
    with pytest.raises(C2FError, match="MB free, 1000000000000 MB are needed"):
        open_run().stage(BASE).begin()
    assert not list(run_folder("a").glob("*"))


def test_results_with_a_value_that_is_not_finite_are_refused_with_its_path():
    stage = open_run().stage(BASE)
    with pytest.raises(C2FError, match=r"results\.curve\[1\]\.reward is nan"):
        stage.save_results({"curve": [{"reward": np.float64(1)}, {"reward": np.float32("nan")}]})
    assert not stage.path("results.json").exists()


def test_results_take_numpy_values_and_come_back_as_numbers():
    stage = open_run().stage(BASE)
    stage.save_results({"mean": np.float32(0.5), "counts": np.arange(3), "n": np.int64(7), "none": None})
    assert stage.results() == {"mean": 0.5, "counts": [0, 1, 2], "n": 7, "none": None}


def test_metrics_are_logged_row_by_row_and_what_is_no_number_is_null():
    stage = open_run().stage(BASE)
    for iteration in range(2):
        stage.log({"iteration": iteration, "reward": math.nan if iteration == 1 else 0.5})
    assert read_jsonl(stage.dir / "metrics.jsonl") == [
        {"iteration": 0, "reward": 0.5},
        {"iteration": 1, "reward": None},
    ]


def test_timings_add_up_and_stay_out_of_the_results():
    stage = open_run().stage(BASE)
    for _ in range(2):
        with stage.timer("training"):
            time.sleep(0.02)
    assert 0.04 <= read_json(stage.dir / "timings.json")["training"] < 1


def test_the_table_names_state_changed_knobs_and_parents():
    run = open_run("t", **{"pretrain.tokens": 4321})
    make(run)
    make(run, "02_reward_model")
    third = run.stage("03_coarse_rlhf")
    third.begin()
    third.log({"iteration": 3, "reward": 0.25})
    third.note(alarms=["92 % of answers hit the limit"])
    third.fail("ValueError: boom")
    found = registry.table().set_index("stage")
    assert list(found["status"]) == ["done", "done", "failed"]
    assert found.loc[BASE, "changed"] == "pretrain.tokens=4321"
    assert found.loc["02_reward_model", "parents"] == "t/01"
    assert found.loc["03_coarse_rlhf", ["iteration", "reward", "alarms"]].tolist() == [
        3, 0.25, "92 % of answers hit the limit",
    ]  # fmt: skip


def test_an_empty_outputs_folder_has_an_empty_table():
    assert registry.table().empty


def test_runs_need_no_torch():
    code = "import sys, c2f_utils.runs.registry, c2f_utils.headless.jobs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
