"""The command `c2f sweep`."""

import argparse
import os
import shutil
import subprocess
from pathlib import Path

from c2f_utils.errors import C2FError, problems, short

DESCRIPTION = """\
Run notebooks under every point of a grid and every seed, each a run of its own.

A grid is a YAML file of settings with lists, e.g.

    coarse.iterations: [10, 20]
    coarse.law: [{name: fixed, limit: 32}, {name: fixed, limit: 128}]

    c2f sweep 03 --grid grid.yaml --seeds 5 --workers 2        # 4 points x seeds 0 to 4
    c2f sweep 06 07 --grid prices.yaml --seeds 11,12,13        # merges; trains once per seed, before the points
    c2f sweep all --seeds 5 --name demo5                       # no grid: repetitions

Earlier stages that the notebooks build on need not be named. Those that some run has already, with equal settings,
are used; those that all points of a seed share are made once, in a run of their own; a point makes the others itself.
A point that fails does not stop the rest. The same command continues a sweep: what is done is left alone. Ctrl-C,
SIGTERM, SIGUSR1 or a file STOP in outputs/<sweep>/ stop it so that it can be continued; a second Ctrl-C kills.
`c2f sweep --table NAME` shows all points at any time, notebook 08 (sweep="NAME") draws them, and
`c2f_utils.report.sweep_results.sweep_results(NAME)` is the table as a DataFrame. docs/sweeps.md: Slurm, files.

Exit codes: 0 all runs are done, 1 some failed, 2 bad input, 3 stopped, 130 killed.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `sweep` to the commands of `c2f`."""
    sweep = commands.add_parser(
        "sweep", help="run notebooks over a grid of settings and seeds", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    sweep.add_argument("notebook", nargs="*", metavar="NOTEBOOK", help="all, a number (03), a name")
    sweep.add_argument("--grid", metavar="FILE", help="YAML file: settings by dotted name, each with a list of values")
    sweep.add_argument("--seeds", default="1", metavar="N|LIST", help=(
        "how many, from 0 on (5), or which (11,12,13; a single one: 11,); default: 1"
    ))  # fmt: skip
    sweep.add_argument("--name", help="folder under outputs/, and the beginning of the runs' names (default: the "
                       "grid's file name)")  # fmt: skip
    sweep.add_argument("--profile", default="tiny", help="as for c2f run (default: tiny)")
    sweep.add_argument("--overrides", metavar="FILE", help="YAML file with settings that all points share")
    sweep.add_argument("--study", action="store_true", help="the larger experiments, too")
    sweep.add_argument("--most", type=int, default=None, metavar="N", help="allow so many runs (default: 100)")
    sweep.add_argument("--threads", type=int, help="CPU threads of each run (default: the machine's, divided)")
    sweep.add_argument("--workers", type=int, help="runs at a time (default: one per device)")
    sweep.add_argument("--devices", metavar="LIST", help="GPUs to spread the workers over, e.g. 0,1,2 (default: all)")
    sweep.add_argument("--slurm", action="store_true", help="hand the runs to Slurm as job arrays and return")
    sweep.add_argument("--sbatch", metavar="FILE", help="your version of the batch script (docs/sweeps.md)")
    sweep.add_argument("--table", metavar="NAME", help="show the runs of a sweep, run nothing")
    sweep.add_argument("--element", nargs=2, metavar=("NAME", "NUMBER"), help=argparse.SUPPRESS)  # of a job array
    sweep.set_defaults(action=_sweep)


def _sweep(options: argparse.Namespace) -> int:
    from c2f_utils.headless import slurm, sweeps

    if options.table is not None:
        print(sweeps.table(options.table).to_string(index=False, float_format="{:.4g}".format))
        return 0
    if options.element:
        return slurm.work(*options.element)
    if options.sbatch and not options.slurm:
        raise C2FError("--sbatch is for --slurm; add it, or leave the file out")
    if options.slurm and (options.workers or options.devices):
        raise C2FError("--workers and --devices are for this machine; Slurm's are in the batch script (--sbatch)")
    if options.workers is not None and not 1 <= options.workers <= 1024:
        raise C2FError(f"--workers {options.workers}; expected a whole number from 1 on")
    wanted, devices = _wanted(options), _devices(options.devices)
    script = slurm.script(options.sbatch) if options.slurm else ""
    record = sweeps.prepare(wanted, sweeps.MOST if options.most is None else options.most)
    if options.slurm:
        return slurm.submit(record, script, options.threads)
    return sweeps.run(record, options.workers or max(1, len(devices)), devices, options.threads)


def _wanted(options: argparse.Namespace):
    from c2f_utils import threads
    from c2f_utils.files import read_mapping
    from c2f_utils.headless import jobs, sweeps

    if not options.notebook:
        raise C2FError("no notebook is named; expected all, a number (03), or a name")
    paths = [path for target in options.notebook for path in jobs.notebooks_of(target)]
    overrides = read_mapping(options.overrides) if options.overrides else {}
    name = options.name or (Path(options.grid).stem if options.grid else None)
    if name is None:
        raise C2FError("without a --grid a sweep needs a --name")
    if options.threads is not None:
        threads.checked(options.threads, "--threads")
    grid = _grid(options.grid, overrides) if options.grid else {}
    stages = tuple(dict.fromkeys(path.stem for path in paths))
    return sweeps.Wanted(name, stages, grid, _seeds(options.seeds), options.profile, overrides, options.study)


def _grid(path: str | Path, overrides: dict[str, object]) -> dict[str, list]:
    """A YAML mapping of dotted settings to lists of values.

    Raises C2FError for what is no such mapping, an empty list, and a setting that is given twice or in `overrides`.
    """
    from c2f_utils.files import read_mapping
    from c2f_utils.settings.load import dotted

    found = read_mapping(path, "grid", "coarse.iterations: [5, 10]")
    wrong = [] if found else ["it is empty; expected lines such as 'coarse.iterations: [5, 10]'"]
    for key, values in found.items():
        if "." not in str(key) or not isinstance(values, list):
            wrong.append(f"{short(key)}: expected a setting by its dotted name with a list: coarse.iterations: [5, 10]")
        elif not values:
            wrong.append(f"{key} has no values; expected at least one")
    taken = [*dotted(overrides), *(str(key) for key in found)]
    for number, name in enumerate(taken):
        wrong += [
            f"{name} is given twice ({other}); keep one"
            for other in taken[number + 1 :]
            if f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}.")
        ]
    if wrong:
        raise problems(f"grid {path} cannot be used:", wrong)
    return found


def _seeds(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.removesuffix(",").split(",")]
    if not all(part.isdecimal() and len(part) < 19 for part in parts):
        raise C2FError(f"--seeds {short(text)}; expected how many (5) or which (11,12,13)")
    if "," not in text:
        if not 1 <= int(text) <= 10_000:
            raise C2FError(f"--seeds {text}; expected at least 1 (a list of one seed is written {text},)")
        return tuple(range(int(text)))
    if len(set(map(int, parts))) < len(parts):
        raise C2FError(f"--seeds {short(text)} names a seed twice; keep one")
    return tuple(map(int, parts))


def _devices(text: str | None) -> list[str]:
    """The GPUs to spread over: those named, else those that this process may see, else all of the machine."""
    if text is None:
        text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is not None:
        return [part.strip() for part in text.split(",") if part.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    found = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return [str(number) for number, _ in enumerate(found.stdout.splitlines())] if found.returncode == 0 else []
