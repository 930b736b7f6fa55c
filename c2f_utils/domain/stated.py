"""Where an answer of the embedded domain states its result, as the exact checker reads it."""

from collections.abc import Sequence

from c2f_utils.domain.problems import EOS, SPECIALS, Problem, check


def ends(problem: Problem, ids: Sequence[int]) -> list[int]:
    """Tokens of an answer up to and including each sentence that states a result, in order; empty where none does.

    The last sentence may lack its full stop; special tokens behind it are no part of it.
    """
    stops = [place + 1 for place, token in enumerate(ids) if token == problem.vocabulary.ids["."]]
    last = max((place + 1 for place, token in enumerate(ids) if token >= len(SPECIALS)), default=0)
    edges = sorted({0, *stops, last})
    pairs = zip(edges, edges[1:], strict=False)
    return [end for begin, end in pairs if check(problem, ids[begin:end]).last_answer is not None]


def shortest_right(problem: Problem, answers: Sequence[Sequence[int]]) -> list[int] | None:
    """The shortest of some answers whose first stated result is right, up to that result and then EOS; None without
    one. Our reading of long2short rejection sampling (Kimi k1.5, arXiv 2501.12599)."""
    right = [ids for ids in answers if check(problem, ids).first_right]
    cut = [list(ids[: ends(problem, ids)[0]]) for ids in right]
    return [*min(cut, key=len), EOS] if cut else None


def right_to_the_last(problem: Problem, answers: Sequence[Sequence[int]]) -> list[list[int]]:
    """Every answer whose last stated result is right, as it is up to that result and then EOS."""
    right = [ids for ids in answers if check(problem, ids).last_right]
    return [[*ids[: ends(problem, ids)[-1]], EOS] for ids in right]
