"""What each of two processes runs in `test_critic_free.py`: GRPO under a law that reads its own rewards.

    accelerate launch --config_file FILE --num_processes 2 tests/two_limits.py FOLDER

Each process writes the limits and rewards that its callback saw.
"""

import json
import os
import sys
from pathlib import Path

import torch
from test_critic_free import Distinct, build

from c2f_utils import limits

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank, reward = Path(sys.argv[1]), os.environ["RANK"], Distinct()
    trainer, limit = build(
        "grpo", folder, limits.Tail(4, maximum=64, growth=0.7), reward, per_device_train_batch_size=4
    )
    trainer.train()
    (folder / f"limits-{rank}.json").write_text(json.dumps({"rows": limit.history, "longest": reward.longest}))
    torch.distributed.destroy_process_group()
