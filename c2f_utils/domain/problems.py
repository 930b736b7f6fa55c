"""What the kinds of problem of the embedded domain share: one running number, answers of mixed quality, an exact
checker.

A kind says how its question reads, how its analysis opens, and what one step's sentence is; everything else, from the
corpus's bad habits to the verdict on an answer, is the same for all kinds. A sentence of another kind counts neither
for nor against an answer.
"""

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from c2f_utils.errors import C2FError
from c2f_utils.redundancy import duplicate_sentence_share, rep_n

Split = Literal["train", "validation", "test"]
_IDLE = 5_000  # draws in a row without a new problem, after which there is none
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
PAD, BOS, EOS = 0, 1, 2
FORCED_ANSWER = "answer :"
# Sentences that carry nothing, for the rambling part of the corpus.
FILLERS = tuple(
    tuple(text.split())
    for text in (
        "this is not easy .",
        "we look at it again .",
        "so it goes on .",
        "there is more to say .",
        "now we think about it .",
        "maybe it is more .",
        "maybe it is less .",
        "that is one way .",
        "and then we go on .",
    )
)
# share, right answers, step errors, ending probabilities: end of sequence, ramble, check
Habit = tuple[float, float, float, tuple[float, float, float]]


class Vocabulary:
    """Words by token id, the special tokens first."""

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self.ids = {word: index for index, word in enumerate(self.words)}

    def encode(self, words: Sequence[str]) -> list[int]:
        """Token ids of a list of words; raises KeyError for an unknown word."""
        return [self.ids[word] for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without the special tokens."""
        return " ".join(self.words[i] for i in ids if i >= len(SPECIALS))

    def sentences(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """Sentences of an answer, without their full stops; special tokens are left out."""
        found: list[tuple[int, ...]] = []
        current: list[int] = []
        for token in ids:
            if token == self.ids["."]:
                found.append(tuple(current))
                current = []
            elif token >= len(SPECIALS):
                current.append(token)
        return [*found, tuple(current)] if current else found

    def tokenizer(self):
        """A word-level tokenizer in Hugging Face format; it puts `<s>` before a text and PAD is not EOS."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        raw = Tokenizer(models.WordLevel(self.ids, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        return PreTrainedTokenizerFast(
            tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
            padding_side="right", model_max_length=1024, clean_up_tokenization_spaces=False,
        )  # fmt: skip


class Problem(ABC):
    """One problem: a start value and operations (word, operand); every running value lies in 0..largest."""

    kind: ClassVar[str]
    thinking: ClassVar[tuple[str, ...]]  # what is said before an analysis,
    checking: ClassVar[tuple[str, ...]]  # and before it is done once more; () where that is not usual
    opening: ClassVar[str]  # the first words of an analysis up to its first number: they force one
    habits: ClassVar[dict[str, Habit]]  # answers of the base corpus
    candidates: ClassVar[dict[str, Habit]]  # answers that are compared in preference pairs
    start: int
    operations: tuple[tuple[str, int], ...]
    largest: int
    vocabulary: Vocabulary

    @abstractmethod
    def grows(self, word: str) -> bool:
        """Whether an operation adds its operand; otherwise it takes it away."""

    @property
    @abstractmethod
    def words(self) -> list[str]:
        """The question as words, without the begin-of-sequence token."""

    @abstractmethod
    def beginning(self) -> list[str]:
        """The sentence before the first step, which states the start value."""

    @abstractmethod
    def step(self, index: int, before: int, after: int) -> list[str]:
        """The sentence that works one operation between two running values, without its full stop."""

    @abstractmethod
    def claimed(self, sentence: Sequence[str]) -> int | None:
        """The number of the operation that a sentence claims to work; None if it is no such sentence."""

    @property
    def values(self) -> tuple[int, ...]:
        """Running values: the start, then one after each operation."""
        values = [self.start]
        for word, operand in self.operations:
            values.append(values[-1] + (operand if self.grows(word) else -operand))
        return tuple(values)

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def prompt_ids(self) -> list[int]:
        return [BOS, *self.vocabulary.encode(self.words)]

    @property
    def split(self) -> Split:
        """A fixed function of the running values: problems that differ only in words are in one split."""
        key = str(self.values)
        return {0: "validation", 1: "test"}.get(zlib.crc32(key.encode()) % 8, "train")


def drawn(draw: Callable[[random.Random], Problem], split: Split, count: int, seed: int) -> list[Problem]:
    """`count` distinct problems of one split, the same for the same seed; raises C2FError where there are not so
    many."""
    rng, idle = random.Random(f"{split}-{seed}"), 0
    found: dict[Problem, None] = {}
    while len(found) < count:
        problem, before = draw(rng), len(found)
        if problem.split == split:
            found[problem] = None
        idle = 0 if len(found) > before else idle + 1
        if idle > _IDLE:
            raise C2FError(
                f"{len(found)} different {problem.kind} problems of the split {split!r} were found, and {count} are "
                "asked for; lower reward.pairs, data.validation_prompts or data.test_prompts"
            )
    return list(found)


# --- answers of mixed quality ----------------------------------------------------------------------------------------


def analysis(
    problem: Problem, rng: random.Random, error_rate: float = 0.0, steps: int | None = None
) -> tuple[list[str], int]:
    """Analysis sentences and the value they end with; an error carries over into the later steps."""
    value, words = problem.start, problem.beginning()
    for index, (word, operand) in list(enumerate(problem.operations))[:steps]:
        result = value + (operand if problem.grows(word) else -operand)
        if rng.random() < error_rate or not 0 <= result <= problem.largest:
            result = rng.choice([n for n in range(problem.largest + 1) if n != result])
        words += [*problem.step(index, value, result), "."]
        value = result
    return words, value


