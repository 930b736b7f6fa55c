"""One of several training processes: the command behind `accelerate launch -m c2f_utils.coarse run.yaml`."""

import argparse
import sys
from pathlib import Path

from c2f_utils.errors import C2FError
from c2f_utils.runs.run import Run
from c2f_utils.stages.processes import STAGE, read_run


def main(arguments: list[str] | None = None) -> int:
    """Run one of the processes; returns 0 when done or stopped, 2 for bad input (said in one message)."""
    parser = argparse.ArgumentParser(prog="c2f_utils.coarse", description="Train the coarse actor of a run (stage 03).")
    parser.add_argument("file", metavar="run.yaml", type=Path, help="profile, seed, run_id, overrides, study")
    parser.add_argument("--begun", action="store_true", help="a notebook has begun the stage and will end it")
    options = parser.parse_args(arguments)
    try:
        _work(Run(read_run(options.file)), options.begun)
    except C2FError as error:
        print(f"coarse: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _work(run: Run, begun: bool) -> None:
    import torch

    from c2f_utils import notebook
    from c2f_utils.coarse import ranks
    from c2f_utils.runs import provenance
    from c2f_utils.stages import coarse_rlhf
    from c2f_utils.stages.inputs import Inputs

    these = ranks.start()
    if these.sharded and run.settings.coarse.snapshots:
        raise C2FError("coarse.snapshots needs whole weights: use coarse.spread 'ddp', or set snapshots to false")
    run.here, run.threads, run.device = run.stage(STAGE), torch.get_num_threads(), provenance.device_name()
    notebook.seed_everything(run.settings.seed)
    if these.rank == 0:
        if not begun:
            inputs, origins = run.inputs(STAGE)
            run.here.begin(inputs, threads=run.threads, device=run.device, parents=origins)
        Inputs(run)  # records the data files, so that the other processes find nothing to write
    if these.any(run.here.loaded):
        return
    if these.rank == 0:
        for row in coarse_rlhf.train(run, ranks=these):
            print(f"iteration {row['iteration']}: limit {row['limit']}, reward {row['reward']:.3f}", flush=True)
        if not begun:
            run.here.finish()
    else:
        coarse_rlhf.assist(run, these)
