"""Notebook parameters: what a notebook declares, and whether the values it was given are of that kind.

papermill only warns about a name it does not know, and its YAML turns `1e-6` and `-p flag false` into text. Here
both are refused, before a kernel starts (`jobs.py`) and again in the first code cell (`notebook/cells.py`),
since a notebook may be run by papermill itself. A parameter is a line `name: type = literal  # help` of the cell
tagged `parameters`.
"""

import ast
import difflib
import io
import json
import tokenize
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from c2f_utils.errors import C2FError, short
from c2f_utils.files import UNPARSABLE
from c2f_utils.settings.config import Settings
from c2f_utils.settings.in_words import places

_TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool, "dict": dict, "list": list}


@dataclass(frozen=True)
class Parameter:
    """A declared parameter; `type` is one of str, int, float, bool, dict, list, `help` the comment behind it."""

    name: str
    type: str
    default: object
    optional: bool = False
    help: str = ""

    def problem(self, value: object) -> str | None:
        """What is wrong with a value, with the spelling to use; None when it fits."""
        if value is None and self.optional:
            return None
        if isinstance(value, _TYPES[self.type]) and (self.type == "bool" or not isinstance(value, bool)):
            return None
        return f"{self.name} = {short(value)} is {_kind(value)}; expected {self.type}: {self._spelling(value)}"

    def parse(self, text: str) -> object:
        """The value a command line means, e.g. `True`, `1e-6`, `{'coarse.iterations': 5}`."""
        if self.type == "str":
            return text
        return literal(text)

    def _spelling(self, value: object) -> str:
        words = str(value).strip().lower()
        if self.type == "bool":
            flag = {"true": "True", "1": "True", "false": "False", "0": "False"}.get(words, "True or False")
            return f"write {flag}, without quotes"
        if self.type in ("int", "float") and isinstance(value, str | float):
            try:
                number = float(words)
            except ValueError:
                return "write a number, without quotes"
            whole = int(number) if number.is_integer() else None
            if self.type == "int":
                return f"write {whole}, without quotes" if whole is not None else "write a whole number"
            return f"write {value} without quotes (in papermill's own YAML: {number:.1e})"
        if self.type == "str" and isinstance(value, int | float):
            return f"write {str(value)!r} with quotes (papermill: -r {self.name} {value})"
        return {"dict": "write {'section.key': value}", "list": "write ['a', 'b']"}.get(
            self.type, f"write a {self.type}"
        )


STANDARD = {
    item.name: item
    for item in (
        Parameter("profile", "str", "tiny"),
        Parameter("seed", "int", 0),
        Parameter("run_id", "str", "lab"),
        Parameter("overrides", "dict", {}),
        Parameter("study", "bool", False),
        Parameter("overwrite", "bool", False),
    )
}


