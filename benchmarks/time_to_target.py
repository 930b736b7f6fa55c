"""Seconds of coarse RLHF under a law to a utility, beside what TRL's PPO would take for as many iterations at full
length as our fixed-long needs.

    python benchmarks/time_to_target.py laws-51 laws-52 laws-53

Takes finished bases and reward models (`c2f run 00 01 02`), trains fixed-long and the laws on each with evaluations
after every second iteration, and compares processor seconds (one thread) to 95 % of what fixed-long gains with TRL
1.10's seconds per iteration (benchmarks/results/coarse_speed.json, one thread) times the iterations that our fixed-long
needs. TRL is not trained to the target: that its iterations teach as much as ours is assumed. A law that misses the
target counts its whole run, and is counted. Writes benchmarks/results/time_to_target.json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from c2f_utils import law_study, limits, stats  # noqa: E402
from c2f_utils.config import Law, load_settings  # noqa: E402
from c2f_utils.files import read_json, write_json  # noqa: E402
from c2f_utils.runs import Run  # noqa: E402
from c2f_utils.stage import Stage, run_folder  # noqa: E402
from c2f_utils.workflow import law_runs  # noqa: E402
from c2f_utils.workflow.inputs import Inputs  # noqa: E402

RESULTS = Path(__file__).parent / "results"
LENGTH, SHARE = 144, 0.95
FULL = 17 * 64 * LENGTH  # tokens, of as many iterations as the tiny profile has if every answer is cut
CONDITION = law_study.Condition(LENGTH)
LAWS = {
    "fixed_long": Law(name="fixed", limit=LENGTH),
    "logistic": Law(name="logistic", start=24, maximum=LENGTH, step=8),
    "linear clock": Law(name="clock", shape="linear", start=24, maximum=LENGTH, duration=17),
    "useful": Law(name="useful", start=24, maximum=LENGTH),
}


def inputs(run_id: str) -> Inputs:
    seed = Stage(run_folder(run_id) / "02_reward_model").config()["settings"]["seed"]
    run = Run(load_settings("tiny", seed, run_id))
    run.here = run.stage("04_length_schedules")
    return Inputs(run)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run ids, one per seed")
    parser.add_argument("--out", type=Path, default=RESULTS / "time_to_target.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # processor seconds of two threads would be counted twice
    speed = next(r for r in read_json(RESULTS / "coarse_speed.json")["rows"] if r["threads"] == 1)
    content = {
        "threads": 1,
        "share": SHARE,
        "trl_seconds_per_iteration": speed["trl"]["median"],
        "runs": {},
    }
    for run_id in options.runs:
        models, rows = inputs(run_id), {}
        for name, law in LAWS.items():
            rows[name] = law_runs.run_one(models, CONDITION, limits.make_law(law), FULL, every=2)
        gained = rows["fixed_long"]["curve"]["utility"]
        target = gained[0] + SHARE * ((gained[-1] + gained[-2]) / 2 - gained[0])  # the last two: one is noisy
        tokens, reached = law_study.cost_to(rows["fixed_long"], target, "tokens", FULL)
        iterations = tokens / (64 * LENGTH)
        row = {"target": target, "fixed_long_iterations": iterations, "fixed_long_reached": reached}
        for name in LAWS:
            seconds, reached = law_study.cost_to(rows[name], target, "seconds", FULL)
            row[name] = {"seconds": seconds, "reached": reached}
            row[name]["times_less"] = iterations * speed["trl"]["median"] / seconds
        content["runs"][run_id] = row
        print(run_id, row, flush=True)
    for name in LAWS:
        ratios = [row[name]["times_less"] for row in content["runs"].values()]
        found = stats.log_ratio_interval(ratios, [1.0] * len(ratios))
        missed = sum(not row[name]["reached"] for row in content["runs"].values())
        content[name] = {
            "times_less": found.value, "low": found.low, "high": found.high, "n": found.n, "missed": missed,
        }  # fmt: skip
        print(name, content[name])
    write_json(options.out, content)


if __name__ == "__main__":
    main()
