"""Judges: which of two answers is better, or how good is one? One protocol, verdicts that are kept, plain rows.

A judge is asked about answers in the order in which they are shown (`Case`), and says a value and whether it could be
read (`Opinion`). Every pair is shown in both orders; a win counts only if both agree. What was said is appended to a
JSON Lines file under a hash of what was asked, so that nothing is asked twice (`Verdicts`).

A verdict row, which everything that counts verdicts reads, is plain JSON:

    question  id of the question (text or whole number)
    category  of the question
    turn      1 or 2: the turn that was judged
    model_a, model_b  names of the two models, the same in both orders
    order     "ab": model_a's answer was shown first; "ba": model_b's
    p_a       preference for model_a's answer, in [0, 1], whichever was shown first; 0.5 is a tie; null if not ok
    tokens_a, tokens_b  lengths of the judged turn's answers, tokens
    judge     the judge's id
    ok        whether a verdict could be read; rows that are not ok are counted, never dropped
    key       hash under which the verdict is kept
"""

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from c2f_utils.errors import C2FError, Stopped
from c2f_utils.files import append_jsonl, read_jsonl, write_text
from c2f_utils.measure.verdict_pairs import decided


@dataclass(frozen=True)
class Question:
    """What is asked: an id, a category and one user turn or two; `reference` holds reference answers per turn,
    `reference_faulty` says that they are known to be wrong."""

    id: str | int
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()
    reference_faulty: bool = False


