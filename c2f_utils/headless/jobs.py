"""Headless notebooks: everything checked first, one kernel per notebook, and a stop that loses nothing.

Notebooks run through papermill's Python interface, which is handed checked values, never YAML. Whether a stage is done
is read from its own status.json: papermill's notebook metadata says `completed` even for a kernel that was killed. On
SIGTERM, SIGUSR1 or Ctrl-C a file STOP appears in the run folder; training saves a checkpoint and ends, the remaining
cells still run, and the same command continues later. A second Ctrl-C kills the kernel.
"""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from c2f_utils import threads
from c2f_utils.errors import C2FError, CannotWrite, Stopped, problems, short
from c2f_utils.files import outputs, room, root
from c2f_utils.runs import disk, locks, registry
from c2f_utils.runs.run import PARENTS, Run
from c2f_utils.runs.stage import Stage, run_folder
from c2f_utils.settings import parameters, preflight
from c2f_utils.settings.config import STAGES, Settings
from c2f_utils.settings.load import dotted, load_settings
from c2f_utils.settings.merge_options import OPTIONS

DONE, FAILED, BAD_INPUT, STOPPED, KILLED = 0, 1, 2, 3, 130  # exit codes
_NOISE = re.compile(
    r"Kernel is running over TCP without encryption|IProgress not found|TqdmWarning|notebook_tqdm|it/s\]|s/it\]"
)
_COLUMNS = ("accuracy_last", "accuracy_first", "mean_tokens", "rep4", "eos_rate")


@dataclass(frozen=True)
class Job:
    """A notebook to run and the parameter values for it."""

    notebook: Path
    stage: str
    values: dict[str, object]


@dataclass
class Outcome:
    """How a notebook ended: done, stopped, failed or killed; seconds, the kernel's peak memory in MiB, the error."""

    state: str
    seconds: float = 0.0
    peak_mb: float | None = None
    error: str = ""

    def __str__(self) -> str:
        memory = f"{self.peak_mb:6.0f} MB" if self.peak_mb else ""
        return f"{self.state:8}{self.seconds:8.1f} s  {memory}".rstrip()


@dataclass
class Stop:
    """What the signals asked for."""

    file: Path
    asked: int = field(default=0)

    def __call__(self, number: int, _frame: object) -> None:
        self.asked += 1
        self.file.touch()
        if number == signal.SIGINT and self.asked > 1:
            raise KeyboardInterrupt
        hint = " (Ctrl-C again kills)" if number == signal.SIGINT else ""
        print(f"\nstopping after the next checkpoint{hint} ...", file=sys.stderr, flush=True)


def prepare(targets: Sequence[str], values: dict[str, object], assignments: Sequence[str] = ()) -> list[Job]:
    """The jobs for `targets` (numbers, names or paths of notebooks, or "all"), checked down to the last value.

    `values` holds the standard parameters; `assignments` are `name=value` texts, whose dotted names become
    overrides. Raises C2FError for an unknown notebook, parameter, profile or setting, a value of the wrong type, a
    missing earlier stage, and a stage that exists with another configuration or is being worked on.
    """
    notebooks = [path for target in targets for path in notebooks_of(target)]
    declared = {path: parameters.of_notebook(path) for path in notebooks}
    anywhere = {name: item for found in declared.values() for name, item in found.items()}
    _refuse_twice(values.get("overrides", {}), assignments)
    given = _assigned(assignments, anywhere)
    overrides = {**values.get("overrides", {}), **given.pop("overrides", {})}
    standard = {name: item.default for name, item in parameters.STANDARD.items()}
    chosen = {**standard, **values, **given, "overrides": overrides}
    wrong, jobs = parameters.check(anywhere, chosen), []
    for path, known in declared.items():
        jobs.append(Job(path, path.stem, {name: value for name, value in chosen.items() if name in known}))
        lacking = [name for name in standard if name not in known]
        wrong += [f"{path.name} does not declare the parameter {name!r}" for name in lacking]
    if wrong:
        raise problems("the parameters cannot be used:", wrong)
    overwrite = chosen["overwrite"]
    settings = load_settings(**{name: chosen[name] for name in standard if name != "overwrite"})
    registry.refuse_unknown(chosen.get("runs", ()), besides=settings.run_id)
    if name := chosen.get("sweep"):
        from c2f_utils.report import sweep_results

        sweep_results.read(name)
    _check_operators(jobs, settings)
    _check_stages(jobs, Run(settings), overwrite)
    return jobs


