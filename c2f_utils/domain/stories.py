"""The embedded domain: inventory stories whose answers can be checked exactly.

Question it answers: what does a model do when working step by step pays, and nobody ever showed it how to stop? A
problem has 3-5 operations on one running number. Guessing the result directly is near chance for a small model;
writing one analysis sentence per operation is not. The base corpus holds both habits in mixed quality and hardly
ever ends an analysis, so reinforcement learning without supervised fine-tuning makes the model analytical *and*
endless, the behaviour that the coarse-to-fine method starts from.

Outputs: problems (disjoint splits), documents, preference pairs, instruction examples, and an exact `check` of any
answer. Everything here is our design; the published system uses real data.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import ClassVar

from c2f_utils.domain.problems import (
    BOS,
    EOS,
    FILLERS,
    SPECIALS,
    Habit,
    Split,
    Vocabulary,
    drawn,
    response,
    stated,
    worked,
)
from c2f_utils.domain.problems import Problem as AnyProblem
from c2f_utils.domain.worlds import SMALL, WIDE, World

# The small world's are a part of these, in the same order.
GAINS, ORDINALS = WIDE.gains, WIDE.ordinals
THINK = ("let", "us", "think", ".")
CHECK = ("let", "us", "check", ".")
FORCED_ANALYSIS = "let us think . start with"


def vocabulary(world: World = SMALL) -> tuple[str, ...]:
    """Words by token id: those of the small world first, so that a word's id is the same in every world."""
    numbers, names = SMALL.words[: SMALL.largest + 1], SMALL.words[SMALL.largest + 1 :]
    words = [*numbers, *"question : answer how many has . ? + - = so start with".split(), *names, *THINK, *CHECK]
    words += [word for filler in FILLERS for word in filler]
    return (*SPECIALS, *dict.fromkeys([*words, *world.words]))


@cache
def _vocabulary(world: World) -> Vocabulary:
    return Vocabulary(vocabulary(world))


VOCABULARY = vocabulary()
WORDS = _vocabulary(WIDE)
IDS, encode, decode = WORDS.ids, WORDS.encode, WORDS.decode


@dataclass(frozen=True)
class Problem(AnyProblem):
    """One story: a start value and operations (verb, operand); every running value lies in 0..largest."""

    kind = "story"
    thinking, checking, opening = THINK, CHECK, FORCED_ANALYSIS
    habits: ClassVar[dict[str, Habit]] = {
        "bare": (0.42, 0.70, 0.0, (0.5, 0.4, 0.1)),
        "partial": (0.08, 0.50, 0.02, (0.2, 0.6, 0.2)),
        "full": (0.24, 1.0, 0.02, (0.2, 0.4, 0.4)),
        "faulty": (0.04, 1.0, 0.30, (0.2, 0.4, 0.4)),
        "ramble": (0.22, 0.0, 0.0, (0.1, 0.8, 0.1)),
    }
    candidates = habits

    name: str
    item: str
    start: int
    operations: tuple[tuple[str, int], ...]
    largest: int = field(default=SMALL.largest, repr=False, compare=False)
    vocabulary: Vocabulary = field(default=WORDS, repr=False, compare=False)

    @property
    def words(self) -> list[str]:
        words = ["question", ":", self.name, "has", str(self.start), self.item, "."]
        for ordinal, (verb, operand) in zip(ORDINALS, self.operations, strict=False):
            words += [ordinal, verb, str(operand), "."]
        return [*words, "how", "many", self.item, "?"]

    def grows(self, word: str) -> bool:
        return word in GAINS

    def beginning(self) -> list[str]:
        return ["start", "with", str(self.start), "."]

    def step(self, index: int, before: int, after: int) -> list[str]:
        verb, operand = self.operations[index]
        sign = "+" if self.grows(verb) else "-"
        return [ORDINALS[index], verb, str(operand), "so", str(before), sign, str(operand), "=", str(after)]

    def claimed(self, sentence: Sequence[str]) -> int | None:
        if len(sentence) == 9 and sentence[7] == "=" and sentence[3] == "so" and sentence[0] in ORDINALS:
            return ORDINALS.index(sentence[0])
        return None


