"""A run once more: gone on with (`c2f run --resume`), or repeated under another id to see whether it comes out the same
(`c2f rerun`)."""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from c2f_utils.errors import C2FError, problems
from c2f_utils.files import UNPARSABLE, read_json, read_jsonl, root, sha256

if TYPE_CHECKING:
    from c2f_utils.headless.kernel import Job
    from c2f_utils.runs.stage import Stage

_COMPARED = ("results.json", "metrics.jsonl", "samples.jsonl")
_OF_TIME = "seconds"  # the one column of metrics.jsonl that no second run repeats
_NAMED = 5  # places that a line names


def resumed(run_id: str, targets: Sequence[str]) -> list["Job"]:
    """The jobs that go on with a run under the parameters it was begun with: the notebooks of its latest command, or
    those named. Raises C2FError where nothing is recorded, and as `jobs.prepare` does."""
    from c2f_utils.headless import jobs, request
    from c2f_utils.runs import registry
    from c2f_utils.runs.stage import run_folder

    if not (run_folder(run_id) / request.FILE).is_file():  # else no stage need have begun
        registry.known(run_id)
    paths = [path for target in targets for path in jobs.notebooks_of(target)]
    paths = paths or [request.notebook(run_id, stage) for stage in request.latest(run_id)]
    found: list = []
    for path in paths:
        values = request.parameters(run_id, path.stem) | {"run_id": run_id}
        found += jobs.prepare([str(path)], values, before=found)
    return found


def rerun(run_id: str, new_id: str | None = None, anyway: bool = False) -> int:
    """Make the finished stages of a run once more as run `new_id`, from the same code, parameters, seeds and thread
    counts, and print for each results file whether it is the same; returns the exit code: 1 if one is not.

    Raises C2FError, before anything starts, where nothing is finished, where `new_id` exists, where a parent of
    another run would be another one now, and, unless `anyway`, where code, packages or a notebook have changed.
    """
    from c2f_utils.headless import jobs, request
    from c2f_utils.runs import registry
    from c2f_utils.runs.stage import ALWAYS_REDONE, run_folder

    registry.known(run_id)
    new_id = new_id or f"{run_id}.again"
    if run_folder(new_id).exists():
        raise C2FError(f"there is a run {new_id!r} already; name another one: c2f rerun {run_id} --as NEWID")
    stages = [stage for stage in registry.stages(run_id) if stage.done and stage.name not in ALWAYS_REDONE]
    if not stages:
        raise C2FError(f"run {run_id!r} has no finished stage between 01 and 07; there is nothing to compare with")
    changed = [line for stage in stages for line in _changes(stage)]
    if changed and not anyway:
        raise problems(
            f"run {run_id!r} was made otherwise (--anyway runs it all the same):", list(dict.fromkeys(changed))
        )
    found: list = []
    for stage in stages:
        path = request.notebook(run_id, stage.name)
        target = str(path) if path and path.is_file() else stage.name
        values = request.parameters(run_id, stage.name) | {"run_id": new_id, "overwrite": False}
        found += jobs.prepare([target], values, before=found)
        found[-1] = dataclasses.replace(found[-1], threads=stage.config()["threads"])
    _refuse_other_parents(stages, found)
    same = ["code, packages and notebooks are the same"]
    print("\n".join(["not as it was made:", *dict.fromkeys(changed)] if changed else same))
    code = jobs.run(found)
    if code != jobs.DONE:
        return code
    lines = [line for stage in stages for line in compared(stage.dir, run_folder(new_id) / stage.name)]
    print("\n".join([f"results of {run_id} and {new_id}", *lines]))
    return jobs.FAILED if any(_DIFFERS in line for line in lines) else jobs.DONE


_DIFFERS = ": differs"


def compared(there: Path, here: Path) -> Iterator[str]:
    """A line for each results file of a stage, and each model whose SHA-256 both recorded: identical, or where it
    differs.

    Of metrics.jsonl the seconds are left out; results.json and samples.jsonl hold no time, and each byte counts.
    """
    from c2f_utils.runs.stage import Stage

    models = [Stage(folder).models() for folder in (there, here)]
    for name in sorted(models[0].keys() & models[1].keys()):
        digests = [each[name].get("sha256") for each in models]
        if all(digests):
            same = digests[0] == digests[1]
            yield f"  {there.name}/{name}" + (": identical" if same else f"{_DIFFERS} in its weights")
    for name in _COMPARED:
        files = [folder / name for folder in (there, here)]
        if not any(file.exists() for file in files):
            continue
        missing = [file for file in files if not file.exists()]
        contents = None if missing else [file.read_bytes() for file in files]
        if contents and contents[0] == contents[1]:
            yield f"  {there.name}/{name}: identical"
            continue
        places = [] if missing else list(_places(*(_content(file) for file in files)))
        if name == "metrics.jsonl" and not missing and not places:
            yield f"  {there.name}/{name}: identical but for its {_OF_TIME}"
            continue
        more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
        where = f"{missing[0]} is missing" if missing else ", ".join(places[:_NAMED]) + more
        yield f"  {there.name}/{name}{_DIFFERS}: {where or 'in its spelling'}"


