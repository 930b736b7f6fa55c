"""Exact checkpoints of a training run: safetensors for arrays, JSON for the rest, one atomic rename each.

A checkpoint holds what training changes: trainable weights, Adam moments, the law, the KL controller, reward moments
and the rows logged so far. Random numbers are functions of seed and iteration, so no generator state is needed.
"""

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from c2f_utils.errors import C2FError
from c2f_utils.files import read_json, write_json
from c2f_utils.limits import refuse_another

if TYPE_CHECKING:
    from c2f_utils.coarse import CoarseTrainer

KEPT = 2


def save(trainer: "CoarseTrainer", folder: Path) -> Path:
    """Write `step-00012/` under `folder` and drop all but the last two; every process must call, the first one writes.

    Raises C2FError when the disk is full, and for weights that are not finite: a checkpoint is always one to go back
    to.
    """
    folder = Path(folder)
    final = folder / f"step-{trainer.iteration:05d}"
    ranks = trainer.ranks
    weights = {name: ranks.full(w.detach()) for name, w in trainer.updates.weights.items()}
    moments = _moments(trainer)
    _refuse_damaged(weights, folder)
    checksum = sum(float(w.double().sum()) for w in weights.values())
    ranks.agree(checksum, "the sum of the trained weights")
    if ranks.rank == 0:
        _write(folder, final, weights, moments, _state(trainer))
    ranks.wait()
    return final


def _refuse_damaged(weights: dict[str, torch.Tensor], folder: Path) -> None:
    damaged = [name for name, w in weights.items() if not torch.isfinite(w).all()]
    if damaged:
        raise C2FError(
            f"weights are no longer finite ({len(damaged)} tensors, first {damaged[0]}); nothing was saved, "
            f"the last sound checkpoint is {latest(folder)}. Lower the learning rates and continue from it"
        )


def _write(folder: Path, final: Path, weights: dict, moments: dict, state: dict) -> None:
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file({n: w.contiguous() for n, w in weights.items()}, partial / "weights.safetensors")
        save_file(moments, partial / "optimiser.safetensors")
        write_json(partial / "state.json", state)
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


def resume(trainer: "CoarseTrainer", folder: Path) -> bool:
    """Continue from the newest checkpoint, if there is one; raises C2FError when it belongs to another law or model."""
    found = latest(folder)
    if found is None:
        return False
    state = read_json(found / "state.json")
    refuse_another(trainer.law, state["law_name"], state.get("law_began"), found)
    ranks, updates = trainer.ranks, trainer.updates
    saved = load_file(found / "weights.safetensors")
    if saved.keys() != updates.weights.keys():
        raise C2FError(f"checkpoint {found} holds other parameters than the model; use overwrite=True to start anew")
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(found / "optimiser.safetensors").items():
        name, _, what = key.rpartition("/")
        # The step count is a scalar; a copy onto the parameter's device serves a fused optimiser everywhere.
        weight = updates.weights[name]
        moments.setdefault(name, {})[what] = ranks.like(value, weight) if value.ndim else value.to(weight.device)
    with torch.no_grad():
        for name, weight in updates.weights.items():
            ranks.assign(weight, saved[name])
            if name in moments:
                updates.optimiser.state[weight] = moments[name]
    updates.publish()
    trainer.iteration, trainer.rollout_tokens = state["iteration"], state["rollout_tokens"]
    trainer.history, trainer.curve = state["history"], state["curve"]
    trainer.law.load_state_dict(state["law"])
    trainer.kl.coefficient = state["kl_coefficient"]
    trainer.scale.square, trainer.scale.count = state["scale"]["square"], state["scale"]["count"]
    trainer.budget.tokens = state["tokens_per_micro_batch"]
    return True


def _moments(trainer: "CoarseTrainer") -> dict[str, torch.Tensor]:
    state = trainer.updates.optimiser.state
    return {
        f"{name}/{key}": trainer.ranks.full(value.detach()).contiguous()
        for name, weight in trainer.updates.weights.items()
        for key, value in state.get(weight, {}).items()
    }


def _state(trainer: "CoarseTrainer") -> dict:
    return {
        "iteration": trainer.iteration,
        "rollout_tokens": trainer.rollout_tokens,
        "law_name": type(trainer.law).__name__,
        "law": trainer.law.state_dict(),
        "law_began": trainer.law_began,
        "kl_coefficient": trainer.kl.coefficient,
        "scale": asdict(trainer.scale),
        "tokens_per_micro_batch": trainer.budget.tokens,
        "history": trainer.history,
        "curve": trainer.curve,
    }
