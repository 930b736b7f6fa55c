"""Coarse training in several processes: the command that each of them runs, and the notebook's side of it.

    accelerate launch --config_file c2f_utils/coarse/launch/ddp.yaml --num_processes 4 -m c2f_utils.coarse run.yaml

`run.yaml` names a run as a notebook's parameters do: `profile`, and optionally `seed`, `run_id`, `overrides`,
`study`. A notebook never touches the processes: with `coarse.processes` above 1, `train` writes that file, starts the
command, and yields the rows of metrics.jsonl as they appear; so a restarted kernel, papermill and a bare shell all
continue from the same checkpoints. Simplified: the run folder is on a file system that all processes see; evaluation
and the sampler's prompts after training are the first process's work.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from c2f_utils.coarse import checkpoints
from c2f_utils.errors import C2FError, problems
from c2f_utils.files import read_jsonl, read_mapping, write_text
from c2f_utils.runs.run import Run
from c2f_utils.settings.config import PROFILES, Settings
from c2f_utils.settings.load import NAMED, load_settings

STAGE = "03_coarse_rlhf"
KEYS = ("profile", "seed", "run_id", "overrides", "study")
POLL = 0.3  # seconds between two looks at the metrics
PATIENCE = 30.0  # seconds that processes get to end on SIGTERM


def read_run(path: Path) -> Settings:
    """Settings named by a run file; raises C2FError for unknown keys and for settings that cannot be used."""
    values = read_mapping(path)
    unknown = [f"{key!r} is not a key of a run file; expected {', '.join(KEYS)}" for key in values if key not in KEYS]
    if "profile" not in values:
        unknown.append(f"there is no 'profile'; expected one of {', '.join(PROFILES)}")
    if unknown:
        raise problems(f"run file {path} cannot be used:", unknown)
    return load_settings(**values)


def write_run(settings: Settings, path: Path) -> None:
    """The run file that `read_run` turns into equal settings."""
    values = settings.model_dump(mode="json")
    named = {key: values.pop(key) for key in ("profile", "seed", "run_id", "study")}
    emptied = {section: {} for section in sorted(NAMED)}  # or the profile's laws would come back
    write_text(path, yaml.safe_dump({**named, "overrides": emptied | values}, sort_keys=False))


def train(run: Run) -> Iterator[dict]:
    """Start the processes for a stage that the caller has begun, and yield each iteration's row as it appears.

    Closing the iterator, or an interrupt, ends the processes; they continue from the last checkpoint next time.
    Raises C2FError with what they said when they fail.
    """
    here, coarse = run.here, run.settings.coarse
    write_run(run.settings, here.path("run.yaml"))
    seen = checkpoints.last_iteration(here.path("checkpoints"))
    write_text(here.path("metrics.jsonl"), "")  # rows up to the checkpoint come back with the first process
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration(coarse.spread))]
    command += ["--num_processes", str(coarse.processes), "--main_process_port", "0"]
    command += ["-m", "c2f_utils.coarse", str(here.path("run.yaml")), "--begun"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(run.threads)}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    )
    log = here.path("processes.log")
    with open(log, "w", encoding="utf-8") as output:
        job = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        ended = False
        while not ended:
            ended = job.poll() is not None  # asked before reading: afterwards no row can follow
            here.stop_requested()  # the processes look, too; this one must remember that it was asked
            for row in read_jsonl(here.path("metrics.jsonl")):
                if row["iteration"] > seen:
                    seen = row["iteration"]
                    yield row
            time.sleep(0 if ended else POLL)
    finally:
        _end(job)
    if job.returncode:
        raise C2FError(f"{coarse.processes} training processes ended with code {job.returncode}: {_reason(log)}")


def configuration(spread: str) -> Path:
    """The launch configuration of accelerate that belongs to `coarse.spread`."""
    return Path(__file__).parents[1] / "coarse" / "launch" / f"{spread}.yaml"


def _end(job: subprocess.Popen) -> None:
    for deadly in (signal.SIGTERM, signal.SIGKILL):
        if job.poll() is not None:
            return
        os.killpg(job.pid, deadly)
        try:
            job.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            continue


def _reason(log: Path) -> str:
    """What a process said about bad input, else the end of the log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("coarse: ")), None)
    if start is None:
        return "\n".join([f"see {log}, which ends with", *lines[-12:]])
    return "\n".join(
        [
            lines[start].removeprefix("coarse: "),
            *itertools.takewhile(lambda line: line.startswith("  - "), lines[start + 1 :]),
        ]
    )
