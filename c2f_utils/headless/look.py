"""What has been run: `c2f runs` (also `table`), `show`, `stop` and `report`."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from c2f_utils.errors import C2FError, short

STATES = ("running", "done", "failed", "stopped", "killed", "lost", "damaged")
_UNREADABLE = (C2FError, LookupError, TypeError, ValueError, AttributeError)  # odd results of a run that was cut short


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the commands of this room."""
    runs = commands.add_parser(
        "runs", aliases=["table"], help="list all runs", description="One line per stage, the latest last."
    )
    runs.add_argument("--run-id", help="only this run")
    runs.add_argument("--stage", help="only this stage: a number (03) or a name")
    runs.add_argument("--profile", help="only runs of this profile")
    runs.add_argument("--status", help=f"only stages in these states, e.g. failed,lost; known: {', '.join(STATES)}")
    runs.add_argument("--json", action="store_true", help="as JSON")
    runs.set_defaults(action=_runs)

    show = commands.add_parser(
        "show", help="show one run", description="State, origin, settings, results and alarms of a run's stages."
    )
    show.add_argument("run", metavar="RUN", help="a run's folder under outputs/")
    show.add_argument("stage", metavar="STAGE", nargs="?", help="only this stage, in full: a number (03) or a name")
    show.set_defaults(action=_show)

    stop = commands.add_parser(
        "stop", help="stop a run gently", description="What is at work in the run saves and ends; the command that "
        "started it continues it later."
    )  # fmt: skip
    stop.add_argument("run", metavar="RUN", help="a run's folder under outputs/")
    stop.set_defaults(action=_stop)

    report = commands.add_parser(
        "report", help="write the report of one or several runs", description="Draw the report anew from the results "
        "on disk. Runs that differ in their seed alone are averaged; others are compared."
    )  # fmt: skip
    report.add_argument(
        "run", nargs="+", metavar="RUN", help="runs' folders under outputs/; the first is shown in full"
    )
    report.add_argument("--out", metavar="DIR", help="folder of the report (default: report/ of the first run)")
    report.set_defaults(action=_report)


def stage_named(text: str) -> str:
    """The stage that a number or a name means; raises C2FError for any other text."""
    from c2f_utils.settings.config import STAGES

    found = [name for name in STAGES if text == name or text.isdecimal() and text.zfill(2) == name[:2]]
    if not found:
        raise C2FError(f"there is no stage {short(text)}; expected a number, or one of {', '.join(STAGES)}")
    return found[0]


def states_named(text: str) -> list[str]:
    """The states in a text such as `failed,lost`; raises C2FError for an unknown one."""
    found = [word.strip() for word in text.split(",")]
    if wrong := [word for word in found if word not in STATES]:
        raise C2FError(
            f"there is no state {short(wrong[0])}; expected some of {', '.join(STATES)}, with commas between"
        )
    return found


def _runs(options: argparse.Namespace) -> int:
    from c2f_utils.files import outputs
    from c2f_utils.runs import registry

    wanted = {"run": registry.known(options.run_id).name} if options.run_id is not None else {}
    wanted |= {"stage": stage_named(options.stage)} if options.stage is not None else {}
    states = STATES if options.status is None else states_named(options.status)
    every = registry.rows()
    if options.profile is not None:
        wanted["profile"] = options.profile
        if options.profile not in (known := {row["profile"] for row in every if row["profile"]}):
            there = ", ".join(sorted(known)) or "none"
            raise C2FError(f"no run has the profile {short(options.profile)}; there are: {there}")
    rows = [
        row for row in every if row["status"] in states and all(row[name] == value for name, value in wanted.items())
    ]
    if options.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    elif not rows:
        print(f"no runs in {outputs()}" if not every else f"none of {len(every)} stages in {outputs()} is of that kind")
    else:
        print(_aligned(rows))
    return 0