def worked(problem: Problem, rng: random.Random) -> list[str]:
    """A right answer, worked out step by step."""
    steps, value = analysis(problem, rng)
    return [*problem.thinking, *steps, *stated(value)]


def stated(value: int) -> list[str]:
    return ["answer", ":", str(value), "."]


def _answer(problem: Problem, rng: random.Random, right: float) -> list[str]:
    if rng.random() < right:
        return stated(problem.answer)
    return stated(rng.choice([n for n in range(problem.largest + 1) if n != problem.answer]))


def _ramble(words: list[str], rng: random.Random, room: int) -> list[str]:
    """Go on for `room` words: sentences said one to three times in a row, answers restated, no end."""
    last = words[-4:] if words[-4:-2] == ["answer", ":"] else []
    more: list[str] = []
    while len(more) < room:
        sentence = list(rng.choice(FILLERS)) if not last or rng.random() < 0.6 else last
        more += sentence * rng.randint(1, 3)
    return more[:room]


def response(
    problem: Problem,
    rng: random.Random,
    longest: int = 130,
    kind: str | None = None,
    ends: bool = False,
    habits: dict[str, Habit] | None = None,
) -> list[str]:
    """One answer of mixed quality as words, by default with the habits of the base corpus; it ends with `</s>` (always,
    and at its result, if `ends`) or is cut after `longest` words."""
    habits = habits or problem.habits
    kind = kind or rng.choices(list(habits), weights=[share for share, *_ in habits.values()])[0]
    _, right, error_rate, endings = habits[kind]
    if kind == "bare":
        words = _answer(problem, rng, right)
    elif kind == "ramble":
        words = _ramble([], rng, rng.randint(6, 20)) + ["."] + _answer(problem, rng, right)
    elif kind == "partial":
        steps, _ = analysis(problem, rng, error_rate, rng.randint(1, len(problem.operations) - 1))
        words = [*problem.thinking, *steps, *_answer(problem, rng, right)]
    else:
        steps, value = analysis(problem, rng, error_rate)
        words = [*problem.thinking, *steps, *stated(value)]
    ending = "end" if ends else rng.choices(("end", "ramble", "check"), weights=endings)[0]
    if ending == "check":
        for _ in range(rng.randint(1, 3)):
            steps, value = analysis(problem, rng, 0.02)
            words += [*problem.checking, *steps, *stated(value)]
        ending = "end" if rng.random() < 0.15 else "ramble"
    if ending == "end":
        words.append("</s>")
    elif len(words) < longest:
        words += _ramble(words, rng, longest - len(words))
    return words[:longest]


# --- the exact checker -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What one answer is worth, read off its tokens alone."""

    correct_steps: int
    wrong_steps: int
    steps: int
    first_answer: int | None
    last_answer: int | None
    gold: int
    checks: int
    tokens: int
    ended: bool
    rep4: float
    duplicate_sentences: float

    @property
    def first_right(self) -> bool:
        return self.first_answer == self.gold

    @property
    def last_right(self) -> bool:
        return self.last_answer == self.gold

    @property
    def utility(self) -> float:
        """True quality: 3 x share of distinct correct steps - 0.25 x wrong steps (at most 4) + 1.5 or -0.5 for the
        last answer + 0.4 for a check section; no length term."""
        steps = 3.0 * self.correct_steps / self.steps - 0.25 * min(self.wrong_steps, 4)
        return steps + (1.5 if self.last_right else -0.5) + (0.4 if self.checks else 0.0)


def check(problem: Problem, ids: Sequence[int]) -> Verdict:
    """Judge one answer (token ids after the prompt, `</s>` included if it was produced) against its problem."""
    values, known = problem.values, problem.vocabulary
    right: set[int] = set()
    wrong = checks = 0
    answers: list[int] = []
    spoken = known.sentences(ids)
    for sentence in spoken:
        words = [known.words[token] for token in sentence]
        if len(words) == 3 and words[:2] == ["answer", ":"] and words[2].isdigit():
            answers.append(int(words[2]))
        elif words and tuple(words) == problem.checking[:-1]:
            checks += 1
        elif (index := problem.claimed(words)) is not None:
            stands = index < len(problem.operations)
            if stands and words == problem.step(index, values[index], values[index + 1]):
                right.add(index)
            else:
                wrong += 1
    plain = [token for token in ids if token >= len(SPECIALS)]
    return Verdict(
        correct_steps=len(right),
        wrong_steps=wrong,
        steps=len(problem.operations),
        first_answer=answers[0] if answers else None,
        last_answer=answers[-1] if answers else None,
        gold=problem.answer,
        checks=checks,
        tokens=len(ids),
        ended=EOS in ids,
        rep4=rep_n(plain, 4),
        duplicate_sentences=duplicate_sentence_share(spoken),
    )


# --- preferences -----------------------------------------------------------------------------------------------------


def synthetic_answer(problem: Problem, rng: random.Random, cut_share: float, longest: int = 144) -> list[int]:
    """An answer for preference pairs: corpus-like, cut at a random token with probability `cut_share`."""
    ids = problem.vocabulary.encode(response(problem, rng, longest, habits=problem.candidates))
    return ids[: rng.randint(4, max(5, len(ids)))] if rng.random() < cut_share else ids


def labelled_utility(verdict: Verdict, rng: random.Random, noise: float, length_bonus: float) -> float:
    """What the simulated annotator sees: utility, a small taste for length (per token), and Gaussian noise."""
    return verdict.utility + length_bonus * verdict.tokens + rng.gauss(0.0, noise)
