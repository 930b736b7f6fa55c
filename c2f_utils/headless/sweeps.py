"""Sweeps: a grid of settings times seeds, every point a run of its own, and stages that points share made once.

`outputs/<sweep>/` holds `sweep.json` (the points; written once, before work), the overrides of each run, their logs,
and a STOP file while a stop is asked for. The runs lie beside it: they are runs like others, and a sweep's folder that
is deleted takes none along. Whether a point is done is read off its stages, nowhere else, so the same command continues
a sweep that was stopped, killed or half failed.
"""

import contextlib
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from c2f_utils import threads
from c2f_utils.errors import C2FError, problems, short
from c2f_utils.files import outputs, root, write_json
from c2f_utils.headless import jobs
from c2f_utils.report import sweep_results
from c2f_utils.runs import locks, provenance, registry
from c2f_utils.runs.run import PARENTS
from c2f_utils.runs.stage import ALWAYS_REDONE, Stage, run_folder
from c2f_utils.settings.config import STAGES, Settings
from c2f_utils.settings.load import load_settings

if TYPE_CHECKING:
    import pandas as pd

MOST = 100  # runs, unless more are asked for
BETWEEN = 2.0  # seconds between two starts: kernels that start at once may pick one port
_POLL = 0.2
_PATIENCE = 20.0  # seconds that runs get to end when they are killed
_WORDS = {jobs.DONE: "done", jobs.FAILED: "failed", jobs.BAD_INPUT: "refused", jobs.STOPPED: "stopped"}


@dataclass(frozen=True)
class Wanted:
    """What a sweep is asked for; `grid` maps dotted settings to lists of values."""

    name: str
    notebooks: tuple[str, ...]
    grid: dict[str, list]
    seeds: tuple[int, ...]
    profile: str
    overrides: dict[str, object]
    study: bool = False

    def record(self) -> dict[str, object]:
        """What tells this sweep from another, as JSON."""
        return {
            "sweep": self.name, "notebooks": list(self.notebooks), "profile": self.profile, "study": self.study,
            "overrides": self.overrides, "grid": self.grid, "seeds": list(self.seeds),
        }  # fmt: skip

    def settings(self, seed: int, point: dict[str, object], run_id: str = "lab") -> Settings:
        return load_settings(self.profile, seed, run_id, self.overrides | point, self.study)


def prepare(wanted: Wanted, most: int = MOST) -> dict:
    """The record of a sweep, with all its runs checked as `c2f run` checks them; writes sweep.json if there is none.

    Raises C2FError, before anything is written, for unknown settings, points that are the same, settings that decide
    none of the notebooks, more than `most` runs, and a sweep of that name that is another one.
    """
    folder = run_folder(wanted.name)
    if any(Stage(path).config() for path in folder.glob("[0-9][0-9]_*")):
        raise C2FError(f"{wanted.name!r} is a run already; choose another --name for the sweep")
    known = sweep_results.read(wanted.name) if (folder / sweep_results.FILE).exists() else None
    record = known or wanted.record() | {"runs": _runs(wanted, most)}
    if changed := provenance.differences({key: record.get(key) for key in wanted.record()}, wanted.record()):
        advice = f"choose another --name, or delete {folder / sweep_results.FILE}: runs that are done are found again"
        raise problems(f"sweep {wanted.name!r} exists with other points:", [*changed, advice])
    made, wrong = {run["run"]: run["notebooks"] for run in record["runs"]}, []
    for run in record["runs"]:
        values = {"profile": wanted.profile, "seed": run["seed"], "run_id": run["run"], "study": wanted.study}
        values["overrides"] = _overrides(record, run)
        with contextlib.redirect_stdout(io.StringIO()):  # where inputs come from is said by the runs themselves
            jobs.prepare([*made.get(run["after"], ()), *run["notebooks"]], values)
        wrong += [
            f"{name} in run {run['run']!r} was made from stages with other settings: delete it, and it is made again"
            for name in _foreign(record, run)
        ]
    if wrong:
        raise problems(f"sweep {wanted.name!r} cannot count what is there as its own:", wrong)
    if not known:
        for run in record["runs"]:
            write_json(_overrides_file(wanted.name, run["run"]), _overrides(record, run))
        write_json(folder / sweep_results.FILE, record)
    return record


