"""Where a report's numbers come from: stages on disk, lent ones included, and the fixed words about what they mean.

Inputs: run directories. Outputs: paths, small tables of facts, and the paragraphs that no number changes.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from c2f_utils import redundancy
from c2f_utils.errors import C2FError
from c2f_utils.files import PACKED, identity, read_json, read_jsonl, sha256
from c2f_utils.report.results import DECODINGS, METRICS, PARENTS_OF_06

STAGES = {
    "00_environment_and_data": ("Environment and data", "Is this machine ready, and what does the data look like?"),
    "01_base_model": ("Base model", "Which base do we start from?"),
    "02_reward_model": ("Reward model", "Does the reward rank answers as intended, and how length-biased is it?"),
    "03_coarse_rlhf": ("Coarse RLHF", "What does RLHF straight on the base give as the limit grows?"),
    "04_length_schedules": ("Length laws", "Which law for the limit buys most quality per generated token?"),
    "05_instruction_model": ("Instruction model", "What instruction model do we merge into?"),
    "06_residue_merging": ("Residue merging", "How much residue, in which layers, by which operator?"),
    "07_evaluation": ("Evaluation", "Is the Fine Actor better, and is it less redundant?"),
}
PAPER = (
    "From the papers (Mistral-C2F, arXiv 2406.08657; Mistral-Plus, arXiv 2403.02513): RLHF by PPO straight on the base "
    "model, without SFT, with actor, critic, reward model and frozen reference; an output-length limit that is "
    "extended dynamically and adaptively during RLHF (Continuous Maximization), by what a secondary source calls a "
    "logistic regression function of reward-model score and critic; a Coarse Actor that is rich in knowledge but full "
    "of redundant text and cannot be used directly for responses; and a merge of it with an existing instruction model "
    "into one ordinary checkpoint of the same shape (Knowledge Residue Merger)."
)
OURS = (
    "Ours, because it is not published where we could read it: the closed form and constants of the length law, first "
    "and last limit, the merge formula with its layers and coefficients, the instruction model, reward model and "
    "preference data, all hyperparameters, every control, and every test shown here."
)
DOES_NOT_SHOW = (
    "The numbers of the papers are not reproduced: their task names, shots and scores were not available to us.",
    "The embedded domain is a set of small sums in words with an exact checker and a small model (about a hundred "
    "thousand parameters, in profile gpu_demo 24 million); what holds there need not hold for a large model or for "
    "open-ended text.",
    "Intervals over prompts say how sure a difference is for these trained models; only several training seeds say "
    "whether another training would show it. With one run nothing is said about seeds.",
    "The reward is z-scored within a run and comparable within that run only; a reward model can like length and "
    "repetition, so reward alone is never taken as quality.",
    "Last-answer accuracy penalises rambling by construction; first-answer accuracy is therefore shown beside it.",
    "The coefficient was chosen on validation problems by the score shown; other scores would choose others.",
)


def find_stages(run: Path) -> dict[str, Path]:
    """Stage name -> directory with results: the run's own, else the one another run lent to a later stage."""
    found = {name: run / name for name in STAGES if (run / name / "results.json").is_file()}
    for path in list(found.values()):
        lenders = read(path / "provenance.json").get("parents")
        for name, lender in lenders.items() if isinstance(lenders, dict) else ():
            lent = run.parent / str(lender) / name
            if name in STAGES and name not in found and (lent / "results.json").is_file():
                found[name] = lent
    return {name: found[name] for name in STAGES if name in found}


def made_from(runs: list[Path], shown: dict[str, Path], files: Iterable[str]) -> dict[str, object]:
    """What a report's manifest tells of the origin: the runs, the SHA-256 of each stage's results, and for every file
    the stages it was made from (as `run/stage`): that of the run shown whose number its name begins with, for 06 with
    its parents, else all of them."""
    found = {run.name: find_stages(run) for run in runs}
    digests = {run: {name: sha256(path / "results.json") for name, path in of.items()} for run, of in found.items()}
    every = sorted({_short(path) for of in found.values() for path in of.values()})
    numbered: dict[str, list[str]] = {}
    for name, path in shown.items():
        parents = [stage for stage, _ in PARENTS_OF_06.values()] if name.startswith("06") else []
        numbered[name[:2]] = sorted([_short(path), *(_short(shown[parent]) for parent in parents if parent in shown)])
    made = {file: numbered.get(Path(file).name[:2], every) for file in files}
    return {"run": runs[0].name, "runs": [run.name for run in runs], "results": digests, "made_from": made}


def identity_of(stage: Path) -> str | None:
    """The fingerprint that stages built on this one recorded of it, as far as it is still what they met; None where
    it has no results.

    Of a stage out of a pack, in whose records folders were taken out, what the pack tells, while it is as it was.
    """
    if not (stage / "results.json").is_file():
        return None
    packed = read(stage.parent / PACKED)
    listed = {name: (packed.get("files") or {}).get(f"{stage.name}/{name}") or {} for name in _IDENTIFYING}
    if packed and all(about.get("sha256") == sha256(stage / name) for name, about in listed.items()):
        return packed["stages"][stage.name]["fingerprint"]
    config, made = read(stage / "config.json"), read(stage / "provenance.json").get("models")
    return identity(config.get("settings"), read_json(stage / "results.json"), made)


