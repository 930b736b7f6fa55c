"""How long the command line takes: its help, a list of 5,000 runs with and without its index, and what a notebook
costs beyond papermill's own time.

The runs are synthetic: the records of three stages, written once by the package and copied under other names. Writes
`benchmarks/results/command_line.json` with the commit and the machine.

    python benchmarks/command_line.py [--runs 5000]
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from c2f_utils.files import outputs, root, write_json
from c2f_utils.runs import index, provenance, registry
from c2f_utils.runs.run import Run
from c2f_utils.settings.load import load_settings

STAGES = ("01_base_model", "02_reward_model", "03_coarse_rlhf")
RECORDS = ("config.json", "status.json", "provenance.json", "metrics.jsonl")
ITERATIONS = 30
REPEATS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5000)
    count = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"C2F_OUTPUTS": folder, "C2F_THREADS": "1", "C2F_MIN_FREE_MB": "1"}
        overheads = [overhead() for _ in range(REPEATS)]
        shutil.rmtree(outputs() / "timed")
        synthetic(count)
        time.sleep(2.5)  # a file as young as that is not taken from the index
        rebuilt = [without_index(lambda: command("runs")) for _ in range(2)]
        found = {
            "runs": count,
            "stages": count * len(STAGES),
            "seconds": {
                "c2f --help": best(lambda: command("--help")),
                "c2f runs, index rebuilt": min(rebuilt),
                "c2f runs": best(lambda: command("runs")),
                "c2f runs --status failed": best(lambda: command("runs", "--status", "failed")),
                "c2f show": best(lambda: command("show", "s0001")),
                "registry.latest (a notebook opens)": best(lambda: registry.latest(STAGES[0], "tiny", 0)),
                "registry.refuse_unknown": best(lambda: registry.refuse_unknown(["s0001"])),
                "a notebook beyond papermill's own time": statistics.median(overheads),
            },
            "index_mb": round((outputs() / index.FILE).stat().st_size / 2**20, 1),
            "code": provenance.code_version(root()),
            "machine": provenance.machine(),
        }
    print(json.dumps(found, indent=1))
    write_json(Path(__file__).parent / "results" / "command_line.json", found)


def synthetic(count: int) -> None:
    """Runs of three finished stages each, seeds 0 to 9, every tenth of them with another setting."""
    for seed in range(10):
        overrides = {"coarse.iterations": 9} if seed == 9 else {}
        run = Run(load_settings("tiny", seed=seed, run_id=f"s{seed:04}", overrides=overrides))
        for name in STAGES:
            stage = run.stage(name)
            inputs, parents = run.inputs(name)
            stage.begin(inputs, parents=parents)
            for iteration in range(ITERATIONS if name == STAGES[-1] else 0):
                stage.log({"iteration": iteration, **{f"metric_{k}": k / 7 for k in range(22)}, "reward": 0.1})
            stage.save_results({"value": seed})
            stage.finish()
    for number in range(10, count):
        for name in STAGES:
            source, target = (outputs() / f"s{k:04}" / name for k in (number % 10, number))
            target.mkdir(parents=True)
            for record in RECORDS:
                if (source / record).exists():
                    shutil.copyfile(source / record, target / record)


def command(*arguments: str) -> None:
    """One `c2f` in a process of its own, as a user starts it."""
    subprocess.run([sys.executable, "-m", "c2f_utils", *arguments], check=True, stdout=subprocess.DEVNULL, cwd=root())


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return round(time.perf_counter() - start, 3)


def best(action: Callable[[], object]) -> float:
    return min(timed(action) for _ in range(REPEATS))


def without_index(action: Callable[[], object]) -> float:
    (outputs() / index.FILE).unlink(missing_ok=True)
    return timed(action)


def overhead() -> float:
    """Seconds of `c2f run` for one empty notebook, checks and records included, without those inside papermill."""
    import papermill

    from c2f_utils.__main__ import main as c2f

    inside, execute = [], papermill.execute_notebook

    def watched(*arguments: object, **named: object) -> object:
        start = time.perf_counter()
        try:
            return execute(*arguments, **named)
        finally:
            inside.append(time.perf_counter() - start)

    papermill.execute_notebook = watched
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            whole = timed(lambda: c2f(["run", "09", "--profile", "smoke", "--run-id", "timed"]))
    finally:
        papermill.execute_notebook = execute
    return round(whole - sum(inside), 3)


if __name__ == "__main__":
    main()
