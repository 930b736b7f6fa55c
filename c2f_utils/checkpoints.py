"""Exact checkpoints of a training run: safetensors for arrays, JSON for the rest, one atomic rename each.

A checkpoint holds what training changes: trainable weights, Adam moments, the law, the KL controller, reward moments and the rows
logged so far. Random numbers are functions of seed and iteration, so no generator state is needed.
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

if TYPE_CHECKING:
    from c2f_utils.coarse import CoarseTrainer

KEPT = 2


def save(trainer: "CoarseTrainer", folder: Path) -> Path:
    """Write `step-00012/` under `folder` and drop all but the last two; raises C2FError when the disk is full."""
    folder = Path(folder)
    final = folder / f"step-{trainer.iteration:05d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        weights = trainer.policy.trainable()
        save_file({n: p.detach().contiguous() for n, p in weights.items()}, partial / "weights.safetensors")
        save_file(_moments(trainer.optimiser, weights), partial / "optimiser.safetensors")
        write_json(partial / "state.json", _state(trainer))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise C2FError(f"cannot write checkpoint {final}: {error.strerror or error}; the one before it is complete. Free space and start again") from error
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return max(Path(folder).glob("step-*"), default=None)


def resume(trainer: "CoarseTrainer", folder: Path) -> bool:
    """Continue from the newest checkpoint, if there is one; raises C2FError when it belongs to another law or model."""
    found = latest(folder)
    if found is None:
        return False
    state = read_json(found / "state.json")
    if state["law_name"] != type(trainer.law).__name__:
        raise C2FError(f"checkpoint {found} was written under law {state['law_name']}, now {type(trainer.law).__name__} is asked for; use overwrite=True")
    weights = trainer.policy.trainable()
    saved = load_file(found / "weights.safetensors")
    if saved.keys() != weights.keys():
        raise C2FError(f"checkpoint {found} holds other parameters than the model; use overwrite=True to start anew")
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(saved[name])
    moments = load_file(found / "optimiser.safetensors")
    for name, parameter in weights.items():
        keys = {key.rpartition("/")[2]: value for key, value in moments.items() if key.rpartition("/")[0] == name}
        if keys:
            # The step count stays on the CPU unless the optimiser is fused on a GPU; a copy onto the parameter's device serves both.
            trainer.optimiser.state[parameter] = {k: v.to(parameter.device) for k, v in keys.items()}
    trainer.iteration, trainer.rollout_tokens = state["iteration"], state["rollout_tokens"]
    trainer.history, trainer.curve = state["history"], state["curve"]
    trainer.law.load_state_dict(state["law"])
    trainer.kl.coefficient = state["kl_coefficient"]
    trainer.scale.square, trainer.scale.count = state["scale"]["square"], state["scale"]["count"]
    return True


def _moments(optimiser: torch.optim.Optimizer, weights: dict) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.detach().contiguous()
        for name, parameter in weights.items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def _state(trainer: "CoarseTrainer") -> dict:
    return {
        "iteration": trainer.iteration, "rollout_tokens": trainer.rollout_tokens, "law_name": type(trainer.law).__name__,
        "law": trainer.law.state_dict(), "kl_coefficient": trainer.kl.coefficient, "scale": asdict(trainer.scale),
        "history": trainer.history, "curve": trainer.curve,
    }  # fmt: skip