def _runs(wanted: Wanted, most: int) -> list[dict]:
    """Every run: its id, seed, point, the notebooks that it runs, the run that it comes after, and which stages which
    other runs lend.

    A stage that all points of a seed share goes to a run of its own, `<sweep>-s<seed>` (its point is None); of earlier
    stages only those that no other run has.
    """
    points = [dict(zip(wanted.grid, values, strict=True)) for values in itertools.product(*wanted.grid.values())]
    if len(points) * len(wanted.seeds) > most:
        raise C2FError(
            f"{len(points)} points x {len(wanted.seeds)} seeds are {len(points) * len(wanted.seeds)} runs; --most "
            f"{len(points) * len(wanted.seeds)} allows so many"
        )
    names, needed, runs = _names(wanted, points), _needed(wanted.notebooks), []
    for seed in wanted.seeds:
        keys = [_keys(wanted.settings(seed, point), needed) for point in points]
        _refuse_alike(keys, points, wanted)
        shared = [name for name in keys[0] if len(points) > 1 and all(key[name] == keys[0][name] for key in keys)]
        earlier = [name for name in needed if name not in wanted.notebooks]
        first = wanted.settings(seed, points[0])
        lent = {name: run for name in shared if name in earlier and (run := _lender(name, first))}
        before = [name for name in shared if name not in lent]
        common = f"{wanted.name}-s{seed}"
        if before:
            runs.append({"run": common, "seed": seed, "point": None, "notebooks": before, "after": None, "lent": lent})
        for name, point in zip(names, points, strict=True):
            own = [stage for stage in needed if stage not in shared]
            run_id = f"{wanted.name}-{name}-s{seed}" if name else common
            after = common if before else None
            runs.append({"run": run_id, "seed": seed, "point": point, "notebooks": own, "after": after, "lent": lent})
    for run in runs:
        run_folder(run["run"])
    return runs


def _needed(notebooks: Sequence[str]) -> list[str]:
    """The notebooks and all stages that they build on, in order."""
    found = set(notebooks)
    while more := {parent for name in found for parent in PARENTS[name]} - found:
        found |= more
    return [name for name in STAGES if name in found]


def _keys(settings: Settings, needed: Sequence[str]) -> dict[str, str]:
    """What decides each stage: its own settings and what decides those that it builds on. Stages that are always
    redone speak of their own run and have none."""
    keys: dict[str, str] = {}
    for name in needed:
        if name not in ALWAYS_REDONE:
            keys[name] = provenance.fingerprint([settings.for_stage(name), [keys[p] for p in PARENTS[name]]])
    return keys


def _refuse_alike(keys: list[dict], points: list[dict], wanted: Wanted) -> None:
    seen: dict[str, dict] = {}
    for key, point in zip(keys, points, strict=True):
        same = seen.setdefault(provenance.fingerprint(key), point)
        if same is not point:
            raise C2FError(
                f"the points {short(same)} and {short(point)} are the same to {', '.join(wanted.notebooks)}: leave one "
                "out, or name a notebook that the setting decides"
            )


def _lender(name: str, settings: Settings) -> str | None:
    """The run that has this stage done with exactly these settings, and on earlier stages of which that is true."""
    found = registry.latest(name, settings.profile, settings.seed, settings.for_stage(name))
    return found.run_id if found is not None and _is_as_wanted(found, settings) else None


def _is_as_wanted(stage: Stage, settings: Settings, unknown: bool = False) -> bool:
    """Whether a stage and all that it was made from have these settings; `unknown` is the answer where that is gone."""
    config, wanted = None if stage.damage() else stage.config(), settings.for_stage(stage.name)
    if not config:
        return unknown
    if settings.recorded(config["settings"], stage.name) != wanted:
        return False
    origins = stage.provenance().get("parents", {})
    earlier = [Stage(run_folder(origins[name]) / name) for name in PARENTS[stage.name] if name in origins]
    whole = unknown or len(earlier) == len(PARENTS[stage.name])
    return whole and all(_is_as_wanted(each, settings, unknown) for each in earlier)


def _names(wanted: Wanted, points: list[dict]) -> list[str]:
    """A short word for each point, of the last part of each setting and its value; numbers where that is too long or
    not unique; nothing for the only point."""
    if len(points) == 1:
        return [""]
    moving = [key for key, values in wanted.grid.items() if len(values) > 1]
    found = ["-".join(f"{key.rpartition('.')[2]}{_word(point[key])}" for key in moving) for point in points]
    longest = max(len(f"{wanted.name}-{name}-s{seed}") for name in found for seed in wanted.seeds)
    if longest <= 64 and len({name.lower() for name in found}) == len(found):
        return found
    return [f"p{number:0{len(str(len(points)))}}" for number in range(1, len(points) + 1)]