def run(jobs: Sequence[Job], thread_count: int | None = None) -> int:
    """Run the jobs one after another, printing a line for each, up to the first that fails; returns the exit code.

    Raises C2FError, and touches nothing, while another command is at work in the same run.
    """
    run_id = jobs[0].values["run_id"]
    with _alone(run_id):
        return _one_by_one(jobs, run_id, thread_count)


def _one_by_one(jobs: Sequence[Job], run_id: str, thread_count: int | None) -> int:
    folder = run_folder(run_id)
    count = thread_count or threads.requested() or registry.threads_of(run_id) or _probe()
    print(f"run {run_id!r} in {folder}, {count} CPU thread{'s' if count > 1 else ''}", flush=True)
    started = time.perf_counter()
    with signals(folder / "STOP") as stop:
        for job in jobs:
            print(f"{job.stage:28}", end="", flush=True)
            with room(folder):  # the log and the executed notebook are written here; the stage is then continued
                outcome = _execute(job, folder, count)
            print(outcome, flush=True)
            if outcome.state in ("failed", "killed"):
                print(f"{outcome.error}\nlog and notebook: {_where(job, folder)}", file=sys.stderr, flush=True)
                return KILLED if outcome.state == "killed" else FAILED
            if outcome.state == "stopped" or stop.asked or stop.file.exists():
                print("stopped on request; the same command continues", flush=True)
                return STOPPED
    if len(jobs) > 1:
        print(f"{'total':28}{'':8}{time.perf_counter() - started:8.1f} s")
    if any(job.stage == "08_report" for job in jobs):
        print(summary(run_id))
    return DONE


def summary(run_id: str) -> str:
    """The models of 07_evaluation at temperature 1 as a text table, and where the report is; says what is missing."""
    folder = run_folder(run_id)
    lines = []
    stage = Stage(folder / "07_evaluation")
    if (stage.dir / "results.json").is_file():
        lines += ["", f"{'model':22}" + "".join(f"{name:>16}" for name in _COLUMNS)]
        for name, found in stage.results()["models"].items():
            metrics = found.get("sampled_t1") or {}
            lines.append(f"{name:22}" + "".join(f"{_number(metrics.get(column)):>16}" for column in _COLUMNS))
    else:
        lines.append("no 07_evaluation/results.json")
    reports = [path for kind in ("html", "md") if (path := folder / "report" / f"report.{kind}").is_file()]
    return "\n".join([*lines, "", f"report: {reports[0] if reports else 'none yet; run 08_report'}"])


def notebooks_folder() -> Path:
    """Where the notebooks are: `notebooks/` of the project."""
    return root() / "notebooks"


def notebooks_of(target: str) -> list[Path]:
    folder = notebooks_folder()
    if target.endswith(".ipynb"):
        found = [Path(target)]
    elif target == "all":
        found = [folder / f"{stage}.ipynb" for stage in STAGES]
    else:
        names = [stage for stage in STAGES if target == stage or target.isdecimal() and target.zfill(2) == stage[:2]]
        if not names:
            raise C2FError(f"there is no notebook {target!r}; expected all, a number, or one of {', '.join(STAGES)}")
        found = [folder / f"{names[0]}.ipynb"]
    missing = [str(path) for path in found if not path.is_file()]
    if missing:
        raise C2FError(f"no such notebook: {', '.join(missing)}; run c2f inside the project folder")
    return found


def _refuse_twice(of_file: dict[str, object], assignments: Sequence[str]) -> None:
    """Raise C2FError if two `-p`, or one and the overrides file, set the same thing or a part of it."""
    seen = dict.fromkeys(dotted(of_file), "--overrides")
    for text in assignments:
        name, _, value = text.partition("=")
        found = parameters.literal(value) if name == "overrides" else None
        for mine in dotted(found) if isinstance(found, dict) else [name]:
            for other, where in seen.items():
                if f"{mine}.".startswith(f"{other}.") or f"{other}.".startswith(f"{mine}."):
                    raise C2FError(f"-p {short(text)}: {other} is given by {where}, too; keep one")
        seen |= dict.fromkeys(dotted(found) if isinstance(found, dict) else [name], "another -p")


