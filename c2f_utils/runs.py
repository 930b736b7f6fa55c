"""Runs: the way from one stage to those it builds on, and the table of everything that has been run.

A stage finds its parents in its own run, else in the latest run with equal profile and seed, and says so. Stages
talk to each other through run directories (`stage.py`) only. Needs no torch.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from c2f_utils import provenance
from c2f_utils.errors import C2FError, problems
from c2f_utils.files import read_jsonl
from c2f_utils.stage import ALWAYS_REDONE, Stage, age, outputs, root, run_folder

if TYPE_CHECKING:
    import pandas as pd

    from c2f_utils.config import Settings

__all__ = ["OF_SETTINGS", "PARENTS", "Run", "Stage", "latest", "outputs", "root", "run_folder", "stages", "table"]

# What each stage is made from. A missing one is refused before work starts; a changed one makes the stage another
# stage.
PARENTS: dict[str, tuple[str, ...]] = {
    "00_environment_and_data": (),
    "01_base_model": (),
    "02_reward_model": ("01_base_model",),
    "03_coarse_rlhf": ("01_base_model", "02_reward_model"),
    "04_length_schedules": ("01_base_model", "02_reward_model", "03_coarse_rlhf"),
    "05_instruction_model": ("01_base_model",),
    "06_residue_merging": (
        "01_base_model", "02_reward_model", "03_coarse_rlhf", "04_length_schedules", "05_instruction_model",
    ),
    "07_evaluation": (
        "01_base_model", "02_reward_model", "03_coarse_rlhf", "05_instruction_model", "06_residue_merging",
    ),
    "08_report": (),  # reports what is there and names what is missing
}  # fmt: skip

OF_SETTINGS = {"source": "the settings'"}  # what 03 records for a law or reward that is not an object of the user's


@dataclass
class Run:
    """One run: settings, thread count and device, and the way to its stages and to those it builds on."""

    settings: "Settings"
    threads: int = 1
    device: str = "cpu"
    here: Stage | None = None  # the stage a notebook works on
    _found: dict[str, Stage] = field(default_factory=dict, repr=False)

    @property
    def id(self) -> str:
        return self.settings.run_id

    @property
    def dir(self) -> Path:
        """Folder of the run."""
        return run_folder(self.id)

    @property
    def report(self) -> Path:
        """Folder of the run's report, beside its stages."""
        return self.dir / "report"

    def stage(self, name: str) -> Stage:
        """A stage of this run, begun or not; raises C2FError for a name that is no stage."""
        if name not in PARENTS:
            raise C2FError(f"there is no stage {name!r}; expected one of {', '.join(PARENTS)}")
        return Stage(self.dir / name, self.settings)

    def parent(self, name: str) -> Stage:
        """The finished stage `name` to build on.

        This run's, else the one used before, else the latest with equal profile and seed. A stage of another run is
        printed and recorded. Raises C2FError that names the notebook to run first.
        """
        found = self._find(name, self.here.name if self.here else None)
        if self.here and self.here.config():
            self.here.add_input(name, found.fingerprint())
        return found

    def inputs(self, stage: str, expected: Collection[str] = ()) -> tuple[dict[str, str], dict[str, str]]:
        """Fingerprints of a stage's parents, and the runs they come from, both by name.

        Parents in `expected`, which are about to be made, are left out. Raises C2FError naming every missing one.
        """
        missing, fingerprints, origins = [], {}, {}
        for name in PARENTS[stage]:
            if name in expected:
                continue
            try:
                found = self._find(name, stage)
            except C2FError as error:
                missing.append(str(error))
            else:
                fingerprints[name], origins[name] = found.fingerprint(), found.run_id
        if missing:
            raise problems(f"{stage} lacks earlier stages:", missing)
        return fingerprints, origins

    def refuse_mixture(self, stage: str) -> None:
        """Raise C2FError if the run already holds finished stages of another profile or seed.

        00 is about the present and may be run anywhere.
        """
        asked = self.settings.profile, self.settings.seed
        made = [_kind(item) for item in stages(run_id=self.id) if item.done and item.name not in ALWAYS_REDONE]
        found = next((kind for kind in made if kind != asked), None)
        if found and stage != ALWAYS_REDONE[0]:
            flags = zip(("--profile", "--seed"), found, asked, strict=True)
            advice = " ".join(f"{flag} {there}" for flag, there, here in flags if there != here)
            raise C2FError(
                f"run {self.id!r} holds profile {found[0]}, seed {found[1]}; {stage} asks for {asked[0]}, seed "
                f"{asked[1]}: add {advice} (in a notebook: in its first cell) or choose another run_id (--run-id)"
            )

    def _find(self, name: str, user: str | None) -> Stage:
        if name in self._found:
            return self._found[name]
        before = self.stage(user).provenance().get("parents", {}).get(name) if user else None
        own = (Stage(run_folder(run_id) / name) for run_id in (self.id, before) if run_id)
        kind, wanted = (self.settings.profile, self.settings.seed), self.settings.for_stage(name)
        found = next((item for item in own if item.done and _kind(item) == kind), None) or latest(name, *kind, wanted)
        if found is None:
            state = Stage(self.dir / name).state()
            there = f"it is {state} in run {self.id!r}" if state else f"run {self.id!r} has none"
            flags = f"--profile {kind[0]} --seed {kind[1]} --run-id {self.id}"
            raise C2FError(
                f"no finished {name} for profile {kind[0]!r} and seed {kind[1]} ({there}, nor has any other run); "
                f"run notebooks/{name}.ipynb first: c2f run {name[:2]} {flags}"
            )
        changed = provenance.differences(found.config()["settings"], wanted)
        if found.run_id != self.id or changed:
            print(f"{name}: from run {found.run_id!r}" + (f", made with {'; '.join(changed)}" if changed else ""))
        self._found[name] = found
        return found