_IDENTIFYING = ("config.json", "results.json", "provenance.json")


def _short(stage: Path) -> str:
    return f"{stage.parent.name}/{stage.name}"


def runs_table(stages: Iterable[Path]) -> pd.DataFrame:
    """One row per stage directory: run, profile, seed, state, commit, threads, device; unknown is null."""
    rows = []
    for path in stages:
        settings = read(path / "config.json").get("settings", {})
        session = (read(path / "provenance.json").get("sessions") or [{}])[-1]
        code = session.get("code") or {}
        commit = str(code["commit"])[:10] + (" + changes" if code.get("dirty") else "") if code.get("commit") else None
        rows.append(
            {
                "run": path.parent.name,
                "stage": path.name,
                "profile": settings.get("profile"),
                "seed": settings.get("seed"),
                "state": read(path / "status.json").get("status"),
                "commit": commit,
                "threads": session.get("threads"),
                "device": session.get("device"),
            }
        )
    return pd.DataFrame(rows)


def with_results(run: Path, others: Iterable[object]) -> list[Path]:
    """The run and the further ones, each once, as far as they hold results."""
    paths = [run, *(path for other in others if (path := run_path(run, other)).resolve() != run.resolve())]
    return [path for path in dict.fromkeys(paths) if find_stages(path)]


def run_path(run: Path, other: object) -> Path:
    """A further run: a directory, something with `dir`, or the id of a run beside the first."""
    path = Path(getattr(other, "dir", other))
    return path if path.is_dir() or len(path.parts) > 1 else run.parent / path


def read(path: Path) -> dict:
    """A record of a stage; empty where there is none and where it is `damaged`."""
    try:
        found = read_json(path) if path.is_file() else {}
    except C2FError:
        return {}
    return found if isinstance(found, dict) else {}


def damaged(stage: Path, names: Iterable[str] = ("config.json", "status.json", "provenance.json")) -> list[str]:
    """The records of a stage that are there and cannot be read."""
    return [name for name in names if (stage / name).is_file() and not read(stage / name)]


def results_of(stages: dict[str, Path]) -> tuple[dict[str, dict], list[str]]:
    """The results of stages by their names, and a line for each whose file is damaged."""
    found = {name: read(path / "results.json") for name, path in stages.items()}
    wrong = [f"{name}: results.json is damaged; run it again" for name, results in found.items() if not results]
    return {name: results for name, results in found.items() if results}, wrong


def rows(path: Path) -> list[dict]:
    """The rows of a file of kept answers; none of a damaged one."""
    try:
        return [row for row in read_jsonl(path) if isinstance(row, dict)]
    except C2FError:
        return []


def command(run: Path, what: str) -> str:
    """The command that makes a stage of this run (a number, or `all`), with the profile and seed of its stages."""
    made = [read(path).get("settings", {}) for path in sorted(run.glob("0[1-7]_*/config.json"))]
    flags = [f"--{key} {settings[key]}" for settings in made[-1:] for key in ("profile", "seed") if key in settings]
    return " ".join(["c2f run", what, *flags, f"--run-id {run.name}"])


def facts_table(results: dict, limit: int = 30) -> pd.DataFrame:
    """Numbers and short words of a stage, e.g. `length bias: pearson`; long lists have figures of their own."""
    rows = []
    for key, value in results.items():
        inner = value.items() if isinstance(value, dict) and len(value) <= 12 else [("", value)]
        for name, item in inner:
            if isinstance(item, int | float | str | None) and not (isinstance(item, str) and len(item) > 120):
                rows.append({"quantity": _quantity(key, name), "value": _shown(item)})
    return pd.DataFrame(rows[:limit], columns=["quantity", "value"])


def _quantity(*keys: str) -> str:
    return ": ".join(METRICS[key].words if key in METRICS else key.replace("_", " ") for key in keys if key)


def _shown(value: object) -> str | None:
    if isinstance(value, str):
        return DECODINGS.get(value, value if "/" in value else value.replace("_", " "))
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return None if value is None else f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)


def unchecked(results: dict) -> bool:
    rows = [
        row
        for model in (results.get("models") or {}).values()
        for key, row in model.items()
        if key in DECODINGS and row
    ]
    return bool(rows) and all(row.get("accuracy_last") is None for row in rows)


def clip(text: str, limit: int = 1200) -> str:
    return text if len(text) <= limit else text[:limit] + " … [cut here for the report]"


def marked_words(text: str) -> list[tuple[str, bool]]:
    """Words of an answer with whether they lie in a 4-gram that occurred before."""
    words = clip(text).split()
    return list(zip(words, redundancy.repeated_spans(words, 4).tolist(), strict=True))


def decodings(results: dict) -> list[str]:
    """The decodings that any model of a 07 result was evaluated with, in the order of the house; never empty."""
    models = (results.get("models") or {}).values()
    return [way for way in DECODINGS if any(model.get(way) for model in models)] or ["sampled_t1"]
