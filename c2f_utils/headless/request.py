"""What a run was asked for: written to `run.json` as its notebooks start, so that nobody has to say it twice.

A stage whose `config.json` holds other settings than were recorded (a notebook that was run by hand, a run of an older
version) counts as begun with those of its profile that it does not share.
"""

from collections.abc import Sequence
from pathlib import Path

from c2f_utils.errors import C2FError, problems
from c2f_utils.files import plain, read_json, root, write_json
from c2f_utils.headless.kernel import Job
from c2f_utils.runs import provenance, registry
from c2f_utils.runs.stage import ALWAYS_REDONE, Stage, run_folder
from c2f_utils.settings.config import Settings
from c2f_utils.settings.load import NAMED, load_settings

FILE = "run.json"
_OF_THE_COMMAND = ("run_id", "overwrite")  # what a later command says itself
_OF_SETTINGS = ("profile", "seed", "overrides", "study")


def record(jobs: Sequence[Job]) -> None:
    """Add the notebooks of a command and their parameters to those of the run; they are its latest."""
    folder = run_folder(jobs[0].values["run_id"])
    stages = _read(folder)["stages"]
    for job in jobs:
        values = {name: value for name, value in job.values.items() if name not in _OF_THE_COMMAND}
        inside = job.notebook.is_relative_to(root())
        notebook = str(job.notebook.relative_to(root()) if inside else job.notebook)
        stages[job.stage] = plain({"notebook": notebook, "parameters": values}, job.stage)
    write_json(folder / FILE, {"latest": [job.stage for job in jobs], "stages": stages})


def latest(run_id: str) -> list[str]:
    """The stages of the command that was last given for a run; raises C2FError where none is recorded."""
    folder = run_folder(run_id)
    found = _read(folder)["latest"]
    if not found:
        raise C2FError(f"no command is recorded in {folder / FILE}; name the notebooks: c2f run all --resume {run_id}")
    return found


def notebook(run_id: str, stage: str) -> Path | None:
    """The notebook that made a stage of a run; None where it is not recorded."""
    entry = _read(run_folder(run_id))["stages"].get(stage)
    return root() / entry["notebook"] if entry else None


def parameters(run_id: str, stage: str) -> dict[str, object]:
    """The parameters that a stage was begun with; for one that has not begun, those that its run was begun with.

    Raises C2FError where they are not recorded and cannot be told from the settings that are, and, for a stage that has
    not begun, where the run's other stages contradict each other.
    """
    folder = run_folder(run_id)
    asked, here = _read(folder), Stage(folder / stage)
    begun = not here.damage() and here.config() is not None
    mine = asked["stages"].get(stage)
    if mine and (not begun or _makes(mine["parameters"], here)):
        return mine["parameters"]
    if begun:
        return _from_settings(here)
    if asked["latest"]:
        return _together(run_id, stage, asked)
    together: dict[str, object] = {}
    for other in registry.stages(run_id):
        found = _from_settings(other)
        together = found | {"overrides": together.get("overrides", {}) | found["overrides"]}
    if not together:
        raise C2FError(f"run {run_id!r} has begun nothing that it could go on with; start it without --resume")
    return together


def _together(run_id: str, stage: str, asked: dict) -> dict[str, object]:
    """The parameters of all recorded stages as one, the latest last, of which each makes what it made by its own."""
    names = [name for name in asked["stages"] if name not in ALWAYS_REDONE] or list(asked["stages"])
    names.sort(key=lambda name: name in asked["latest"])
    of = {name: {k: v for k, v in asked["stages"][name]["parameters"].items() if k in _OF_SETTINGS} for name in names}
    overrides: dict[str, object] = {}
    for values in of.values():
        overrides |= values.get("overrides", {})
    found = of[names[-1]] | {"overrides": overrides}
    for name, values in of.items():
        if load_settings(**values).for_stage(name) != load_settings(**found).for_stage(name):
            rest = ", ".join(other for other in names if other != name)
            title = f"{stage} of run {run_id!r} has not begun, and {name} (there) was asked for otherwise than {rest}"
            advice = f"give the parameters again, without --resume: c2f run {stage[:2]} --run-id {run_id} ..."
            raise problems(f"{title} (here):", [*provenance.differences(values, found), advice])
    return found


def _read(folder: Path) -> dict:
    """The record of a run; an empty one where there is none or it is damaged."""
    try:
        found = read_json(folder / FILE)
        stages = {
            name: {"notebook": str(each["notebook"]), "parameters": dict(each["parameters"])}
            for name, each in found["stages"].items()
        }
        return {"latest": [name for name in found["latest"] if name in stages], "stages": stages}
    except (C2FError, AttributeError, LookupError, TypeError, ValueError):
        return {"latest": [], "stages": {}}


def _makes(values: dict[str, object], stage: Stage) -> bool:
    """Whether these parameters give the settings that a stage recorded."""
    try:
        settings = load_settings(**{name: values[name] for name in _OF_SETTINGS if name in values})
    except (C2FError, TypeError):
        return False
    recorded = settings.recorded(stage.config()["settings"], stage.name)
    return not provenance.differences(recorded, settings.for_stage(stage.name))


def _from_settings(stage: Stage) -> dict[str, object]:
    """Parameters that give the settings which a stage recorded: its profile's, and each value that differs."""
    made = stage.config()["settings"]
    values = {"profile": made["profile"], "seed": made["seed"], "study": made.get("study", False)}
    usual = load_settings(**values).for_stage(stage.name)
    sections = {name: keys for name, keys in Settings.recorded(made, stage.name).items() if isinstance(keys, dict)}
    overrides = {}
    for section, keys in sections.items():
        for key, value in keys.items():
            before, name = usual.get(section, {}).get(key, ...), f"{section}.{key}"
            if before != value:  # of names of the user's choice, those that are gone are taken away one by one
                overrides[name] = dict.fromkeys(before) | value if name in NAMED and value else value
    values["overrides"] = overrides
    if registry.own_parts(stage) or not _makes(values, stage):
        raise C2FError(
            f"the parameters of {stage.name} in run {stage.run_id!r} were not recorded and cannot be told from its "
            f"settings ({stage.dir / 'config.json'}); give them again, as c2f run takes them"
        )
    return values