def draw_problem(
    rng: random.Random, operations: tuple[int, int] = (3, 5), world: World = SMALL, vocabulary: Vocabulary = WORDS
) -> Problem:
    """One random problem of any split with between `operations[0]` and `operations[1]` steps."""
    value = start = rng.randint(1, world.start)
    steps: list[tuple[str, int]] = []
    for _ in range(rng.randint(*operations)):
        operand = rng.randint(1, world.operand)
        gain = rng.random() < 0.5
        if not 0 <= value + (operand if gain else -operand) <= world.largest:
            gain = not gain
        steps.append((rng.choice(world.gains if gain else world.losses), operand))
        value += operand if gain else -operand
    return Problem(rng.choice(world.names), rng.choice(world.items), start, tuple(steps), world.largest, vocabulary)


def problems(
    split: Split, count: int, seed: int, operations: tuple[int, int] = (3, 5), world: World = SMALL
) -> list[Problem]:
    """`count` distinct problems of one split, the same for the same seed; raises ValueError if `operations` asks for
    more steps than the world has."""
    if operations[1] > len(world.ordinals) or operations[0] > operations[1]:
        raise ValueError(f"operations = {operations}: expected (fewest, most) with at most {len(world.ordinals)}")
    return drawn(partial(draw_problem, operations=operations, world=world), split, count, seed)


def drill(rng: random.Random, world: World) -> list[str]:
    """A document of 4 to 10 single sums, as words."""
    words: list[str] = []
    for _ in range(rng.randint(4, 10)):
        value, operand = rng.randint(0, world.largest), rng.randint(1, world.operand)
        gain = value + operand <= world.largest and (value < operand or rng.random() < 0.5)
        words += [
            str(value),
            "+" if gain else "-",
            str(operand),
            "=",
            str(value + operand if gain else value - operand),
            ".",
        ]
    return words


def documents(
    tokens: int,
    seed: int,
    operations: tuple[int, int] = (3, 5),
    longest: int = 160,
    ends: bool = False,
    world: World = SMALL,
) -> Iterator[list[int]]:
    """Base-corpus documents (token ids, begin-of-sequence first) until `tokens` tokens are reached; training
    problems only. With `ends` every answer stops at its result, as no corpus of the embedded base does."""
    rng = random.Random(f"documents-{seed}")
    while tokens > 0:
        if rng.random() < 0.15:
            document = [BOS, *encode(drill(rng, world)), EOS]
        else:
            problem = draw_problem(rng, operations, world)
            if problem.split != "train":
                continue
            prompt = problem.prompt_ids
            document = prompt + encode(response(problem, rng, longest - len(prompt), ends=ends))
        tokens -= len(document)
        yield document


def instructions(
    tokens: int, worked_share: float, seed: int, operations: tuple[int, int] = (3, 5), world: World = SMALL
) -> Iterator[tuple[list[int], list[int]]]:
    """Concise (prompt, answer) examples until `tokens` tokens are reached: right answers that end, some worked step
    by step."""
    rng = random.Random(f"instructions-{seed}")
    while tokens > 0:
        problem = draw_problem(rng, operations, world)
        if problem.split != "train":
            continue
        steps = worked(problem, rng)
        words = steps if rng.random() < worked_share else stated(problem.answer)
        answer = encode([*words, "</s>"])
        tokens -= len(problem.prompt_ids) + len(answer)
        yield problem.prompt_ids, answer


def make_tokenizer(world: World = SMALL):
    """A world's word-level tokenizer in Hugging Face format; it puts `<s>` before a text and PAD is not EOS."""
    return _vocabulary(world).tokenizer()


@dataclass(frozen=True)
class Stories:
    """Stories of one world, as the embedded stages ask for them."""

    operations: tuple[int, int] = (3, 5)
    world: World = SMALL

    @property
    def vocabulary(self) -> Vocabulary:
        return _vocabulary(self.world)

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        return problems(split, count, seed, self.operations, self.world)

    def documents(self, tokens: int, seed: int) -> Iterator[list[int]]:
        return documents(tokens, seed, self.operations, world=self.world)

    def instructions(self, tokens: int, worked_share: float, seed: int) -> Iterator[tuple[list[int], list[int]]]:
        return instructions(tokens, worked_share, seed, self.operations, self.world)
