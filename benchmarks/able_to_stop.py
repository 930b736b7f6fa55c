"""Can the coarse actor learn to end its answers on its own, and what does that cost?

    python benchmarks/able_to_stop.py s11 s12 s13 --out benchmarks/results/able_to_stop.json

Takes finished `tiny` runs (their base and reward model), trains the entries of `schedules.study_laws` that charge
for being cut (`stop_*`, see the profile), and measures them on the run's test problems at T = 1 beside the run's own
laws.
"""

import argparse
import tempfile
from pathlib import Path

from c2f_utils import stats
from c2f_utils.files import read_json, write_json
from c2f_utils.measure import answers
from c2f_utils.runs.run import Run
from c2f_utils.runs.stage import Stage, run_folder
from c2f_utils.settings.laws import make_law
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import coarse_rlhf
from c2f_utils.stages.inputs import Inputs

ARMS = ("stop_fixed", "stop_logistic")
BESIDE = ("logistic", "fixed_long")


def arms(run_id: str) -> dict[str, dict]:
    """Test metrics and rollout tokens by name of the law, for one finished run."""
    stage = Stage(run_folder(run_id) / "04_length_schedules")
    seed = stage.config()["settings"]["seed"]
    found = {}
    for name in BESIDE:
        result = stage.results()["laws"][name]["seeds"][str(seed)]
        found[name] = {"rollout_tokens": result["rollout_tokens"], **result["final"]}
    run = Run(load_settings("tiny", seed, run_id))
    run.here = run.stage("07_evaluation")
    inputs = Inputs(run)
    for name in ARMS:
        law, credit = run.settings.schedules.study_laws[name], run.settings.schedules.credit[name]
        config = run.settings.coarse.model_copy(update=credit.model_dump(exclude_none=True))
        with tempfile.TemporaryDirectory() as folder:
            process = coarse_rlhf.trainer(inputs, make_law(law), Path(folder), config=config, evaluated=False)
            for row in process:
                print(f"{run_id} {name} {row['iteration']}/{config.iterations}", end="\r")
        samples = inputs.answers(process.policy.actor, inputs.prompts("test"))
        found[name] = {"rollout_tokens": process.rollout_tokens, **answers.measure(samples, inputs.reward)}
        print(f"{run_id} {name}: {found[name]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run ids, one per seed")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; seeds already in it are kept")
    arguments = parser.parse_args()
    content = read_json(arguments.out) if arguments.out.exists() else {"runs": {}}
    for run_id in arguments.runs:
        if run_id not in content["runs"]:
            content["runs"][run_id] = arms(run_id)
            write_json(arguments.out, content)
    rows = content["runs"].values()
    for name in ARMS:
        loss = stats.seed_interval([row[name]["utility"] - row["logistic"]["utility"] for row in rows])
        content[name] = {
            "least_eos_rate": min(row[name]["eos_rate"] for row in rows),
            "utility_minus_logistic": {"mean": loss.value, "low": loss.low, "high": loss.high, "n": loss.n},
        }
        print(name, content[name])
    write_json(arguments.out, content)


if __name__ == "__main__":
    main()
