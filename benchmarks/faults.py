"""Faults that must lose nothing: stages of profile smoke killed, stopped, starved and misled, then run once more.

    python benchmarks/faults.py --kills 100 --out benchmarks/results/faults.json

Every trial runs one stage in a folder of its own, disturbs it, and gives the same command again. Counted are results
that are *lost* (the second command does not end well), that *differ* from an undisturbed run's, that are *half*
(written under their final name before they were whole), and *tracebacks* among what the commands say. A disturbance
that has no effect (a signal after the end) is a trial, too. `--whole` takes a finished run in place of making one.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import psutil

from c2f_utils.files import read_json, write_json
from c2f_utils.runs import provenance
from c2f_utils.settings.config import STAGES

ROOT = Path(__file__).parents[1]
NINE = STAGES[:9]
RUN = "r"
PATIENCE = 300.0  # seconds
KILLED = ("kernel", "runner", "both")
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
WRONG_PARENTS = ("missing", "cut", "four bytes")
WITH_PARENTS = ("02_reward_model", "03_coarse_rlhf", "05_instruction_model", "06_residue_merging", "07_evaluation")
FOLDER = "/proc/c2f"  # a folder that nobody can make, not even root


@dataclass
class Trial:
    """What came of one disturbance; `said` is the end of what the commands said, where anything is wrong."""

    fault: str
    stage: str
    moment: float = 0.0
    exit: int | None = None
    lost: bool = False
    differs: bool = False
    half: bool = False
    traceback: bool = False
    waited: float = 0.0
    said: str = ""

    @property
    def good(self) -> bool:
        return not (self.lost or self.differs or self.half or self.traceback)


@dataclass
class Bench:
    """The undisturbed run, and a folder in which every trial gets one of its own."""

    whole: Path
    scratch: Path

    def before(self, stage: str) -> Path:
        """An outputs folder with everything that comes before a stage."""
        outputs = Path(tempfile.mkdtemp(dir=self.scratch))
        (outputs / RUN).mkdir()
        for name in (name for name in NINE if name < stage):
            shutil.copytree(self.whole / name, outputs / RUN / name, ignore=shutil.ignore_patterns("checkpoints"))
        return outputs

    def seconds(self, stage: str) -> float:
        """How long the command takes, about: the stage, and starting a runner and a kernel."""
        status = read_json(self.whole / stage / "status.json")
        began, ended = (datetime.fromisoformat(status[key]) for key in ("started", "finished"))
        return (ended - began).total_seconds() + 6

    def same(self, stage: str, outputs: Path) -> bool:
        """Whether the results are those of the undisturbed run, bit for bit."""
        here, there = (folder / stage / "results.json" for folder in (outputs / RUN, self.whole))
        if stage != "08_report":
            return here.exists() and here.read_bytes() == there.read_bytes()
        ours, theirs = (read_json(folder / "report" / "manifest.json") for folder in (outputs / RUN, self.whole))
        return list(ours["results"].values()) == list(theirs["results"].values()) and not ours["missing"]


def start(stage: str, outputs: object, root: Path = ROOT, **options: object) -> subprocess.Popen:
    """`c2f run` of one stage on one thread, without network."""
    environment = os.environ | {
        "C2F_OUTPUTS": str(outputs), "C2F_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root),
        "HF_HUB_OFFLINE": "1", "C2F_MIN_FREE_MB": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "c2f_utils", "run", stage[:2], "--profile", "smoke", "--run-id", RUN]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def ended(process: subprocess.Popen) -> str:
    """What a command said until its end."""
    return process.communicate(timeout=PATIENCE)[0]


def finish(bench: Bench, trial: Trial, outputs: Path, said: str) -> Trial:
    """Give the same command again, and compare; the trial's folder is removed."""
    trial.half = bool(half(bench, trial.stage, outputs))
    since = time.monotonic()
    while True:
        process = start(trial.stage, outputs)
        again = ended(process)
        trial.waited = time.monotonic() - since
        # A runner that was killed leaves a kernel that ends itself a moment later.
        if process.returncode != 2 or "is being worked on" not in again or trial.waited > PATIENCE:
            break
        said += again
        time.sleep(1)
    trial.lost = process.returncode != 0
    trial.differs = not trial.lost and not bench.same(trial.stage, outputs)
    trial.traceback = "Traceback (most recent call last)" in said + again
    if not trial.good:
        trial.said = (said + again)[-3000:]
    shutil.rmtree(outputs, ignore_errors=True)
    return trial