def _aligned(rows: list[dict[str, object]]) -> str:
    """Rows as text, a column for each key that has a value in any of them."""
    columns = [[name, *map(_cell, (row[name] for row in rows))] for name in rows[0]]
    columns = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*([cell.rjust(width) for cell in c] for c, width in zip(columns, widths, strict=True)), strict=True)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _cell(value: object) -> str:
    if type(value) is float:
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _show(options: argparse.Namespace) -> int:
    from c2f_utils.runs import disk, index, registry
    from c2f_utils.runs.stage import Stage

    folder = registry.known(options.run)
    wanted = None if options.stage is None else stage_named(options.stage)
    there = [stage for path in index.folders(options.run) if (stage := Stage(path)).state() is not None]
    if not (stages := [stage for stage in there if wanted in (None, stage.name)]):
        missing = f"{wanted} has not begun" if wanted else "nothing has begun"
        raise C2FError(f"{missing} in run {options.run!r}; there are: {_names(there)}")
    lines = [f"run {options.run} in {folder}: {disk.used(folder) / 2**20:.0f} MB"]
    lines += [line for stage in stages for line in _described(stage, full=wanted is not None)]
    print("\n".join(lines))
    return 0


def _names(stages: list) -> str:
    return ", ".join(stage.name for stage in stages) or "none"


def _described(stage, full: bool) -> Iterator[str]:
    """What a stage says of itself, a line each; all of its sentences on the results only in `full`."""
    from c2f_utils.runs import index, registry

    if reason := stage.damage():
        yield f"{stage.name}: damaged: {reason}"
        return
    config, status, origin = stage.config(), stage.status(), stage.provenance()
    row, session = registry.row(stage.run_id, stage.name, index.facts(stage.dir)), (origin["sessions"] or [{}])[-1]
    times = f"{row['started'].replace('T', ' ')} UTC, {row['minutes']} min, {row['peak_mb']:.0f} MB of memory"
    beat = f", heartbeat {status['heartbeat'][:19].replace('T', ' ')}" if row["status"] in ("running", "lost") else ""
    yield f"{stage.name}: {row['status']}; {times}, CPU threads: {config['threads']}, {session.get('device')}{beat}"
    if status.get("error") and row["status"] in ("failed", "killed"):
        where = f" (cell {status['cell']})" if status.get("cell") else ""
        yield f"  {status.get('exception') or 'error'}{where}: {status['error']}"
    parents = ", ".join(f"{name} of run {run}" for name, run in origin["parents"].items())
    found = {"made from": parents, "not the profile's": row["changed"], "alarms": row["alarms"]}
    yield from (f"  {name}: {value}" for name, value in found.items() if value)
    said = list(_results(stage))
    yield from (f"  - {line}" for line in (said if full else said[:3]))
    yield f"  files: {', '.join(sorted(each.name + '/' * each.is_dir() for each in stage.dir.iterdir()))}"


def _results(stage) -> Iterator[str]:
    """The sentences of the report, or, where there is none, single numbers."""
    from c2f_utils.report import sources, verdicts

    try:
        results = stage.results() if (stage.dir / "results.json").exists() else {}
        facts = sources.facts_table(results).dropna().itertuples(index=False)
        said = verdicts.everything({stage.name: results} if results else {}).get(stage.name)
        yield from said or [f"{quantity} = {value}" for quantity, value in facts]
    except _UNREADABLE as error:
        yield f"results.json could not be put into words ({type(error).__name__}: {error})"


def _stop(options: argparse.Namespace) -> int:
    from c2f_utils.files import room
    from c2f_utils.runs import locks, registry

    folder = registry.known(options.run)
    working = [stage.name for stage in registry.stages(options.run) if stage.state() == "running"]
    command = locks.holder(folder / ".run.claim", registry.heartbeat_age(options.run))
    if not (working or command):
        raise C2FError(f"nothing is at work in run {options.run!r}; there is nothing to stop")
    with room(folder / "STOP"):
        (folder / "STOP").touch()
    what = ", ".join(working) or f"the command of process {command['pid']} on {command['host']}"
    print(f"{what} will save and end; the command that started it continues it, as does c2f run --resume {options.run}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from c2f_utils.report import build, compare

    if len(set(options.run)) < len(options.run):
        raise C2FError(f"a run is given twice: {' '.join(options.run)}; name each once")
    runs = [compare.with_results(name) for name in options.run]
    if len(compare.arms(runs)) > 1:
        differing = ", ".join(compare.settings(runs)["setting"])
        print(f"the runs differ in more than their seed ({differing}): they are compared, not averaged")
    print(build.build(runs[0], Path(options.out) if options.out else runs[0] / "report", runs=runs[1:]))
    return 0