def _assigned(assignments: Sequence[str], known: dict[str, parameters.Parameter]) -> dict[str, object]:
    values: dict[str, object] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise C2FError(f"-p {short(text)}: expected name=value, e.g. -p seed=1 or -p coarse.iterations=5")
        if "." in name or name == "overrides":
            found = parameters.literal(value)
            if name == "overrides" and not isinstance(found, dict):
                raise C2FError(f"-p {short(text)}: expected a dict, e.g. -p \"overrides={{'coarse.iterations': 5}}\"")
            values.setdefault("overrides", {}).update(found if name == "overrides" else {name: found})
        else:
            values[name] = known[name].parse(value) if name in known else value
    return values


def _check_operators(jobs: Sequence[Job], settings: Settings) -> None:
    """An operator that is none of ours must at least be spoken of where it would be registered."""
    for job in jobs:
        text = job.notebook.read_text(encoding="utf-8") if job.stage == "06_residue_merging" else ""
        if text and (strange := [name for name in preflight.strange_operators(settings) if name not in text]):
            raise C2FError(
                f"there is no merge operator {short(strange[0])}, and {job.notebook} registers none of that name; "
                f"known: {', '.join(OPTIONS)}"
            )


def _check_stages(jobs: Sequence[Job], run: Run, overwrite: bool) -> None:
    planned: list[str] = []
    for job in jobs:
        if job.stage not in PARENTS:
            raise C2FError(f"{job.notebook} belongs to no stage; expected a file name among {', '.join(PARENTS)}")
        if not overwrite:
            run.refuse_mixture(job.stage)
        # What an earlier job is about to make cannot be compared yet; the notebook itself does it.
        inputs, _ = run.inputs(job.stage, expected=planned)
        action = run.stage(job.stage).plan(inputs, overwrite)
        if action != "load" and (needed := run.stage(job.stage).disk_needed()) >= 1e9:
            print(f"{job.stage} will write about {needed / 1e9:.0f} GB; {disk.free(run.dir) / 1e9:.0f} GB are free")
        planned.append(job.stage)


@contextlib.contextmanager
def _alone(run_id: str) -> Iterator[None]:
    """Claim the run, whose STOP file and logs two commands would share."""
    claim = run_folder(run_id) / ".run.claim"
    if other := locks.take(claim, registry.heartbeat_age(run_id)):
        raise C2FError(
            f"run {run_id!r} is being worked on by the command of process {other['pid']} on {other['host']}; wait for "
            "it, stop it, or choose another run_id (--run-id)"
        )
    try:
        yield
    finally:
        locks.release(claim)


def _execute(job: Job, folder: Path, count: int) -> Outcome:
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    live, log = folder / f"{job.stage}.running.ipynb", folder / f"{job.stage}.running.log"
    seen: dict[str, float] = {}
    began, start = datetime.now(UTC), time.perf_counter()
    outcome = Outcome("done")
    with open(log, "w", encoding="utf-8") as handle, _papermill_log(handle):
        try:
            papermill.execute_notebook(
                str(job.notebook).replace("{", "{{").replace("}", "}}"),  # papermill formats paths
                str(live).replace("{", "{{").replace("}", "}}"),
                job.values,
                kernel_name="python3",
                progress_bar=False,
                stdout_file=handle,
                stderr_file=handle,
                start_timeout=300,
                iopub_timeout=120,
                cwd=str(root()),
                kernel_manager_class=_kernel_manager(_environment(count), handle, seen),
            )
        except PapermillExecutionError as error:
            sentence = error.ename in (C2FError.__name__, CannotWrite.__name__)
            what = str(error.evalue) if sentence else f"{error.ename}: {error.evalue}"
            state = "stopped" if error.ename == Stopped.__name__ else "failed"
            outcome = Outcome(state, error=f"cell {error.exec_count} failed: {what}")
        except DeadKernelError:
            outcome = Outcome("failed", error="kernel died (out of memory?)")
        except RuntimeError as error:
            if not str(error).startswith("Kernel "):  # what the client says of one that never answered
                raise
            why = "killed while it started (out of memory?); the same command tries again"
            outcome = Outcome("killed", error=f"the notebook's kernel was {why}. {error}")
        except KeyboardInterrupt:
            outcome = Outcome("killed", error="killed on request")
    outcome.seconds = time.perf_counter() - start
    stage = Stage(folder / job.stage)
    status = {} if stage.damage() else stage.status()
    # A stage that another process began meanwhile is not this kernel's to end, nor is its notebook.
    ours = outcome.state == "done" or registry.began_since(stage, began) and status["pid"] == seen.get("pid")
    if ours and outcome.state != "done":
        stage.fail(outcome.error)
    elif status.get("status") == "stopped":
        outcome.state = "stopped"
    elif outcome.state == "done" and status.get("status") != "done":
        outcome.state, outcome.error = "failed", f"{job.stage} ended without finish(): its status is {stage.state()}"
    outcome.peak_mb = seen.get("peak_mb") or (status.get("peak_mb") if ours else None)
    _keep(live, log, stage.dir if ours and stage.dir.is_dir() else None)
    return outcome


