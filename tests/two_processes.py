"""What each of several processes runs in `test_ranks.py`: one trainer on samples that do not depend on who generates
them.

    accelerate launch --config_file FILE --num_processes 2 tests/two_processes.py FOLDER [lora]

The first process writes what it found to FOLDER; `found(...)` gives the same for a single process.
"""

import json
import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import TOKENIZER, trainer

from c2f_utils.coarse import ranks
from c2f_utils.errors import C2FError
from c2f_utils.rollout.decoder import KVDecoder

SETTINGS = {"prompts": 7, "tokens_per_micro_batch": 50, "iterations": 3, "actor_learning_rate": 1e-3, "minibatches": 2}


def injected(process):
    """A sampler whose answers are a function of prompt and weights alone."""
    decoder = KVDecoder(process.policy.actor, TOKENIZER)

    def sample(prompts, limits, *, temperature, seed):
        draws = (zlib.crc32(repr(p.ids).encode()) for p in prompts)
        return [
            decoder([p], [n], temperature=temperature, seed=s)[0]
            for p, n, s in zip(prompts, limits, draws, strict=True)
        ]

    return sample


def found(folder: Path | None = None, lora: bool = False, those: ranks.Ranks | None = None, **changes):
    """(gradient of the first step, weights after three iterations, the rows, micro-batches of each step on this
    process).
    """
    process = trainer("logistic", folder, lora, those=those, **SETTINGS | changes)
    process.sampler = injected(process)
    gradient, counts = {}, [0]
    step, backward, sum_gradients = process.updates.step, process.updates.backward, process.ranks.sum_gradients

    def spied_sum(parameters):
        sum_gradients(parameters)
        if not gradient:
            gradient.update(
                {
                    n: process.ranks.full(w.grad).clone()
                    for n, w in process.updates.weights.items()
                    if w.grad is not None
                }
            )

    def spied_step():
        counts.append(0)
        return step()

    def spied_backward(loss, weight):
        counts[-1] += weight > 0
        backward(loss, weight)

    process.updates.step, process.updates.backward = spied_step, spied_backward
    process.ranks.sum_gradients = spied_sum
    rows = [{k: v for k, v in process.step().items() if k != "seconds"} for _ in range(3)]
    weights = {n: process.ranks.full(w.detach()).clone() for n, w in process.updates.weights.items()}
    return gradient, weights, rows, counts[:-1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, *words = sys.argv[1:]
    these = ranks.start()
    gradient, weights, rows, counts = found(Path(target) / "checkpoints", "lora" in words, these)
    rows_of_any_length = [torch.arange(n, dtype=torch.uint8) for n in (3, 0, 5, 1, 0)]
    gathered = these.gather(these.deal(rows_of_any_length))
    assert all(torch.equal(a, b) for a, b in zip(gathered, rows_of_any_length, strict=True))
    try:
        these.agree(float(these.rank), "a number of its own")
    except C2FError as error:
        disagreement = str(error)
    facts = {
        "rows": rows,
        "counts": counts,
        "world": these.world,
        "sharded": these.sharded,
        "disagreement": disagreement,
    }
    Path(target, f"rows-{these.rank}.json").write_text(json.dumps(facts))
    save_file(weights, Path(target) / f"weights-{these.rank}.safetensors")
    if these.rank == 0:
        save_file(gradient, Path(target) / "gradient.safetensors")
    torch.distributed.destroy_process_group()
