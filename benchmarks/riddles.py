"""What does a merge carry over that supervised tuning forecloses? Riddles over seeds, as registered.

    python benchmarks/riddles.py run --seeds 201 202        # 00 to 07 with all rivals; continues what stopped
    python benchmarks/riddles.py choose --seeds 201 202     # then: 06 once more, the coefficient without labels
    python benchmarks/riddles.py teach --seeds 201 202      # then: the base as a teacher, in the coarse actor's place
    python benchmarks/riddles.py complete --seeds 201 202   # of older runs: the fine actor with a forced beginning
    python benchmarks/riddles.py gather --seeds 201 202     # benchmarks/results/riddles.json, and the tables

Seeds, arms, endpoint and what will be said: `benchmarks/preregistered/riddles.md`.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd

from c2f_utils.domain.samples import analysed_prompts
from c2f_utils.errors import C2FError
from c2f_utils.files import read_json, root, write_json
from c2f_utils.measure import answers
from c2f_utils.models import loading
from c2f_utils.models.generated import generator
from c2f_utils.report import carried, riddle_study, tables_rivals
from c2f_utils.runs import provenance
from c2f_utils.runs.run import Run
from c2f_utils.runs.stage import run_folder
from c2f_utils.settings.config import TRAINED_CONTROLS
from c2f_utils.settings.load import load_settings
from c2f_utils.stages.evaluation import LABELS
from c2f_utils.stages.inputs import Inputs

RESULTS = Path(__file__).parent / "results" / "riddles.json"
MERGES = ("interpolation", "coarse_interpolation", "random_residue", "fixed_long_residue", "distilled_merge")
TEACHER = "base_correct"  # asked after all seeds were seen: in runs of its own, `teach`
CONTROLS = [*MERGES, *(name for name in TRAINED_CONTROLS if name != TEACHER)]
DECODINGS = (riddle_study.DECODING, "greedy")
METRICS = ("accuracy_last", "accuracy_first", "correct_steps", "utility", "mean_tokens", "eos_rate", "rep4")
FORCED = "fine_forced"  # registered; runs made before 07 had it are completed by `complete`


def run_id(seed: int) -> str:
    return f"riddles-{seed}"


def choice_id(seed: int) -> str:
    return f"{run_id(seed)}-choice"


def teach_id(seed: int) -> str:
    return f"{run_id(seed)}-teach"


LESS = {"merge.other_operators": []}
WAYS = {  # name of a run, its stages, and what it changes
    "run": (run_id, [f"{number:02}" for number in range(8)], {"merge.controls": CONTROLS}),
    "choose": (choice_id, ["06"], {"merge.controls": [], "merge.sections": ["label_free"]} | LESS),
    "teach": (teach_id, ["06", "07"], {"merge.controls": [TEACHER], "merge.sections": []} | LESS),
}


def run(seeds: list[int], what: str) -> int:
    """Every seed by itself, as `c2f run` does it: 00 to 07, or what was asked later on its models; the first exit code
    that is not 0, or 0."""
    named, stages, changes = WAYS[what]
    changes = {"data.domain": "riddles"} | changes
    settings = [word for key, value in changes.items() for word in ("-p", f"{key}={json.dumps(value)}")]
    for seed in seeds:
        name = named(seed)
        command = ["run", *stages, "--profile", "tiny", "--seed", str(seed), "--run-id", name, *settings]
        if code := subprocess.run([sys.executable, "-m", "c2f_utils", *command], cwd=root()).returncode:
            return code
    return 0


def complete(seeds: list[int]) -> None:
    """Have the fine actor of every seed answer 07's problems with a forced beginning, as 07 itself does by now."""
    for seed in seeds:
        settings = load_settings("tiny", seed, run_id(seed), {"data.domain": "riddles", "merge.controls": CONTROLS})
        run = Run(settings)
        run.here = run.stage("07_evaluation")
        inputs = Inputs(run)
        model = loading.load_causal(run.parent("06_residue_merging").model(), settings.models)
        prompts = analysed_prompts([p.problem for p in inputs.prompts("test")])
        row = {"label": LABELS[FORCED], "role": "control"}
        for decoding in settings.evaluation.decodings:
            samples = inputs.answers(model, prompts, decoding, form=inputs.instruct_forms[0])
            row[decoding] = {"all": answers.measure(samples), **answers.by_kind(samples)}
        write_json(run_folder(run_id(seed)) / f"{FORCED}.json", row | {"code": provenance.code_version(root())})


