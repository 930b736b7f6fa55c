"""Collect finished `tiny` runs of several seeds: what is promised, seed by seed, and the fine actor against all
controls.

    for s in 11 12 13; do c2f run all --profile tiny --seed $s --run-id s$s; done
    python benchmarks/tiny_seeds.py s11 s12 s13 --out benchmarks/results/tiny_seeds.json

Reads results files only; runs whose settings differ in more than the seed are refused. Prints Markdown; exit code 1
if a promise is broken on any seed.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from c2f_utils import stats
from c2f_utils.errors import C2FError
from c2f_utils.files import write_json
from c2f_utils.report.typeset import markdown
from c2f_utils.runs.stage import Stage, run_folder
from c2f_utils.settings.config import STAGES

DECODING = "sampled_t1"
COLUMNS = ("accuracy_last", "accuracy_first", "correct_steps", "mean_tokens", "rep4", "eos_rate", "utility")
LAWS = ("logistic", "fixed_long", "clock_linear", "fixed_short")


def promises(models: dict, laws: dict, seed: str) -> dict[str, tuple[float, bool]]:
    """Name, measured value and whether it holds, for one seed. The last bound is 0.61 at most for this law's step."""
    instruct, coarse, fine = (models[name][DECODING] for name in ("instruct", "coarse", "fine"))
    tokens = {name: laws[name]["seeds"][seed]["rollout_tokens"] for name in ("logistic", "fixed_long")}
    values = {
        "fine accuracy_last >= 0.65": (fine["accuracy_last"], 0.65),
        "fine above both parents by >= 0.20": (
            fine["accuracy_last"] - max(instruct["accuracy_last"], coarse["accuracy_last"]),
            0.20,
        ),
        "fine eos_rate >= 0.90": (fine["eos_rate"], 0.90),
        "coarse tokens / instruct tokens >= 4": (coarse["mean_tokens"] / instruct["mean_tokens"], 4),
        "fine rep4 / coarse rep4 <= 0.25": (fine["rep4"] / coarse["rep4"], 0.25),
        "coarse eos_rate <= 0.15": (coarse["eos_rate"], 0.15),
        "logistic / fixed-long rollout tokens <= 0.65": (tokens["logistic"] / tokens["fixed_long"], 0.65),
    }
    return {k: (v, v >= bound if ">=" in k else v <= bound) for k, (v, bound) in values.items()}


def read_run(run_id: str) -> dict:
    """Seed, settings, results and origin of one run; raises C2FError when a stage is unfinished or made elsewhere."""
    folder = run_folder(run_id)
    stages = {name: Stage(folder / name) for name in STAGES[1:8]}
    unfinished = [name for name, stage in stages.items() if stage.state() != "done"]
    lent = {
        name
        for stage in stages.values()
        for name, run in stage.provenance().get("parents", {}).items()
        if run != run_id
    }
    if unfinished or lent:
        raise C2FError(f"run {run_id!r}: unfinished {unfinished}, stages of other runs {sorted(lent)}; run all of it")
    settings = {name: stage.config()["settings"] for name, stage in stages.items()}
    last = stages["07_evaluation"]
    return {
        "run": run_id,
        "seed": str(settings["07_evaluation"]["seed"]),
        "settings": {name: {k: v for k, v in s.items() if k != "seed"} for name, s in settings.items()},
        "threads": last.config()["threads"],
        "commits": sorted({s["code"]["commit"][:10] for st in stages.values() for s in st.provenance()["sessions"]}),
        **{name[:2]: stage.results() for name, stage in stages.items()},
    }


