"""A second look at pairs on which a judge contradicted itself: asked again with the answers in aligned parts (PORTIA).

The verdicts as they were given stay what they are; this says what they become. `portia` cuts and aligns.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from c2f_utils.measure import judge_summary, portia
from c2f_utils.measure.judges import Case, Judge, Pair, Verdicts, both_orders
from c2f_utils.measure.verdict_pairs import decided

ROUNDS = ("length", "meaning")
ASKED_AGAIN = 2 * len(ROUNDS)  # verdicts at most for a flipped pair


def second_look(
    asked: Sequence[Pair], rows: Sequence[dict], judge: Judge, verdicts: Verdicts, **watch: Callable
) -> tuple[list[dict], dict]:
    """Verdict rows of all pairs in which flipped ones say what both orders say of the aligned parts, if they agree at
    last; and {"flipped", "settled", "by": {alignment: pairs}, and the summary of these rows}.

    `rows` are those of `asked` (`judges.verdict_rows`). A pair is flipped if both orders could be read and the judge
    decided otherwise in one than in the other. Source: Li et al. 2024, arXiv 2310.01432.
    """
    found, by = [dict(row) for row in rows], dict.fromkeys(ROUNDS, 0)
    flipped = [place for place, pair in enumerate(both_orders(rows)) if _disagree(*(row["p_a"] for row in pair))]
    left = {place: dict(portia.ways(*_answers(asked[place]))) for place in flipped}
    for name in ROUNDS:
        cases = {place: _cases(asked[place], ways[name]) for place, ways in left.items() if name in ways}
        said = iter(verdicts.opinions([case for pair in cases.values() for case in pair], judge, **watch))
        for place in cases:
            first, back = next(said).value, next(said).value
            other = None if back is None else 1 - back
            if first is None or other is None or _disagree(first, other):
                continue
            del left[place]
            by[name] += 1
            for row in found[2 * place : 2 * place + 2]:
                row["p_a"] = (first + other) / 2
    settled = {"flipped": len(flipped), "settled": len(flipped) - len(left), "by": by}
    return found, settled | judge_summary.summary(found)


def _disagree(first: float | None, second: float | None) -> bool:
    return None not in (first, second) and bool(decided(first) != decided(second))


def _answers(pair: Pair) -> tuple[str, str]:
    a, b = (dialogue.answers[pair.turn - 1] for dialogue in pair.dialogues)
    return a, b


def _cases(pair: Pair, parts: portia.Parts) -> tuple[Case, Case]:
    """The pair's cases with the answers to the judged turn in parts, a's first and then b's."""
    a, b = map(tuple, parts)
    first, second = pair.cases()
    return replace(first, parts=(a, b)), replace(second, parts=(b, a))
