"""A training process killed at any moment continues as if nothing had happened: 20 SIGKILLs over laws and adapters,
0 differences."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import LAWS

KILLS = 20


class Server:
    """The forking server of `killed_runs.py`."""

    def __init__(self):
        here = Path(__file__).parent
        paths = os.pathsep.join([str(here.parent), str(here)])
        self.job = subprocess.Popen(
            [sys.executable, str(here / "killed_runs.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def said(self) -> str:
        line = self.job.stdout.readline().strip()
        assert line, "the server has died"
        return line

    def run(self, law: str, lora: bool, folder: Path, kill_after: float | None = None) -> tuple[float, bool]:
        """Train until the end or the kill; returns seconds of training and whether it was killed."""
        folder.mkdir(parents=True, exist_ok=True)
        self.job.stdin.write(f"{law} {lora} {folder}\n")
        self.job.stdin.flush()
        child = int(self.said())
        word = self.said()
        began = time.perf_counter()
        if word == "ready":
            if kill_after is not None:
                time.sleep(kill_after)
                try:
                    os.kill(child, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            word = self.said()
        status = int(word.split()[1])
        assert status in (0, signal.SIGKILL), f"training ended with {status}"
        return time.perf_counter() - began, status == signal.SIGKILL


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    server, rng = Server(), random.Random(20)
    cases = list(itertools.product(LAWS, (False, True)))
    whole, seconds = {}, {}
    for law, lora in cases:
        folder = tmp_path / f"{law}-{lora}-whole"
        seconds[law, lora], _ = server.run(law, lora, folder)
        whole[law, lora] = json.loads((folder / "found.json").read_text())
    differences, kills, before_the_end = [], 0, []
    for number, (law, lora) in enumerate(itertools.cycle(cases)):
        if kills >= KILLS and number >= len(cases):
            break
        folder = tmp_path / f"{law}-{lora}-{number}"
        for _ in range(rng.choice((1, 2))):
            _, killed = server.run(law, lora, folder, rng.uniform(0, seconds[law, lora]))
            kills += killed
            if not killed:
                break
            before_the_end.append(sorted(p.name for p in (folder / "checkpoints").glob("step-*"))[-1:])
        server.run(law, lora, folder)
        found = json.loads((folder / "found.json").read_text())
        differences += [(law, lora, key) for key, value in whole[law, lora].items() if found[key] != value]
    server.job.stdin.close()
    server.job.wait(20)
    assert kills >= KILLS and number >= len(cases) and not differences, differences
    assert len({tuple(names) for names in before_the_end}) > 5, "the kills came at too few different moments"
