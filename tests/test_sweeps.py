"""`c2f sweep`: what is refused before work, which stages are shared, and that a sweep survives its points, its signals
and its own end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import light_project
import pytest
from finished_runs import surroundings
from light_project import BASE
from test_runs import make, open_run

from c2f_utils.__main__ import main
from c2f_utils.errors import C2FError
from c2f_utils.files import read_json
from c2f_utils.headless import jobs, sweeps
from c2f_utils.report import sweep_results
from c2f_utils.runs.stage import Stage, run_folder
from c2f_utils.settings.load import load_settings


def wanted(*notebooks: str, seeds=(0,), name: str = "s", overrides: dict | None = None, **grid) -> sweeps.Wanted:
    dotted = {key.replace("__", "."): values for key, values in grid.items()}
    return sweeps.Wanted(name, notebooks, dotted, seeds, "smoke", overrides or {})


def runs(found: dict) -> dict[str, tuple]:
    return {run["run"]: (" ".join(name[:2] for name in run["notebooks"]), run["after"]) for run in found["runs"]}


def test_stages_that_all_points_share_are_made_once_per_seed(outputs):
    found = sweeps.prepare(wanted("03_coarse_rlhf", seeds=(1, 2), coarse__iterations=[3, 5]))
    assert runs(found) == {
        "s-s1": ("01 02", None), "s-iterations3-s1": ("03", "s-s1"), "s-iterations5-s1": ("03", "s-s1"),
        "s-s2": ("01 02", None), "s-iterations3-s2": ("03", "s-s2"), "s-iterations5-s2": ("03", "s-s2"),
    }  # fmt: skip
    assert read_json(outputs / "s" / "sweep.json") == found


def test_a_setting_that_decides_an_early_stage_is_not_shared_from_there_on(outputs):
    found = runs(sweeps.prepare(wanted("03_coarse_rlhf", reward__pairs=[40, 60])))
    assert found == {"s-s0": ("01", None), "s-pairs40-s0": ("02 03", "s-s0"), "s-pairs60-s0": ("02 03", "s-s0")}
    found = runs(sweeps.prepare(wanted("06_residue_merging", name="m", merge__token_price=[0.01, 0.5])))
    assert found["m-s0"] == ("01 02 03 04 05", None) and found["m-token_price0.01-s0"] == ("06", "m-s0")


def test_a_grid_of_seeds_alone_shares_nothing(outputs):
    assert runs(sweeps.prepare(wanted("03_coarse_rlhf", seeds=(4, 5)))) == {
        "s-s4": ("01 02 03", None), "s-s5": ("01 02 03", None)
    }  # fmt: skip


def test_an_earlier_stage_that_some_run_has_is_used(outputs, smoke_run, monkeypatch):
    monkeypatch.setenv("C2F_OUTPUTS", str(smoke_run.parent))
    found = sweeps._runs(wanted("03_coarse_rlhf", coarse__iterations=[7, 8]), 100)
    assert [(run["run"], run["notebooks"]) for run in found] == [
        ("s-iterations7-s0", ["03_coarse_rlhf"]), ("s-iterations8-s0", ["03_coarse_rlhf"])
    ]  # fmt: skip
    other = sweeps._runs(wanted("03_coarse_rlhf", overrides={"reward.pairs": 30}, coarse__iterations=[7, 8]), 100)
    assert other[0]["notebooks"] == ["02_reward_model"], "01 fits, 02 does not"
    base = sweeps._runs(wanted("03_coarse_rlhf", overrides={"pretrain.tokens": 999}, coarse__iterations=[7, 8]), 100)
    assert base[0]["notebooks"] == ["01_base_model", "02_reward_model"], "02 has these settings, but another base"


def test_names_are_read_where_they_can_be_and_numbers_where_not(outputs):
    laws = [{"name": "fixed", "limit": 16}, {"name": "fixed", "limit": 32}]
    found = sweeps.prepare(wanted("03_coarse_rlhf", coarse__law=laws))
    assert [run["run"] for run in found["runs"]] == ["s-s0", "s-p1-s0", "s-p2-s0"]
    found = sweeps.prepare(wanted("03_coarse_rlhf", name="x" * 50, coarse__actor_learning_rate=[1e-3, 2e-3]))
    assert [run["run"] for run in found["runs"]][1:] == [f"{'x' * 50}-p1-s0", f"{'x' * 50}-p2-s0"]
    found = sweeps.prepare(wanted("03_coarse_rlhf", name="b", coarse__actor_learning_rate=[1e-5, 2e-3]))
    assert [run["run"] for run in found["runs"]][1:] == [
        "b-actor_learning_rate1e-05-s0",
        "b-actor_learning_rate0.002-s0",
    ]


@pytest.mark.parametrize(
    ("grid", "arguments", "said"),
    [
        ("coarse.iterations: []", (), "coarse.iterations has no values"),
        ("coarse.iterations: 5", (), "expected a setting by its dotted name with a list"),
        ("coarse: {iterations: [5, 6]}", (), "expected a setting by its dotted name with a list"),
        ("", (), "it is empty"),
        ("[1, 2]", (), "expected a mapping"),
        ("coarse.iterations: [5]\ncoarse.iterations: [6]", (), "given twice"),
        ("coarse.law: [{name: fixed, limit: 9}]\ncoarse.law.limit: [8]", (), "given twice"),
        ("coarse.iteratons: [5, 6]", (), "coarse.iteratons"),
        ("coarse.iterations: [5, many]", (), "coarse.iterations"),
        ("seed.x: [1, 2]", (), "seed"),
        ("coarse.iterations: [5, 6, 5]", (), "are the same to 03_coarse_rlhf"),
        ("coarse.iterations: [5, 5.0]", (), "coarse.iterations"),
        ("merge.token_price: [0.1, 0.2]", (), "name a notebook that the setting decides"),
        ("coarse.iterations: [5, 6]", ("--seeds", "51"), "102 runs; --most 102"),
        ("coarse.iterations: [5, 6]", ("--seeds", "0"), "expected at least 1"),
        ("coarse.iterations: [5, 6]", ("--seeds", "1,1"), "names a seed twice"),
        ("coarse.iterations: [5, 6]", ("--seeds", "1;2"), "expected how many (5) or which"),
        ("coarse.iterations: [5, 6]", ("--seeds", "-3"), "expected how many (5) or which"),
        ("coarse.iterations: [5, 6]", ("--workers", "0"), "--workers 0"),
        ("coarse.iterations: [5, 6]", ("--threads", "0"), "--threads 0"),
        ("coarse.iterations: [5, 6]", ("--name", "../x"), "run_id is '../x'"),
        ("coarse.iterations: [5, 6]", ("--name", "y" * 60), "run_id is"),
        ("coarse.iterations: [5, 6]", ("--profile", "huge"), "unknown profile"),
        ("coarse.iterations: [5, 6]", ("--sbatch", "x.sh"), "--sbatch is for --slurm"),
    ],
)
def test_misuse_is_refused_in_a_sentence_and_writes_nothing(outputs, tmp_path, capsys, grid, arguments, said):
    path = tmp_path / "grid.yaml"
    path.write_text(grid)
    assert main(["sweep", "03", "--grid", str(path), "--profile", "smoke", *arguments]) == jobs.BAD_INPUT
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and list(outputs.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no notebook is named"),
        (("03",), "needs a --name"),
        (("99", "--name", "s"), "there is no notebook '99'"),
        (("03", "--name", "s", "--grid", "nowhere.yaml"), "nowhere.yaml"),
        (("--table", "nowhere"), "there is no sweep 'nowhere'"),
        (("--element", "nowhere", "0"), "there is no sweep 'nowhere'"),
        (("03", "--name", "s", "--slurm", "--workers", "2"), "are for this machine"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused_in_a_sentence(outputs, capsys, arguments, said):
    assert main(["sweep", *arguments]) == jobs.BAD_INPUT
    assert said in capsys.readouterr().err and list(outputs.iterdir()) == []


def test_a_sweep_keeps_to_its_points_and_to_a_name_of_its_own(outputs, capsys):
    first = wanted("03_coarse_rlhf", coarse__iterations=[3, 5])
    found = sweeps.prepare(first)
    assert sweeps.prepare(first) == found, "the same command again"
    with pytest.raises(jobs.C2FError, match=r"(?s)exists with other points.*grid.coarse.iterations.*sweep.json"):
        sweeps.prepare(wanted("03_coarse_rlhf", coarse__iterations=[3, 6]))
    Stage(run_folder("taken") / BASE, load_settings("smoke")).begin()
    with pytest.raises(jobs.C2FError, match="'taken' is a run already"):
        sweeps.prepare(wanted("03_coarse_rlhf", name="taken", coarse__iterations=[3, 5]))


def test_the_table_shows_waiting_runs(outputs, capsys):
    sweeps.prepare(wanted("03_coarse_rlhf", coarse__iterations=[3, 5]))
    assert main(["sweep", "--table", "s"]) == jobs.DONE
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and all("waiting" in line for line in printed[1:])


def test_each_worker_has_a_device_of_its_own(outputs, monkeypatch):
    given = []

    class Started:
        returncode = 0

        def __init__(self, command, env, **_):
            given.append((command[command.index("--run-id") + 1], env["CUDA_VISIBLE_DEVICES"]))

        def poll(self):
            return 0

    monkeypatch.setattr(sweeps.subprocess, "Popen", Started)
    monkeypatch.setattr(sweeps, "BETWEEN", 0.0)
    monkeypatch.setattr(sweeps, "_POLL", 0.0)
    record = sweeps.prepare(wanted(BASE, seeds=(1, 2, 3, 4)))
    sweeps.run(record, 2, ["4", "7"])
    assert given == [("s-s1", "4"), ("s-s2", "7"), ("s-s3", "4"), ("s-s4", "7")]


def test_a_run_whose_shared_run_failed_is_not_started(outputs, monkeypatch, capsys):
    begun = []

    class Started:
        def __init__(self, command, **_):
            begun.append(command[command.index("--run-id") + 1])

        def poll(self):
            return jobs.FAILED

    monkeypatch.setattr(sweeps.subprocess, "Popen", Started)
    monkeypatch.setattr(sweeps, "BETWEEN", 0.0)
    monkeypatch.setattr(sweeps, "_POLL", 0.0)
    record = sweeps.prepare(wanted("03_coarse_rlhf", seeds=(1, 2), coarse__iterations=[3, 5]))
    assert sweeps.run(record, 1) == jobs.FAILED
    said = capsys.readouterr().out
    assert begun == ["s-s1", "s-s2"] and said.count("not started: s-s1, which it comes after, is not done") == 2


def test_a_point_made_from_stages_with_other_settings_is_not_done(outputs):
    for name in ("01_base_model", "02_reward_model"):
        make(open_run("other", **{"reward.pairs": 30}), name)
    points = {"coarse__iterations": [3, 5], "reward__pairs": [40]}
    record = sweeps.prepare(wanted("03_coarse_rlhf", **points))
    assert read_json(outputs / "s" / "overrides" / "s-s0.json")["reward.pairs"] == 40, "as all points want it"
    make(open_run("s-iterations3-s0", **{"coarse.iterations": 3, "reward.pairs": 40}), "03_coarse_rlhf")
    assert sweeps.state(record["runs"][1])[1] == "done" and not sweeps.is_done(record, record["runs"][1])
    with pytest.raises(C2FError, match="03_coarse_rlhf in run 's-iterations3-s0' was made from stages with other"):
        sweeps.prepare(wanted("03_coarse_rlhf", **points))
    shutil.rmtree(outputs / "other")
    assert sweeps.is_done(record, record["runs"][1]), "what it was made from is gone and cannot be told"


# With kernels


def command(project, outputs, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "c2f_utils", "sweep", "01", "--profile", "smoke", *arguments], cwd=project, text=True,
        env=surroundings(outputs) | {"PYTHONPATH": str(project)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen) -> tuple[int, str]:
    printed, error = process.communicate(timeout=240)
    return process.returncode, printed + error


def stamps(outputs) -> dict[str, int]:
    return {str(path.relative_to(outputs)): path.stat().st_mtime_ns for path in outputs.glob("*/*/results.json")}


@pytest.mark.slow
def test_a_failing_point_stops_no_other_and_the_same_command_does_what_is_left(outputs, tmp_path):
    project, grid = light_project.make(tmp_path / "project"), tmp_path / "s.yaml"
    grid.write_text("pretrain.tokens: [4, 8]\npretrain.warmup_steps: [13, 5]")
    code, said = ended(command(project, outputs, "--grid", str(grid), "--workers", "2"))
    assert code == jobs.FAILED and "2 of 4 runs are done" in said and said.count("RuntimeError: thirteen") == 2, said
    table = sweeps.table("s").set_index("run")["status"]
    assert sorted(table) == ["done", "done", "failed", "failed"]
    before = stamps(outputs)
    notebook = project / "notebooks" / f"{BASE}.ipynb"
    notebook.write_text(notebook.read_text().replace("== 13", "== 99"))
    code, said = ended(command(project, outputs, "--grid", str(grid), "--workers", "2"))
    assert code == jobs.DONE and "4 of 4 runs are done" in said, said
    assert before.items() <= stamps(outputs).items() and len(stamps(outputs)) == 4
    found = sweep_results.sweep_results("s")
    assert list(found["accuracy_last"]) == [light_project.value(steps, 0) for steps in (4, 4, 8, 8)]


@pytest.mark.slow
def test_a_sweep_that_is_killed_and_stopped_in_turn_ends_as_if_nothing_had_happened(outputs, tmp_path):
    project, options = light_project.make(tmp_path / "project"), ("--name", "s", "--seeds", "2", "--workers", "2")
    settings = tmp_path / "settings.yaml"
    settings.write_text("pretrain: {tokens: 150}")
    options += ("--overrides", str(settings))
    for way in ("SIGKILL", "SIGINT", "SIGTERM"):
        before = [steps(outputs, seed) for seed in (0, 1)]
        process = command(project, outputs, *options)
        wait(lambda before=before: all(steps(outputs, seed) > before[seed] for seed in (0, 1)), process)
        process.send_signal(getattr(signal, way))
        if way == "SIGINT":
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        code, said = ended(process)
        if way == "SIGKILL":  # of the sweep alone: its runs go on, and are stopped here
            for seed in (0, 1):
                claim = outputs / f"s-s{seed}" / ".run.claim"
                os.kill(json.loads(claim.read_text())["pid"], signal.SIGTERM)
                wait(lambda claim=claim: not claim.read_text())
        else:
            assert code == (jobs.KILLED if way == "SIGINT" else jobs.STOPPED), said
        assert max(steps(outputs, seed) for seed in (0, 1)) < 150, "ended in the middle"
    assert {sweeps.state(run)[1] for run in sweep_results.read("s")["runs"]} == {"stopped"}
    assert not (outputs / "s" / "STOP").exists()
    code, said = ended(command(project, outputs, *options))
    assert code == jobs.DONE and "2 of 2 runs are done" in said, said
    assert [*sweep_results.sweep_results("s")["accuracy_last"]] == [light_project.value(150, seed) for seed in (0, 1)]


def steps(outputs, seed: int) -> int:
    path = outputs / f"s-s{seed}" / BASE / "checkpoints" / "state.json"
    return read_json(path)["step"] if path.exists() else 0


def wait(until, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 120
    while not until():
        assert time.monotonic() < deadline and (process is None or process.poll() is None), process
        time.sleep(0.05)
