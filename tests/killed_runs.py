"""A small server for `test_kills.py`: forks a training process per line of input, so that 40 of them need one import.

    python killed_runs.py        # then lines of "LAW LORA FOLDER"; answers the process number, and "ready" once
    training starts

The forked process trains to the end and writes what it found to FOLDER/found.json; the test kills it whenever it likes.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from tiny_models import trainer, weights

SETTINGS = {"iterations": 12, "prompts": 8, "kl_target": 0.01, "reward_scaling": "running"}


def digest(tensors: dict) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return whole.hexdigest()


def work(law: str, lora: bool, folder: Path) -> None:
    process = trainer(law, folder / "checkpoints", lora, **SETTINGS)
    print("ready", flush=True)
    for _ in process:
        pass
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in process.history]
    found = {
        "rows": rows,
        "law": process.law.state_dict(),
        "weights": digest(weights(process)),
        "tokens": process.rollout_tokens,
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer("fixed", lora=True).step()  # imports everything that is imported late
    for line in sys.stdin:
        law, lora, folder = line.split()
        child = os.fork()
        if not child:
            work(law, lora == "True", Path(folder))
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(f"ended {status}", flush=True)
