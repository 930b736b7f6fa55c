"""What a report shows of each stage: figures and tables in their order, with key and caption, and further sentences.

Nothing is drawn or made here: the report calls what it is handed, and leaves out what is empty or cannot be made.
"""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from c2f_utils.report import (
    against,
    carried,
    figures,
    figures_bias,
    figures_retention,
    gate,
    sources,
    tables,
    tables_dialogue,
    tables_label_free,
    tables_retention,
    tables_rivals,
    tables_safety,
    tables_tasks,
)
from c2f_utils.report.results import DECODINGS, PARENTS_OF_06

Drawn = list[tuple[str, Callable[[], Figure], str]]
Made = list[tuple[str, Callable[[], pd.DataFrame], str]]


def figures_of(name: str, place: Path, results: dict[str, dict]) -> Drawn:
    """The figures of the stage in `place`; `results` are those of all stages, by name."""
    loss = ("loss", lambda: figures.loss_curve(place), "Training loss.")
    match name:
        case "01_base_model" | "05_instruction_model":
            return [loss]
        case "02_reward_model":
            return [
                loss,
                ("calibration", lambda: figures.reward_calibration(place), "Calibration on held-out pairs."),
                ("length_bias", lambda: figures.length_bias(place), "Reward against length, and against utility."),
                ("prefix_reward", lambda: figures.prefix_reward(place), "Reward of answers cut short."),
                ("bias_models", lambda: figures.length_bias_models(place), "Length bias of every reward model."),
            ]
        case "03_coarse_rlhf":
            return [("training", lambda: figures.training_panel(place), "Coarse RLHF, iteration by iteration.")]
        case "04_length_schedules":
            return [
                ("schedules", lambda: figures.schedule_comparison(place), "Laws: limits, and quality by tokens."),
                ("tokens_to_target", lambda: figures.tokens_to_target(place), "Tokens to reach a target."),
            ]
        case "06_residue_merging":
            parents = {
                role: results[stage].get(key) or {} for role, (stage, key) in PARENTS_OF_06.items() if stage in results
            }
            return [
                ("coefficients", lambda: figures.coefficient_sweep(place, parents), "The coefficient sweep."),
                ("layers", lambda: figures.layer_sweep(place), "Layer recipes."),
                ("operators", lambda: figures.operator_table(place), "Merge operators; green: the chosen one."),
                ("anatomy", lambda: figures.residue_anatomy(place), "What the residues are made of."),
            ]
        case "07_evaluation":
            return _evaluation(place, results[name])
    return []


def _evaluation(place: Path, found: dict) -> Drawn:
    n = max((row["n"] for row in found.get("paired") or [] if row.get("n")), default=0)
    caption = f"Fine minus every other model on the same {n} prompts: paired differences, 95 % bootstrap intervals."
    drawn: Drawn = [("forest", lambda: figures.forest(place), caption)]
    drawn += [("prefixes", lambda: figures.prefix_redundancy(place), "Redundancy at fixed prefixes.")]
    frontiers = {"length": figures.quality_length_frontier, "redundancy": figures.quality_redundancy_frontier}
    for decoding in sources.decodings(found):
        for key, draw in frontiers.items():
            caption = f"Quality and {key}, {DECODINGS[decoding]}."
            drawn.append((f"{key}_{decoding}", lambda draw=draw, way=decoding: draw(place, way), caption))
    return drawn + figures_bias.of_report(found) + figures_retention.of_report(place, found)


SUMMARY = ("model", "accuracy_last", "accuracy_first", "mean_tokens", "rep4", "eos_rate", "utility", "reward", "n")


def models_of(found: dict, decoding: str) -> pd.DataFrame:
    """Every model of 07 with its metrics and their intervals."""
    return against.with_intervals(tables.model_table(found, decoding), found, decoding)


def summary_of(found: dict) -> pd.DataFrame:
    """The columns of `models_of` that a reader of the first page needs, in the first decoding."""
    decoding = sources.decodings(found)[0]
    return against.with_intervals(tables.model_table(found, decoding)[list(SUMMARY)], found, decoding)


def tables_of(name: str, found: dict, place: Path | None = None) -> Made:
    """The tables of a stage with these results; what models cost stands in the stages beside its `place`."""
    match name:
        case "04_length_schedules":
            return [("laws", lambda: tables.law_table(found), "Every law and seed at the end of training.")]
        case "06_residue_merging":
            return [
                ("sweep", lambda: against.shares_with_intervals(tables.sweep_table(found)), "The coefficient sweep."),
                ("layer_recipes", lambda: against.shares_with_intervals(tables.layer_table(found)), "Layer recipes."),
                (
                    "operator_scores",
                    lambda: against.shares_with_intervals(tables.operator_table(found)),
                    "Merge operators.",
                ),
                ("carried", lambda: carried.changes_table(found), "What the residue carries (first answers)."),
                ("label_free", lambda: tables_label_free.label_free_table(found), "The coefficient without labels."),
                ("label_free_by", lambda: tables_label_free.quantities_table(found), "What these rules choose by."),
            ]
        case "07_evaluation":
            made: Made = [
                (f"models_{way}", lambda way=way: models_of(found, way), f"All models, {DECODINGS[way]}.")
                for way in sources.decodings(found)
            ]
            return [
                *gate.of_report(found),
                *made,
                ("rivals", lambda: tables_rivals.rivals_table(place or found), tables_rivals.CAPTION),
                ("paired", lambda: tables.paired_table(found), "Paired differences over prompts (a minus b)."),
                ("prefix_redundancy", lambda: tables.prefix_table(found), "Repeated 4-grams at fixed prefixes."),
                *tables_tasks.of_report(found),
                *tables_dialogue.of_report(found),
                *tables_retention.of_report(found),
            ]
    return []


def words_of(name: str, found: dict) -> list[str]:
    """Sentences beside the verdicts: what was asked in tasks, dialogues and requests, and what of it to believe."""
    if name != "07_evaluation":
        return []
    words = tables_tasks.sentences(found) if found.get("tasks") else []
    words += [tables_dialogue.in_words(found)] if found.get("dialogue") else []
    return words + ([tables_safety.in_words(found)] if found.get("requests") else [])
