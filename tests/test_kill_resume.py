"""A run that was killed continues from its last checkpoint and ends exactly as an unbroken one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from finished_runs import ROOT, finished, rows, surroundings

from c2f_utils import notebook
from c2f_utils.errors import Stopped
from c2f_utils.runs.run import Run
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import coarse_rlhf, instruction_model, length_schedules, residue_merging, reward_model

STAGE = "03_coarse_rlhf"
LONG = ("-p", "coarse.iterations=60", "-p", "coarse.prompts=24", "-p", "coarse.checkpoint_every=4")


def without_times(table: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in table]


def same_outcome(broken: Path, whole: Path) -> None:
    """Model and results are bit for bit the same; every iteration was logged once."""
    for file in ("model/model.safetensors", "results.json", "samples.jsonl"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file
    logged = rows(broken / "metrics.jsonl")
    assert [row["iteration"] for row in logged] == list(range(1, len(logged) + 1))
    assert without_times(logged) == without_times(rows(whole / "metrics.jsonl"))


def parents(smoke_run: Path, outputs: Path, *names: str) -> None:
    for name in names or ("01_base_model", "02_reward_model"):
        shutil.copytree(smoke_run / name, outputs / "r" / name)


@pytest.mark.slow
def test_sigkill_of_the_kernel_in_the_middle_of_03(smoke_run, tmp_path):
    arguments = ("run", "03", "--profile", "smoke", "--run-id", "r", *LONG)
    for kind in ("broken", "whole"):
        parents(smoke_run, tmp_path / kind)
    finished(tmp_path / "whole", *arguments)
    broken = tmp_path / "broken" / "r" / STAGE
    process = subprocess.Popen(
        [sys.executable, "-m", "c2f_utils", *arguments], cwd=ROOT, env=surroundings(tmp_path / "broken"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 180
    while not (broken / "metrics.jsonl").exists() or len((broken / "metrics.jsonl").read_text().splitlines()) < 15:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(json.loads((broken / "status.json").read_text())["pid"], signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and "kernel died" in error
    reached = len(rows(broken / "metrics.jsonl"))
    assert 15 <= reached < 60 and not (broken / "results.json").exists(), "killed in the middle, not at the end"
    finished(tmp_path / "broken", *arguments)
    assert len(json.loads((broken / "provenance.json").read_text())["sessions"]) == 2
    same_outcome(broken, tmp_path / "whole" / "r" / STAGE)


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing may catch it."""


def begin(name: str, **overrides: object) -> Run:
    run = Run(load_settings("smoke", run_id="r", overrides={key.replace("__", "."): v for key, v in overrides.items()}))
    run.here = run.stage(name)
    run.here.begin(run.inputs(name)[0])
    notebook.seed_everything(0)
    return run


@pytest.mark.parametrize("moment", ["after the row", "between checkpoint and row"])
@pytest.mark.parametrize("every", [1, 2])
def test_03_continues_from_its_checkpoint_wherever_it_was_killed(smoke_run, tmp_path, monkeypatch, moment, every):
    for kind in ("whole", "broken"):
        parents(smoke_run, tmp_path / kind)
        monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path / kind))
        if kind == "broken":
            run, seen = begin(STAGE, coarse__iterations=5, coarse__checkpoint_every=every), []
            log = run.here.log
            run.here.log = lambda row: _die(seen, row, log, moment)  # noqa: B023
            with pytest.raises(Killed):
                list(coarse_rlhf.train(run))
            run.here.release()
        run = begin(STAGE, coarse__iterations=5, coarse__checkpoint_every=every)
        list(coarse_rlhf.train(run))
        run.here.finish()
    same_outcome(tmp_path / "broken" / "r" / STAGE, tmp_path / "whole" / "r" / STAGE)


def _die(seen: list, row: dict, log, moment: str) -> None:
    seen.append(row)
    if len(seen) == 4 and moment == "between checkpoint and row":
        raise Killed
    log(row)
    if len(seen) == 4:
        raise Killed


def test_03_killed_between_a_checkpoint_and_its_snapshot_keeps_that_snapshot_too(smoke_run, tmp_path, monkeypatch):
    parents(smoke_run, tmp_path)
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))
    run, seen = begin(STAGE), []
    log = run.here.log

    def dying(row: dict) -> None:
        log(row)
        seen.append(row)
        if len(seen) == 2:  # checkpointed and evaluated, and no snapshot yet
            raise Killed

    run.here.log = dying
    with pytest.raises(Killed):
        list(coarse_rlhf.train(run))
    run.here.release()
    run = begin(STAGE)
    list(coarse_rlhf.train(run))
    run.here.finish()
    whole = smoke_run / STAGE / "snapshots"
    assert {path.name for path in whole.iterdir()} == {path.name for path in (run.here.dir / "snapshots").iterdir()}
    for path in whole.iterdir():
        assert (run.here.dir / "snapshots" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("laws", [1, 2])
def test_04_keeps_finished_laws_and_logs_no_row_twice(smoke_run, tmp_path, monkeypatch, laws):
    parents(smoke_run, tmp_path, "01_base_model", "02_reward_model", STAGE)
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))
    run = begin("04_length_schedules")
    log, seen = run.here.log, []

    def dying(row: dict) -> None:
        log(row)
        seen.append(row["law"])
        if len(set(seen)) == laws and seen.count(seen[-1]) == 2:
            raise Killed

    run.here.log = dying
    with pytest.raises(Killed):
        length_schedules.make(run)
    run.here.release()
    run = begin("04_length_schedules")
    found = length_schedules.make(run)
    run.here.finish()
    logged = rows(run.here.dir / "metrics.jsonl")
    assert len({(row["law"], row["iteration"]) for row in logged}) == len(logged) == 9
    assert json.loads(json.dumps(found)) == json.loads((smoke_run / "04_length_schedules" / "results.json").read_text())


