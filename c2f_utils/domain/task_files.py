"""Questions with known answers in files of the user's: what they may look like, read and checked row by row.

A folder holds .jsonl files (one object per line) and .json files (a list of objects, or one under `examples`); each is
a task, named after its path. A row is one of three: `question`, `choices` and `answer` (the right choice, or its number
from 0); `question` and an `answer` that ends in `#### n`, as in GSM8K; `question` and `answer`, or `input` and `target`
as in BIG-Bench-Hard. Other fields are not read, but for `id`, which no two rows may share. Needs no torch.
"""

import glob
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from c2f_utils.errors import C2FError, problems
from c2f_utils.files import root

Shape = Literal["choice", "number", "text"]

_SHOWN = 12  # problems of one message
_NUMBER = re.compile(r"####\s*-?\$?[\d.,]*\d\s*\Z")
_EXPECTED = "expected question and answer, input and target, or question, choices and answer"


@dataclass(frozen=True)
class TaskFile:
    """One file as a task: `rows` hold `question` and `answer`, or `question`, `choices` and `right` (an index)."""

    name: str
    path: Path
    shape: Shape
    rows: list[dict]


def folder(named: str) -> Path:
    """The folder that a setting names; a relative one that the working folder lacks is the project's."""
    path = Path(named).expanduser()
    return path if path.is_absolute() or path.exists() else root() / path


def files(place: Path) -> dict[str, Path]:
    """The task files in a folder and below by task name; raises C2FError if there is none, or two of one name."""
    found: dict[str, Path] = {}
    every = sorted(place / name for name in glob.iglob("**/*", root_dir=place, recursive=True))  # also through links
    paths = [path for path in every if path.suffix in (".json", ".jsonl") and path.is_file()]
    if not paths:
        state = "holds no .jsonl or .json file" if place.is_dir() else "is no folder"
        raise C2FError(f"tasks.folder = {str(place)!r} {state}; place files there, or take 'local' out of tasks.suites")
    for path in paths:
        name = "local_" + re.sub(r"\W+", "_", str(path.relative_to(place).with_suffix(""))).strip("_")
        if name in found:
            raise C2FError(f"tasks.folder: {found[name]} and {path} would both be the task {name}; rename one")
        found[name] = path
    return found


def read(place: Path) -> list[TaskFile]:
    """All task files of a folder; raises C2FError that lists what is wrong, with file and line."""
    tasks, wrong = [], []
    for name, path in files(place).items():
        found = _File(path)
        tasks.append(TaskFile(name, path, found.shape, found.rows))
        wrong += found.wrong
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise problems("tasks.folder: these rows cannot be asked:", wrong[:_SHOWN] + more)
    return tasks


class _File:
    """Rows of one file, their common shape, and what is wrong with them."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.wrong = path, [], []
        self.shape: Shape | None = None
        self._ids: dict[object, str] = {}
        try:
            for where, row in self._entries():
                self._add(where, row)
        except C2FError as error:
            self.wrong.append(str(error))
        if not self.rows and not self.wrong:
            self.wrong.append(f"{path} holds no row; {_EXPECTED}, one object per line")

    def _entries(self) -> Iterator[tuple[str, object]]:
        text = self._text()
        if self.path.suffix == ".jsonl":
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    where = f"{self.path}, line {number}"
                    try:
                        yield where, json.loads(line)
                    except (json.JSONDecodeError, RecursionError) as error:
                        self.wrong.append(f"{where}: not valid JSON ({error})")
            return
        try:
            content = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise C2FError(f"{self.path}: not valid JSON ({error})") from None
        rows = content.get("examples") if isinstance(content, dict) else content
        if not isinstance(rows, list):
            raise C2FError(f"{self.path}: expected a list of objects, or an object with such a list under 'examples'")
        yield from ((f"{self.path}, entry {number}", row) for number, row in enumerate(rows, start=1))

    def _text(self) -> str:
        try:
            content = self.path.read_bytes()
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise C2FError(f"{self.path}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
        except OSError as error:
            raise C2FError(f"{self.path} cannot be read: {error.strerror}") from None

    def _add(self, where: str, row: object) -> None:
        said = _problem(row)
        if not said and row.get("id") is not None:
            key = json.dumps(row["id"])
            if key in self._ids:
                said = f"the id {row['id']!r} is that of {self._ids[key]}, too; give every row its own"
            self._ids.setdefault(key, where.removeprefix(f"{self.path}, "))
        if not said:
            shape, content = _content(row)
            self.shape = self.shape or shape
            if shape != self.shape:
                said = f"is a row of shape {shape!r} in a file of shape {self.shape!r}; keep each in a file of its own"
            else:
                self.rows.append(content)
        if said:
            self.wrong.append(f"{where}: {said}")


def _keys(row: dict) -> tuple[str, str]:
    return ("input", "target") if "input" in row and "question" not in row else ("question", "answer")


def _problem(row: object) -> str | None:
    """What makes a row unusable, in words."""
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}; {_EXPECTED}"
    asked, answered = _keys(row)
    if missing := [key for key in (asked, answered) if key not in row]:
        return f"lacks {' and '.join(missing)}; {_EXPECTED}"
    question, answer, choices = row[asked], row[answered], row.get("choices")
    for key, value in ((asked, question), (answered, answer)):
        if isinstance(value, bool) or not isinstance(value, str | int if key == answered else str):
            return f"{key} is {value!r}; expected text"
        if not str(value).strip():
            return f"{key} is empty; expected text"
    if choices is not None:
        if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
            return f"choices are {choices!r}; expected a list of texts, none of them empty"
        if len(choices) < 2 or len({c.strip() for c in choices}) < len(choices):
            return f"choices are {choices!r}; expected at least two, all different"
        if answer not in (choices if isinstance(answer, str) else range(len(choices))):
            return f"answer {answer!r} is none of the choices {choices!r} nor a number from 0 to {len(choices) - 1}"
    try:
        json.dumps([question, answer, choices], ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no letter; mend the text"
    return None


def _content(row: dict) -> tuple[Shape, dict]:
    asked, answered = _keys(row)
    answer = row[answered]
    if row.get("choices") is not None:
        right = row["choices"].index(answer) if isinstance(answer, str) else answer
        return "choice", {"question": row[asked], "choices": row["choices"], "right": right}
    shape = "number" if _NUMBER.search(str(answer)) else "text"
    return shape, {"question": row[asked], "answer": str(answer)}
