"""What verdicts add up to: win rates, swap consistency, failures; and whether a judge can be trusted at all.

A model wins a pair only if both orders say so; orders that disagree are a tie. Pairs without two readable verdicts are
counted as failures and are in no rate. Input: verdict rows (`judges.verdict_rows`).
"""

from collections.abc import Callable, Sequence

from c2f_utils import stats
from c2f_utils.measure.judges import (
    Dialogue,
    Judge,
    Opinion,
    Pair,
    Question,
    Verdicts,
    both_orders,
    outcome,
    verdict_rows,
)

IDENTICAL_TIES = 0.95  # least share of identical answers that a sound judge calls a tie


def summary(rows: Sequence[dict]) -> dict:
    """Counts and rates of verdict rows on one pair of models, in both orders.

    `win_rate` = (wins + ties / 2) / judged, of model a, with a Wilson interval for as many trials as there are
    questions: the turns of one are no independent evidence, and count as if they were one; `mean_p_a` is the mean
    preference over both orders (None where nothing could be read), `first_wins` the share of decided verdicts for the
    answer shown first. Source of the rule: Zheng et al. 2023, MT-Bench.
    """
    found = dict.fromkeys(("wins", "losses", "ties", "failed"), 0)
    agreed, preferences, decided, first, questions = 0, [], 0, 0, set()
    for one, other in both_orders(rows):
        said = outcome(one["p_a"]), outcome(other["p_a"])
        first += (said[0] == "a") + (said[1] == "b")
        decided += sum(each in ("a", "b") for each in said)
        if "error" in said:
            found["failed"] += 1
            continue
        questions.add(one["question"])
        agreed += said[0] == said[1]
        preferences.append((one["p_a"] + other["p_a"]) / 2)
        found[{("a", "a"): "wins", ("b", "b"): "losses"}.get(said, "ties")] += 1
    judged = len(preferences)
    won = (found["wins"] + found["ties"] / 2) / judged if judged else None
    rate = stats.wilson((won or 0.0) * len(questions), len(questions))
    return {
        **found, "pairs": len(rows) // 2, "judged": judged, "win_rate": won, "low": rate.low, "high": rate.high,
        "mean_p_a": sum(preferences) / judged if judged else None,
        "swap_consistency": agreed / judged if judged else None,
        "first_wins": first / decided if decided else None, "verdicts_failed": sum(not row["ok"] for row in rows),
        "tokens_a": _mean([row["tokens_a"] for row in rows]), "tokens_b": _mean([row["tokens_b"] for row in rows]),
    }  # fmt: skip


def _mean(values: Sequence[int | None]) -> float | None:
    """None where a length is not known, as in files of judgements."""
    return None if None in values or not values else sum(values) / len(values)


def by(rows: Sequence[dict], field: str) -> dict[str, dict]:
    """The summary of every value of a field (`category`, `turn`), in the order of their first rows."""
    values = dict.fromkeys(row[field] for row in rows)
    return {str(value): summary([row for row in rows if row[field] == value]) for value in values}


def grades(asked: Sequence[tuple[Question, int]], opinions: Sequence[Opinion], seed: int) -> dict:
    """Mean grade with its bootstrap interval over questions, whose turns stay together, per turn, and the number that
    could not be read; means are None without a readable grade."""
    known = [(q.id, turn, o.value) for (q, turn), o in zip(asked, opinions, strict=True) if o.ok]
    found = {"graded": len(known), "failed": len(opinions) - len(known), "mean": None, "low": None, "high": None}
    if known:
        places, _, values = zip(*known, strict=True)
        mean = stats.paired_bootstrap(values, [0.0] * len(values), clusters=[str(p) for p in places], seed=seed)
        found |= {"mean": mean.difference, "low": mean.low, "high": mean.high}
    turns = {turn: [value for _, at, value in known if at == turn] for turn in (1, 2)}
    return found | {f"turn_{turn}": sum(v) / len(v) if v else None for turn, v in turns.items()}


def null_pairs(
    questions: Sequence[Question], dialogues: dict[str | int, Dialogue], constant: str, tokens: Callable[[str], int]
) -> dict[str, list[Pair]]:
    """Pairs on which every sound judge must say the same, on the last turn of every question.

    identical: an answer against itself; repeated: the answer with its last paragraph said twice against the answer;
    constant: a text that answers nothing against the answer. `tokens` counts those of a text.
    """

    def changed(dialogue: Dialogue, text: str) -> Dialogue:
        return Dialogue((*dialogue.answers[:-1], text), (*dialogue.tokens[:-1], tokens(text)))

    found: dict[str, list[Pair]] = {"identical": [], "repeated": [], "constant": []}
    for question in questions:
        dialogue, turn = dialogues[question.id], len(question.turns)
        answer = dialogue.answers[-1]
        texts = {
            "identical": answer,
            "repeated": f"{answer.rstrip()}\n\n{_last_paragraph(answer)}",
            "constant": constant,
        }
        for check, text in texts.items():
            other = dialogue if text == answer else changed(dialogue, text)
            found[check].append(Pair(question, turn, (check, "answer"), (other, dialogue)))
    return found


def _last_paragraph(text: str) -> str:
    return text.rstrip().rsplit("\n\n", 1)[-1].strip()


def null_checks(checks: dict[str, list[Pair]], judge: Judge, verdicts: Verdicts, **watch: Callable) -> dict:
    """What a judge makes of `null_pairs`: per check its value, what was required, and whether it passed.

    identical: the share of single verdicts that are ties (in both orders together they tie by construction); repeated:
    the win rate of the longer text, at most 1/2; constant: its win rate, below 1/2. A check without a readable
    verdict is failed.
    """
    found = {}
    for check, asked in checks.items():
        rows = verdict_rows(asked, judge, verdicts, **watch)
        counted = summary(rows)
        value = counted["win_rate"]
        if check == "identical":
            value = sum(outcome(row["p_a"]) == "tie" for row in rows) / max(1, len(rows))
            passed, required = value >= IDENTICAL_TIES, f"ties in at least {IDENTICAL_TIES:.0%}"
        elif check == "repeated":
            passed, required = value is not None and value <= 0.5, "wins at most half"
        else:
            passed, required = value is not None and value < 0.5, "wins less than half"
        found[check] = {"value": value, "required": required, "passed": passed, "n": len(asked),
                        "failed": counted["verdicts_failed"]}  # fmt: skip
    return found


def fit_for_headlines(checks: dict) -> bool:
    """Whether a judge may carry a claim: it passed every check, and there was one."""
    return bool(checks) and all(check["passed"] for check in checks.values())
