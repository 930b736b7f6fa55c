"""What does a merge carry over that supervised tuning forecloses? Riddles over seeds, as registered.

    python benchmarks/riddles.py run --seeds 201 202        # 00 to 07 with all rivals; continues what stopped
    python benchmarks/riddles.py choose --seeds 201 202     # then: 06 once more, the coefficient without labels
    python benchmarks/riddles.py gather --seeds 201 202     # benchmarks/results/riddles.json, and the tables

Seeds, arms, endpoint and what will be said: `benchmarks/preregistered/riddles.md`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from c2f_utils.errors import C2FError
from c2f_utils.files import read_json, root, write_json
from c2f_utils.report import carried, riddle_study, tables_rivals
from c2f_utils.runs import provenance
from c2f_utils.runs.stage import run_folder
from c2f_utils.settings.config import TRAINED_CONTROLS

RESULTS = Path(__file__).parent / "results" / "riddles.json"
MERGES = ("interpolation", "coarse_interpolation", "random_residue", "fixed_long_residue", "distilled_merge")
CONTROLS = [*MERGES, *TRAINED_CONTROLS]
COSTS = ("rl_tokens", "sft_tokens", "seconds")


def run_id(seed: int) -> str:
    return f"riddles-{seed}"


def choice_id(seed: int) -> str:
    return f"{run_id(seed)}-choice"


def run(seeds: list[int], choose: bool = False) -> int:
    """Every seed by itself, as `c2f run` does it, or 06 alone with all rules of choice; the first exit code that is
    not 0, or 0."""
    changes = {"data.domain": "riddles", "merge.controls": [] if choose else CONTROLS}
    changes |= {"merge.sections": ["label_free"], "merge.other_operators": []} if choose else {}
    settings = [word for key, value in changes.items() for word in ("-p", f"{key}={json.dumps(value)}")]
    stages = ["06"] if choose else [f"{number:02}" for number in range(8)]
    for seed in seeds:
        name = choice_id(seed) if choose else run_id(seed)
        command = ["run", *stages, "--profile", "tiny", "--seed", str(seed), "--run-id", name, *settings]
        if code := subprocess.run([sys.executable, "-m", "c2f_utils", *command], cwd=root()).returncode:
            return code
    return 0


def gather(seeds: list[int], out: Path) -> None:
    """Keep what the registered comparisons read of every finished seed; raises C2FError for one that is not."""
    found = {}
    for seed in seeds:
        place = run_folder(run_id(seed)) / "07_evaluation"
        if not (place / "results.json").exists():
            raise C2FError(f"{place} has no results: run `python benchmarks/riddles.py run --seeds {seed}` first")
        results = read_json(place / "results.json")
        rows = tables_rivals.rivals_table(place)
        costs = dict(zip(results["models"], rows[list(COSTS)].astype(object).to_dict("records"), strict=True))
        merging = read_json(place.parent / "06_residue_merging" / "results.json")
        choice = run_folder(choice_id(seed)) / "06_residue_merging" / "results.json"
        made_by = read_json(place / "provenance.json")["sessions"][-1]
        found[str(seed)] = {
            "commit": made_by["code"]["commit"],
            "started": made_by["started"],
            "gate": results["gate"],
            "coefficient": merging["chosen"]["coefficient"],
            "best_recipe": merging["best_recipe"]["name"],
            "carried": carried.carried_table(merging).to_dict("records"),
            **({"label_free": read_json(choice)["label_free"]} if choice.exists() else {}),
            "models": {
                name: {
                    "label": model["label"],
                    "role": model["role"],
                    "all": model[riddle_study.DECODING],
                    **results["by_kind"][name][riddle_study.DECODING],
                    "cost": {key: None if value != value else value for key, value in costs[name].items()},
                }
                for name, model in results["models"].items()
                if riddle_study.DECODING in model
            },
        }
    origin = {"gathered by": provenance.code_version(root()), "machine": provenance.machine()}
    write_json(out, {"seeds": found, **origin})
    for table in riddle_study.TABLES:
        print(table({"seeds": found}).to_string(index=False), end="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "choose", "gather"))
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.what != "gather":
        sys.exit(run(options.seeds, options.what == "choose"))
    gather(options.seeds, options.out)


if __name__ == "__main__":
    main()
