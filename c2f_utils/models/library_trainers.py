"""Keep library trainers quiet in notebooks: no progress-bar spam, no advice about choices made on purpose."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' and TRL's console output and progress bars inside the block; all of it comes back
    afterwards."""
    from transformers.utils import logging as hf_logging

    before, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    trl = logging.getLogger("trl")
    trl_level = trl.level
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    trl.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(before)
        trl.setLevel(trl_level)
        if bars:
            hf_logging.enable_progress_bar()


def arguments(steps: int, order: int, cpu: bool, folder: str | Path = ".", dtype: str = "float32") -> dict[str, object]:
    """What both library trainers are told: `steps` optimiser steps at a linear rate, data in the order of seed `order`,
    at most two checkpoints in `folder`.

    Nothing is cut, reported or drawn, or saved unless a callback asks for it; the loss is logged about 50 times. Under
    `dtype` bfloat16 products are in that type beside weights that must be float32: these trainers keep no masters, and
    bfloat16 weights would swallow most of their steps.
    """
    return {
        "output_dir": str(folder),
        "save_total_limit": 2,
        "max_length": None,
        "max_steps": steps,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "seed": order,
        "data_seed": order,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": max(1, steps // 50),
        "disable_tqdm": True,
        "bf16": dtype == "bfloat16",
        "use_cpu": cpu,
        "dataloader_pin_memory": False,
    }


def fit(trainer, log: Callable[[dict], None], checkpoint: str | None = None) -> None:
    """Run a Hugging Face trainer without its printing, from a checkpoint if one is given, and hand its loss rows,
    {"step", "loss"}, to `log`."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    for row in trainer.state.log_history:
        if "loss" in row:
            log({"step": row["step"], "loss": round(row["loss"], 5)})


def trained(trainer, dtype: str) -> nn.Module:
    """What a library trainer has trained, in evaluation mode, as if it had been saved and loaded: without the trainer's
    wrapper around its forward, adapters merged, weights in `dtype`, and tables of positions in float32 as they were."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    whole = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    for weight in whole.parameters():
        weight.data = weight.data.to(getattr(torch, dtype))
    return whole.eval()
