"""Verdict rows of a made-up judge whose preference for length and for the first place is known."""

from collections.abc import Sequence

import numpy as np


def verdicts(
    strengths: dict[str, float],
    lengths: dict[str, float],
    pairs: Sequence[tuple[str, str]],
    questions: int = 200,
    length: float = 0.0,
    place: float = 0.0,
    unread: float = 0.0,
    noise: float = 0.0,
    judge: str = "judge",
    seed: int = 0,
    both: bool = True,
) -> list[dict]:
    """Rows of a judge who pays `length` logits per doubling of the relative length, `place` for standing first.

    `lengths` are median tokens; the question's difficulty changes nothing between two models. `noise` is one logit
    error per pair, the same in both orders.
    """
    rng = np.random.default_rng(seed)
    tokens = {
        name: np.maximum(1, rng.lognormal(np.log(size), 0.5, questions)).astype(int) for name, size in lengths.items()
    }
    rows = []
    for question in range(questions):
        for a, b in pairs:
            ta, tb = int(tokens[a][question]), int(tokens[b][question])
            merit = strengths[a] - strengths[b] + length * np.log2(ta / tb) + rng.normal(0, 1) * noise
            for order, shift in (("ab", place), ("ba", -place))[: 1 + both]:
                lost = rng.random() < unread
                rows.append({
                    "question": question, "category": "made up", "turn": 1, "model_a": a, "model_b": b, "order": order,
                    "p_a": None if lost else float(1 / (1 + np.exp(-merit - shift))), "tokens_a": ta, "tokens_b": tb,
                    "judge": judge, "ok": not lost, "key": f"{judge} {question} {a} {b} {order}",
                })  # fmt: skip
    return rows


def row(p_a: float | None, **changes) -> dict:
    """One verdict row."""
    return {
        "question": 1, "model_a": "x", "model_b": "y", "order": "ab", "p_a": p_a, "tokens_a": 10, "tokens_b": 20,
        "judge": "judge", "ok": p_a is not None,
    } | changes  # fmt: skip