def stages(name: str = "*", run_id: str = "*") -> Iterator[Stage]:
    """Every stage on disk that has begun, by run and stage name; set-aside ones (`.old-k`) are left out."""
    for config in sorted(outputs().glob(f"{run_id}/{name}/config.json")):
        if ".old-" not in config.parent.name:
            yield Stage(config.parent)


def latest(stage: str, profile: str, seed: int, prefer: dict | None = None) -> Stage | None:
    """The stage finished last with equal profile and seed, or None; those with exactly the settings `prefer` first.

    An actor trained under a law or reward of the user's own serves its own run only: no setting would tell of it.
    """
    found = [item for item in stages(stage) if item.done and _kind(item) == (profile, seed) and not own_parts(item)]
    return max(found, key=lambda item: (item.config()["settings"] == prefer, item.status()["finished"]), default=None)


def own_parts(stage: Stage) -> list[str]:
    """Which of law and reward the stage was made with as an object of the user's own, not by its settings."""
    inputs, usual = stage.provenance().get("inputs", {}), provenance.fingerprint(OF_SETTINGS)
    return [name for name in ("law", "reward") if inputs.get(name, usual) != usual]


def _kind(stage: Stage) -> tuple[str, int]:
    settings = stage.config()["settings"]
    return settings["profile"], settings["seed"]


def began_since(stage: Stage, moment: datetime) -> bool:
    """Whether the stage was begun (or continued) after a time, and so by whoever started then."""
    started = stage.status().get("started")
    return bool(started) and datetime.fromisoformat(started) >= moment


def threads_of(run_id: str) -> int | None:
    """The thread count that the stages of a run were begun with (the last one's), or None for a new run."""
    counts = [stage.config()["threads"] for stage in stages(run_id=run_id)]
    return counts[-1] if counts else None


def table(run_id: str = "*") -> "pd.DataFrame":
    """One row per stage on disk, the latest last: state, where training stands, time, memory, parents, alarms.

    `changed` names the settings that differ from the profile's. Units: `minutes` of wall time, `peak_mb` in MiB.
    """
    import pandas as pd

    rows = sorted((_row(item) for item in stages(run_id=run_id)), key=lambda row: row["started"])
    return pd.DataFrame(rows, columns=_COLUMNS)


_PROGRESS = ("iteration", "reward", "kl_per_token", "mean_tokens")
_COLUMNS = [
    "run", "stage", "profile", "seed", "status", *_PROGRESS, "started", "minutes", "peak_mb",
    "changed", "parents", "alarms",
]  # fmt: skip


def _row(stage: Stage) -> dict[str, object]:
    settings, status = stage.config()["settings"], stage.status()
    last = (read_jsonl(stage.dir / "metrics.jsonl") or [{}])[-1]
    end = status["finished"] or status["heartbeat"]
    return {
        "run": stage.run_id,
        "stage": stage.name,
        "profile": settings["profile"],
        "seed": settings["seed"],
        "status": stage.state(),
        **{key: last.get(key) for key in _PROGRESS},
        "started": status["started"][:19],
        "minutes": round((age(status["started"]) - age(end)) / 60, 1),
        "peak_mb": status["peak_mb"],
        "changed": "; ".join(_changed(stage.name, settings)),
        "parents": ", ".join(f"{run}/{name[:2]}" for name, run in stage.provenance().get("parents", {}).items()),
        "alarms": "; ".join(status["alarms"]),
    }


def _changed(name: str, settings: dict) -> list[str]:
    from c2f_utils.config import load_settings

    try:
        usual = load_settings(settings["profile"], settings["seed"], study=settings.get("study", False)).for_stage(name)
    except C2FError as error:  # a profile of an older version
        return [str(error)]
    theirs, ours = provenance.flat(settings), provenance.flat(usual)
    return [f"{key}={value!r}" for key, value in theirs.items() if ours.get(key, ...) != value]
