"""The command `c2f` (also `python -m c2f_utils`).

Exit codes: 0 done, 1 a notebook failed, 2 bad input (said in one message, without a traceback), 3 stopped on request
and ready to be continued, 130 killed.
"""

import argparse
import sys
from collections.abc import Sequence

from c2f_utils.errors import C2FError
from c2f_utils.headless import sweep_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.action(options)
    except C2FError as error:
        print(f"c2f: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from c2f_utils import threads
    from c2f_utils.files import read_mapping
    from c2f_utils.headless import jobs as batch

    overrides = read_mapping(options.overrides) if options.overrides else {}
    names = ("profile", "seed", "run_id", "study", "overwrite")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    twice = {text.partition("=")[0] for text in options.parameter} & set(given)
    if twice:
        raise C2FError(f"given twice, as an option and with -p: {', '.join(sorted(twice))}; keep one")
    if options.threads is not None:
        threads.checked(options.threads, "--threads")
    jobs = batch.prepare(options.notebook, {"overrides": overrides, **given}, options.parameter)
    return batch.run(jobs, options.threads)


def _table(options: argparse.Namespace) -> int:
    from c2f_utils.files import outputs
    from c2f_utils.runs import registry

    found = registry.table()
    if options.run_id is not None and len(found):
        known = ", ".join(sorted(set(found["run"])))
        found = found[found["run"] == options.run_id]
        if found.empty:
            raise C2FError(f"there is no run {options.run_id!r} in {outputs()}; there are: {known}")
    if found.empty:
        print(f"no runs in {outputs()}")
        return 0
    found = found.convert_dtypes().astype(object).where(found.notna(), "")  # a count beside gaps stays a whole number
    print(found.loc[:, (found != "").any()].to_string(index=False))
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
    parser = argparse.ArgumentParser(
        prog="c2f", description="Coarse-to-fine workbench: run notebooks, list and compare runs, merge models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="run notebooks without a browser", description="Run notebooks headless, in order."
    )
    run.add_argument("notebook", nargs="+", metavar="NOTEBOOK", help="all, a number (03), a name, or a path")
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
    run.set_defaults(action=_run)

    sweep_command.add_command(commands)

    table = commands.add_parser("table", help="list all runs", description="One line per stage, the latest last.")
    table.add_argument("--run-id", help="only this run")
    table.set_defaults(action=_table)

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
    return parser


if __name__ == "__main__":
    sys.exit(main())
