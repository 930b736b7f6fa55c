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
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from c2f_utils.domain.worlds import SMALL, WIDE, World
from c2f_utils.redundancy import duplicate_sentence_share, rep_n

Split = Literal["train", "validation", "test"]
# The small world's are a part of these, in the same order.
GAINS, ORDINALS = WIDE.gains, WIDE.ordinals
THINK = ("let", "us", "think", ".")
CHECK = ("let", "us", "check", ".")
FORCED_ANALYSIS = "let us think . start with"
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
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
PAD, BOS, EOS = 0, 1, 2


def vocabulary(world: World = SMALL) -> tuple[str, ...]:
    """Words by token id: those of the small world first, so that a word's id is the same in every world."""
    numbers, names = SMALL.words[: SMALL.largest + 1], SMALL.words[SMALL.largest + 1 :]
    words = [*numbers, *"question : answer how many has . ? + - = so start with".split(), *names, *THINK, *CHECK]
    words += [word for filler in FILLERS for word in filler]
    return (*SPECIALS, *dict.fromkeys([*words, *world.words]))


VOCABULARY = vocabulary()
_WORDS = vocabulary(WIDE)
IDS = {word: index for index, word in enumerate(_WORDS)}
_STOP = IDS["."]


def encode(words: Sequence[str]) -> list[int]:
    """Token ids of a list of words; raises KeyError for a word outside every world."""
    return [IDS[word] for word in words]


def decode(ids: Sequence[int]) -> str:
    """Text of token ids without the special tokens."""
    return " ".join(_WORDS[i] for i in ids if i >= len(SPECIALS))


@dataclass(frozen=True)
class Problem:
    """One story: a start value and operations (verb, operand); every running value lies in 0..largest."""

    name: str
    item: str
    start: int
    operations: tuple[tuple[str, int], ...]
    largest: int = field(default=SMALL.largest, repr=False, compare=False)

    @property
    def values(self) -> tuple[int, ...]:
        """Running values: the start, then one after each operation."""
        values = [self.start]
        for verb, operand in self.operations:
            values.append(values[-1] + (operand if verb in GAINS else -operand))
        return tuple(values)

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def words(self) -> list[str]:
        """The question as words, without the begin-of-sequence token."""
        words = ["question", ":", self.name, "has", str(self.start), self.item, "."]
        for ordinal, (verb, operand) in zip(ORDINALS, self.operations, strict=False):
            words += [ordinal, verb, str(operand), "."]
        return [*words, "how", "many", self.item, "?"]

    @property
    def prompt_ids(self) -> list[int]:
        return [BOS, *encode(self.words)]

    @property
    def split(self) -> Split:
        """A fixed function of the running values: stories that differ only in words are in one split."""
        key = str(self.values)
        return {0: "validation", 1: "test"}.get(zlib.crc32(key.encode()) % 8, "train")


def draw_problem(rng: random.Random, operations: tuple[int, int] = (3, 5), world: World = SMALL) -> Problem:
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
    return Problem(rng.choice(world.names), rng.choice(world.items), start, tuple(steps), world.largest)


def problems(
    split: Split, count: int, seed: int, operations: tuple[int, int] = (3, 5), world: World = SMALL
) -> list[Problem]:
    """`count` distinct problems of one split, the same for the same seed; raises ValueError if `operations` asks for
    more steps than the world has."""
    if operations[1] > len(world.ordinals) or operations[0] > operations[1]:
        raise ValueError(f"operations = {operations}: expected (fewest, most) with at most {len(world.ordinals)}")
    rng = random.Random(f"{split}-{seed}")
    found: dict[Problem, None] = {}
    while len(found) < count:
        problem = draw_problem(rng, operations, world)
        if problem.split == split:
            found[problem] = None
    return list(found)


# --- answers ---------------------------------------------------------------------------------------------------------


def analysis(
    problem: Problem, rng: random.Random, error_rate: float = 0.0, steps: int | None = None
) -> tuple[list[str], int]:
    """Analysis sentences (10 words each) and the value they end with; an error carries over into the later steps."""
    value = problem.start
    words = ["start", "with", str(value), "."]
    for ordinal, (verb, operand) in list(zip(ORDINALS, problem.operations, strict=False))[:steps]:
        sign = "+" if verb in GAINS else "-"
        result = value + (operand if sign == "+" else -operand)
        if rng.random() < error_rate or not 0 <= result <= problem.largest:
            result = rng.choice([n for n in range(problem.largest + 1) if n != result])
        words += [ordinal, verb, str(operand), "so", str(value), sign, str(operand), "=", str(result), "."]
        value = result
    return words, value


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


