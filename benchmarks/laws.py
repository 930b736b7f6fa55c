"""Which law for l(t) is robust, frugal and safe? The study of laws over conditions, seeds and clocks.

    python benchmarks/laws.py run --seeds 101 102 --share 1/2     # one lane; start `--share 2/2` beside it
    python benchmarks/laws.py gather --seeds 101 102              # benchmarks/results/laws.json from what has finished
    python benchmarks/laws.py run --rivals --seeds 111 112        # what others do about length
    python benchmarks/laws.py run --witnesses --seeds 111 112     # `useful` under noise, a learned reward, or half deaf

A seed covers base, reward model and reinforcement learning; missing bases are trained first (`c2f run 00 01 02`; with
several lanes, make them before). In the conditions of the regret study run the clocks of the grid, `grow 12 %` and
`useful`, and these two once more with cut answers credited by the mean over their last prefixes; the other clocks that
do not know the maximum run where cost to a target counts, the other laws that look at what they do where rewards are
hacked or the right length is known.
Every finished run is one file under outputs/laws-<seed>/study/, so a stopped study continues where it was. One run
takes about 15 seconds of one core, a seed with all conditions, clocks and laws about half an hour; use one thread per
lane. Conditions, clocks and measures: `c2f_utils/report/law_study.py`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import law_runs  # noqa: E402

from c2f_utils.files import read_json, root, write_json, write_text  # noqa: E402
from c2f_utils.report import law_study  # noqa: E402
from c2f_utils.runs.run import Run  # noqa: E402
from c2f_utils.runs.stage import Stage, run_folder  # noqa: E402
from c2f_utils.settings.laws import make_law  # noqa: E402
from c2f_utils.settings.load import load_settings  # noqa: E402
from c2f_utils.stages.inputs import Inputs  # noqa: E402

HACKED_BUDGET = 200_000  # rollout tokens; enough for the logistic law to reach its maximum
KEPT = ("tokens", "seconds", "utility", "eos_rate", "mean_tokens")  # of each curve, in the results
RESULTS = Path(__file__).parent / "results"


def run_id(seed: int) -> str:
    return f"laws-{seed}"


def inputs(seed: int) -> Inputs:
    """Base and reward model of a seed, trained now if they are missing."""
    if not Stage(run_folder(run_id(seed)) / "02_reward_model").done:
        command = ["run", "00", "01", "02", "--profile", "tiny", "--seed", str(seed), "--run-id", run_id(seed)]
        subprocess.run([sys.executable, "-m", "c2f_utils", *command, "--threads", "1"], check=True)
    run = Run(load_settings("tiny", seed, run_id(seed)))
    run.here = run.stage("04_length_schedules")
    return Inputs(run)


def jobs(conditions: list[str], only: list[str]) -> list[tuple[str, str, law_study.Arm, int]]:
    """(condition, name of the arm, law and changes, rollout tokens), in the order in which they are run."""
    found = []
    for name in conditions:
        if name in law_study.NOISY | law_study.LEARNED:
            continue
        maximum = law_study.ALL[name].maximum
        clocks, free, laws = law_study.grid(maximum), law_study.agnostic(maximum), law_study.laws(maximum)
        if name in law_study.HACKED or name in law_study.KNOWN:
            budget = HACKED_BUDGET if name in law_study.HACKED else law_study.BUDGET
            found += [(name, law, law_study.Arm(settings), budget) for law, settings in laws.items()]
            continue
        twice = law_study.averaged(maximum)
        for law, settings in {**laws, **free, **clocks, **twice}.items():
            cost_counts = name in law_study.ROOMY and (law in free or law in twice or law == "useful")
            if law in clocks or law in twice or law in ("useful", "grow 12 %") or cost_counts:
                arm = law_study.Arm(settings, {"cut": "average"} if law in twice else {})
                found.append((name, law, arm, law_study.LONG if cost_counts else law_study.BUDGET))
    return [job for job in found if not only or job[1] in only]


def rivals(conditions: list[str], only: list[str]) -> list[tuple[str, str, law_study.Arm, int]]:
    """The same for what others do about length."""
    return [
        (name, arm, made, law_study.BUDGET)
        for name in conditions
        if name in law_study.CONDITIONS | law_study.UNLEARNING
        for arm, made in law_study.rivals(law_study.ALL[name].maximum).items()
        if not only or arm in only
    ]


def witnesses(conditions: list[str], only: list[str]) -> list[tuple[str, str, law_study.Arm, int]]:
    """The same for `useful` and what it listens to."""
    return [
        (name, arm, made, law_study.BUDGET)
        for name in conditions
        for arm, made in law_study.witnesses(name).items()
        if not only or arm in only
    ]


KINDS = {"study": jobs, "rivals": rivals, "witnesses": witnesses}  # by the folder that holds their runs


def path_of(seed: int, condition: str, law: str, folder: str = "study") -> Path:
    return run_folder(run_id(seed)) / folder / f"{condition}--{law}.json".replace(" ", "_").replace("%", "percent")


def study(options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    lane, lanes = map(int, options.share.split("/"))
    for seed in options.seeds:
        models, starts = None, {}
        for number, (condition, name, arm, budget) in enumerate(KINDS[options.kind](options.conditions, options.laws)):
            file = path_of(seed, condition, name, options.kind)
            if number % lanes != lane - 1 or file.exists():
                continue
            models = models or inputs(seed)
            start = starts.get(condition)
            law, where = law_runs.deaf(arm.law, arm.deaf) if arm.deaf else make_law(arm.law), law_study.ALL[condition]
            found = law_runs.run_one(models, where, law, budget, start=start, changes=arm.changes)
            starts[condition] = {key: values[0] for key, values in found["curve"].items()}
            write_json(file, {"condition": condition, "law": name, "seed": seed, "budget": budget} | found)
            mean = law_study.mean_utility(found, min(budget, law_study.BUDGET))
            print(seed, condition, name, round(mean, 3), flush=True)


def gather(options: argparse.Namespace) -> None:
    from c2f_utils.runs import provenance

    runs: dict = {}
    for seed in options.seeds:
        for file in sorted((run_folder(run_id(seed)) / options.kind).glob("*.json")):
            row = read_json(file)
            by_law = runs.setdefault(row["condition"], {}).setdefault(row["law"], {})
            curve = {key: row["curve"][key] for key in KEPT if key in row["curve"]}
            by_law[str(seed)] = {"budget": row["budget"], "curve": curve, "limits": row["limits"]}
    order = [name for name in law_study.ALL if name in runs]
    content = {
        "what": "utility on 256 validation problems over rollout tokens, by condition, law and seed; processor seconds "
        "with other work on the machine",
        "budget": law_study.BUDGET, "code": provenance.code_version(root()), "versions": provenance.versions(),
        "runs": {name: runs[name] for name in order},
    }  # fmt: skip
    write_text(options.out, json.dumps(content) + "\n")  # indented it would be three times as large
    print(f"{sum(len(s) for laws in runs.values() for s in laws.values())} runs written to {options.out.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "gather"))
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--conditions", nargs="+", default=list(law_study.ALL), choices=list(law_study.ALL))
    parser.add_argument("--laws", nargs="+", default=[], help="names of clocks and laws; default all")
    parser.add_argument("--share", default="1/1", help="which part of the runs this process does, e.g. 1/2")
    parser.add_argument(
        "--rivals", dest="kind", action="store_const", const="rivals", default="study",
        help="what others do about length, in place of laws and clocks",
    )  # fmt: skip
    parser.add_argument(
        "--witnesses", dest="kind", action="store_const", const="witnesses",
        help="`useful` under noise and a learned reward, and without each of its witnesses",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="default: results/laws.json, law_rivals.json or law_witnesses.json")
    options = parser.parse_args()
    options.out = options.out or RESULTS / {"study": "laws.json"}.get(options.kind, f"law_{options.kind}.json")
    {"run": study, "gather": gather}[options.what](options)


if __name__ == "__main__":
    main()
