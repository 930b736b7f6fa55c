"""Questions of one or two turns, the answers of a model, and judgements, in FastChat's files (MT-Bench).

Inputs: `question.jsonl`, `model_answer/<model>.jsonl` and `reference_answer/<model>.jsonl` as FastChat's llm_judge has
them, or a file of prompts with an `instruction` each, as AlpacaEval has it. Outputs: answers and judgements in
FastChat's files. A file is read whole before work starts; what is wrong in it is an error with its file and line.
"""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from c2f_utils.domain.preferences import ASSISTANT, HUMAN
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError
from c2f_utils.files import write_text
from c2f_utils.measure.judges import Dialogue, Opinion, Pair, Question, outcome

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")  # of MT-Bench
NEED_REFERENCE = ("math", "reasoning", "coding")  # judged beside a reference answer
# MT-Bench samples by category; what it does not know, at 0.7.
TEMPERATURES = dict.fromkeys(CATEGORIES, 0.0) | dict(writing=0.7, roleplay=0.7, stem=0.1, humanities=0.1)
OTHER_TEMPERATURE = 0.7
# MT-Bench's reference answers by gpt-4 that are known to be wrong (FastChat, pull request 3158).
FAULTY_REFERENCES = frozenset({104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130})
UNCATEGORISED = "all"