def collect(run_ids: list[str]) -> dict:
    """Everything that is reported; raises C2FError when the runs' settings differ in more than the seed.

    A setting that only one of two versions of the program knows is no difference between runs.
    """
    runs = [read_run(run_id) for run_id in run_ids]
    if odd := [run["run"] for run in runs if not agree(run["settings"], runs[0]["settings"])]:
        raise C2FError(f"runs {', '.join(odd)} have other settings than {runs[0]['run']}; compare equal settings only")
    models = {run["seed"]: {n: m[DECODING] for n, m in run["07"]["models"].items()} for run in runs}
    names = list(dict.fromkeys(name for table in models.values() for name in table))
    final = {
        run["seed"]: {law: run["04"]["laws"][law]["seeds"][run["seed"]]["final"]["utility"] for law in LAWS}
        for run in runs
    }
    gap = [row["logistic"] - row["fixed_long"] for row in final.values()]
    checks = {run["seed"]: promises(run["07"]["models"], run["04"]["laws"], run["seed"]) for run in runs}
    return {
        "decoding": DECODING,
        "runs": {run["seed"]: {k: run[k] for k in ("run", "threads", "commits")} for run in runs},
        "models": models,
        "promises": {seed: {k: [round(v, 4), ok] for k, (v, ok) in c.items()} for seed, c in checks.items()},
        "final_utility": final,
        "logistic_minus_fixed_long": {**interval(gap), "holds": sum(gap) / len(gap) >= -0.2},
        "fine_minus": {
            name: {
                metric: interval([t["fine"][metric] - t[name][metric] for t in models.values()])
                for metric in ("accuracy_last", "accuracy_first", "utility")
            }
            for name in names
            if name != "fine"
        },
        "best_recipe": {run["seed"]: {k: run["06"]["best_recipe"][k] for k in ("name", "score")} for run in runs},
        "parts": parts({run["seed"]: run["06"]["layers"] for run in runs}),
        "chosen_coefficient": {run["seed"]: run["06"]["chosen"]["coefficient"] for run in runs},
    }


def agree(a: object, b: object) -> bool:
    """Whether two nested settings have equal values wherever both have one."""
    if isinstance(a, dict) and isinstance(b, dict):
        return all(agree(value, b[key]) for key, value in a.items() if key in b)
    return a == b


def parts(by_seed: dict[str, list[dict]]) -> dict[str, dict]:
    """Which layers and modules carry the behaviour: score with a part of the residue minus that with all of it.

    Validation problems, over seeds; 'without x' far below zero: x is needed, 'only x' near zero: x is enough.
    """
    tables = [{row["name"]: row["difference"] for row in rows} for rows in by_seed.values()]
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    return {name: interval([table[name] for table in tables]) for name in shared}


def interval(values: list[float]) -> dict:
    """Mean over seeds with Student's 95 % interval (null for one seed)."""
    found = stats.seed_interval(values)
    return {"mean": found.value, "low": found.low, "high": found.high, "n": found.n}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run ids, one per seed")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    found = collect(arguments.runs)
    for seed, models in found["models"].items():
        table = pd.DataFrame(models).T[list(COLUMNS)].astype(float).round(3)
        print(f"\nseed {seed}, test problems, T = 1\n\n{markdown(table.reset_index(names='model'))}")
    lines = {
        s: {k: f"{v:.3f} {'yes' if ok else 'NO'}" for k, (v, ok) in c.items()} for s, c in found["promises"].items()
    }
    print(f"\n{markdown(pd.DataFrame(lines).reset_index(names='promise'))}\n")
    rows = [{"fine minus": n, "metric": m, **v} for n, by in found["fine_minus"].items() for m, v in by.items()]
    print(markdown(pd.DataFrame(rows).round(3)))
    rows = [{"residue": name, **row} for name, row in found["parts"].items()]
    print(f"\nscore with a part of the residue minus with all of it\n\n{markdown(pd.DataFrame(rows).round(3))}\n")
    print("logistic - fixed-long, utility:", found["logistic_minus_fixed_long"])
    if arguments.out:
        write_json(arguments.out, found)
    kept = all(ok for c in found["promises"].values() for _, ok in c.values())
    return 0 if kept and found["logistic_minus_fixed_long"]["holds"] else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except C2FError as error:
        sys.exit(f"tiny_seeds: {error}")
