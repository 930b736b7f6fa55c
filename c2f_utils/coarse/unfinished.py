"""Answers that the limit cut and that go on in the next iteration, under the larger limit (`coarse.cut: continue`).

What they have said is context then and not trained again: until the cut they were credited with what the critic
expected of the rest (partial rollouts as in T-PPO, arXiv 2506.15050, of which we know a summary). At most half of a
batch goes on, so that new questions are met and laws see whole answers; which part is our choice.
"""

from collections.abc import Sequence
from dataclasses import replace

from c2f_utils.coarse.experience import Experience
from c2f_utils.domain.samples import Prompt

Begun = tuple[int, list[int]]  # number of the prompt, and what has been answered so far


def going_on(prompt: Prompt, begun: Sequence[int]) -> Prompt:
    """The prompt of an answer's continuation: the question and the beginning of its answer."""
    return replace(prompt, ids=(*prompt.ids, *begun), forced=(*prompt.forced, *begun)) if begun else prompt


def continued(e: Experience, asked: Sequence[Begun], next_limit: int) -> list[Begun]:
    """Which of the answers to `asked` (in the order of the batch) go on under the next limit, tokens."""
    found = [
        (number, [*begun, *sample.sampled])
        for (number, begun), sample, expected in zip(asked, e.samples, e.expected.tolist(), strict=True)
        if expected and len(begun) + len(sample.sampled) < next_limit
    ]
    return found[: len(asked) // 2]
