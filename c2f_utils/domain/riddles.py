"""A second kind of problem beside the stories, made so that a merge can be decided on.

Question: does reinforcement learning straight on the base add something that supervised tuning forecloses? In stories
a forced beginning finds everything, because instruction data keep their sentence form alive. A riddle has a form of its
own (opening, sentence, words), which a story's sentences cannot express. The base corpus drills its single step well,
uses it for an answer rarely and with many errors, and instruction data never show it: what the form is worth, and that
it is worth using, is left for reinforcement learning to find.

A step is looked up by its own word ("alpha"), as a story's is by its ordinal: a model of two layers cannot count
places. Numbers and operands are small, so that the facts behind one step are few.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from c2f_utils.domain import stories
from c2f_utils.domain.problems import BOS, EOS, Habit, Problem, Split, Vocabulary, drawn, response, stated, worked
from c2f_utils.domain.worlds import SMALL

TERMS = ("alpha", "beta", "gamma", "delta")
UP, DOWN = "up", "down"
LARGEST, OPERAND, STEPS = 9, 4, (3, 4)
OWN = ("riddle", *TERMS, UP, DOWN, "solve", "from", "turns", "into", "memo")
WORDS = Vocabulary((*stories.vocabulary(SMALL), *OWN))

STORY_DRILLS, RIDDLE_DRILLS = 0.12, 0.24  # shares of the base corpus's documents
RIDDLES = 0.5  # share of riddles among what is asked
LONGEST = 90  # base corpus: tokens of a riddle's document; its analyses are shorter than a story's


@dataclass(frozen=True)
class Riddle(Problem):
    """A start value and terms (up or down, operand); every running value lies in 0..9."""

    kind = "riddle"
    thinking, checking, opening = (), (), "solve from"
    habits: ClassVar[dict[str, Habit]] = {
        "bare": (0.54, 0.70, 0.0, (0.5, 0.5, 0.0)),
        "faulty": (0.12, 1.0, 0.30, (0.3, 0.7, 0.0)),
        "ramble": (0.34, 0.0, 0.0, (0.1, 0.9, 0.0)),
    }
    # Preference pairs compare answers from many hands, and some know the form.
    candidates: ClassVar[dict[str, Habit]] = {
        "bare": (0.42, 0.70, 0.0, (0.5, 0.5, 0.0)),
        "full": (0.14, 1.0, 0.02, (0.3, 0.7, 0.0)),
        "faulty": (0.22, 1.0, 0.30, (0.3, 0.7, 0.0)),
        "ramble": (0.22, 0.0, 0.0, (0.1, 0.9, 0.0)),
    }

    start: int
    operations: tuple[tuple[str, int], ...]
    largest: int = field(default=LARGEST, repr=False, compare=False)
    vocabulary: Vocabulary = field(default=WORDS, repr=False, compare=False)

    @property
    def words(self) -> list[str]:
        words = ["riddle", ":", str(self.start), "."]
        for term, (sign, operand) in zip(TERMS, self.operations, strict=False):
            words += [term, sign, str(operand), "."]
        return [*words[:-1], "?"]

    def grows(self, word: str) -> bool:
        return word == UP

    def beginning(self) -> list[str]:
        return ["solve", "from", str(self.start), "."]

    def step(self, index: int, before: int, after: int) -> list[str]:
        return _sentence(TERMS[index], *self.operations[index], before, after)

    def claimed(self, sentence: Sequence[str]) -> int | None:
        if len(sentence) == 7 and sentence[3] == "turns" and sentence[5] == "into" and sentence[0] in TERMS:
            return TERMS.index(sentence[0])
        return None


def _sentence(term: str, sign: str, operand: int, before: int, after: int) -> list[str]:
    return [term, sign, str(operand), "turns", str(before), "into", str(after)]


def _term(rng: random.Random, value: int) -> tuple[str, int]:
    """What can be done to a value without leaving 0..9."""
    operand, up = rng.randint(1, OPERAND), rng.random() < 0.5
    if not 0 <= value + (operand if up else -operand) <= LARGEST:
        up = not up
    return (UP if up else DOWN), operand


def draw_riddle(rng: random.Random) -> Riddle:
    """One random riddle of any split."""
    value = start = rng.randint(0, LARGEST)
    terms = []
    for _ in range(rng.randint(*STEPS)):
        sign, operand = _term(rng, value)
        terms.append((sign, operand))
        value += operand if sign == UP else -operand
    return Riddle(start, tuple(terms))


def _drill(rng: random.Random) -> list[str]:
    """Single steps in the riddles' own sentences: terms, then what each does to a number of its own."""
    chosen = []
    for term in TERMS[: rng.randint(2, len(TERMS))]:
        value = rng.randint(0, LARGEST)
        chosen.append((term, *_term(rng, value), value))
    words = ["memo", ":"]
    for term, sign, operand, _ in chosen:
        words += [term, sign, str(operand), "."]
    for term, sign, operand, value in chosen:
        words += [*_sentence(term, sign, operand, value, value + (operand if sign == UP else -operand)), "."]
    return words


@dataclass(frozen=True)
class Riddles:
    """Stories of the small world and riddles, half of each."""

    operations: tuple[int, int] = (3, 5)
    vocabulary = WORDS

    def _training_problem(self, rng: random.Random) -> Problem:
        draw = draw_riddle if rng.random() < RIDDLES else self._story
        while (problem := draw(rng)).split != "train":
            pass
        return problem

    def _story(self, rng: random.Random) -> stories.Problem:
        return stories.draw_problem(rng, self.operations, SMALL, WORDS)

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """`count` distinct problems of one split, kinds in turn: every even number of them holds half of each."""
        half = drawn(draw_riddle, split, count // 2, seed)
        rest = drawn(self._story, split, count - len(half), seed)
        found: list[Problem] = [None] * count
        found[0::2], found[1::2] = rest, half
        return found

    def documents(self, tokens: int, seed: int, longest: int = 160) -> Iterator[list[int]]:
        """Base-corpus documents (token ids, begin-of-sequence first) until `tokens` tokens are reached; training
        problems only."""
        rng = random.Random(f"documents-{seed}")
        while tokens > 0:
            chance = rng.random()
            if chance < STORY_DRILLS:
                document = [BOS, *WORDS.encode(stories.drill(rng, SMALL)), EOS]
            elif chance < STORY_DRILLS + RIDDLE_DRILLS:
                document = [BOS, *WORDS.encode(_drill(rng)), EOS]
            else:
                problem = self._training_problem(rng)
                prompt = problem.prompt_ids
                room = (LONGEST if problem.kind == Riddle.kind else longest) - len(prompt)
                document = prompt + WORDS.encode(response(problem, rng, room))
            tokens -= len(document)
            yield document

    def instructions(self, tokens: int, worked_share: float, seed: int) -> Iterator[tuple[list[int], list[int]]]:
        """Concise (prompt, answer) examples until `tokens` tokens are reached: right answers that end; some stories are
        worked step by step, riddles never."""
        rng = random.Random(f"instructions-{seed}")
        while tokens > 0:
            problem = self._training_problem(rng)
            is_worked = problem.kind == stories.Problem.kind and rng.random() < worked_share
            words = worked(problem, rng) if is_worked else stated(problem.answer)
            answer = WORDS.encode([*words, "</s>"])
            tokens -= len(problem.prompt_ids) + len(answer)
            yield problem.prompt_ids, answer