def _word(value: object) -> str:
    if isinstance(value, dict):
        value = value.get("name", "")
    if isinstance(value, list):
        return "-".join(map(_word, value))
    return re.sub(r"[^A-Za-z0-9.-]+", "-", f"{value:g}" if isinstance(value, float) else str(value))


def _overrides(record: dict, run: dict) -> dict[str, object]:
    """What a run sets; one whose stages all points share, what the first point does."""
    first = {key: values[0] for key, values in record["grid"].items()}
    return record["overrides"] | (first if run["point"] is None else run["point"])


def _overrides_file(sweep: str, run_id: str) -> Path:
    return run_folder(sweep) / "overrides" / f"{run_id}.json"


# Where a sweep stands


def state(run: dict) -> tuple[str, str]:
    """The stage a run of the sweep has reached and that stage's state; `waiting` before the first has begun."""
    name, found = run["notebooks"][0], None
    for name in run["notebooks"]:
        found = Stage(run_folder(run["run"]) / name).state()
        if found != "done":
            break
    return name, found or "waiting"


def is_done(record: dict, run: dict) -> bool:
    """Whether every stage of the run is done, each as the sweep wants it."""
    return state(run)[1] == "done" and not _foreign(record, run)


def _foreign(record: dict, run: dict) -> list[str]:
    """The finished stages of a run that have other settings than the sweep's, or were made from some that have."""
    settings = load_settings(record["profile"], run["seed"], run["run"], _overrides(record, run), record["study"])
    stages = [Stage(run_folder(run["run"]) / name) for name in run["notebooks"] if name not in ALWAYS_REDONE]
    return [stage.name for stage in stages if stage.done and not _is_as_wanted(stage, settings, unknown=True)]


def table(name: str) -> "pd.DataFrame":
    """One row per run of a sweep, shared ones among them: point, seed, how far it is, and its metrics so far."""
    import pandas as pd

    record, found = sweep_results.read(name), sweep_results.sweep_results(name)
    rows = [{"run": run["run"], **dict(zip(("at", "status"), state(run), strict=True))} for run in record["runs"]]
    kept = [*sweep_results.settings_of(found), *sweep_results.metrics_of(found)]
    return pd.DataFrame(rows).merge(found[["run", *kept]], on="run", how="left")


# Work


@dataclass
class Started:
    """A run of the sweep at work in a process of its own."""

    run: dict
    process: subprocess.Popen
    log: IO[str]
    since: float

    @property
    def reason(self) -> str:
        """The last thing it said, other than where its log is."""
        lines = Path(self.log.name).read_text(encoding="utf-8", errors="replace").split("\n")
        said = (line.strip() for line in reversed(lines) if line.strip() and not line.startswith("log and notebook:"))
        return next(said, "")


def start(record: dict, run: dict, thread_count: int, device: str | None = None) -> Started:
    """Start `c2f run` for one run of a sweep, apart from the terminal's signals; its output goes to `logs/`."""
    path = run_folder(record["sweep"]) / "logs" / f"{run['run']}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open(path, "a", encoding="utf-8")
    command = [sys.executable, "-m", "c2f_utils", "run", *run["notebooks"], "--run-id", run["run"]]
    command += ["--profile", record["profile"], "--seed", str(run["seed"]), "--threads", str(thread_count)]
    command += ["--overrides", str(_overrides_file(record["sweep"], run["run"])), *["--study"] * record["study"]]
    environment = os.environ | {"C2F_OUTPUTS": str(outputs())}
    environment |= {"CUDA_VISIBLE_DEVICES": device} if device is not None else {}
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, cwd=root(),
        start_new_session=True,
    )  # fmt: skip
    return Started(run, process, log, time.monotonic())