def gather(seeds: list[int], out: Path) -> None:
    """Keep what the comparisons read of every finished seed; raises C2FError for one that is not."""
    found = {str(seed): gathered(seed) for seed in seeds}
    study = {"seeds": found, "gathered by": provenance.code_version(root()), "machine": provenance.machine()}
    write_json(out, study)
    held = sum(riddle_study.passed(study).values())
    print(f"{held} of {len(found)} seeds pass the gate; a claim may be made: {riddle_study.decides(study)}")
    print(f"the best constant guess gets {riddle_study.floor(study):.2f} of the riddles right", end="\n\n")
    for table in riddle_study.TABLES:
        print(table.__name__, table(study).to_string(index=False), sep="\n", end="\n\n")
    print(
        "passing seeds alone", riddle_study.registered_table(study, passing_only=True).to_string(index=False), sep="\n"
    )


def gathered(seed: int) -> dict:
    """What is kept of one seed; raises C2FError where it has no results."""
    place = run_folder(run_id(seed)) / "07_evaluation"
    if not (place / "results.json").exists():
        raise C2FError(f"{place} has no results: run `python benchmarks/riddles.py run --seeds {seed}` first")
    models, merging = measured(place), read_json(place.parent / "06_residue_merging" / "results.json")
    made_by = read_json(place / "provenance.json")["sessions"][-1]
    late, choice = place.parent / f"{FORCED}.json", run_folder(choice_id(seed)) / "06_residue_merging" / "results.json"
    if FORCED not in models and late.exists():
        row = read_json(late)
        row |= {way: _few(row[way]) for way in DECODINGS} | {"cost": models["fine"]["cost"], "late": True}
        models[FORCED] = {key: value for key, value in row.items() if key in (*models["fine"], "late")}
    taught = run_folder(teach_id(seed)) / "07_evaluation"
    if (taught / "results.json").exists():
        models[TEACHER] = measured(taught)[TEACHER] | {"late": True}
    settings = load_settings("tiny", seed, overrides={"data.domain": "riddles"})
    asked = generator(settings.data).problems("test", settings.data.test_prompts, seed)
    right = Counter(problem.answer for problem in asked if problem.kind == riddle_study.NEW)
    return {
        "commit": made_by["code"]["commit"], "started": made_by["started"],
        "gate": read_json(place / "results.json")["gate"],
        "floor": max(right.values()) / right.total(), "coefficient": merging["chosen"]["coefficient"],
        "best_recipe": merging["best_recipe"]["name"], "carried": carried.carried_table(merging).to_dict("records"),
        **({"label_free": read_json(choice)["label_free"]} if choice.exists() else {}),
        "models": models,
    }  # fmt: skip


def measured(place: Path) -> dict[str, dict]:
    """Every model of a stage 07 as it is kept: label, role, metrics by decoding and kind, and what it cost."""
    results, rows = read_json(place / "results.json"), tables_rivals.rivals_table(place)
    costs = dict(zip(results["models"], rows[list(riddle_study.COSTS)].astype(object).to_dict("records"), strict=True))
    return {
        name: {
            "label": model["label"],
            "role": model["role"],
            **{way: _few({"all": model[way], **results["by_kind"][name][way]}) for way in DECODINGS},
            "cost": {key: None if pd.isna(value) else value for key, value in costs[name].items()},
        }
        for name, model in results["models"].items()
    }


def _few(by_kind: dict[str, dict]) -> dict[str, dict]:
    return {kind: {name: row[name] for name in METRICS} for kind, row in by_kind.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=(*WAYS, "complete", "gather"))
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    match options.what:
        case "gather":
            gather(options.seeds, options.out)
        case "complete":
            complete(options.seeds)
        case what:
            sys.exit(run(options.seeds, what))


if __name__ == "__main__":
    main()
