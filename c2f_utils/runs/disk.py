"""How much disk a stage will fill, estimated before it starts from the sizes of its models. Needs no torch."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from c2f_utils import weights
from c2f_utils.errors import C2FError

if TYPE_CHECKING:
    from c2f_utils.settings.config import Settings

_BYTES = {"float32": 4, "bfloat16": 2, "bfloat16_stochastic": 2}
ADAPTER_SHARE = 0.1  # of the model's bytes: adapters of rank 32, their optimiser's two moments, two checkpoints


def needed(stage: str, settings: "Settings") -> float:
    """Bytes that `stage` writes at most at one time: the models it keeps, its checkpoints, its scratch models.

    0 for a model that is not on this machine yet: its size is known to the stages after the one that fetches it.
    """
    source = settings.models.base
    if source:
        found = weights.count(f"{source}@{settings.models.base_revision}" if settings.models.base_revision else source)
    else:
        found = settings.pretrain.weights
    return _of_stage(stage, settings, float(found or 0))


def _of_stage(stage: str, settings: "Settings", count: float) -> float:
    models, embedded = settings.models, settings.embedded
    kept = count * _BYTES[models.dtype]
    # Trained in full: float32 weights and two moments of actor and critic, twice while a checkpoint is replaced.
    networks = 2 if settings.coarse.critic == "separate" else 1
    training = ADAPTER_SHARE * kept if models.lora else count * 12 * networks * 2 + kept
    if stage in ("01_base_model", "05_instruction_model"):
        return kept if embedded else 0.0
    if stage == "02_reward_model":
        return 0.0 if models.reward else kept
    if stage == "03_coarse_rlhf":
        evaluations = settings.coarse.iterations // settings.coarse.evaluate_every + 1
        return training + settings.coarse.snapshots * evaluations * kept
    if stage == "04_length_schedules":
        schedules = settings.schedules
        laws = len(schedules.laws) + settings.study * (len(schedules.study_laws) + len(schedules.critic_free))
        return laws * (len(schedules.study_seeds) if settings.study else 1) * training
    if stage == "06_residue_merging":
        from c2f_utils.settings.config import TRAINED_CONTROLS, trained_controls  # a list of runs needs no pydantic

        merge = settings.merge
        merges = {*merge.controls} - {*TRAINED_CONTROLS}
        controls = (1 + len(merges)) * kept + training * len(trained_controls(merge.controls))
        scratch = count * _BYTES["float32"] if "roundings" in merge.sections else 0.0
        return count * _BYTES.get(merge.out_dtype, _BYTES[models.dtype]) + max(scratch, controls)
    return 0.0


def used(folder: Path) -> float:
    """Bytes of the files in a folder."""
    return float(sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()))


def free(folder: Path) -> float:
    """Bytes that are free where a folder is."""
    return float(shutil.disk_usage(folder).free)


def refuse_full(folder: Path, wanted: float = 0.0, there: float = 0.0) -> None:
    """Refuse a run folder that cannot be written or has too little space left: for the bytes `wanted` without those
    that are `there`, and at least for `C2F_MIN_FREE_MB` (default 200)."""
    there_is = next(path for path in (folder, *folder.parents) if path.exists())  # a refusal makes no folder
    probe = there_is / f".write-test-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
        left = free(there_is) / 2**20
    except OSError as error:
        reason = error.strerror or error
        raise C2FError(
            f"run folder {folder} cannot be written: {reason}; set C2F_OUTPUTS to a folder that can"
        ) from None
    least = max(float(os.environ.get("C2F_MIN_FREE_MB") or 200), (wanted - there) / 2**20)
    if left < least:
        raise C2FError(
            f"run folder {folder} has {left:.0f} MB free, {least:.0f} MB are needed; free some or set C2F_OUTPUTS"
            + f" (this stage writes models of about {wanted / 1e9:.0f} GB)" * (wanted >= 1e9)
        )
