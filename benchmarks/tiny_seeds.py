"""Collect finished `tiny` runs of several seeds: what the method promises, seed by seed, and the best recipe against
the default.

    for s in 11 12 13; do c2f run all --profile tiny --seed $s --run-id s$s; done
    python benchmarks/tiny_seeds.py s11 s12 s13 --out benchmarks/results/tiny_seeds.json

Reads results files only. Prints the table in Markdown; exit code 1 if a promise is broken on any seed.
"""

import argparse
import sys
from pathlib import Path

from c2f_utils import stats
from c2f_utils.files import read_json, write_json
from c2f_utils.stage import Stage, run_folder
from c2f_utils.tables import markdown

DECODING = "sampled_t1"
SHOWN = (
    "base",
    "instruct",
    "coarse",
    "fine",
    "best_recipe",
    "interpolation",
    "random_residue",
    "fixed_long_residue",
    "ppo_instruct",
    "instruct_forced",
    "base_forced",
)
COLUMNS = ("accuracy_last", "accuracy_first", "correct_steps", "mean_tokens", "rep4", "eos_rate", "utility")


def promises(models: dict, laws: dict, seed: str) -> dict[str, tuple[float, bool]]:
    """Name, measured value and whether it holds, for one seed."""
    base = {name: models[name][DECODING] for name in ("instruct", "coarse", "fine")}
    instruct, coarse, fine = base["instruct"], base["coarse"], base["fine"]
    tokens = laws["logistic"]["seeds"][seed]["rollout_tokens"] / laws["fixed_long"]["seeds"][seed]["rollout_tokens"]
    gain = fine["accuracy_last"] - max(instruct["accuracy_last"], coarse["accuracy_last"])
    longer = coarse["mean_tokens"] / instruct["mean_tokens"]
    repeats = fine["rep4"] / coarse["rep4"]
    return {
        "fine accuracy_last >= 0.65": (fine["accuracy_last"], fine["accuracy_last"] >= 0.65),
        "fine above both parents by >= 0.20": (gain, gain >= 0.20),
        "fine rep4 / coarse rep4 <= 0.25": (repeats, repeats <= 0.25),
        "fine eos_rate >= 0.90": (fine["eos_rate"], fine["eos_rate"] >= 0.90),
        "coarse tokens / instruct tokens >= 4": (longer, longer >= 4),
        "coarse eos_rate <= 0.15": (coarse["eos_rate"], coarse["eos_rate"] <= 0.15),
        "logistic / fixed-long rollout tokens <= 0.65": (tokens, tokens <= 0.65),
    }


def collect(run_ids: list[str]) -> dict:
    """Everything that is reported, from the results of finished runs."""
    rows, checks, utility, best = {}, {}, [], []
    provenance = {}
    for run_id in run_ids:
        folder = run_folder(run_id)
        evaluation, laws = (read_json(folder / s / "results.json") for s in ("07_evaluation", "04_length_schedules"))
        config = Stage(folder / "07_evaluation").config()
        seed = str(config["settings"]["seed"])
        rows[seed] = {name: evaluation["models"][name][DECODING] for name in SHOWN if name in evaluation["models"]}
        checks[seed] = promises(evaluation["models"], laws["laws"], seed)
        final = {
            law: laws["laws"][law]["seeds"][seed]["final"]["utility"]
            for law in ("logistic", "fixed_long", "clock_linear")
        }
        utility.append(final)
        provenance[seed] = {
            "run": run_id,
            "threads": config["threads"],
            "commit": Stage(folder / "07_evaluation").provenance().get("git"),
        }
        found = [
            r
            for r in evaluation["paired"]
            if (r["b"], r["metric"], r["decoding"]) == ("best_recipe", "utility", DECODING)
        ]
        merged = read_json(folder / "06_residue_merging" / "results.json")
        best += [{"seed": seed, "recipe": merged["best_recipe"]["name"], "coefficient": merged["chosen"]["coefficient"],
                  "utility_gain": -r["difference"], "low": -r["high"], "high": -r["low"]} for r in found]  # fmt: skip
    difference = [row["logistic"] - row["fixed_long"] for row in utility]
    return {
        "decoding": DECODING,
        "seeds": rows,
        "promises": {s: {k: list(v) for k, v in c.items()} for s, c in checks.items()},
        "final_utility": dict(zip(rows, utility, strict=True)),
        "logistic_minus_fixed_long": {
            "mean": sum(difference) / len(difference),
            "holds": sum(difference) / len(difference) >= -0.2,
        },
        "best_recipe_against_one_coefficient": {"by_seed": best, **_interval([row["utility_gain"] for row in best])},
        "runs": provenance,
    }


def _interval(values: list[float]) -> dict:
    found = stats.seed_interval(values) if len(values) > 1 else None
    return (
        {"mean": found.value, "low": found.low, "high": found.high, "n": len(values)} if found else {"n": len(values)}
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run ids, one per seed")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    found = collect(arguments.runs)
    import pandas as pd

    for seed, models in found["seeds"].items():
        table = pd.DataFrame(models).T[list(COLUMNS)].astype(float).round(3)
        print(f"\nseed {seed}, test problems, T = 1\n\n{markdown(table.reset_index(names='model'))}")
    lines = pd.DataFrame(
        {
            seed: {k: f"{v:.3f} {'yes' if ok else 'NO'}" for k, (v, ok) in c.items()}
            for seed, c in found["promises"].items()
        }
    )
    print(f"\n{markdown(lines.reset_index(names='promise'))}\n")
    print("logistic - fixed-long, mean utility:", found["logistic_minus_fixed_long"])
    print("best recipe - one coefficient, utility:", found["best_recipe_against_one_coefficient"])
    if arguments.out:
        write_json(arguments.out, found)
    kept = (
        all(ok for c in found["promises"].values() for _, ok in c.values())
        and found["logistic_minus_fixed_long"]["holds"]
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
