"""What the numbers say, in words computed from them; no outcome is written down beforehand.

Inputs: results of stages 02, 04, 06 and 07 as read from disk. Outputs: sentences. A difference is judged by its
interval, after correction where several are listed; without an interval it is stated and not judged. An interval that
contains zero says that two cannot be told apart; that they are equivalent is said only where it lies within a stated
margin. With one seed no law is called better than another. Nulls are named, never guessed.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from c2f_utils import stats
from c2f_utils.report import against, gate
from c2f_utils.report.against import paired_row
from c2f_utils.report.results import operator_name
from c2f_utils.report.sources import read
from c2f_utils.report.verdicts_laws import schedules
from c2f_utils.report.words import UNCHECKED, difference_words, outcome, percent

DRY = "A dry run of the code: nothing was learnt, so nothing is concluded."


def dry(place: object) -> bool:
    """Whether the stage in `place` (a Stage or its folder) belongs to a run of the profile smoke."""
    return read(Path(getattr(place, "dir", place)) / "config.json").get("settings", {}).get("profile") == "smoke"


def unless_dry(place: object, words: Sequence[str]) -> list[str]:
    """The sentences about the stage in `place`, or, of a dry run, the one that says that there are none."""
    return [DRY] if dry(place) else list(words)


def rambling(coarse: dict, instruct: dict, base: dict | None = None, reference: str = "instruction model") -> list[str]:
    """Does the coarse actor ramble, and is it more analytical than the base?

    Rambling (our definition): under half of the answers end by themselves, and they are longer than the instruction
    model's. Before there is one, `instruct` may be the metrics of another model, named by `reference`.
    """
    eos, tokens, other = coarse.get("eos_rate"), coarse.get("mean_tokens"), instruct.get("mean_tokens")
    if None in (eos, tokens, other):
        return ["Whether the Coarse Actor rambles is not known: its length or ending was not measured."]
    numbers = f"{tokens:.0f} tokens on average ({tokens / max(other, 1e-9):.1f} times the {reference}'s)"
    numbers += f", {percent(eos)} of answers end by themselves"
    if coarse.get("rep4") is not None:
        numbers += f", {percent(coarse['rep4'])} of 4-grams are repeats"
    long, endless = tokens > other, eos < 0.5
    verdict = "rambles" if long and endless else "does not ramble"
    words = [f"The Coarse Actor {verdict}: {numbers}."]
    first, last = coarse.get("accuracy_first"), coarse.get("accuracy_last")
    if first is not None and last is not None:
        bare = ", no interval recorded"
        if last < first - 0.02:
            words.append(f"Going on costs it right answers: first answer {first:.3f}, last answer {last:.3f}{bare}.")
        elif last > first + 0.02:
            words.append(f"Going on mends wrong answers: first answer {first:.3f}, last answer {last:.3f}{bare}.")
        else:
            words.append(f"Going on changes little: first answer {first:.3f}, last answer {last:.3f}{bare}.")
    steps, before = coarse.get("correct_steps"), (base or {}).get("correct_steps")
    if steps is not None and before is not None:
        more = "more analytical than" if steps > before + 0.1 else "less analytical than" if steps < before - 0.1 else (
            "within 0.1 of"
        )  # fmt: skip
        words.append(
            f"It is {more} the base: {steps:.2f} correct steps per answer against {before:.2f}, no interval recorded."
        )
    return words


def conciseness(fine: dict, coarse: dict, paired: Iterable[dict] = (), decoding: str = "sampled_t1") -> list[str]:
    """What the merge does to length, repetition and ending, compared with the coarse actor, by the `paired` differences
    of 07."""
    words, paired = [], list(paired)
    for key, measured, name, digits, unit in (
        ("mean_tokens", "tokens", "length", 1, " tokens"),
        ("rep4", "rep4", "share of repeated 4-grams", 3, ""),
    ):
        mine, theirs = fine.get(key), coarse.get(key)
        if mine is None or theirs is None:
            words.append(f"The {name} of the two actors was not measured.")
            continue
        row = paired_row(paired, "fine", "coarse", measured, decoding) or {"difference": mine - theirs}
        bounds = row.get("low"), row.get("high")
        starts = {
            "better": "The merge raises",
            "worse": "The merge lowers",
            "unknown": "Not judged, for want of an interval, is",
        }
        start = starts.get(outcome(*bounds), "It cannot be told whether the merge changes")
        numbers = f"from {theirs:.{digits}f} to {mine:.{digits}f}{unit}"
        words.append(f"{start} the {name}: {numbers}, {difference_words(row['difference'], *bounds, digits)}.")
    shares = [(row.get("eos_rate"), row.get("n")) for row in (fine, coarse)]
    if all(share is not None for share, _ in shares):
        said = [_share(*share) for share in shares]
        words.append(f"Of the Fine Actor's answers {said[0]} end by themselves, of the Coarse Actor's {said[1]}.")
    return words


def _share(value: float, n: int | None) -> str:
    """A share of answers with its Wilson interval."""
    if not n:
        return f"{percent(value)} (no interval recorded)"
    found = stats.wilson(value * n, n)
    return f"{percent(value)} (95 % interval {percent(found.low)} to {percent(found.high)})"


def reward_against_accuracy(results: dict, decoding: str = "sampled_t1") -> list[str]:
    """Do reward and accuracy choose the same actor? If not, the reward model is no guide to the merge."""
    said = []
    for metric in ("reward", "accuracy_last"):
        row = paired_row(results.get("paired") or [], "fine", "coarse", metric, decoding)
        if row is None:
            return []
        said.append(
            (outcome(row.get("low"), row.get("high")), difference_words(row["difference"], row["low"], row["high"]))
        )
    (by_reward, reward), (by_accuracy, accuracy) = said
    numbers = f"fine against coarse, reward: {reward}; last-answer accuracy: {accuracy}"
    if {by_reward, by_accuracy} == {"better", "worse"}:
        liked = "Coarse" if by_reward == "worse" else "Fine"
        return [f"Reward and accuracy disagree: the reward model prefers the {liked} Actor; {numbers}."]
    return [f"Reward and accuracy are not shown to disagree; {numbers}."]


def at_fixed_prefixes(results: dict, least: int = 50) -> list[str]:
    """Is the merged model less redundant at equal length, or only shorter? (At the longest prefix that both reach.)"""
    found = results.get("prefix_redundancy") or {}
    rows = {
        name: {row["prefix"]: row for row in found.get(name) or [] if row.get("rep4") is not None and row["n"] >= least}
        for name in ("fine", "coarse")
    }
    shared = sorted(set(rows["fine"]) & set(rows["coarse"]))
    if not shared:
        return [f"Redundancy at equal length is not compared: no prefix is reached by {least} answers of both actors."]
    fine, coarse = (rows[name][shared[-1]] for name in ("fine", "coarse"))
    word = {True: "less redundant", False: "more redundant"}[fine["rep4"] < coarse["rep4"]]
    if abs(fine["rep4"] - coarse["rep4"]) <= 0.02:
        word = "within 0.02 of the Coarse Actor"
    numbers = f"{fine['rep4']:.3f} (n {fine['n']}) against {coarse['rep4']:.3f} (n {coarse['n']}) repeated 4-grams"
    start = f"Over the first {shared[-1]} tokens of answers that long, the Fine Actor is {word}"
    return [f"{start}: {numbers}, no interval recorded."]


def evaluation(results: dict, decoding: str = "sampled_t1") -> list[str]:
    """Every sentence about stage 07."""
    rows = {name: model[decoding] for name, model in (results.get("models") or {}).items() if model.get(decoding)}
    words = gate.sentences(results) + against.sentences(results, decoding)
    if "coarse" in rows and "instruct" in rows:
        words += rambling(rows["coarse"], rows["instruct"], rows.get("base"))
    if "coarse" in rows and "fine" in rows and gate.open_to(results):
        words += conciseness(rows["fine"], rows["coarse"], results.get("paired") or [], decoding)
        words += at_fixed_prefixes(results)
        words += reward_against_accuracy(results, decoding)
    return words


# Reward model and merge


def reward_model(results: dict) -> list[str]:
    """Does the reward model rank better than chance, and does it favour length?"""
    words, accuracy, n = [], results.get("pair_accuracy"), results.get("held_out_pairs", results.get("n_pairs"))
    if accuracy is None or not n:
        words.append("The reward model was not tried on held-out pairs.")
    else:
        found = stats.wilson(accuracy * n, n)
        numbers = f"{accuracy:.3f} of {n} held-out pairs, 95 % interval {found.low:.3f} to {found.high:.3f}"
        word = {
            "better": "ranks better than chance",
            "worse": "ranks worse than chance",
            "tie": "does not rank better than chance",
        }
        words.append(f"The reward model {word[outcome(found.low - 0.5, found.high - 0.5)]}: {numbers}.")
    bias = results.get("length_bias") or {}
    if bias.get("pearson") is not None:
        direction = "longer" if bias["pearson"] > 0.1 else "shorter" if bias["pearson"] < -0.1 else ""
        start = f"It scores {direction} answers higher" if direction else "Its score hardly depends on length"
        words.append(f"{start} (correlation {bias['pearson']:+.2f}).")
        partial = bias.get("partial_given_utility")
        if partial is None:
            words.append(f"Whether the length deserves it is not known: {UNCHECKED}.")
        elif partial > 0.1:
            words.append(f"At equal utility it still prefers length (partial correlation {partial:+.2f}).")
        elif partial < -0.1:
            words.append(f"At equal utility it prefers brevity (partial correlation {partial:+.2f}).")
        else:
            words.append(f"At equal utility length hardly matters (partial correlation {partial:+.2f}).")
    return words


def merging(results: dict) -> list[str]:
    """Was the chosen coefficient an inner optimum, and did another operator score better?"""
    chosen, words = results.get("chosen") or {}, []
    scored = [(row["coefficient"], row["score"]) for row in results.get("sweep") or [] if row.get("score") is not None]
    if not scored or chosen.get("coefficient") is None:
        return ["No coefficient was chosen by score."]
    scored.sort()
    best, value = max(scored, key=lambda pair: pair[1])
    where = (
        "at the edge of the range that was tried"
        if best in (scored[0][0], scored[-1][0])
        else "inside the range that was tried"
    )
    words.append(f"The best score, {value:.3f}, is {where} (coefficient {best:g}).")
    if abs(best - chosen["coefficient"]) > 1e-9:
        words.append(f"The chosen coefficient is {chosen['coefficient']:g}, not the one that scores best.")
    operator = operator_name(chosen.get("operator"))
    operators = [row for row in results.get("operators") or [] if row.get("score") is not None]
    mine = [row["score"] for row in operators if row.get("operator") == operator]
    if mine and len(operators) > 1:
        better = sorted(row["operator"] for row in operators if row["score"] > mine[0])
        top = max(row["score"] for row in operators) - mine[0]
        bounds = "; for their intervals see the last sentence" if _variants(results) else ", no interval recorded"
        words.append(
            f"Operators that score better than {operator}: {', '.join(better)}, by at most {top:.3f}{bounds}."
            if better
            else f"No other operator scores better than {operator}."
        )
    return words + _carriers(results) + _variants(results)


def _carriers(results: dict) -> list[str]:
    """Which parts of the network carry the behaviour, by what leaving each out costs (paired interval)."""
    rows = [row for row in results.get("layers") or [] if str(row.get("name", "")).startswith("without ")]
    rows = sorted((row for row in rows if row.get("difference") is not None), key=lambda row: row["difference"])
    needed = [row for row in rows if row["high"] < 0]
    idle = [row["name"].removeprefix("without ") for row in rows if row["low"] <= 0 <= row["high"]]
    words = [
        f"Without the residue in {row['name'].removeprefix('without ')} the score falls: "
        f"{difference_words(row['difference'], row['low'], row['high'])}."
        for row in needed
    ]
    if idle:
        words.append(f"Whether the residue is needed in {', '.join(idle)} cannot be told: the interval contains zero.")
    return words


def _variants(results: dict) -> list[str]:
    """Which variants have an interval above one coefficient for all tensors on validation problems."""
    keys = ("layers", "depths", "operators", "averages", "proxies")
    rows = [row for key in keys for row in results.get(key) or [] if row.get("difference") is not None]
    if not rows:
        return []
    better = sorted((row for row in rows if row["low"] > 0), key=lambda row: -row["difference"])
    if not better:
        return [f"None of {len(rows)} variants scores better than one coefficient with an interval above zero."]
    listed = "; ".join(
        f"{row.get('name') or row.get('operator')} {difference_words(row['difference'], row['low'], row['high'])}"
        for row in better
    )
    return [f"Not corrected for their number, of {len(rows)} variants these lie above one coefficient: {listed}."]


def everything(results: dict[str, dict | None], decoding: str = "sampled_t1") -> dict[str, list[str]]:
    """Sentences per stage for the results at hand (stage name -> results or None)."""
    makers = {
        "02_reward_model": reward_model,
        "04_length_schedules": schedules,
        "06_residue_merging": merging,
        "07_evaluation": lambda found: evaluation(found, decoding),
    }
    return {stage: make(results[stage]) for stage, make in makers.items() if results.get(stage)}