def half(bench: Bench, stage: str, outputs: Path) -> list[str]:
    """Files under their final names that are not whole: JSON that cannot be read, results unlike the undisturbed."""
    folder, found = outputs / RUN / stage, []
    for path in folder.glob("*.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found.append(path.name)
    status = read_json(folder / "status.json") if (folder / "status.json").exists() else {}
    stopped = status.get("status") == "stopped"  # a stage that was asked to stop may show what it has so far
    results = (folder / "results.json").exists() and not stopped and stage != "08_report"
    return found + ["results.json"] * (results and not bench.same(stage, outputs))


# Faults


def killed(bench: Bench, stage: str, who: str, rng: random.Random) -> Trial:
    """SIGKILL of the kernel, the runner, or both, at a random moment of the command."""
    moment = rng.uniform(0.3, bench.seconds(stage))
    outputs, process, said = _killed(bench, stage, who, moment)
    return finish(bench, Trial(f"SIGKILL {who}", stage, round(moment, 2), process.returncode), outputs, said)


def _killed(bench: Bench, stage: str, who: str, moment: float) -> tuple[Path, subprocess.Popen, str]:
    """The outputs, the ended command, and what it said."""
    outputs = bench.before(stage)
    process = start(stage, outputs)
    for victim in _victims(process, who, moment):
        victim.kill()
    return outputs, process, ended(process)


def _victims(process: subprocess.Popen, who: str, moment: float) -> list[psutil.Process]:
    """Who is to be killed, when the moment has come and, where the kernel is meant, there is one."""
    begun, runner = time.monotonic(), psutil.Process(process.pid)
    while process.poll() is None:
        kernels = [child for child in runner.children(recursive=True) if "ipykernel_launcher" in _words(child)]
        if time.monotonic() - begun >= moment and (kernels or who == "runner"):
            return [runner] * (who != "kernel") + kernels * (who != "runner")
        time.sleep(0.02)
    return []


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def signalled(bench: Bench, stage: str, name: str, rng: random.Random) -> Trial:
    """A request to stop, once the stage has begun; the command ends with 3, or with 0 where the stage had ended."""
    outputs = bench.before(stage)
    process, status = start(stage, outputs), outputs / RUN / stage / "status.json"
    while process.poll() is None and not status.exists():
        time.sleep(0.02)
    moment = rng.uniform(0, bench.seconds(stage) - 6)
    time.sleep(moment)
    if process.poll() is None:
        process.send_signal(getattr(signal, name))
    said = ended(process)
    trial = finish(bench, Trial(name, stage, round(moment, 2), process.returncode), outputs, said)
    trial.lost |= process.returncode not in (0, 3)
    trial.said = trial.said or said[-3000:] * trial.lost
    return trial


def full(bench: Bench, stage: str, _: object, rng: random.Random) -> Trial:
    """No file grows beyond a random size, which stands for a disk that fills up."""
    outputs, room = bench.before(stage), int(10 ** rng.uniform(3, 5.6))
    limit = (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    process = start(stage, outputs, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    said = ended(process)
    partial = [str(path) for path in outputs.rglob("*.partial")]
    trial = finish(bench, Trial("disk full", stage, room, process.returncode), outputs, said)
    trial.half |= bool(partial)
    return trial


def two_writers(bench: Bench, stage: str, *_: object) -> Trial:
    """The same command twice at once: one ends well, the other is refused and touches nothing."""
    outputs = bench.before(stage)
    both = [start(stage, outputs) for _ in range(2)]
    said = [ended(process) for process in both]
    codes = sorted(process.returncode for process in both)
    same = bench.same(stage, outputs)
    trial = finish(bench, Trial("two writers", stage, exit=codes[1]), outputs, "".join(said))
    trial.lost |= codes not in ([0, 2], [0, 0])  # the second may come when the first has ended
    trial.differs |= not same
    trial.said = trial.said or "".join(said) * (not trial.good)
    return trial


def wrong_parent(bench: Bench, stage: str, kind: str, _: random.Random) -> Trial:
    """The base model is not as it was: refused; put back, the same command ends well."""
    outputs = bench.before(stage)
    model = outputs / RUN / "01_base_model" / "model"
    shutil.copytree(model, outputs / "kept")
    file = model / "model.safetensors"
    raw = file.read_bytes()
    if kind == "missing":
        shutil.rmtree(model)
    else:
        file.write_bytes(raw[: len(raw) // 2] if kind == "cut" else raw[:-8] + b"abcd" + raw[-4:])
    process = start(stage, outputs)
    said = ended(process)
    shutil.rmtree(model, ignore_errors=True)
    shutil.move(outputs / "kept", model)
    trial = finish(bench, Trial(f"parent {kind}", stage, exit=process.returncode), outputs, said)
    trial.lost |= process.returncode == 0
    return trial


def clock_back(bench: Bench, stage: str, host: str, rng: random.Random) -> Trial:
    """Both are killed, and the clock is set back by a day: what they wrote last lies in the future."""
    outputs, process, said = _killed(bench, stage, "both", rng.uniform(3, bench.seconds(stage)))
    ahead = (datetime.now(UTC) + timedelta(days=1)).isoformat(timespec="milliseconds")
    status, claim = outputs / RUN / stage / "status.json", outputs / RUN / f".{stage}.claim"
    if status.exists():
        found = read_json(status) | {"started": ahead, "heartbeat": ahead}
        write_json(status, found | ({"host": host} if host else {}))
    for path in (claim, outputs / RUN / ".run.claim"):
        if host and path.exists() and path.read_text():
            path.write_text(json.dumps(read_json(path) | {"host": host}))
    return finish(bench, Trial("clock back", stage, exit=process.returncode), outputs, said)


def changed_code(bench: Bench, stage: str, _: object, rng: random.Random) -> Trial:
    """Killed, and met by other code: refused (or, where it had ended, loaded); the first code continues it."""
    outputs, _, said = _killed(bench, stage, "both", rng.uniform(5, bench.seconds(stage)))
    copy = bench.scratch / "changed"
    if not copy.exists():
        skip = shutil.ignore_patterns("__pycache__", "outputs")
        for name in ("c2f_utils", "notebooks"):
            shutil.copytree(ROOT / name, copy / name, ignore=skip)
        with open(copy / "c2f_utils" / "coarse" / "ppo.py", "a", encoding="utf-8") as handle:
            handle.write("\n# changed\n")
    begun = (outputs / RUN / stage / "config.json").exists()
    done = begun and read_json(outputs / RUN / stage / "status.json")["status"] == "done"
    kept = outputs.with_name(f"{outputs.name}-kept")
    shutil.copytree(outputs, kept)
    other = start(stage, outputs, root=copy)
    said += ended(other)
    shutil.rmtree(outputs)
    kept.rename(outputs)
    trial = finish(bench, Trial("changed code", stage, exit=other.returncode), outputs, said)
    trial.lost |= other.returncode == 0 and begun and not done and stage != "08_report" and stage != NINE[0]
    trial.said = trial.said or said[-3000:] * trial.lost
    return trial


def nowhere(bench: Bench, stage: str, *_: object) -> Trial:
    """Outputs that cannot be written: refused before work; the command continues where they can."""
    process = start(stage, FOLDER)
    said = ended(process)
    trial = finish(bench, Trial("read-only outputs", stage, exit=process.returncode), bench.before(stage), said)
    trial.lost |= process.returncode != 2
    return trial


@dataclass(frozen=True)
class Fault:
    """A kind of disturbance: how it is done, in which forms, and to which stages."""

    disturb: Callable[..., Trial]
    forms: Sequence[str] = ("",)
    stages: Sequence[str] = NINE


FAULTS = {
    "signals": Fault(signalled, SIGNALS),
    "disk": Fault(full),
    "writers": Fault(two_writers),
    "parents": Fault(wrong_parent, WRONG_PARENTS, WITH_PARENTS),
    "clock": Fault(clock_back, ("", "elsewhere"), NINE[1:8]),
    "code": Fault(changed_code, stages=NINE[1:8]),
    "read-only": Fault(nowhere, stages=NINE[:3]),
}


def kills(bench: Bench, count: int, rng: random.Random) -> list[Trial]:
    """`count` kills over all nine stages, each kernel, runner or both in turn."""
    stages = [NINE[number % 9] for number in range(count)]
    return [_told(killed(bench, stage, KILLED[n // 9 % 3], rng)) for n, stage in enumerate(stages)]


def others(bench: Bench, rng: random.Random, names: Sequence[str] = tuple(FAULTS)) -> list[Trial]:
    """Every form of every other fault in each of its stages."""
    return [
        _told(fault.disturb(bench, stage, form, rng))
        for fault in (FAULTS[name] for name in names)
        for stage in fault.stages
        for form in fault.forms
    ]


def _told(trial: Trial) -> Trial:
    verdict = "good" if trial.good else f"BAD\n{trial.said}"
    print(f"{trial.fault:20}{trial.stage:28}{trial.moment:9.1f}{trial.exit!s:>6}  {verdict}", flush=True)
    return trial


def table(trials: Sequence[Trial]) -> pd.DataFrame:
    """One row per fault: trials, and how many of them are wrong in which way."""
    frame = pd.DataFrame([asdict(trial) for trial in trials])
    grouped = frame.groupby("fault", sort=False)
    counts = grouped[["lost", "differs", "half", "traceback"]].sum()
    return counts.assign(trials=grouped.size(), waited=grouped["waited"].max().round(1)).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs at random moments")
    parser.add_argument("--only", nargs="*", choices=FAULTS, default=list(FAULTS), help="other faults (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--whole", type=Path, help="folder of a finished smoke run of this code")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rng, load = random.Random(options.seed), round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as scratch:
        whole = options.whole
        if whole is None:
            whole = Path(scratch) / "whole" / RUN
            for stage in NINE:
                assert start(stage, whole.parent).wait(PATIENCE) == 0, stage
        bench = Bench(whole, Path(scratch))
        trials = kills(bench, options.kills, rng) + others(bench, rng, options.only)
    found = table(trials)
    print(found.to_string(index=False))
    if options.out:
        wrong = [asdict(trial) for trial in trials if not trial.good]
        origin = {"code": provenance.code_version(ROOT), "machine": provenance.machine() | {"load_average": load}}
        write_json(options.out, {"faults": found.to_dict("records"), "wrong": wrong, "seed": options.seed, **origin})
    sys.exit(not all(trial.good for trial in trials))


if __name__ == "__main__":
    main()
