"""The first page of a report: at most ten sentences, computed from the numbers, on what a run shows and what not.

A control that beats the method comes first; every difference has its interval; what is not known is said.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from c2f_utils.report import (
    against,
    gate,
    sources,
    tables_dialogue,
    tables_retention,
    tables_tasks,
    verdicts,
    verdicts_laws,
)
from c2f_utils.report.words import difference_words

MOST = 10  # sentences
_EVALUATION = "07_evaluation"
NOTHING = f"The models were not compared yet, so nothing is concluded: notebooks/{_EVALUATION}.ipynb compares them."


def sentences(stages: Mapping[str, Path], results: Mapping[str, dict], seeds: Sequence[object] = ()) -> list[str]:
    """What the run with these stages shows; `seeds` are those of all runs that the report compares."""
    if any(verdicts.dry(place) for place in stages.values()):
        return [verdicts.DRY]
    found = results.get(_EVALUATION)
    if not found:
        return [NOTHING]
    decoding = sources.decodings(found)[0]
    settings = sources.read(stages[_EVALUATION] / "config.json").get("settings", {})
    last = [_scope(found, decoding, seeds or [settings.get("seed")]), _limits(settings)]
    said = [
        *gate.sentences(found),
        *against.sentences(found, decoding)[:5],
        *_length(found, decoding),
        *_kept(found),
        *_tasks(found),
    ]
    said += _judged(found) + _laws(results.get("04_length_schedules") or {})
    return [*said[: MOST - len(last)], *last]


def _length(found: dict, decoding: str) -> list[str]:
    """Length and repetition of the merge against both parents, in one sentence."""
    parts = []
    for metric, words, digits in (("tokens", "tokens per answer", 1), ("rep4", "the share of repeated 4-grams", 3)):
        rows = {
            name: against.paired_row(found.get("paired") or [], "fine", other, metric, decoding)
            for other, name in (("coarse", "the coarse actor's"), ("instruct", "instruct's"))
        }
        told = [f"{name}: {_difference(row, digits)}" for name, row in rows.items() if row]
        parts += [f"{words} minus {', minus '.join(told)}"] if told else []
    return [f"Length and redundancy of the merge: {'; '.join(parts)}."] if parts else []


def _difference(row: Mapping, digits: int) -> str:
    if row.get("low") is None or row.get("high") is None:
        return f"{row['difference']:+.{digits}f}, no interval recorded"
    numbers = f"{row['difference']:+.{digits}f} (95 % interval {row['low']:+.{digits}f} to {row['high']:+.{digits}f})"
    return f"{numbers}, cannot be told apart" if row["low"] <= 0 <= row["high"] else numbers


def _kept(found: dict) -> list[str]:
    """What the merge keeps of the instruction model."""
    kept = (found.get("retention") or {}).get("models", {}).get("fine") or {}
    kinds = (found.get("retention") or {}).get("kinds", {})
    parts = [f"{kinds[kind]['label']} {_bounded(value)}" for kind, value in (kept.get("ratio") or {}).items()]
    if not parts:
        return []
    moved = (
        f"; forward KL from instruct {_bounded(kept['forward_kl'])} nats per token" if kept.get("forward_kl") else ""
    )
    return [f"Retention: perplexity of fine as a multiple of instruct's, {'; '.join(parts)}{moved}."]


def _bounded(value: Mapping) -> str:
    return f"{value['value']:.3f} (95 % interval {value['low']:.3f} to {value['high']:.3f})"


def _tasks(found: dict) -> list[str]:
    """Where fine differs from a parent or the base on tasks, after correction."""
    rows, clear = tables_tasks.told_apart(found)
    if not rows:
        return []
    listed = [
        f"{'higher' if row['difference'] > 0 else 'lower'} than {tables_retention.label(found, row['b'])} on "
        f"{row['task']} ({difference_words(row['difference'], row['low'], row['high'])})"
        for row in sorted(clear, key=lambda row: -abs(row["difference"]))[:4]
    ]
    told = f"fine scores {'; '.join(listed)}" if listed else "no difference survives Holm's correction"
    return [f"Tasks: {told}; {len(rows) - len(clear)} of {len(rows)} comparisons cannot be told apart."]


def _judged(found: dict) -> list[str]:
    """What a judge says that may be believed, or why it may not."""
    dialogue = found.get("dialogue")
    if not dialogue:
        return []
    judge = tables_dialogue.stamp(dialogue)
    if not dialogue["judge"]["fit"]:
        return [f"The judge, {judge}, may not be believed, so nothing is concluded from its verdicts."]
    rows = dialogue["against"].items()
    clear = [
        f"{rate['win_rate']:.3f} against {tables_retention.label(found, name)} "
        f"(95 % interval {rate['low']:.3f} to {rate['high']:.3f})"
        for name, rate in rows
        if rate["low"] > 0.5 or rate["high"] < 0.5
    ]
    told = f"fine wins {'; '.join(clear)}" if clear else "no win rate of fine differs from one half beyond its interval"
    return [f"The judge, {judge}: {told}; {len(rows) - len(clear)} of {len(rows)} models cannot be told apart from it."]


def _laws(found: dict) -> list[str]:
    """Growing against fixed limit, where several seeds allow a verdict."""
    shared = verdicts_laws.law_pairs(found, "logistic", "fixed_long", "rollout_tokens")[2]
    return verdicts_laws.law_against_law(found, "logistic", "fixed_long") if len(shared) > 1 else []


def _scope(found: dict, decoding: str, seeds: Sequence[object]) -> str:
    n = found["models"].get("fine", {}).get(decoding, {}).get("n")
    prompts = f"{n} test prompts" if n else "the test prompts"
    if len(set(seeds)) > 1:
        several = f"{len(set(seeds))} training seeds ({', '.join(map(str, seeds))})"
        return f"Intervals are over {prompts} of one run; what {several} say follows in “Across runs”."
    return (
        f"One training seed ({seeds[0]}) and {prompts}: intervals are over prompts, so whether another training would "
        "show the same is not known."
    )


def _limits(settings: Mapping) -> str:
    data = settings.get("data") or {}
    if data.get("source", "embedded") == "embedded":
        problems = "stories and riddles" if data.get("domain") == "riddles" else "stories"
        return (
            f"The claim is limited to small models on generated arithmetic {problems} with an exact checker: it says "
            "nothing of the papers' numbers, of 7B models or of open-ended text."
        )
    return "The claim is limited to these models, data and this reward: the papers' numbers are not reproduced."
