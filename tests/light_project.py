"""A project whose notebooks do little: the package by a link, and a 01 that counts up to `pretrain.tokens`.

A step takes 50 ms and is checkpointed; what comes out depends on the seed and on every step, once each.
"""

from pathlib import Path

from notebooks_for_tests import write

PACKAGE = Path(__file__).parent.parent / "c2f_utils"
BASE = "01_base_model"
COUNT = """import time
from c2f_utils.files import read_json, write_json
path = run.here.path("checkpoints", "state.json")
found = read_json(path) if path.exists() else {"step": 0, "value": run.settings.seed}
while found["step"] < run.settings.pretrain.tokens and not run.here.stop_requested():
    found = {"step": found["step"] + 1, "value": (found["value"] * 7 + found["step"]) % 1009}
    write_json(path, found)
    time.sleep(0.05)
if run.settings.pretrain.warmup_steps == 13:
    raise RuntimeError("thirteen")
run.here.save_results({"behaviour": {"accuracy_last": found["value"] / 1009}})"""


def make(folder: Path) -> Path:
    """The project in `folder`: commands that are run there use its notebooks."""
    (folder / "notebooks").mkdir(parents=True)
    (folder / "c2f_utils").symlink_to(PACKAGE)
    write(folder / "notebooks", BASE, COUNT)
    return folder


def value(steps: int, seed: int) -> float:
    """What the notebook finds."""
    found = seed
    for step in range(steps):
        found = (found * 7 + step) % 1009
    return found / 1009