# kind: (share, right answers, step errors, ending probabilities: end of sequence, ramble, check)
_KINDS: dict[str, tuple[float, float, float, tuple[float, float, float]]] = {
    "bare": (0.42, 0.70, 0.0, (0.5, 0.4, 0.1)),
    "partial": (0.08, 0.50, 0.02, (0.2, 0.6, 0.2)),
    "full": (0.24, 1.0, 0.02, (0.2, 0.4, 0.4)),
    "faulty": (0.04, 1.0, 0.30, (0.2, 0.4, 0.4)),
    "ramble": (0.22, 0.0, 0.0, (0.1, 0.8, 0.1)),
}
_SHARES = [kind[0] for kind in _KINDS.values()]


def response(
    problem: Problem, rng: random.Random, longest: int = 130, kind: str | None = None, ends: bool = False
) -> list[str]:
    """One answer of mixed quality as words; it ends with `</s>` (always, and at its result, if `ends`) or is cut after
    `longest` words."""
    kind = kind or rng.choices(list(_KINDS), weights=_SHARES)[0]
    _, right, error_rate, endings = _KINDS[kind]
    if kind == "bare":
        words = _answer(problem, rng, right)
    elif kind == "ramble":
        words = _ramble([], rng, rng.randint(6, 20)) + ["."] + _answer(problem, rng, right)
    elif kind == "partial":
        steps, _ = analysis(problem, rng, error_rate, rng.randint(1, len(problem.operations) - 1))
        words = [*THINK, *steps, *_answer(problem, rng, right)]
    else:
        steps, value = analysis(problem, rng, error_rate)
        words = [*THINK, *steps, *stated(value)]
    ending = "end" if ends else rng.choices(("end", "ramble", "check"), weights=endings)[0]
    if ending == "check":
        for _ in range(rng.randint(1, 3)):
            steps, value = analysis(problem, rng, 0.02)
            words += [*CHECK, *steps, *stated(value)]
        ending = "end" if rng.random() < 0.15 else "ramble"
    if ending == "end":
        words.append("</s>")
    elif len(words) < longest:
        words += _ramble(words, rng, longest - len(words))
    return words[:longest]


def _drill(rng: random.Random, world: World) -> list[str]:
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
            document = [BOS, *encode(_drill(rng, world)), EOS]
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
        steps, value = analysis(problem, rng)
        words = [*THINK, *steps, *stated(value)] if rng.random() < worked_share else stated(problem.answer)
        answer = encode([*words, "</s>"])
        tokens -= len(problem.prompt_ids) + len(answer)
        yield problem.prompt_ids, answer


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


def sentences(ids: Sequence[int]) -> list[tuple[int, ...]]:
    """Sentences of an answer, without their full stops; special tokens are left out."""
    found: list[tuple[int, ...]] = []
    current: list[int] = []
    for token in ids:
        if token == _STOP:
            found.append(tuple(current))
            current = []
        elif token >= len(SPECIALS):
            current.append(token)
    return [*found, tuple(current)] if current else found


def check(problem: Problem, ids: Sequence[int]) -> Verdict:
    """Judge one answer (token ids after the prompt, `</s>` included if it was produced) against its problem."""
    values = problem.values
    right: set[int] = set()
    wrong = checks = 0
    answers: list[int] = []
    spoken = sentences(ids)
    for sentence in spoken:
        words = [_WORDS[token] for token in sentence]
        if len(words) == 3 and words[:2] == ["answer", ":"] and words[2].isdigit():
            answers.append(int(words[2]))
        elif tuple(words) == CHECK[:-1]:
            checks += 1
        elif len(words) == 9 and words[7] == "=" and words[3] == "so" and words[0] in ORDINALS:
            index = ORDINALS.index(words[0])
            if index < len(problem.operations) and words[1:] == _step(problem, index, values):
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


def _step(problem: Problem, index: int, values: tuple[int, ...]) -> list[str]:
    verb, operand = problem.operations[index]
    sign = "+" if verb in GAINS else "-"
    return [verb, str(operand), "so", str(values[index]), sign, str(operand), "=", str(values[index + 1])]


# --- preferences and tokenizer ---------------------------------------------------------------------------------------


def labelled_utility(verdict: Verdict, rng: random.Random, noise: float, length_bonus: float) -> float:
    """What the simulated annotator sees: utility, a small taste for length (per token), and Gaussian noise."""
    return verdict.utility + length_bonus * verdict.tokens + rng.gauss(0.0, noise)


def synthetic_answer(problem: Problem, rng: random.Random, cut_share: float, longest: int = 144) -> list[int]:
    """An answer for preference pairs: corpus-like, cut at a random token with probability `cut_share`."""
    ids = encode(response(problem, rng, longest))
    return ids[: rng.randint(4, max(5, len(ids)))] if rng.random() < cut_share else ids


def make_tokenizer(world: World = SMALL):
    """A world's word-level tokenizer in Hugging Face format; it puts `<s>` before a text and PAD is not EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(vocabulary(world))}
    raw = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side="right", model_max_length=1024, clean_up_tokenization_spaces=False,
    )  # fmt: skip