class Lines:
    """The rows of one file, and errors that name file and line (of a .json array: the item)."""

    def __init__(self, path: str | Path, what: str):
        self.path, self.what = Path(path), what
        self._unit = "item" if self.path.suffix == ".json" else "line"

    def wrong(self, number: int, problem: str) -> C2FError:
        return C2FError(f"{self.path}, {self._unit} {number}: {problem}; mend this {self._unit} of the {self.what}")

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        text = self._text()
        count = 0
        for number, row in self._items(text) if self._unit == "item" else self._json_lines(text):
            if not isinstance(row, dict):
                raise self.wrong(number, f"a {type(row).__name__} instead of a JSON object")
            count += 1
            yield number, row
        if not count:
            raise C2FError(f"{self.path} holds no rows; expected {self.what} with one JSON object per {self._unit}")

    def _text(self) -> str:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise C2FError(f"{self.path} cannot be read ({error.strerror}); expected a {self.what}") from None
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise C2FError(f"{self.path}, line {line}: not UTF-8 text; save the {self.what} as UTF-8") from None

    def _items(self, text: str) -> Iterator[tuple[int, object]]:
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise C2FError(f"{self.path} is not valid JSON ({error}); expected an array of objects") from None
        if not isinstance(rows, list):
            raise C2FError(f"{self.path} holds a {type(rows).__name__}; expected an array of objects")
        return enumerate(rows, start=1)

    def _json_lines(self, text: str) -> Iterator[tuple[int, object]]:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise self.wrong(number, f"not valid JSON ({error})") from None

    def text_of(self, number: int, row: dict, key: str) -> str:
        """A field that must be text with something in it."""
        return self.checked(number, row.get(key), f"the field {key!r}")

    def checked(self, number: int, value: object, what: str, empty: bool = False) -> str:
        if not isinstance(value, str):
            raise self.wrong(number, f"{what} is {'missing' if value is None else repr(value)}, expected text")
        if not value.strip() and not empty:
            raise self.wrong(number, f"{what} is empty, expected text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise self.wrong(number, f"{what} holds half of a surrogate pair, which is no text") from None
        return value

    def turns_of(self, number: int, turns: object, what: str, empty: bool = False) -> tuple[str, ...]:
        if not isinstance(turns, list) or not 1 <= len(turns) <= 2:
            count = f"{len(turns)} of them" if isinstance(turns, list) else repr(turns)
            raise self.wrong(number, f"the field 'turns' is {count}, expected a list of one or two texts")
        return tuple(self.checked(number, t, f"{what} {i}", empty) for i, t in enumerate(turns, start=1))

    def id_of(self, number: int, row: dict, seen: dict) -> str | int:
        """The question's id; `seen` holds the lines of those before it."""
        found = row.get("question_id")
        if isinstance(found, bool) or not isinstance(found, int | str) or found == "":
            raise self.wrong(number, f"question_id is {found!r}, expected a whole number or text")
        if found in seen:
            raise self.wrong(number, f"question_id {found!r} stands in {self._unit} {seen[found]} already")
        seen[found] = number
        return found


def read_questions(path: str | Path, further_categories: Collection[str] = ()) -> list[Question]:
    """Questions of a FastChat file (rows with `turns`) or of a file of prompts (rows with `instruction`).

    Categories are MT-Bench's and `further_categories`; a prompt's category is its `dataset`, if it has one. Raises
    C2FError naming file and line for what is malformed, twice there, empty, of an unknown category or without turns.
    """
    lines, known, seen = Lines(path, "question file"), {*CATEGORIES, *further_categories}, {}
    found = []
    for number, row in lines:
        if "turns" not in row and "instruction" in row:
            category = row.get("dataset", UNCATEGORISED)
            turns = (lines.text_of(number, row, "instruction"),)
            found.append(Question(number, lines.checked(number, category, "the field 'dataset'"), turns))
            continue
        if "turns" not in row:
            raise lines.wrong(number, "neither 'turns' (FastChat) nor 'instruction' (AlpacaEval) is there")
        place, category = lines.id_of(number, row, seen), lines.text_of(number, row, "category")
        if category not in known:
            names = ", ".join(sorted(known))
            raise lines.wrong(number, f"category {category!r} is unknown (known: {names}; judge.categories adds more)")
        found.append(Question(place, category, lines.turns_of(number, row["turns"], "turn")))
    return found


def read_answers(
    path: str | Path, questions: Sequence[Question], empty: bool = False
) -> tuple[str, dict[str | int, tuple[str, ...]]]:
    """A model's name and its answers by question id, from a FastChat answer file; of several choices the first.

    `empty` allows empty answers, which a model may give. Raises C2FError naming file and line for malformed rows,
    questions that are not asked, twice answered or without an answer to every turn.
    """
    lines, seen, model = Lines(path, "answer file"), {}, None
    turns = {question.id: len(question.turns) for question in questions}
    found = {}
    for number, row in lines:
        place, name = lines.id_of(number, row, seen), lines.text_of(number, row, "model_id")
        if place not in turns:
            raise lines.wrong(number, f"question_id {place!r} is not among the {len(turns)} questions")
        if model not in (None, name):
            raise lines.wrong(number, f"model_id is {name!r} and was {model!r} before, expected one model per file")
        choices, model = row.get("choices"), name
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise lines.wrong(number, "the field 'choices' is no list of objects with 'turns'")
        answers = lines.turns_of(number, choices[0].get("turns"), "the answer to turn", empty)
        if len(answers) != turns[place]:
            raise lines.wrong(number, f"{len(answers)} answers to the {turns[place]} turns of question {place!r}")
        found[place] = answers
    return model, found


def with_references(questions: Sequence[Question], path: str | Path) -> list[Question]:
    """The questions with the reference answers of a file, those known to be wrong flagged.

    Raises C2FError as `read_answers` does, and for a question of math, reasoning or coding without one.
    """
    model, answers = read_answers(path, questions)
    if missing := [q.id for q in questions if q.category in NEED_REFERENCE and q.id not in answers]:
        raise C2FError(
            f"{path} has no reference answer to {len(missing)} questions of {', '.join(NEED_REFERENCE)}, the first "
            f"being {missing[0]!r}; add them, or leave the reference answers out"
        )
    return [
        replace(
            question,
            reference=answers[question.id],
            reference_faulty=model == "gpt-4" and question.id in FAULTY_REFERENCES,
        )
        if question.id in answers
        else question
        for question in questions
    ]


def write_answers(path: Path, model: str, dialogues: dict[str | int, Dialogue]) -> None:
    """Replace a FastChat answer file; an answer's id is a hash of its content."""
    rows = []
    for place, dialogue in dialogues.items():
        turns = list(dialogue.answers)
        digest = hashlib.sha256(json.dumps([model, place, turns]).encode()).hexdigest()[:22]
        choices = [{"index": 0, "turns": turns}]
        rows.append(
            {"question_id": place, "answer_id": digest, "model_id": model, "choices": choices, "tstamp": time.time()}
        )
    _write(path, rows)


def write_pair_judgements(
    path: Path, asked: Sequence[Pair], opinions: Sequence[Opinion], judge: tuple[str, str], prompts: Sequence[str] = ()
) -> None:
    """Replace a FastChat file of pairwise judgements; two opinions per pair, a's answer shown first and then b's.

    `judge` is its name and that of its prompt, `prompts` what it read, one per opinion, if it reads text.
    """
    rows = []
    for place, pair in enumerate(asked):
        a, b = pair.names
        names = {"a": ("model_1", "model_2"), "b": ("model_2", "model_1"), "tie": ("tie",) * 2, "error": ("error",) * 2}
        row = {"question_id": pair.question.id, "model_1": a, "model_2": b, "judge": list(judge), "turn": pair.turn}
        for game in (0, 1):
            opinion = opinions[2 * place + game]
            row[f"g{game + 1}_winner"] = names[outcome(opinion.value)][game]
            row[f"g{game + 1}_user_prompt"] = prompts[2 * place + game] if prompts else ""
            row[f"g{game + 1}_judgment"] = opinion.raw
        rows.append(row | {"tstamp": time.time()})
    _write(path, rows)


def read_pair_judgements(path: str | Path, questions: Sequence[Question]) -> list[dict]:
    """Verdict rows (`measure/judges`) of a FastChat file of pairwise judgements; it knows no lengths, they are null.

    Raises C2FError naming file and line for malformed rows and for questions that are not asked.
    """
    lines, known = Lines(path, "file of judgements"), {question.id: question for question in questions}
    values = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5, "error": None}
    found = []
    for number, row in lines:
        if (place := lines.id_of(number, row, {})) not in known:
            raise lines.wrong(number, f"question_id {place!r} is not among the {len(known)} questions")
        a, b = (lines.text_of(number, row, key) for key in ("model_1", "model_2"))
        for order, key in (("ab", "g1_winner"), ("ba", "g2_winner")):
            if row.get(key) not in values:
                raise lines.wrong(number, f"{key} is {row.get(key)!r}, expected one of {', '.join(values)}")
            if row.get("turn") not in range(1, len(known[place].turns) + 1):
                raise lines.wrong(number, f"turn is {row.get('turn')!r}, which question {place!r} does not have")
            value = values[row[key]]
            found.append({
                "question": place, "category": known[place].category, "turn": row["turn"], "model_a": a, "model_b": b,
                "order": order, "p_a": value, "tokens_a": None, "tokens_b": None,
                "judge": ":".join(map(str, row.get("judge") or ["unknown"])), "ok": value is not None, "key": None,
            })  # fmt: skip
    return found