def _keep(live: Path, log: Path, folder: Path | None) -> None:
    """Move the executed notebook and its log into the stage's folder; without one they stay as `.refused`."""
    text = "".join(
        line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if not _NOISE.search(line)
    )
    log.unlink()
    target = folder / "log.txt" if folder else log.with_name(log.name.replace(".running.", ".refused."))
    with open(target, "a" if folder else "w", encoding="utf-8") as handle:
        handle.write(text)
    if live.exists():
        refused = live.with_name(live.name.replace(".running.", ".refused."))
        live.replace(folder / "notebook.ipynb" if folder else refused)


def _where(job: Job, folder: Path) -> str:
    refused = folder / f"{job.stage}.refused.ipynb"
    return str(refused if refused.exists() else folder / job.stage / "notebook.ipynb")


def _environment(count: int) -> dict[str, str]:
    return os.environ | {
        "C2F_BATCH": "1",
        "C2F_HEADLESS": "1",
        "C2F_OUTPUTS": str(outputs()),
        "C2F_THREADS": str(count),
        "OMP_NUM_THREADS": str(count),
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's python3 kernel, not one registered in the home folder
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "TQDM_DISABLE": "1",
    }


def _kernel_manager(environment: dict[str, str], log: IO[str], seen: dict[str, float]) -> type:
    """A kernel manager class that gives the kernel its environment, keeps its messages, and notes its process and peak
    memory."""
    from jupyter_client import AsyncKernelManager

    class Manager(AsyncKernelManager):
        async def start_kernel(self, **kwargs: object) -> None:
            await super().start_kernel(**kwargs | {"env": environment, "stdout": log, "stderr": log})
            seen["pid"] = getattr(self.provisioner, "pid", None)

        async def shutdown_kernel(self, **kwargs: object) -> None:
            process = getattr(self.provisioner, "process", None)
            with contextlib.suppress(OSError, IndexError, AttributeError):  # only Linux tells
                status = Path(f"/proc/{process.pid}/status").read_text()
                seen["peak_mb"] = int(status.split("VmHWM:")[1].split()[0]) / 1024
            await super().shutdown_kernel(**kwargs)

    return Manager


@contextlib.contextmanager
def _papermill_log(handle: IO[str]) -> Iterator[None]:
    logger, handler = logging.getLogger("papermill"), logging.StreamHandler(handle)
    handler.handleError = lambda record: None  # a full disk is said once, by the notebook that cannot be written
    before, logger.handlers, logger.propagate = logger.handlers, [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before, True


@contextlib.contextmanager
def signals(file: Path) -> Iterator[Stop]:
    """Turn signals into a STOP file while the block runs; one left over from before is removed first."""
    file.unlink(missing_ok=True)
    stop = Stop(file)
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        file.unlink(missing_ok=True)


def _probe() -> int:
    """Measure in a process of its own, so that this one, which stays for the whole run, never loads torch."""
    code = "from c2f_utils import threads; print(threads.probe())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root())
    return int(done.stdout) if done.returncode == 0 else 1


def _number(value: object) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