def test_06_killed_in_its_last_control_ends_as_an_unbroken_run(smoke_run, tmp_path, monkeypatch):
    names = ("01_base_model", "02_reward_model", STAGE, "04_length_schedules", "05_instruction_model")
    parents(smoke_run, tmp_path, *names)
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))
    run = begin("06_residue_merging")
    run.here.log = lambda row: (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        residue_merging.Merging(run).finish()
    run.here.release()
    assert not (run.here.dir / "results.json").exists()
    run = begin("06_residue_merging")
    residue_merging.Merging(run).finish()
    run.here.finish()
    whole = smoke_run / "06_residue_merging"
    for file in ("results.json", "model/model.safetensors", "controls/ppo_instruct/model.safetensors"):
        assert (run.here.dir / file).read_bytes() == (whole / file).read_bytes(), file
    assert [row["iteration"] for row in rows(run.here.dir / "metrics.jsonl")] == [1, 2, 3]


def test_a_stop_file_ends_03_with_a_model_and_the_same_notebook_continues(smoke_run, tmp_path, monkeypatch):
    parents(smoke_run, tmp_path)
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))
    run = begin(STAGE)
    for row in coarse_rlhf.train(run):
        if row["iteration"] == 1:
            (run.here.dir / "STOP").touch()
    assert run.here.finish() == "stopped" and run.here.results()["iterations"] == 1
    assert not run.stage(STAGE).done
    run = begin(STAGE)
    assert [row["iteration"] for row in coarse_rlhf.train(run)] == [2, 3]
    run.here.finish()
    same_outcome(run.here.dir, smoke_run / STAGE)


def test_an_interrupt_ends_03_after_the_iteration_and_a_second_one_at_once(smoke_run, tmp_path, monkeypatch, capsys):
    parents(smoke_run, tmp_path)
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))
    usual = signal.default_int_handler  # a process started in the background has none
    before = signal.signal(signal.SIGINT, usual)
    run = begin(STAGE)
    for row in coarse_rlhf.train(run):
        if row["iteration"] == 1:
            signal.raise_signal(signal.SIGINT)
    printed = capsys.readouterr().out
    assert "interrupt again to stop at once" in printed and "stopped after iteration 1 of 3; run again" in printed
    assert run.here.finish() == "stopped" and signal.getsignal(signal.SIGINT) is usual
    run = begin(STAGE)
    with pytest.raises(KeyboardInterrupt):
        for _ in coarse_rlhf.train(run):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    run.here.release()
    assert signal.getsignal(signal.SIGINT) is usual
    signal.signal(signal.SIGINT, before)
    run = begin(STAGE)
    list(coarse_rlhf.train(run))
    run.here.finish()
    same_outcome(run.here.dir, smoke_run / STAGE)


@pytest.mark.parametrize(
    "name, make, says",
    (
        ("02_reward_model", reward_model.make, "reward model: stopped after step 1 of"),
        ("05_instruction_model", instruction_model.make, "instruction model: stopped after step 1 of"),
    ),
)
def test_a_stop_file_in_a_library_s_training_keeps_what_was_trained(smoke_run, tmp_path, monkeypatch, name, make, says):
    parents(smoke_run, tmp_path, "01_base_model")
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))
    run = begin(name)
    (run.here.dir / "STOP").touch()
    with pytest.raises(Stopped, match=says):
        make(run)
    assert run.here.state() == "stopped" and not (run.here.dir / "results.json").exists()
    run = begin(name)
    make(run)
    run.here.finish()
    for file in ("results.json", "model/model.safetensors"):
        assert (run.here.dir / file).read_bytes() == (smoke_run / name / file).read_bytes(), file
    assert not (run.here.dir / "checkpoints").exists()


def test_a_stop_file_in_04_leaves_results_that_figures_and_tables_can_show(smoke_run, tmp_path, monkeypatch):
    from c2f_utils.report import figures, tables, verdicts_laws

    parents(smoke_run, tmp_path, "01_base_model", "02_reward_model", STAGE)
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))
    run = begin("04_length_schedules")

    def on_start(name: str, seed: int) -> None:
        if name == "fixed_long":
            (run.here.dir / "STOP").touch()

    found = length_schedules.make(run, on_start)
    figures.schedule_comparison(run.here)
    figures.tokens_to_target(run.here)
    tables.law_table(found)
    verdicts_laws.schedules(found)
    assert run.here.finish() == "stopped"
    run = begin("04_length_schedules")
    length_schedules.make(run)
    run.here.finish()
    whole = smoke_run / "04_length_schedules" / "results.json"
    assert (run.here.dir / "results.json").read_bytes() == whole.read_bytes()
