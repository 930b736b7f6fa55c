"""Seconds of coarse RLHF under a law to a utility, beside what TRL's PPO would take for as many iterations at full
length as our fixed-long needs.

    python benchmarks/time_to_target.py laws-51 laws-52 laws-53

Takes finished bases and reward models (`c2f run 00 01 02`), trains fixed-long and the laws on each with evaluations
after every second iteration, and asks how many iterations each needs until two evaluations in a row reach 95 % of
fixed-long's last utility. Seconds are those iterations' cost on an idle machine: benchmarks/results/coarse_speed.json
holds one thread's seconds per iteration at several limits, TRL 1.10's beside them at full length, measured in one run;
between those limits cost is linear. So it does not matter what else runs meanwhile, and an iteration whose answers end
early counts as if they were cut. TRL is not trained to the target: that its iterations teach as much as ours is
assumed. A law that misses the target counts its whole run, and is counted. Writes
benchmarks/results/time_to_target.json.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from c2f_utils import law_study, limits, stats  # noqa: E402
from c2f_utils.config import Law, load_settings  # noqa: E402
from c2f_utils.errors import C2FError  # noqa: E402
from c2f_utils.files import read_json, write_json  # noqa: E402
from c2f_utils.runs import Run  # noqa: E402
from c2f_utils.stage import Stage, run_folder  # noqa: E402
from c2f_utils.workflow import law_runs  # noqa: E402
from c2f_utils.workflow.inputs import Inputs  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PROMPTS, LENGTH, SHARE = 64, 144, 0.95
EVERY = 2  # iterations between evaluations
FULL = 17 * PROMPTS * LENGTH  # tokens, of as many iterations as the tiny profile has if every answer is cut
CONDITION = law_study.Condition(LENGTH)
LINEAR = Law(name="clock", shape="linear", start=24, maximum=LENGTH, duration=17)
USEFUL = Law(name="useful", start=24, maximum=LENGTH)
ARMS = {  # law, and how cut answers are credited
    "fixed_long": (Law(name="fixed", limit=LENGTH), "score"),
    "logistic": (Law(name="logistic", start=24, maximum=LENGTH, step=8), "score"),
    "linear clock": (LINEAR, "score"),
    "useful": (USEFUL, "score"),
    "linear clock, averaged cut": (LINEAR, "average"),
    "useful, averaged cut": (USEFUL, "average"),
}


def inputs(run_id: str) -> Inputs:
    seed = Stage(run_folder(run_id) / "02_reward_model").config()["settings"]["seed"]
    run = Run(load_settings("tiny", seed, run_id))
    run.here = run.stage("04_length_schedules")
    return Inputs(run)


def cost(run: dict, target: float, seconds: dict[int, float]) -> dict:
    """Iterations and idle seconds of a run until two evaluations in a row reach `target`, or all of them.

    `seconds`: of one iteration, by limit.
    """
    _, reached = law_study.cost_to(run, target, "tokens", FULL)
    utility = run["curve"]["utility"]
    pairs = [k for k in range(1, len(utility)) if min(utility[k - 1 : k + 1]) >= target]
    path = run["limits"][:-1]  # the last one was decided and not used
    used = path[: EVERY * pairs[0]] if reached else path
    return {
        "reached": reached, "iterations": len(used), "processor_seconds_here": run["curve"]["seconds"][-1],
        "seconds": round(float(np.interp(used, list(seconds), list(seconds.values())).sum()), 2),
    }  # fmt: skip


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run ids, one per seed")
    parser.add_argument("--out", type=Path, default=RESULTS / "time_to_target.json")
    parser.add_argument("--speed", type=Path, default=RESULTS / "coarse_speed.json", help="what an iteration takes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    speed = next(r for r in read_json(options.speed)["rows"] if r["threads"] == 1)
    if "ours_by_limit" not in speed or "trl" not in speed:
        raise C2FError(
            f"{options.speed} has no seconds by limit, or none of TRL's; run benchmarks/coarse_speed.py --trl PYTHON"
        )
    seconds = {int(limit): value for limit, value in speed["ours_by_limit"].items()}
    trl = speed["trl"]["median"]
    content = {"share": SHARE, "trl_seconds_per_iteration": trl, "ours_by_limit": speed["ours_by_limit"], "runs": {}}
    if (
        options.out.exists()
        and (before := read_json(options.out)).items() >= {**content, "runs": before["runs"]}.items()
    ):
        content["runs"] = before["runs"]  # made at the same prices: a stopped benchmark continues
    for run_id in options.runs:
        if run_id in content["runs"]:
            continue
        models = inputs(run_id)
        law, cut = ARMS["fixed_long"]
        long = law_runs.run_one(models, CONDITION, limits.make_law(law), FULL, every=EVERY, cut=cut)
        target = SHARE * (long["curve"]["utility"][-1] + long["curve"]["utility"][-2]) / 2  # one alone is noisy
        row = {"target": target, "fixed_long": cost(long, target, seconds)}
        for name, (law, cut) in ARMS.items():
            if name not in row:
                found = law_runs.run_one(
                    models, CONDITION, limits.make_law(law), FULL, every=EVERY, until=target, cut=cut
                )
                row[name] = cost(found, target, seconds)
            row[name]["times_less"] = row["fixed_long"]["iterations"] * trl / row[name]["seconds"]
        content["runs"][run_id] = row
        write_json(options.out, content)
        print(run_id, row, flush=True)
    for name in ARMS:
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