def write_single_judgements(
    path: Path, model: str, asked: Sequence[tuple[Question, int]], opinions: Sequence[Opinion], judge: tuple[str, str]
) -> None:
    """Replace a FastChat file of grades; -1 stands for one that could not be read."""
    _write(path, [
        {
            "question_id": question.id, "model": model, "judge": list(judge), "user_prompt": "",
            "judgment": opinion.raw, "score": opinion.value if opinion.ok else -1, "turn": turn, "tstamp": time.time(),
        }
        for (question, turn), opinion in zip(asked, opinions, strict=True)
    ])  # fmt: skip


def _write(path: Path, rows: Sequence[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def transcript(turns: Sequence[str], answers: Sequence[str]) -> str:
    """A dialogue as the preference data has it, waiting for the answer to the last of these turns."""
    said = [f"{HUMAN} {turn}{ASSISTANT}{_said(answer)}" for turn, answer in zip(turns, [*answers, ""], strict=True)]
    return "".join(said)


def _said(answer: str) -> str:
    return f" {answer.strip()}" if answer.strip() else ""


def generate(
    questions: Sequence[Question],
    prompt: Callable[[Question, Sequence[Sample]], Prompt],
    answer: Callable[[list[Prompt], float], list[Sample]],
) -> dict[str | int, Dialogue]:
    """A model's answers to all turns of all questions, the second after its own first.

    `prompt` puts a question, after the answers so far, to the model; `answer` samples at a temperature, which is that
    of MT-Bench for the question's category.
    """
    said: dict[str | int, list[Sample]] = {question.id: [] for question in questions}
    for turn in (1, 2):
        asked = [question for question in questions if len(question.turns) >= turn]
        for temperature in sorted({temperature_of(question) for question in asked}):
            group = [question for question in asked if temperature_of(question) == temperature]
            prompts = [prompt(question, said[question.id]) for question in group]
            for question, sample in zip(group, answer(prompts, temperature), strict=True):
                said[question.id].append(sample)
    return {
        place: Dialogue(tuple(s.text.strip() for s in samples), tuple(len(s.answer) for s in samples))
        for place, samples in said.items()
    }


def temperature_of(question: Question) -> float:
    """At which temperature a question is answered."""
    return TEMPERATURES.get(question.category, OTHER_TEMPERATURE)