def run(record: dict, workers: int, devices: Sequence[str] = (), thread_count: int | None = None) -> int:
    """Work on all runs that are not done, `workers` at a time, each on a device of its own in turn; the exit code.

    A run that fails does not stop the others, only those that come after it. SIGTERM, SIGUSR1, Ctrl-C or a file STOP
    in the sweep's folder stop all gracefully, a second Ctrl-C kills. Raises C2FError while another command is at work
    on the sweep.
    """
    folder = run_folder(record["sweep"])
    claim = folder / ".sweep.claim"
    ages = [registry.heartbeat_age(each["run"]) for each in record["runs"]]
    if other := locks.take(claim, min((age for age in ages if age is not None), default=None)):
        raise C2FError(
            f"sweep {record['sweep']!r} is being worked on by process {other['pid']} on {other['host']}; wait for it, "
            "stop it, or choose another --name"
        )
    count = thread_count or threads.requested() or max(1, threads.available() // workers)
    words = f"{workers} at a time, {count} CPU thread{'s' if count > 1 else ''} each"
    print(f"sweep {record['sweep']!r} in {folder}: {len(record['runs'])} runs, {words}", flush=True)
    try:
        with jobs.signals(folder / "STOP") as stop:
            code = _Pool(record, workers, devices, count, stop).work()
    finally:
        locks.release(claim)
    done = sum(is_done(record, each) for each in record["runs"])
    print(f"{done} of {len(record['runs'])} runs are done")
    if code != jobs.DONE:
        print(f"the same command continues; c2f sweep --table {record['sweep']} shows where they stand")
    return code


class _Pool:
    """Runs at work, each in the slot of a worker."""

    def __init__(self, record: dict, workers: int, devices: Sequence[str], count: int, stop: jobs.Stop) -> None:
        self.record, self.devices, self.count, self.stop = record, devices, count, stop
        self.free = list(range(workers))
        self.active: dict[int, Started] = {}
        self.again: set[str] = set()  # those whose kernel did not start
        self.waiting = [run for run in record["runs"] if not is_done(record, run)]
        self.over = {run["run"] for run in record["runs"] if run not in self.waiting}  # those that are done
        self.width = max(len(run["run"]) for run in record["runs"])
        self.stopping, self.failed = False, False

    def work(self) -> int:
        """Until nothing is left to do, or to wait for after a stop; the exit code."""
        last = -BETWEEN
        try:
            while self.active or (self.waiting and not self.stopping):
                self._collect()
                if not self.stopping and self.stop.file.exists():
                    self.stopping = True
                    self._signal(signal.SIGTERM)
                ready = next((run for run in self.waiting if run["after"] in (None, *self.over)), None)
                if ready and self.free and not self.stopping and time.monotonic() - last >= BETWEEN:
                    last = time.monotonic()
                    self._start(ready)
                time.sleep(_POLL)
        except KeyboardInterrupt:
            self._signal(signal.SIGINT)  # their second signal: they kill their kernels
            for started in self.active.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.process.wait(_PATIENCE)
            self._signal(signal.SIGKILL)
            return jobs.KILLED
        finally:
            self._signal(signal.SIGTERM)
        if self.failed:
            return jobs.FAILED
        return jobs.DONE if len(self.over) == len(self.record["runs"]) else jobs.STOPPED

    def _start(self, run: dict) -> None:
        self.waiting.remove(run)
        slot = self.free.pop(0)
        device = self.devices[slot % len(self.devices)] if self.devices else None
        self.active[slot] = start(self.record, run, self.count, device)

    def _collect(self) -> None:
        for slot, started in list(self.active.items()):
            code = started.process.poll()
            if code is None:
                continue
            del self.active[slot]
            self.free.append(slot)
            started.log.close()
            name, seconds = started.run["run"], time.monotonic() - started.since
            if code == jobs.KILLED and not self.stopping and name not in self.again:
                self.again.add(name)
                self.waiting.insert(0, started.run)
                continue
            code = jobs.STOPPED if code == -signal.SIGTERM and self.stopping else code  # before it began
            self.failed |= code not in (jobs.DONE, jobs.STOPPED)
            said = "" if code in (jobs.DONE, jobs.STOPPED) else f"  {started.reason}"
            print(f"{name:{self.width}}  {_WORDS.get(code, 'killed'):8}{seconds:8.1f} s{said}", flush=True)
            if is_done(self.record, started.run):
                self.over.add(name)
                continue
            for after in [run for run in self.waiting if run["after"] == name]:  # it would take other runs' stages
                self.waiting.remove(after)
                print(
                    f"{after['run']:{self.width}}  not started: {name}, which it comes after, is not done", flush=True
                )

    def _signal(self, number: int) -> None:
        for started in self.active.values():
            if started.process.poll() is None:
                started.process.send_signal(number)
