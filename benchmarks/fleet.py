"""What a shared file system sees of a run, measured on one node and added up for a fleet.

    python benchmarks/fleet.py --out benchmarks/results/fleet.json

A hook that Python itself calls for every open, rename, removal and listing (`sys.addaudithook`) writes them down in the
runner and in the notebook's kernel, as far as they concern the folder of runs. 03 runs on the embedded domain with two
numbers of iterations and two of checkpoints, so that what a run costs once, what an iteration costs and what a
checkpoint costs come apart. Not seen: `stat`, the libraries' own writes below Python (safetensors: one file each), and
any network file system: this measures requests, not how fast a server answers them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from c2f_utils.files import write_json
from c2f_utils.runs import provenance
from c2f_utils.runs.stage import HEARTBEAT

ROOT = Path(__file__).parent.parent
RUNS, NODES = 1000, 100
ITERATION, CHECKPOINT = 30.0, 300.0  # seconds of an iteration and between checkpoints that the sum assumes
HOOK = """
import os, sys
_log, _of = os.open(os.environ["FLEET_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT), os.environ["C2F_OUTPUTS"]
_writes = os.O_WRONLY | os.O_RDWR

def _hook(event, args):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir"):
        if args and isinstance(args[0], (str, os.PathLike)) and str(args[0]).startswith(_of):
            if event == "open":
                event = "open to write" if (args[2] or 0) & _writes else "open to read"
            os.write(_log, (event + "\\n").encode())

sys.addaudithook(_hook)
"""


def counted(outputs: Path, hooks: Path, run_id: str, *settings: str) -> Counter:
    """Requests of `c2f run 03` by kind."""
    log = hooks / f"{run_id}.log"
    environment = os.environ | {
        "FLEET_LOG": str(log), "C2F_OUTPUTS": str(outputs), "PYTHONPATH": f"{hooks}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1", "C2F_THREADS": "1", "C2F_MIN_FREE_MB": "1",
    }  # fmt: skip
    parameters = [word for setting in settings for word in ("-p", setting)]
    command = [sys.executable, "-m", "c2f_utils", "run", "03", "--profile", "smoke", "--run-id", run_id, *parameters]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return Counter(log.read_text().split("\n")[:-1])


def slope(more: Counter, less: Counter, count: int) -> dict[str, float]:
    """What one of `count` further things costs."""
    return {kind: (more[kind] - less[kind]) / count for kind in sorted({*more, *less}) if more[kind] != less[kind]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outputs, hooks = Path(folder) / "outputs", Path(folder) / "hooks"
        outputs.mkdir()
        hooks.mkdir()
        (hooks / "sitecustomize.py").write_text(HOOK)
        before = [sys.executable, "-m", "c2f_utils", "run", "01", "02", "--profile", "smoke", "--run-id", "before"]
        subprocess.run(before, cwd=ROOT, env=os.environ | {"C2F_OUTPUTS": str(outputs)}, check=True)
        few = ("coarse.evaluate_every=60", "coarse.iterations=20")
        short = counted(outputs, hooks, "short", *few, "coarse.checkpoint_every=60")
        often = counted(outputs, hooks, "often", *few, "coarse.checkpoint_every=2")
        longer = counted(outputs, hooks, "longer", few[0], "coarse.iterations=60", "coarse.checkpoint_every=60")
        stage = outputs / "short" / "03_coarse_rlhf"
        sizes = {str(path.relative_to(stage.parent)): path.stat().st_size for path in _files(stage.parent)}
        folders = sum(path.is_dir() for path in stage.parent.rglob("*"))
        status = (stage / "status.json").stat().st_size
        checkpoint = {path.name: path.stat().st_size for path in max(stage.glob("checkpoints/step-*")).iterdir()}
    models = {name: size for name, size in sizes.items() if name.endswith(".safetensors")}
    per_iteration, per_checkpoint = slope(longer, short, 40), slope(often, short, 9)
    beat = {"open to write": 1, "os.rename": 1, "fsync": 1}  # status.json, written beside and renamed
    rates = {
        "heartbeats": sum(beat.values()) / HEARTBEAT,
        "iterations": sum(per_iteration.values()) / ITERATION,
        "checkpoints": sum(per_checkpoint.values()) / CHECKPOINT,
    }
    found = {
        "once": dict(sorted(short.items())), "per_iteration": per_iteration, "per_checkpoint": per_checkpoint,
        "per_heartbeat": beat, "heartbeat_s": HEARTBEAT, "status_bytes": status,
        "files": len(sizes), "folders": folders, "bytes_without_weights": sum(sizes.values()) - sum(models.values()),
        "files_of_a_checkpoint": checkpoint,
        "fleet": {
            "runs": RUNS, "nodes": NODES, "iteration_s": ITERATION, "checkpoint_s": CHECKPOINT,
            "requests_per_s_and_run": {name: round(rate, 4) for name, rate in rates.items()},
            "requests_per_s": round(RUNS * sum(rates.values()), 1),
            "requests_per_s_and_node": round(RUNS * sum(rates.values()) / NODES, 2),
            "files": RUNS * len(sizes), "megabytes_without_weights":
                round(RUNS * (sum(sizes.values()) - sum(models.values())) / 1e6),
        },
        "machine": provenance.machine(), "versions": provenance.versions(),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if options.out:
        write_json(options.out, found)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


if __name__ == "__main__":
    main()
