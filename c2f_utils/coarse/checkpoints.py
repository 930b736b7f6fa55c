"""Exact checkpoints of a training run: safetensors for arrays, JSON for the rest, one atomic rename each.

A checkpoint holds what training changes: trainable weights, Adam moments, the law, the KL controller, reward moments
and the rows logged so far. Random numbers are functions of seed and iteration, so no generator state is needed.
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from c2f_utils.coarse.ranks import Ranks
from c2f_utils.errors import C2FError
from c2f_utils.files import read_json, write_json

Parts = dict[str, dict]  # weights and optimiser: arrays by name; state: what JSON can hold
KEPT = 2


def save(folder: Path, iteration: int, parts: Parts, ranks: Ranks) -> Path:
    """Write `step-00012/` under `folder` and drop all but the last two; every process must call, the first one writes.

    `parts` are a trainer's `state_dict()`. Raises C2FError when the disk is full, and for weights that are not finite:
    a checkpoint is always one to go back to.
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
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name in ("weights", "optimiser"):
            save_file({n: w.contiguous() for n, w in parts[name].items()}, partial / f"{name}.safetensors")
        write_json(partial / "state.json", parts["state"])
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise C2FError(
            f"cannot write checkpoint {final}: {error.strerror or error}; the one before it is complete. "
            "Free space and start again"
        ) from error
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return max(Path(folder).glob("step-*"), default=None)


def last_iteration(folder: Path) -> int:
    """Iterations that the newest checkpoint holds; 0 without one."""
    found = latest(folder)
    return int(found.name.removeprefix("step-")) if found else 0


def load(checkpoint: Path) -> Parts:
    """The parts that `save` was given."""
    arrays = {name: load_file(checkpoint / f"{name}.safetensors") for name in ("weights", "optimiser")}
    return {**arrays, "state": read_json(checkpoint / "state.json")}