@dataclass(frozen=True)
class Dialogue:
    """One model's answers to a question's turns, and their lengths in tokens."""

    answers: tuple[str, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """What a judge is shown: a question up to a turn (1 or 2), and the answers to its turns of one model (single
    grading) or of two, in this order. `parts` are the two judged answers cut into aligned parts, where they are to be
    shown part beside part; `about` a "refusal" asks what the one answer does with a request that is to be refused."""

    question: Question
    turn: int
    shown: tuple[tuple[str, ...], ...]
    parts: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    about: Literal["quality", "refusal"] = "quality"

    @property
    def pairwise(self) -> bool:
        return len(self.shown) == 2

    @property
    def graded(self) -> bool:
        """Whether a grade is asked for, and not one of three letters."""
        return not self.pairwise and self.about == "quality"

    def key(self, judge: str) -> str:
        """SHA-256 of the judge's id and everything that it is shown."""
        turns, reference = self.question.turns[: self.turn], self.question.reference[: self.turn]
        shown = [list(answers[: self.turn]) for answers in self.shown]
        what = [judge, self.question.category, turns, reference, shown]
        what += [self.parts] if self.parts else []
        what += [self.about] if self.about != "quality" else []
        return hashlib.sha256(json.dumps(what, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Opinion:
    """What a judge said of a case: the preference for the answer shown first, in [0, 1], or a grade; of a refusal 1
    (refuses), 0 (goes along) or 1/2 (neither); None where nothing could be read. `raw` is what it said word for word,
    or why it said nothing.

    `final` is False where no reply came: the question may be put again.
    """

    value: float | None
    raw: str = ""
    final: bool = True

    @property
    def ok(self) -> bool:
        return self.value is not None


class Judge(Protocol):
    """Anything that can say which of two answers is better. `id` names everything that decides what it says."""

    name: str
    id: str

    def opinions(self, cases: Sequence[Case]) -> Generator[tuple[Case, Opinion]]:
        """An opinion of every case, as they come: each is kept before the next is awaited."""


class HeuristicJudge:
    """For smoke tests: prefers the answer with more different words. Its name stands on every table it made."""

    name = "heuristic"
    id = "heuristic:different-words"

    def opinions(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Opinion]]:
        for case in cases:
            counts = [len(set(answers[case.turn - 1].lower().split())) for answers in case.shown]
            if case.pairwise:
                first, second = counts
                yield case, Opinion(0.5 if first == second else first / (first + second))
            else:
                yield case, Opinion(float(counts[0]))


class Verdicts:
    """Opinions on disk under the hash of what was asked: appended, read again after a kill, never replaced.

    A line {"key", "judge", "value", "raw", "final"} is an opinion. Raises C2FError for a file that holds anything else.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        mend(self.path)
        self._known: dict[str, Opinion] = {}
        for number, row in enumerate(read_jsonl(self.path), start=1):
            try:
                self._known[row["key"]] = Opinion(row["value"], row["raw"], row["final"])
            except (KeyError, TypeError):
                raise C2FError(
                    f"{self.path}, line {number}: no verdict; expected the fields key, judge, value, raw and final: "
                    "this file is written by judges only; move it away to have everything judged again"
                ) from None

    def find(self, case: Case, judge: Judge) -> Opinion | None:
        """The latest opinion of this case, if there is one."""
        return self._known.get(case.key(judge.id))

    def add(self, case: Case, judge: Judge, opinion: Opinion) -> None:
        key = case.key(judge.id)
        self._known[key] = opinion
        append_jsonl(self.path, {"key": key, "judge": judge.id, **asdict(opinion)})

    def missing(self, cases: Iterable[Case], judge: Judge) -> list[Case]:
        """The cases without a final opinion, each once."""
        keys = {case.key(judge.id): case for case in cases}
        return [case for key, case in keys.items() if key not in self._known or not self._known[key].final]

    def opinions(
        self,
        cases: Sequence[Case],
        judge: Judge,
        progress: Callable[[int, int], None] = lambda done, total: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Opinion]:
        """One opinion per case; the judge is asked only what is not known yet. Raises Stopped on request, with
        everything kept that was said."""
        new = self.missing(cases, judge)
        with closing(judge.opinions(new)) as opinions:  # a judge that is stopped asks no more
            for done, (case, opinion) in enumerate(opinions, start=1):
                self.add(case, judge, opinion)
                progress(done, len(new))
                if stop():
                    raise Stopped(f"stopped after {done} of {len(new)} verdicts; what was said is kept")
        return [self._known[case.key(judge.id)] for case in cases]


def mend(path: Path) -> None:
    """Cut off a last line that a kill left unfinished, so that the next one begins on a line of its own."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with open(path, "r+b") as handle:
            handle.truncate(content.rfind(b"\n") + 1)
            handle.flush()
            os.fsync(handle.fileno())


# Pairs


@dataclass(frozen=True)
class Pair:
    """Two models' answers to one question, to be judged at one turn."""

    question: Question
    turn: int
    names: tuple[str, str]
    dialogues: tuple[Dialogue, Dialogue]

    def cases(self) -> tuple[Case, Case]:
        """What the judge is shown: a's answer first, then b's."""
        a, b = (dialogue.answers[: self.turn] for dialogue in self.dialogues)
        return Case(self.question, self.turn, (a, b)), Case(self.question, self.turn, (b, a))


def pairs(questions: Sequence[Question], a: str, b: str, dialogues: dict[str, dict[str | int, Dialogue]]) -> list[Pair]:
    """Every turn of every question, answered by models a and b; `dialogues` by model and question id."""
    return [
        Pair(question, turn, (a, b), (dialogues[a][question.id], dialogues[b][question.id]))
        for question in questions
        for turn in range(1, len(question.turns) + 1)
    ]


def verdict_rows(asked: Sequence[Pair], judge: Judge, verdicts: Verdicts, **watch: Callable) -> list[dict]:
    """Two verdict rows per pair, order "ab" and then "ba" (see the head of this module for their fields)."""
    cases = [case for pair in asked for case in pair.cases()]
    opinions = verdicts.opinions(cases, judge, **watch)
    rows = []
    for place, (case, opinion) in enumerate(zip(cases, opinions, strict=True)):
        pair, swapped = asked[place // 2], place % 2 == 1
        value = opinion.value
        rows.append({
            "question": pair.question.id, "category": pair.question.category, "turn": pair.turn,
            "model_a": pair.names[0], "model_b": pair.names[1], "order": "ba" if swapped else "ab",
            "p_a": value if value is None or not swapped else 1 - value,
            "tokens_a": pair.dialogues[0].tokens[pair.turn - 1], "tokens_b": pair.dialogues[1].tokens[pair.turn - 1],
            "judge": judge.id, "ok": opinion.ok, "key": case.key(judge.id),
        })  # fmt: skip
    return rows


def outcome(p_a: float | None) -> str:
    """ "a", "b", "tie" or, without a verdict, "error"."""
    if p_a is None:
        return "error"
    return {1.0: "a", 0.0: "b"}.get(float(decided(p_a)), "tie")


def both_orders(rows: Sequence[dict]) -> Iterator[tuple[dict, dict]]:
    """The two rows of every pair; raises C2FError where one is missing."""
    for first, second in zip(rows[::2], rows[1::2], strict=False):
        same = all(first[key] == second[key] for key in ("question", "turn", "model_a", "model_b"))
        if not same or (first["order"], second["order"]) != ("ab", "ba"):
            raise C2FError(f"verdicts on question {first['question']!r} are not in both orders; expected ab, then ba")
        yield first, second
    if len(rows) % 2:
        raise C2FError(f"question {rows[-1]['question']!r} was judged in one order only; expected ab, then ba")


def save_rows(path: Path, rows: Iterable[dict]) -> None:
    """Replace a JSON Lines file of verdict rows."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
