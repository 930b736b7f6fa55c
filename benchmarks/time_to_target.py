"""Seconds of coarse RLHF under a law to a utility, beside what TRL's PPO would take for as many iterations at full
length as our fixed-long needs.

    python benchmarks/time_to_target.py laws-51 laws-52 laws-53
    python benchmarks/time_to_target.py laws-301 laws-302 --registered     # as preregistered/time_to_target.md says
    python benchmarks/time_to_target.py laws-301 laws-302 --registered --count      # tokens that were generated

Takes finished bases and reward models (`c2f run 00 01 02`), trains fixed-long and the laws on each with evaluations
after every second iteration (registered: after every one), and asks how many iterations each needs until two
evaluations in a row reach 95 % of fixed-long's last utility. Seconds are those iterations' cost on an idle machine:
benchmarks/results/coarse_speed.json holds seconds per iteration at several limits on one and two threads, TRL 1.10's
beside them at full length, measured in one run; between those limits cost is linear. So it does not matter what else
runs meanwhile, and an iteration whose answers end early counts as if they were cut. TRL is not trained to the target:
that its iterations teach as much as ours is assumed. A law that misses the target counts its whole run, and is counted.
Tokens are sums of limits, as if every answer were cut, which charges long limits more than they generate: `--count`
makes the runs again up to their target, without evaluations on the way, and adds what was generated.
Writes benchmarks/results/time_to_target.json, or time_to_target_registered.json.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import law_runs  # noqa: E402

from c2f_utils import stats  # noqa: E402
from c2f_utils.errors import C2FError  # noqa: E402
from c2f_utils.files import read_json, root, write_json  # noqa: E402
from c2f_utils.report import law_study, tables_laws  # noqa: E402
from c2f_utils.runs import provenance  # noqa: E402
from c2f_utils.runs.run import Run  # noqa: E402
from c2f_utils.runs.stage import Stage, run_folder  # noqa: E402
from c2f_utils.settings.laws import Law, make_law  # noqa: E402
from c2f_utils.settings.load import load_settings  # noqa: E402
from c2f_utils.stages.inputs import Inputs  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PROMPTS, LENGTH, SHARE = 64, 144, 0.95
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
CLOCKS = {  # of the registered study, all under averaged cuts: the best of them is chosen on the other seeds
    f"{shape} {duration}, averaged cut": (
        Law(name="clock", shape=shape, start=24, maximum=LENGTH, duration=duration), "average",
    )
    for shape, duration in (("linear", 9), ("linear", 34), ("geometric", 17))
}  # fmt: skip
REGISTERED = {
    "fixed_long": ARMS["fixed_long"],
    "fixed_long, averaged cut": (ARMS["fixed_long"][0], "average"),
    **{name: ARMS[name] for name in ("linear clock, averaged cut", "useful, averaged cut")},
    **CLOCKS,
}
COUNTED = ("fixed_long", "linear clock, averaged cut", "useful, averaged cut", "fixed_long, averaged cut")
WHOLE = "linear clock, averaged cut"  # registered: runs on past its target, so that its final utility is known


def inputs(run_id: str) -> Inputs:
    seed = Stage(run_folder(run_id) / "02_reward_model").config()["settings"]["seed"]
    run = Run(load_settings("tiny", seed, run_id))
    run.here = run.stage("04_length_schedules")
    return Inputs(run)


def used(run: dict, target: float, every: int) -> tuple[list[int], bool]:
    """Limits of the iterations until two evaluations in a row reach `target`, or of all; and whether they did."""
    utility, path = run["curve"]["utility"], run["limits"][:-1]  # the last limit was decided and not used
    pairs = [k for k in range(1, len(utility)) if min(utility[k - 1 : k + 1]) >= target]
    return (path[: every * pairs[0]], True) if pairs else (path, False)


def generated(models: Inputs, row: dict, arm: str) -> int:
    """Tokens that an arm of the registered study generated until it reached its target (or in all, where it missed);
    raises C2FError unless the run, made again, ends with the utility that is recorded."""
    count, (law, cut) = len(row[arm]["limits"]), REGISTERED[arm]
    start = {"tokens": 0, "utility": row[arm]["utility"][0]}
    again = law_runs.run_one(
        models, CONDITION, make_law(law), FULL, start=start, every=count, until=-math.inf, changes={"cut": cut}
    )
    if again["curve"]["utility"][-1] != row[arm]["utility"][count]:
        raise C2FError(
            f"{arm} made again has utility {again['curve']['utility'][-1]} after {count} iterations, recorded is "
            f"{row[arm]['utility'][count]}; count on the machine and with the versions of the study"
        )
    return again["curve"]["tokens"][-1]


def priced(path: list[int], by_limit: dict[str, float]) -> float:
    """Seconds of iterations under these limits, linear between the limits that were timed."""
    return round(float(np.interp(path, [int(k) for k in by_limit], list(by_limit.values())).sum()), 2)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run ids, one per seed")
    parser.add_argument("--registered", action="store_true", help="arms and evaluations as they were registered")
    parser.add_argument("--count", action="store_true", help="add to finished runs what they generated")
    parser.add_argument("--out", type=Path, help="runs in it are kept; default: results/time_to_target*.json")
    parser.add_argument("--speed", type=Path, default=RESULTS / "coarse_speed.json", help="what an iteration takes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.count and not options.registered:
        parser.error("--count goes with --registered: only those runs keep every evaluation")
    arms, every, name = (REGISTERED, 1, "_registered") if options.registered else (ARMS, 2, "")
    options.out = options.out or RESULTS / f"time_to_target{name}.json"
    if options.count:
        content = read_json(options.out)
        for arm in COUNTED:  # an arm on every seed before the next
            for run_id in options.runs:
                row = content["runs"][run_id]
                if "generated" not in row[arm]:
                    row[arm]["generated"] = generated(inputs(run_id), row, arm)
                    write_json(options.out, content)
                    print(run_id, arm, row[arm]["generated"], PROMPTS * sum(row[arm]["limits"]), flush=True)
        return
    prices = read_json(options.speed)["rows"]
    if any(part not in row for row in prices for part in ("ours_by_limit", "trl")):
        raise C2FError(
            f"{options.speed} has no seconds by limit, or none of TRL's; run benchmarks/coarse_speed.py --trl PYTHON"
        )
    content = {"share": SHARE, "every": every, "code": provenance.code_version(root()), "runs": {}}
    content["runs"] |= read_json(options.out)["runs"] if options.out.exists() else {}
    for run_id in options.runs:
        if run_id in content["runs"]:
            continue
        models = inputs(run_id)
        law, cut = arms["fixed_long"]
        long = law_runs.run_one(models, CONDITION, make_law(law), FULL, every=every, changes={"cut": cut})
        target = SHARE * (long["curve"]["utility"][-1] + long["curve"]["utility"][-2]) / 2  # one alone is noisy
        row = {"target": target}
        for name, (law, cut) in arms.items():
            if name == "fixed_long":
                found = long
            else:
                rule = make_law(law)
                until = math.inf if options.registered and name == WHOLE else target
                found = law_runs.run_one(models, CONDITION, rule, FULL, every=every, until=until, changes={"cut": cut})
            path, reached = used(found, target, every)
            spent = found["curve"]["tokens"][-(-len(path) // every)]  # at the evaluation that follows the path
            row[name] = {"reached": reached, "limits": path, "utility": found["curve"]["utility"], "generated": spent}
        content["runs"][run_id] = row
        write_json(options.out, content)
        print(run_id, {name: (len(row[name]["limits"]), row[name]["reached"]) for name in arms}, flush=True)
    content["arms"] = {name: compared(content["runs"], name, prices) for name in arms}
    write_json(options.out, content)
    print(json.dumps(content["arms"], indent=1))
    if options.registered:
        print(tables_laws.registered_table(content).to_string(index=False))
        print("final utility of the linear clock minus fixed-long's:", tables_laws.registered_utility(content))


def compared(runs: dict, name: str, prices: list[dict]) -> dict:
    """How many times less an arm takes than TRL for as many iterations as fixed-long needs, by number of threads.

    Geometric mean over seeds with its t-interval; a seed that misses counts all its iterations, and is counted.
    """
    found = {"n": len(runs), "missed": sum(not row[name]["reached"] for row in runs.values())}
    for price in prices:
        theirs = [len(row["fixed_long"]["limits"]) * price["trl"]["median"] for row in runs.values()]
        ours = [priced(row[name]["limits"], price["ours_by_limit"]) for row in runs.values()]
        times = stats.log_ratio_interval(theirs, ours)
        threads = f"{price['threads']} threads"
        found[threads] = {"seconds": ours, "times_less": times.value, "low": times.low, "high": times.high}
    return found


if __name__ == "__main__":
    main()
