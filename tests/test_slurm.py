"""A sweep on a real Slurm: preempted, out of time, cancelled and killed, it ends with the results of an undisturbed
one."""

import json
import os
import signal
import subprocess
import sys
import time

import light_project
import one_node_slurm
import pytest
from finished_runs import surroundings
from light_project import BASE

from c2f_utils.__main__ import main
from c2f_utils.files import read_json
from c2f_utils.headless import jobs, slurm, sweeps
from c2f_utils.report import sweep_results

LONG = 500  # steps of 50 ms: more than may pass before the time of a job is nearly up
STEPS = (100, 101, 102, 103, 104, LONG)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    if reason := one_node_slurm.missing():
        pytest.skip(f"no Slurm of this test's own: {reason}")
    monkeypatch.setenv("SLURM_CONF", "")  # the cluster sets it
    started = one_node_slurm.Slurm(tmp_path / "slurm")
    yield started
    started.stop()


def wait(until, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


@pytest.mark.slurm
def test_preempted_out_of_time_cancelled_and_killed_a_sweep_ends_as_an_undisturbed_one(cluster, outputs, tmp_path):
    project, grid, script = light_project.make(tmp_path / "project"), tmp_path / "s.yaml", tmp_path / "mine.sbatch"
    grid.write_text(f"pretrain.tokens: {list(STEPS)}")
    # Slurm looks at the clock twice a minute, and warns half a minute early: these jobs are warned at the first look.
    text = slurm.TEMPLATE.read_text().replace("=04:00:00", "=00:01:00").replace("USR1@300", "USR1@50")
    script.write_text(text)

    def submit() -> str:
        command = ["sweep", "01", "--profile", "smoke", "--grid", str(grid), "--slurm", "--sbatch", str(script)]
        environment = surroundings(outputs) | {"PYTHONPATH": str(project)}
        done = subprocess.run(
            [sys.executable, "-m", "c2f_utils", *command], cwd=project, env=environment, capture_output=True, text=True
        )
        assert done.returncode == jobs.DONE, done.stdout + done.stderr
        return done.stdout

    def begun(steps: int) -> bool:
        return (outputs / f"s-tokens{steps}-s0" / BASE / "checkpoints" / "state.json").exists()

    def element(steps: int) -> str:
        return f"{job}_{STEPS.index(steps)}"

    job = submit().split()[1].rstrip(":")
    wait(lambda: begun(100) and begun(101))
    cluster.said("sbatch", "--partition=high", "--output=/dev/null", "--wrap=sleep 1")
    wait(lambda: [cluster.queue().get(element(steps)) for steps in (100, 101)].count("RUNNING") == 1)
    wait(lambda: begun(102) and begun(103), 90)
    cluster.said("scancel", element(102))
    os.kill(read_json(outputs / "s-tokens103-s0" / BASE / "status.json")["pid"], signal.SIGKILL)
    wait(lambda: not cluster.queue(), 120)
    states = {run["point"]["pretrain.tokens"]: sweeps.state(run)[1] for run in sweep_results.read("s")["runs"]}
    assert {steps for steps, state in states.items() if state != "done"} == {102, 103}, states
    logs = {path.name: path.read_text() for path in (outputs / "s" / "logs").glob("slurm-*.txt")}
    again = {name.split("_")[1].split(".")[0]: text.count("begun 1 times before") for name, text in logs.items()}
    assert again[str(STEPS.index(LONG))] == 1, "it was warned, stopped and requeued itself"
    assert again["0"] + again["1"] >= 1, "one of the first two was preempted"
    assert "4 of 6 runs are done already" in submit()
    wait(lambda: not cluster.queue())
    for run in sweep_results.read("s")["runs"]:
        found = json.loads((outputs / run["run"] / BASE / "results.json").read_text())
        wanted = light_project.value(run["point"]["pretrain.tokens"], 0)
        assert sweeps.is_done(run) and found == {"behaviour": {"accuracy_last": wanted}}, run


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("#!/bin/bash\nexec python run.py", "says 'exec {command}' once"),
        ("{command}", "begins with '#!'"),
    ],
)
def test_a_batch_script_that_cannot_be_used_is_refused(outputs, tmp_path, monkeypatch, capsys, text, said):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.touch(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
    if text is not None:
        (tmp_path / "mine.sbatch").write_text(text)
    command = ["sweep", "01", "--name", "s", "--profile", "smoke", "--slurm", "--sbatch", str(tmp_path / "mine.sbatch")]
    assert main(command) == jobs.BAD_INPUT
    assert said in capsys.readouterr().err and list(outputs.iterdir()) == []


def test_without_slurm_the_command_says_so(outputs, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main(["sweep", "01", "--name", "s", "--profile", "smoke", "--slurm"]) == jobs.BAD_INPUT
    assert "there is no sbatch on this machine" in capsys.readouterr().err and list(outputs.iterdir()) == []
