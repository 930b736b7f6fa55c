"""One stage of one run: its folder, its files, and whether it may start, continue or be loaded.

`outputs/<run_id>/<NN_stage>/` belongs to one stage of one run. A stage that is done is loaded; one that was killed
is continued from its checkpoints; one that exists with other settings or inputs is refused, naming what changed.
Everything is plain JSON, written atomically, so a run can be read while it works and after it died. Needs no torch.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from c2f_utils import weights
from c2f_utils.errors import C2FError, problems
from c2f_utils.files import append_jsonl, identity, or_null, outputs, plain, read_json, root, write_json
from c2f_utils.runs import disk, locks, provenance, records, trackers

if TYPE_CHECKING:
    from c2f_utils.settings.config import Settings

OF_NO_RUN = ("00_environment_and_data", "09_studies")  # about this machine, and about what the project comes with
ALWAYS_REDONE = (*OF_NO_RUN, "08_report")  # cheap, and about the present: never loaded, never in the way

CONTINUE = "C2F_CONTINUE_ANYWAY"  # environment: continue a stage although code or packages have changed since

HEARTBEAT = 15.0  # seconds

_AT_WORK: dict[Path, "Stage"] = {}  # stages that this process has begun and not ended

WEIGHTS = "weights:"  # begins the names of inputs that are models: weights:base, weights:instruct, weights:reward

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def run_folder(run_id: str) -> Path:
    """Folder of one run; raises C2FError unless the name is safe as a folder name everywhere."""
    if not isinstance(run_id, str) or not _RUN_ID.fullmatch(run_id):
        raise C2FError(f"run_id is {run_id!r}; expected 1 to 64 letters, digits, '.', '_', '-', the first no mark")
    return outputs() / run_id


class Stage:
    """One stage of one run: its folder, its files, its state. Opening one writes nothing; `begin()` does."""

    def __init__(self, folder: Path, settings: "Settings | None" = None) -> None:
        self.dir = Path(folder)
        self.name = self.dir.name
        self.settings = settings
        self.threads: int | None = None
        self.loaded = False  # begin() found it done
        self._stopped = False
        self._asked: dict[str, object] = {}  # what begin() was called with
        self._met: dict[str, str] = {}  # inputs that were added since
        self._status: dict[str, object] = {}
        self._writing = threading.RLock()
        self._over: threading.Event | None = None

    def __repr__(self) -> str:
        return f"Stage({self.run_id}/{self.name}, {self.state() or 'not begun'})"

    @property
    def run_id(self) -> str:
        return self.dir.parent.name

    def path(self, *parts: str) -> Path:
        """A path inside the stage's folder; the folders above it are made."""
        path = self.dir.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    # What is on disk

    def config(self) -> dict | None:
        """`{"stage", "settings", "threads"}` as recorded, or None before the stage has begun."""
        return records.read(self.dir / "config.json") or None

    def provenance(self) -> dict:
        """What was recorded about the origin; empty before the stage has begun."""
        return records.read(self.dir / "provenance.json")

    def status(self) -> dict:
        """The last written status; empty before the stage has begun."""
        return records.read(self.dir / "status.json")

    def damage(self) -> str | None:
        """What makes this stage unusable, in words, or None: the other readers raise it as C2FError."""
        return records.damage(self.dir)

    def state(self) -> str | None:
        """As `records.state`, or damaged."""
        return "damaged" if self.damage() else records.state(self.status())

    @property
    def done(self) -> bool:
        """Whether the stage finished with the settings asked for (any settings when opened without)."""
        config = None if self.damage() else self.config()
        return bool(config) and self.status().get("status") == "done" and not self._changed_settings(config)

    def results(self) -> dict:
        """Content of results.json; raises C2FError when it is missing."""
        return read_json(self.dir / "results.json")

    def fingerprint(self) -> str:
        """Identity of this stage as an input of others: its settings, results and models, not its times or its name."""
        results = self.dir / "results.json"
        found = read_json(results) if results.is_file() else None
        return identity((self.config() or {}).get("settings"), found, self.provenance().get("models"))

    def models(self) -> dict[str, dict]:
        """What the stage recorded of the models it made, by their folders in it: `sha256` and `bytes` of each.

        For a stage made before models had fingerprints: those that are there, with nothing known about them.
        """
        made = self.provenance().get("models")
        return {name: {} for name in self._made()} if made is None else made

    def model(self, name: str = "model") -> Path:
        """Folder of a model that this stage made; raises C2FError unless it is there as it was written."""
        folder, made = self.dir / name, self.models()
        settings = (self.config() or {}).get("settings", {})
        command = f"c2f run {self.name[:2]} --profile {settings.get('profile')} --seed {settings.get('seed')}"
        again = f"put it back as it was, or delete {self.dir} and make it again: {command} --run-id {self.run_id}"
        if not folder.is_dir() or name not in made:
            state = "is missing" if not folder.is_dir() else "is none of the models that this stage recorded"
            raise C2FError(f"{name}/ of {self.name} in run {self.run_id!r} {state}; {again}")
        if not made[name]:
            print(f"{self.name} of run {self.run_id!r} has no fingerprints yet: {name}/ is used unchecked")
            return folder
        wrong = weights.altered(folder, made[name])
        if wrong:
            raise C2FError(f"{name}/ of {self.name} in run {self.run_id!r} {wrong}; {again}")
        return folder

    def _made(self) -> list[str]:
        """Folders with weights in them, without checkpoints and what a kill left behind."""
        found = {path.parent.relative_to(self.dir) for path in self.dir.rglob("*.safetensors")}
        hidden = [p for p in found if any(part.startswith(".") for part in (str(p), *p.parts))]
        return sorted(str(p) for p in found.difference(hidden) if p.parts[0] != "checkpoints")

    # Writing

    def save_results(self, results: dict) -> None:
        """Write results.json atomically; raises C2FError naming a value that is NaN or infinite."""
        write_json(self.path("results.json"), plain(results))

    def log(self, row: dict) -> None:
        """Append one row to metrics.jsonl; a value that is not finite becomes null (the panel raises the alarm)."""
        append_jsonl(self.path("metrics.jsonl"), {key: or_null(value) for key, value in row.items()})

    @contextlib.contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the wall time of the block, seconds, to `name` in timings.json (a resumed stage adds up)."""
        start = time.perf_counter()
        try:
            yield
        finally:
            path = self.path("timings.json")
            timings = read_json(path) if path.is_file() else {}
            timings[name] = round(timings.get(name, 0.0) + time.perf_counter() - start, 3)
            write_json(path, timings)

    def note(self, **fields: object) -> None:
        """Put fields (such as `alarms`) into status.json of a stage at work; a loaded stage is left as it is."""
        if self._over:
            with self._writing:
                self._status |= plain(fields, "status")
                self._beat()

    def disk_needed(self) -> float:
        """Bytes that the stage will write, as far as its models' sizes are known here; 0 without settings."""
        return disk.needed(self.name, self.settings) if self.settings else 0.0

    def stop_requested(self) -> bool:
        """Whether a STOP file lies in the stage's or the run's folder; the stage then ends as `stopped`, not `done`."""
        found = (self.dir / "STOP").exists() or (self.dir.parent / "STOP").exists()
        self._stopped |= found
        return found

    # Life

    def plan(self, inputs: dict[str, str] | None = None, overwrite: bool = False) -> str:
        """What `begin()` would do: fresh, continue, load, redo or replace; changes nothing on disk.

        `inputs` maps an input's name to its fingerprint; None leaves inputs out of the comparison. Raises C2FError
        when the folder cannot be written, space is short, another process is at work here, or settings or inputs
        have changed, or, for a stage that is not done, code or packages (unless `CONTINUE` is set).
        """
        disk.refuse_full(self.dir.parent)
        if other := locks.holder(self._claim, self._heartbeat_age()):
            raise _busy(self, other)
        damage = self.damage()
        config = None if damage else self.config()
        if self.name in ALWAYS_REDONE:
            return "redo" if damage or config else "fresh"
        if not (damage or config):
            disk.refuse_full(self.dir.parent, self.disk_needed())
            return "fresh"
        changed = [damage] if damage else self._changed_settings(config) + self._changed_inputs(inputs)
        advice = ""
        if not changed:
            if self.status()["status"] == "done":
                return "load"
            changed = [] if CONTINUE in os.environ else provenance.code_changes(self.provenance()) or []
            advice = f"; {CONTINUE}=1 in the environment continues it all the same"
        if not changed or overwrite:
            disk.refuse_full(self.dir.parent, self.disk_needed(), 0 if changed else disk.used(self.dir))
            return "replace" if changed else "continue"
        choices = "next step: choose another run_id, or set overwrite=True (--overwrite), which keeps the old one as "
        title = f"{self.name} exists in run {self.run_id!r} ({self.state()}) with another configuration:"
        title = f"{self.name} in run {self.run_id!r} is damaged:" if damage else title
        raise problems(title, [*changed, f"{choices}{self._archive().name}{advice}"])

    def begin(
        self,
        inputs: dict[str, str] | None = None,
        overwrite: bool = False,
        threads: int = 1,
        device: str = "cpu",
        parents: dict[str, str] | None = None,
    ) -> str:
        """Start, continue or load the stage as `plan()` says, and return that word.

        Unless loaded, it is claimed for this process, beats in status.json every 15 s, and ends with `finish()`.
        A continued stage keeps its recorded thread count (`self.threads`). Raises as `plan()` does.
        """
        if self.settings is None:
            raise ValueError(f"{self.name} was opened without settings: it can be read, not begun")
        if before := _AT_WORK.get(self.dir):  # this process begins the stage anew: a notebook's first cell, run again
            before.release()
        disk.refuse_full(self.dir.parent)
        if other := locks.take(self._claim, self._heartbeat_age()):
            raise _busy(self, other)
        self._asked = {"inputs": inputs or {}, "overwrite": overwrite, "threads": threads, "device": device}
        self._asked["parents"] = parents or {}
        try:
            return self._begin(**self._asked)
        except BaseException:
            locks.release(self._claim)
            raise

    def _begin(self, inputs: dict, overwrite: bool, threads: int, device: str, parents: dict) -> str:
        action = self.plan(inputs, overwrite)
        config = self.config() if action in ("continue", "load") else None
        self.loaded = action == "load"
        self.threads = config["threads"] if config else threads
        if self.loaded:
            locks.release(self._claim)
            return action
        if action == "replace":
            self.dir.rename(self._archive())
        self._stopped = False
        (self.dir / "STOP").unlink(missing_ok=True)
        if "C2F_BATCH" not in os.environ:  # the runner owns the run's STOP file: it may mean this very stage
            (self.dir.parent / "STOP").unlink(missing_ok=True)
        session = {
            "started": locks.now(),
            "threads": self.threads,
            "device": device,
            "code": provenance.code_version(root()),
        }
        session |= {"machine": provenance.machine(), "versions": provenance.versions()}
        before = self.provenance() if action == "continue" else {}
        settings = self.settings.for_stage(self.name)
        record = {"stage": self.name, "seed": self.settings.seed, "settings": provenance.fingerprint(settings)}
        record |= {"inputs": before.get("inputs", {}) | inputs, "parents": parents, "words": before.get("words", {})}
        record["sessions"] = [*before.get("sessions", []), session]
        write_json(self.path("provenance.json"), record)
        self._status = {
            "status": "running",
            **locks.owner(),
            "started": session["started"],
            "finished": None,
            "alarms": [],
        }
        self._over = threading.Event()
        _AT_WORK[self.dir] = self
        self._beat()
        threading.Thread(target=self._keep_beating, args=(self._over,), daemon=True).start()
        # Last, because its presence means that the stage has begun.
        write_json(self.path("config.json"), {"stage": self.name, "settings": settings, "threads": self.threads})
        trackers.follow(self.dir, self.settings.tracking)
        return action

    def add_input(self, name: str, fingerprint: str, words: str | None = None) -> None:
        """Record an input met on the way (a data file's SHA-256), in `words` where a reader needs them.

        If it was another one before, the stage is set aside and begun anew where `overwrite` was asked for, else
        C2FError is raised.
        """
        record = self.provenance()
        known = record.setdefault("inputs", {}).get(name)
        if known not in (None, fingerprint) and self.name not in ALWAYS_REDONE:
            if not self._asked.get("overwrite"):
                then, now = record.get("words", {}).get(name, known[:16]), words or fingerprint[:16]
                raise C2FError(
                    f"{self.name} in run {self.run_id!r} was begun with another {name} ({then} then, {now} now); "
                    "choose another run_id, or set overwrite=True (--overwrite), which keeps the old one as "
                    f"{self._archive().name}"
                )
            # begin() could not know of it: what a notebook makes, or a stage opens, is met only now.
            print(f"{self.name}: starting with another {name}; the earlier one is kept as {self._archive().name}")
            self.begin(**self._asked | {"inputs": self._asked["inputs"] | self._met | {name: fingerprint}})
            record = self.provenance()
        self._met[name] = fingerprint
        if not self.loaded and (known != fingerprint or words not in (None, record.get("words", {}).get(name))):
            record.setdefault("inputs", {})[name] = fingerprint
            if words:
                record.setdefault("words", {})[name] = words
            write_json(self.path("provenance.json"), record)

    def finish(self) -> str:
        """End the stage: `done`, or `stopped` when a stop was asked for and seen; returns the state."""
        if self._over:
            if not self._stopped and (made := self._made()):
                of = {name: weights.record(self.dir / name) for name in made}
                write_json(self.path("provenance.json"), self.provenance() | {"models": of})
            self._close("stopped" if self._stopped else "done")
        return self.status().get("status", "")

    def fail(self, message: str, state: str = "failed", **fields: object) -> None:
        """End the stage as `failed` or `killed` with a reason and further `fields` of its status; it can be continued.

        Works on a stage whose process is gone, too.
        """
        self._status = self._status or self.status()
        if self._status.get("status") == "running":
            self._close(state, error=message, **fields)

    def stop(self) -> None:
        """End the stage as `stopped`: it is not finished and can be continued."""
        if self._over:
            self._close("stopped")

    def release(self) -> None:
        """Stop the heartbeat and give up the claim without a verdict; the stage can be continued."""
        with self._writing:  # a beat under way ends first: its late write must not land on what follows
            if self._over:
                self._over.set()
            self._over = None
        if _AT_WORK.get(self.dir) is self:
            del _AT_WORK[self.dir]
        locks.release(self._claim)

    def _close(self, state: str, **fields: object) -> None:
        with self._writing:
            self._status |= {"status": state, "finished": locks.now(), **fields}
            self._beat(peak=self._over is not None)
            self.release()

    def _keep_beating(self, over: threading.Event) -> None:
        while not over.wait(HEARTBEAT):
            with self._writing, contextlib.suppress(C2FError):  # a disk that is full now may have room later
                if not over.is_set():
                    self._beat()

    def _beat(self, peak: bool = True) -> None:
        self._status["heartbeat"] = locks.now()
        if peak:
            self._status["peak_mb"] = round(provenance.peak_memory_mb())
        write_json(self.path("status.json"), self._status)

    def _heartbeat_age(self) -> float | None:
        return None if self.damage() else locks.age(self.status().get("heartbeat"))

    @property
    def _claim(self) -> Path:
        return self.dir.parent / f".{self.name}.claim"  # beside the folder, which may be moved away

    def _changed_settings(self, config: dict) -> list[str]:
        if not self.settings:
            return []
        made = self.settings.recorded(config["settings"], self.name)
        return provenance.differences(made, self.settings.for_stage(self.name))

    def _changed_inputs(self, inputs: dict[str, str] | None) -> list[str]:
        known = self.provenance().get("inputs", {})
        changed = [name for name, value in (inputs or {}).items() if name in known and known[name] != value]
        what = {name: "its settings or results have changed since, or its models" for name in changed}
        for name in changed:
            if name.startswith(WEIGHTS):
                what[name] = f"other weights ({weights.short(known[name])} then, {weights.short(inputs[name])} now)"
        return [f"input {name}: {what[name]}" for name in changed]

    def _archive(self) -> Path:
        taken = (self.dir.with_name(f"{self.name}.old-{number}") for number in range(1, 10_000))
        return next(path for path in taken if not path.exists())


def _busy(stage: Stage, other: dict) -> C2FError:
    return C2FError(
        f"{stage.name} in run {stage.run_id!r} is being worked on by process {other['pid']} on {other['host']}; "
        "wait for it, stop it (shut its kernel down), or choose another run_id"
    )
