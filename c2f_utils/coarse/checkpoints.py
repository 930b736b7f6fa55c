"""Exact checkpoints of a training run: safetensors for arrays, JSON for the rest, a digest of each file, one atomic
rename.

A checkpoint holds what training changes: trainable weights, Adam moments, the law, the KL controller, reward moments
and the rows logged so far. Random numbers are functions of seed and iteration, so no generator state is needed.
"""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from c2f_utils.coarse.ranks import Ranks
from c2f_utils.errors import C2FError
from c2f_utils.files import read_json, replacing, sha256, write_json

Parts = dict[str, dict]  # weights and optimiser: arrays by name; state: what JSON can hold
ARRAYS, STATE, DIGESTS = ("weights", "optimiser"), "state.json", "digests.json"
KEPT = 2


def save(folder: Path, iteration: int, parts: Parts, ranks: Ranks) -> Path:
    """Write `step-00012/` under `folder` and drop all but the last two; every process must call, the first one writes.

    `parts` are a trainer's `state_dict()`. Raises CannotWrite when the disk is full, and C2FError for weights that
    are not finite: a checkpoint is always one to go back to.
    """
    folder = Path(folder)
    final = folder / f"step-{iteration:05d}"
    _refuse_damaged(parts["weights"], folder)
    ranks.agree(sum(float(w.double().sum()) for w in parts["weights"].values()), "the sum of the trained weights")
    if ranks.rank == 0:
        _write(folder, final, parts)
    ranks.wait()
    return final


def _refuse_damaged(weights: dict[str, torch.Tensor], folder: Path) -> None:
    damaged = [name for name, w in weights.items() if not torch.isfinite(w).all()]
    if damaged:
        raise C2FError(
            f"weights are no longer finite ({len(damaged)} tensors, first {damaged[0]}); nothing was saved, "
            f"the last sound checkpoint is {latest(folder)}. Lower the learning rates and continue from it"
        )


def _write(folder: Path, final: Path, parts: Parts) -> None:
    with replacing(final) as partial:
        partial.mkdir()
        for name in ARRAYS:
            save_file({n: w.contiguous() for n, w in parts[name].items()}, partial / f"{name}.safetensors")
        write_json(partial / STATE, parts["state"])
        write_json(partial / DIGESTS, {file.name: sha256(file) for file in sorted(partial.iterdir())})
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, or None."""
    return max(Path(folder).glob("step-*"), default=None)


def whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written, or None; what is wrong with newer ones is printed."""
    for found in sorted(Path(folder).glob("step-*"), reverse=True):
        if (wrong := _damage(found)) is None:
            return found
        print(f"checkpoint {found} is passed over: {wrong}")
    return None


def _damage(checkpoint: Path) -> str | None:
    try:
        for name in ARRAYS:
            with safe_open(checkpoint / f"{name}.safetensors", "pt"):  # a file that was cut says so
                pass
        read_json(checkpoint / STATE)
        known = read_json(checkpoint / DIGESTS) if (checkpoint / DIGESTS).exists() else {}  # none before there were any
        changed = [name for name, digest in dict(known).items() if sha256(checkpoint / name) != digest]
    except (C2FError, SafetensorError, OSError, TypeError, ValueError) as error:
        return str(error)
    return f"{changed[0]} is not as it was written" if changed else None


def last_iteration(folder: Path) -> int:
    """Iterations that the newest whole checkpoint holds; 0 without one."""
    found = whole(folder)
    return int(found.name.removeprefix("step-")) if found else 0


def load(checkpoint: Path) -> Parts:
    """The parts that `save` was given."""
    arrays = {name: load_file(checkpoint / f"{name}.safetensors") for name in ARRAYS}
    return {**arrays, "state": read_json(checkpoint / STATE)}