def literal(text: str) -> object:
    """A Python literal, or the text itself when it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def declared(source: str) -> dict[str, Parameter]:
    """The parameters of a parameters cell, by name; raises C2FError for a line that is not `name: type = literal`."""
    found = {}
    try:
        lines, comments = ast.parse(source).body, _comments(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise C2FError(f"parameters cell: {error}; expected lines of the form 'name: type = literal'") from None
    for line in lines:
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            continue  # a text
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value):
            raise C2FError(f"parameters cell: {ast.unparse(line)!r}; expected lines of the form 'name: type = literal'")
        name, annotation = line.target.id, ast.unparse(line.annotation)
        kind = annotation.removeprefix("Optional[")
        optional = kind != annotation
        kind = kind.partition("[")[0].removesuffix("]")
        if kind not in _TYPES:
            raise C2FError(f"parameters cell: {name} has type {annotation}; expected one of {', '.join(_TYPES)}")
        try:
            said = comments.get(line.end_lineno, "")
            found[name] = Parameter(name, kind, ast.literal_eval(line.value), optional, said)
        except ValueError:
            raise C2FError(f"parameters cell: {name} = {ast.unparse(line.value)}; expected a literal") from None
    return found


def _comments(source: str) -> dict[int, str]:
    """The comments of a source that can be parsed, by the number of their line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def of_notebook(path: Path) -> dict[str, Parameter]:
    """The parameters that a notebook file declares; raises C2FError unless exactly one cell is tagged `parameters`."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        tagged = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    except (OSError, LookupError, TypeError, AttributeError, *UNPARSABLE) as error:
        raise C2FError(f"{path} is not a readable notebook ({short(error)}); expected an .ipynb file") from None
    if len(tagged) != 1:
        raise C2FError(f"{path} has {len(tagged)} cells tagged 'parameters'; expected exactly one")
    try:
        return declared(tagged[0])
    except C2FError as error:
        raise C2FError(f"{path}, {error}") from None


def check(known: dict[str, Parameter], values: dict[str, object]) -> list[str]:
    """One line per unknown name or value of the wrong type."""
    found = []
    for name, value in values.items():
        if name in known:
            found += filter(None, [known[name].problem(value)])
        else:
            near = _near(name, known)
            hint = f"did you mean {near[0]!r}? " if near else ""
            if settings := places(Settings, name):
                written = " or ".join(f"{place}={value}" for place in settings)
                hint = f"a setting is written with its section: {written}; "
            found.append(f"there is no parameter {name!r}; {hint}known: {', '.join(known)}")
    return found


def of_session(namespace: dict[str, object]) -> tuple[dict[str, object], list[str]]:
    """Values of a running notebook's parameters, and what is wrong with them.

    Read from IPython's record of executed cells, `In`: the parameters cell run last, and papermill's `# Parameters`
    cell if it came after. Variables of other cells do not matter, so the first cell may be run again at any time; but a
    name annotated as parameters are is refused where it seems to be meant as one: nearly a parameter's or a setting's
    and typed before the run was first opened, or a parameter's but for underscores and capitals.
    Outside IPython the standard parameters are taken from the namespace.
    """
    known, injected, typed, opened = STANDARD, set(), {}, False  # typed: name -> whether the run was open by then
    for source in namespace.get("In", []):
        tree = _parsed(source)
        here = {ast.unparse(line.target) for line in tree if isinstance(line, ast.AnnAssign)}
        if len(here & set(STANDARD)) >= 3:
            known, injected, typed = declared(source), set(), {}
        elif source.startswith("# Parameters"):
            injected = {target.id for line in tree if isinstance(line, ast.Assign) for target in line.targets}
        else:
            typed = {
                name: late for name, late in typed.items() if not here & set(_near(name, known))
            }  # the uncorrected
            typed |= dict.fromkeys(here, opened)
        opened |= "notebook.start(" in source
    absent = set(STANDARD) - set(known)
    misspelt = {name for name in set(known) - set(STANDARD) if _near(name, absent) or _same_letters(name, STANDARD)}
    known = {name: item for name, item in known.items() if name not in misspelt}
    every = STANDARD | known
    for name in set(typed) & set(namespace):
        meant = _near(name, every) or places(Settings, name)
        if _same_letters(name, every) or (meant and not typed[name]):
            misspelt.add(name)
    values = {name: namespace.get(name, item.default) for name, item in known.items()}
    unknown = {name: namespace.get(name) for name in sorted((injected | misspelt) - set(every))}
    return {**{name: item.default for name, item in STANDARD.items()}, **values}, check(every, values | unknown)


def _same_letters(name: str, known: Collection[str]) -> bool:
    return name.replace("_", "").lower() in {each.replace("_", "") for each in known}


def _near(name: str, known: Collection[str]) -> list[str]:
    return difflib.get_close_matches(name.lower(), known, n=1)


def _parsed(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError:  # a cell with magics, or one that failed
        return []


def _kind(value: object) -> str:
    return {"str": "text", "NoneType": "nothing"}.get(type(value).__name__, f"a {type(value).__name__}")