def _content(file: Path) -> object:
    if file.suffix == ".json":
        return read_json(file)
    rows = read_jsonl(file)
    timed = file.name == "metrics.jsonl"
    return [{key: item for key, item in row.items() if key != _OF_TIME} for row in rows] if timed else rows


def _places(there: object, here: object, where: str = "") -> Iterator[str]:
    """Every place, e.g. `curve[3].reward`, where two JSON values are not the same."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            yield from _places(there.get(key, ...), here.get(key, ...), f"{where}.{key}".lstrip("."))
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, pair in enumerate(zip(there, here, strict=True)):
            yield from _places(*pair, f"{where}[{number}]")
    elif type(there) is not type(here) or there != here:
        yield where or "as a whole"


def _changes(stage: "Stage") -> list[str]:
    """What has changed since a stage was made, a line each: code, packages, the cells of its notebook, the data and
    models that it read."""
    from c2f_utils.headless import jobs, request
    from c2f_utils.runs import provenance

    found = provenance.code_changes(stage.provenance())
    found = [f"the code of {stage.name} was not recorded"] if found is None else found
    path = request.notebook(stage.run_id, stage.name) or jobs.notebooks_folder() / f"{stage.name}.ipynb"
    executed = stage.dir / "notebook.ipynb"
    if executed.is_file() and (not path.is_file() or _cells(executed) != _cells(path)):
        found.append(f"the cells of {path} are not those that {stage.name} ran")
    return [*found, *_changed_inputs(stage)]


def _changed_inputs(stage: "Stage") -> Iterator[str]:
    """The data files, and the models that the settings name, that are not as a stage met them."""
    from c2f_utils import weights
    from c2f_utils.runs.stage import WEIGHTS

    models = stage.config()["settings"].get("models", {})
    for name, then in stage.provenance()["inputs"].items():
        role, file = name.removeprefix(WEIGHTS), root() / name.removeprefix("data:")
        if name.startswith("data:"):
            now = sha256(file) if file.is_file() else None
        elif role != name and (source := models.get(role)):
            revision = models.get(f"{role}_revision")
            now = weights.identity(f"{source}@{revision}" if revision else source)
        else:
            continue
        if now != then:
            yield f"{name}, which {stage.name} read, is {'another one now' if now else 'not there any more'}"


def _cells(path: Path) -> list[str] | None:
    """The code of a notebook, without the parameters that papermill put in; None where it cannot be read."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        return ["".join(c["source"]) for c in code if "injected-parameters" not in c["metadata"].get("tags", [])]
    except (OSError, LookupError, TypeError, AttributeError, *UNPARSABLE):
        return None


def _refuse_other_parents(stages: Sequence["Stage"], found: Sequence["Job"]) -> None:
    """Raise C2FError if a stage was made from one of another run that would not be its parent today."""
    from c2f_utils.runs.run import Run
    from c2f_utils.settings.load import load_settings

    planned = [stage.name for stage in stages]
    for stage, job in zip(stages, found, strict=True):
        names = ("profile", "seed", "run_id", "overrides", "study")
        run = Run(load_settings(**{name: job.values[name] for name in names}))
        inputs, origins = run.inputs(stage.name, expected=planned)
        then = stage.provenance()
        for name in origins:
            if inputs[name] != then["inputs"].get(name):
                raise C2FError(
                    f"{stage.name} was made from {name} of run {then['parents'].get(name)!r}, and would now be made "
                    f"from another one of run {origins[name]!r}; there is nothing to compare"
                )


def add_command(commands: argparse._SubParsersAction) -> None:
    """`c2f rerun`."""
    parser = commands.add_parser(
        "rerun", help="make a run once more and compare", description="Make the finished stages 01 to 07 of a run once "
        "more, from the same code, parameters, seeds and thread counts, and say for each results file whether it is "
        "the same. Exit code 1: one is not."
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="a run's folder under outputs/")
    parser.add_argument("--as", dest="new_id", metavar="NEWID", help="the new run's folder (default: RUN.again)")
    parser.add_argument("--anyway", action="store_true", help="although code, packages or notebooks have changed")
    parser.set_defaults(action=lambda options: rerun(options.run, options.new_id, options.anyway))
