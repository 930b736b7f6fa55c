"""Sweeps on Slurm: a job array with one run per element, from a batch script that a user may edit.

An element is the runner of one run. USR1, which Slurm sends before the time is up (`--signal=B:USR1@300`), and TERM,
which it sends on preemption and `scancel`, ask the run to stop at its next checkpoint. After USR1 the element requeues
itself; a preempted one is requeued by Slurm (`--requeue`), and a cancelled one is not: the same command submits what is
not done.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from c2f_utils import threads
from c2f_utils.errors import C2FError
from c2f_utils.files import outputs, root, write_text
from c2f_utils.headless import jobs, sweeps
from c2f_utils.report import sweep_results
from c2f_utils.runs import locks, registry
from c2f_utils.runs.stage import run_folder

TEMPLATE = Path(__file__).parent / "slurm_files" / "sweep.sbatch"
_COMMAND = "exec {command}"  # of the batch script
_LOOK = 5.0  # seconds between two looks at a claim


def script(path: str | None = None) -> str:
    """The batch script to fill in; C2FError without Slurm, and for a file that has no place for the command."""
    if not shutil.which("sbatch"):
        raise C2FError("there is no sbatch on this machine: leave --slurm out, or log in where Slurm's commands are")
    try:
        text = Path(path or TEMPLATE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise C2FError(f"--sbatch {path} cannot be read ({error}); expected a batch script") from None
    if text.count(_COMMAND) != 1 or not text.startswith("#!"):
        raise C2FError(f"--sbatch {path}: expected a script that begins with '#!' and says '{_COMMAND}' once")
    return text


def submit(record: dict, text: str, thread_count: int | None = None) -> int:
    """Submit all runs that are not done: those that others come after as one job array, the others as a second.

    Prints the jobs' numbers and returns 0; raises C2FError with what sbatch said when it refuses.
    """
    folder = run_folder(record["sweep"])
    command = [sys.executable, "-m", "c2f_utils", "sweep", "--element", record["sweep"]]
    command = ["env", f"C2F_OUTPUTS={outputs()}", *command]
    filled = text.replace(_COMMAND, f'exec {shlex.join(command)} "$SLURM_ARRAY_TASK_ID"')
    write_text(folder / "sweep.sbatch", filled)
    (folder / "logs").mkdir(exist_ok=True)
    left = {number: run for number, run in enumerate(record["runs"]) if not sweeps.is_done(record, run)}
    arrays = [
        [number for number, run in left.items() if run["point"] is None],
        [number for number, run in left.items() if run["point"] is not None],
    ]
    earlier: list[str] = []  # `afterok` would hold back all seeds for one that failed: each element looks for its own
    for numbers in filter(None, arrays):
        options = [f"--array={','.join(map(str, numbers))}", f"--job-name={record['sweep']}", f"--chdir={root()}"]
        options += [] if "--output" in text else [f"--output={folder}/logs/slurm-%A_%a.txt"]
        options += [f"--cpus-per-task={thread_count}"] if thread_count else []
        options += [f"--dependency=afterany:{earlier[-1]}"] if earlier else []
        earlier.append(_said(["sbatch", "--parsable", *options, str(folder / "sweep.sbatch")]).partition(";")[0])
        print(f"job {earlier[-1]}: {len(numbers)} runs of sweep {record['sweep']!r}", flush=True)
    print(f"{len(record['runs']) - len(left)} of {len(record['runs'])} runs are done already", flush=True)
    return jobs.DONE


def work(name: str, number: str) -> int:
    """Be one element: work on one run of a sweep, hand signals on to it, and requeue if time is up; the exit code."""
    record = sweep_results.read(name)
    runs = record["runs"]
    if not number.isdecimal() or int(number) >= len(runs):
        raise C2FError(f"sweep {name!r} has no run number {number}; expected 0 to {len(runs) - 1}")
    run, seen = runs[int(number)], []
    at_work: list[sweeps.Started] = []

    def hand_on(received: int, _frame: object) -> None:
        seen.append(received)
        for started in at_work:
            started.process.send_signal(signal.SIGTERM)

    for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(each, hand_on)
    if late := next((each for each in runs if each["run"] == run["after"] and not sweeps.is_done(record, each)), None):
        print(f"{run['run']} not started: {late['run']}, which it comes after, is not done", flush=True)
        return jobs.FAILED
    _wait_for_the_dead(run["run"], seen)
    count = threads.requested() or int(os.environ.get("SLURM_CPUS_PER_TASK", 1))
    print(f"{run['run']}, begun {os.environ.get('SLURM_RESTART_COUNT', 0)} times before", flush=True)
    code = jobs.STOPPED
    if not seen:
        at_work.append(sweeps.start(record, run, count))
        code = at_work[0].process.wait()
        print(f"{run['run']} ended with exit code {code}: {at_work[0].reason}", flush=True)
    if code == jobs.STOPPED and signal.SIGUSR1 in seen:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        try:
            _said(["scontrol", "requeue", job])
        except C2FError as error:  # one that was preempted meanwhile is requeued already
            print(error, flush=True)
    return code


def _wait_for_the_dead(run_id: str, seen: list[int]) -> None:
    """A run whose node died is claimed from another machine until its heartbeat is old enough: wait for that, or for a
    signal."""
    deadline = time.monotonic() + locks.LOST
    while not seen and time.monotonic() < deadline:
        other = locks.holder(run_folder(run_id) / ".run.claim", registry.heartbeat_age(run_id))
        if not other or other["host"] == socket.gethostname():
            return
        time.sleep(_LOOK)


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise C2FError(f"{command[0]} refused: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout.strip()
