"""Headless notebooks: everything checked first, one kernel per notebook, and a stop that loses nothing.

Notebooks run through papermill's Python interface, which is handed checked values, never YAML (`kernel.py`). On
SIGTERM, SIGUSR1 or Ctrl-C a file STOP appears in the run folder; training saves a checkpoint and ends, the remaining
cells still run, and the same command continues later. A second Ctrl-C kills the kernel.
"""

import atexit
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from c2f_utils import threads
from c2f_utils.errors import C2FError, problems, short
from c2f_utils.files import room, root
from c2f_utils.headless import request
from c2f_utils.headless.kernel import Job, execute
from c2f_utils.runs import disk, locks, registry
from c2f_utils.runs.run import PARENTS, Run
from c2f_utils.runs.stage import Stage, run_folder
from c2f_utils.settings import parameters, preflight
from c2f_utils.settings.config import STAGES, Settings
from c2f_utils.settings.load import dotted, load_settings
from c2f_utils.settings.merge_options import OPTIONS

DONE, FAILED, BAD_INPUT, STOPPED, KILLED = 0, 1, 2, 3, 130  # exit codes
_COLUMNS = ("accuracy_last", "accuracy_first", "mean_tokens", "rep4", "eos_rate")


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


def prepare(
    targets: Sequence[str], values: dict[str, object], assignments: Sequence[str] = (), before: Sequence[Job] = ()
) -> list[Job]:
    """The jobs for `targets` (numbers, names or paths of notebooks, or "all"), checked down to the last value.

    `values` holds the standard parameters; `assignments` are `name=value` texts, whose dotted names become
    overrides; the jobs `before` will have been done by then. Raises C2FError for an unknown notebook, parameter,
    profile or setting, a value of the wrong type, a missing earlier stage, and a stage that exists with another
    configuration or is being worked on.
    """
    paths = [path for target in targets for path in notebooks_of(target)]
    declared = {path: parameters.of_notebook(path) for path in paths}
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
    _check_stages(jobs, Run(settings), overwrite, [job.stage for job in before])
    return jobs


def run(jobs: Sequence[Job], thread_count: int | None = None) -> int:
    """Run the jobs one after another, printing a line for each, up to the first that fails; returns the exit code.

    Raises C2FError, and touches nothing, while another command is at work in the same run.
    """
    run_id = jobs[0].values["run_id"]
    with _alone(run_id):
        request.record(jobs)
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
                outcome = execute(job, folder, job.threads or count)
            print(outcome, flush=True)
            if outcome.state in ("failed", "killed"):
                print(f"{outcome.error}\nlog and notebook: {_where(job, folder)}", file=sys.stderr, flush=True)
                died = outcome.exception == "DeadKernelError"  # of itself, as a cell that fails does
                return KILLED if outcome.state == "killed" and not died else FAILED
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
    """The files that a number, a name, a path or "all" stands for; raises C2FError where there is none."""
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


def _check_stages(jobs: Sequence[Job], run: Run, overwrite: bool, planned: list[str]) -> None:
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


def _where(job: Job, folder: Path) -> str:
    refused = folder / f"{job.stage}.refused.ipynb"
    return str(refused if refused.exists() else folder / job.stage / "notebook.ipynb")


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
        atexit.register(_ignore, numbers)
        file.unlink(missing_ok=True)


def _ignore(numbers: Sequence[int]) -> None:
    """Nothing is left to stop: a request that comes while Python ends must not make a finished run look killed."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _probe() -> int:
    """Measure in a process of its own, so that this one, which stays for the whole run, never loads torch."""
    code = "from c2f_utils import threads; print(threads.probe())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root())
    return int(done.stdout) if done.returncode == 0 else 1


def _number(value: object) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
