"""The command `c2f` (also `python -m c2f_utils`).

Exit codes: 0 done, 1 a notebook failed, 2 bad input (said in one message, without a traceback), 3 stopped on request
and ready to be continued, 130 killed.
"""

import argparse
import sys
from collections.abc import Sequence

from c2f_utils.errors import C2FError, short
from c2f_utils.headless import again, clean, look, pack, sweep_command


class _Parser(argparse.ArgumentParser):
    """A command line whose mistakes are said in one sentence, like any bad input."""

    def error(self, message: str) -> None:
        raise C2FError(f"{' '.join(message.split())}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        return options.action(options)
    except C2FError as error:
        print(f"c2f: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `c2f runs | head`
        sys.stderr.close()
        return 0


def _run(options: argparse.Namespace) -> int:
    from c2f_utils import threads
    from c2f_utils.files import read_mapping
    from c2f_utils.headless import jobs as batch

    if options.help:
        print(_help(options))
        return 0
    names = ("profile", "seed", "run_id", "study", "overwrite")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.threads is not None:
        threads.checked(options.threads, "--threads")
    if options.resume is not None:
        return batch.run(again.resumed(_resumed_id(options, given), options.notebook), options.threads)
    if not options.notebook:
        raise C2FError("name the notebooks to run: all, a number (03), a name, or a path; see c2f run --help")
    overrides = read_mapping(options.overrides) if options.overrides else {}
    twice = {text.partition("=")[0] for text in options.parameter} & set(given)
    if twice:
        raise C2FError(f"given twice, as an option and with -p: {', '.join(sorted(twice))}; keep one")
    jobs = batch.prepare(options.notebook, {"overrides": overrides, **given}, options.parameter)
    return batch.run(jobs, options.threads)


def _resumed_id(options: argparse.Namespace, given: dict[str, object]) -> str:
    """The run that --resume means; raises C2FError beside anything that the run itself says."""
    named = {text for text in (options.resume, options.run_id) if text}
    if len(named) > 1:
        raise C2FError(f"--resume {options.resume} and --run-id {options.run_id} name two runs; keep one")
    given = [f"--{name}" for name in given if name != "run_id"]
    given += ["--overrides"] * (options.overrides is not None) + ["-p"] * bool(options.parameter)
    if given:
        raise C2FError(f"--resume takes the parameters that the run was begun with; leave out {', '.join(given)}")
    return named.pop() if named else "lab"


def _help(options: argparse.Namespace) -> str:
    """The command's options and, for the notebooks named, their parameters and the settings that decide them."""
    from c2f_utils.headless import jobs
    from c2f_utils.notebook.opening import deciding
    from c2f_utils.settings import parameters
    from c2f_utils.settings.load import load_settings

    lines = [] if options.notebook else [options.parser.format_help()]
    profile = options.profile or "tiny"
    for path in (path for target in options.notebook for path in jobs.notebooks_of(target)):
        lines.append(f"{path.name}, parameters (-p NAME=VALUE; the first six are options, too):")
        for item in parameters.of_notebook(path).values():
            lines.append(f"  {item.name}: {item.type} = {item.default!r}  {item.help}")
        lines.append(f"settings that decide it, in profile {profile} (-p SECTION.NAME=VALUE; all: c2f settings):")
        for name, value, _, meaning in deciding(load_settings(profile), path.stem):
            lines.append(f"  {name} = {value}  {meaning}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _settings(options: argparse.Namespace) -> int:
    from c2f_utils.settings.kinds import Section
    from c2f_utils.settings.load import load_settings

    settings = load_settings(options.profile)
    sections = {name: section for name, section in settings if isinstance(section, Section)}
    if options.section not in (None, *sections):
        raise C2FError(f"there is no section {short(options.section)}; expected one of {', '.join(sections)}")
    for name in sections if options.section is None else [options.section]:
        values = sections[name].model_dump(mode="json")
        for key, field in type(sections[name]).model_fields.items():
            print(f"{name}.{key} = {values[key]!r}" + (f"  # {field.description}" if field.description else ""))
    return 0


def _diff(options: argparse.Namespace) -> int:
    from c2f_utils.report import compare

    print(compare.text(options.a, options.b, options.all))
    return 0


def _merge(options: argparse.Namespace) -> int:
    from c2f_utils.merge import load_recipe, plan_merge, run_merge, verify_and_record

    recipe = load_recipe(options.recipe)
    if not (options.out or options.plan):
        raise C2FError("--out is missing; name the folder of the merged model (--out DIR), or ask for the --plan only")
    plan = plan_merge(recipe)
    if options.plan:
        print(plan.table().to_string(index=False))
        size = f"{plan.bytes_read / 2**20:.1f} MiB to read, {plan.bytes_written / 2**20:.1f} MiB to write"
        print("\n".join([*plan.notes, f"{size}; nothing was written"]))
        return 0
    report = run_merge(plan, options.out, resume=options.resume)
    print("\n".join([*report.warnings, f"{report.formula}\nwritten to {report.out_dir}"]))
    if options.verify:
        found = verify_and_record(report.out_dir, recipe)
        print(f"verified: {found.slices} slices recomputed, worst {found.worst:.2f} of the rounding error allowed")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="c2f",
        description="Coarse-to-fine workbench: run notebooks, list, compare and repeat runs, merge models. "
        "c2f COMMAND --help says more; c2f run 03 --help shows what a notebook takes.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="run notebooks without a browser", description="Run notebooks headless, in order.", add_help=False
    )
    run.add_argument("notebook", nargs="*", metavar="NOTEBOOK", help="all, a number (03), a name, or a path")
    run.add_argument(
        "-h", "--help", action="store_true", help="show this, or, beside a notebook, its parameters and settings"
    )
    run.add_argument("--profile", help=(
        "tiny (default), gpu_demo, small_gpu, mistral_7b, or smoke (a dry run of the code: nothing is learnt)"
    ))  # fmt: skip
    run.add_argument("--seed", type=int, help="default: 0")
    run.add_argument("--run-id", help="folder under outputs/ (default: lab)")
    run.add_argument("--overrides", metavar="FILE", help="YAML file with settings to change")
    run.add_argument("-p", dest="parameter", action="append", default=[], metavar="NAME=VALUE", help=(
        "a notebook parameter, or a setting by its dotted name (coarse.iterations=5); may be repeated"
    ))  # fmt: skip
    run.add_argument("--threads", type=int, help="CPU threads (default: measured once)")
    run.add_argument("--study", action="store_true", default=None, help="the larger experiments, too")
    run.add_argument("--overwrite", action="store_true", default=None, help="set stages of another configuration aside")
    run.add_argument("--resume", nargs="?", const="", metavar="RUN", help=(
        "go on with a run under the parameters it was begun with; without notebooks: those of its latest command"
    ))  # fmt: skip
    run.set_defaults(action=_run, parser=run)

    settings = commands.add_parser(
        "settings", help="show all settings", description="Every setting with its value in a profile and its meaning."
    )
    settings.add_argument("section", nargs="?", metavar="SECTION", help="only this section, e.g. coarse")
    settings.add_argument("--profile", default="tiny", help="default: tiny")
    settings.set_defaults(action=_settings)

    sweep_command.add_command(commands)
    look.add_commands(commands)
    again.add_command(commands)
    clean.add_command(commands)

    diff = commands.add_parser(
        "diff", help="compare two runs", description="Settings and results in which two runs differ."
    )
    diff.add_argument("a", metavar="A", help="a run's folder under outputs/")
    diff.add_argument("b", metavar="B", help="another run's")
    diff.add_argument("--all", action="store_true", help="every number, also of long lists")
    diff.set_defaults(action=_diff)

    merge = commands.add_parser("merge", help="merge models by a recipe", description="Merge models by a recipe file.")
    merge.add_argument("recipe", metavar="RECIPE.yaml")
    merge.add_argument("--out", metavar="DIR", help="folder of the merged model; not needed with --plan")
    merge.add_argument("--plan", action="store_true", help="check everything and show the plan, write nothing")
    merge.add_argument("--resume", action="store_true", help="continue an interrupted merge")
    merge.add_argument("--verify", action="store_true", help="recompute random slices of the result in float64")
    merge.set_defaults(action=_merge)

    pack.add_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
