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

LONG = 2000  # steps of 50 ms: still at work when it is warned
STEPS = (LONG, 80, 81, 82, 83, 84)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    if reason := one_node_slurm.missing():
        pytest.skip(f"no Slurm of this test's own: {reason}")
    monkeypatch.setenv("SLURM_CONF", "")  # the cluster sets it
    try:
        started = one_node_slurm.Slurm(tmp_path / "slurm")
    except AssertionError as error:  # a container without what the daemons need
        pytest.skip(f"Slurm's daemons do not start here: {str(error)[:300]}")
    yield started
    started.stop()


def wait(until, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


@pytest.mark.slurm
def test_preempted_out_of_time_cancelled_and_killed_a_sweep_ends_as_an_undisturbed_one(cluster, outputs, tmp_path):
    project, grid, script = light_project.make(tmp_path / "project"), tmp_path / "s.yaml", tmp_path / "mine.sbatch"
    grid.write_text(f"pretrain.tokens: {list(STEPS)}")
    text = slurm.TEMPLATE.read_text().replace("=04:00:00", "=00:10:00").replace("USR1@300", "USR1@50")
    script.write_text(text)

    def submit() -> str:
        command = ["sweep", "01", "--profile", "smoke", "--grid", str(grid), "--slurm", "--sbatch", str(script)]
        environment = surroundings(outputs) | {"PYTHONPATH": str(project)}
        done = subprocess.run(
            [sys.executable, "-m", "c2f_utils", *command], cwd=project, env=environment, capture_output=True, text=True
        )
        assert done.returncode == jobs.DONE, done.stdout + done.stderr
        return done.stdout

    def at_work(steps: int) -> bool:
        cluster.hurry()
        return bool(progress(steps)) and cluster.queue().get(element(steps)) == "RUNNING"

    def progress(steps: int) -> int:
        path = outputs / f"s-tokens{steps}-s0" / BASE / "checkpoints" / "state.json"
        return read_json(path)["step"] if path.exists() else 0

    def element(steps: int) -> str:
        return f"{job}_{STEPS.index(steps)}"

    def log(steps: int) -> str:
        path = outputs / "s" / "logs" / f"slurm-{element(steps)}.txt"
        return path.read_text() if path.exists() else ""

    def over() -> bool:
        cluster.hurry()
        return not cluster.queue()

    job = submit().split()[1].rstrip(":")
    wait(lambda: at_work(LONG))
    wait(lambda: at_work(80))
    os.kill(read_json(outputs / "s-tokens80-s0" / ".run.claim")["pid"], signal.SIGKILL)
    wait(lambda: at_work(81))
    cluster.said("scancel", element(81))
    wait(lambda: at_work(82))
    cluster.said("sbatch", "--partition=high", "--output=/dev/null", "--cpus-per-task=2", "--wrap=sleep 1")
    wait(lambda: cluster.hurry() or "begun 1 times before" in log(LONG))  # it was preempted with all others
    wait(lambda: at_work(LONG))
    cluster.said("scontrol", "update", f"JobId={element(LONG)}", "TimeLimit=1")  # warned at the controller's next look
    wait(lambda: "DUE TO JOB REQUEUE" in log(LONG))
    cluster.said("scontrol", "update", f"JobId={element(LONG)}", "TimeLimit=10")
    wait(over)
    states = {run["point"]["pretrain.tokens"]: sweeps.state(run)[1] for run in sweep_results.read("s")["runs"]}
    assert states == {LONG: "done", 80: "lost", 81: "stopped", 82: "done", 83: "done", 84: "done"}
    preempted = [text for text in map(log, STEPS) if "DUE TO PREEMPTION" in text]
    assert preempted and all("begun 1 times before" in text for text in preempted)
    assert "exit code 3: stopped on request" in log(LONG) and "begun 2 times before" in log(LONG)
    assert "4 of 6 runs are done already" in submit()
    wait(over)
    record = sweep_results.read("s")
    for run in record["runs"]:
        found = json.loads((outputs / run["run"] / BASE / "results.json").read_text())
        wanted = light_project.value(run["point"]["pretrain.tokens"], 0)
        assert sweeps.is_done(record, run) and found == {"behaviour": {"accuracy_last": wanted}}, run


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


def test_an_element_whose_time_is_up_while_it_waits_for_a_claim_is_requeued(outputs, monkeypatch):
    sweeps.prepare(sweeps.Wanted("s", (BASE,), {}, (0, 1), "smoke", {}))
    handlers, said = {}, []
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(slurm.locks, "holder", lambda *_: {"host": "elsewhere"})
    monkeypatch.setattr(slurm.time, "sleep", lambda _: handlers[signal.SIGUSR1](signal.SIGUSR1, None))
    monkeypatch.setattr(slurm, "_said", said.append)
    for name, value in (("SLURM_ARRAY_JOB_ID", "7"), ("SLURM_ARRAY_TASK_ID", "1")):
        monkeypatch.setenv(name, value)
    assert slurm.work("s", "1") == jobs.STOPPED and said == [["scontrol", "requeue", "7_1"]]


def test_an_element_does_not_start_before_the_run_that_it_comes_after_is_done(outputs, monkeypatch, capsys):
    grid = {"coarse.iterations": [3, 5]}
    sweeps.prepare(sweeps.Wanted("s", ("03_coarse_rlhf",), grid, (0,), "smoke", {}))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sweeps, "start", lambda *_: pytest.fail("it would take stages of other runs"))
    assert slurm.work("s", "1") == jobs.FAILED
    assert "s-s0, which it comes after, is not done" in capsys.readouterr().out
