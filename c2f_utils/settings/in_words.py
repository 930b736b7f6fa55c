"""What is wrong with settings, said in words: the setting, its value, what was expected, the likely spelling.

Input: a validation error of `pydantic` and the model that the settings were checked against. Output: one line each.
"""

import difflib
from types import UnionType
from typing import Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from c2f_utils.errors import short


def explained(root: type[BaseModel], error: ValidationError) -> list[str]:
    """One line per problem of settings that are made like `root`; what every type of a setting that takes several has
    to say is one problem."""
    lines, choices = [], {}
    for item in error.errors():
        loc, _ = _place(root, item["loc"])
        if loc == item["loc"]:
            lines += _explain(root, loc, item)
        else:  # the rest names one of the types
            choices.setdefault((loc, short(item["input"])), []).append(item["msg"].removeprefix("Input should be "))
    return lines + [
        f"{'.'.join(map(str, loc))} = {value}: expected {' or '.join(said)}" for (loc, value), said in choices.items()
    ]


def _explain(root: type[BaseModel], loc: tuple, item: dict) -> list[str]:
    where, value, kind = ".".join(map(str, loc)), item["input"], item["type"]
    if kind == "value_error":  # a rule of ours: its text says it all, the whole section would not help
        rules = item["msg"].removeprefix("Value error, ").splitlines()
        return [f"{where}: {line}" if where else line for line in rules]
    if kind == "extra_forbidden":
        return [f"{where} = {short(value)}: there is no such setting; {_neighbours(root, loc, value)}"]
    if kind == "missing":
        return [f"{where} is missing; give it a value"]
    if kind == "string_pattern_mismatch":  # run_id, or the name of a law
        what = f"a name in {'.'.join(map(str, loc[:-2]))} is" if loc[-1] == "[key]" else f"{where} ="
        return [f"{what} {short(value)}: expected 1 to 64 letters, digits, '.', '_', '-', the first a letter or digit"]
    if kind in {"model_type", "dict_type"}:
        model = _model(_place(root, loc)[1])
        keys = f" with keys among {', '.join(model.model_fields)}" if model else ""
        return [f"{where} = {short(value)}: expected a group of settings{keys}; write {where}={{'KEY': VALUE, ...}}"]
    if isinstance(value, str) and kind in {"bool_type", "bool_parsing"}:
        return [f"{where} = {short(value)} is text; write True or False (YAML: true or false), without quotes"]
    if isinstance(value, str) and kind in {"int_type", "float_type", "int_parsing", "float_parsing"}:
        advice = "write a number without quotes (papermill's own YAML needs 1.0e-6, not 1e-6)"
        return [f"{where} = {short(value)} is text; {advice}"]
    return [f"{where} = {short(value)}: {item['msg'].replace('Input should be', 'expected')}"]


def places(root: type[BaseModel], name: str) -> list[str]:
    """Settings of this name in `root` with their sections, e.g. `coarse.iterations`."""
    sections = {section: _model(field.annotation) for section, field in root.model_fields.items()}
    return [f"{section}.{name}" for section, model in sections.items() if model and name in model.model_fields]


def _neighbours(root: type[BaseModel], loc: tuple, value: object) -> str:
    model, name = _model(_place(root, loc[:-1])[1]), str(loc[-1])
    if len(loc) == 1 and (found := places(root, name)):
        return f"a setting is written with its section: {' or '.join(f'{place}={short(value)}' for place in found)}"
    if not model:
        return "see c2f_utils/config.py"
    near = difflib.get_close_matches(name, model.model_fields, n=1)
    return "".join(f"did you mean {key}? " for key in near) + f"known here: {', '.join(model.model_fields)}"


def _place(root: type[BaseModel], loc: tuple) -> tuple[tuple, object]:
    """The part of an error's place that names settings, and the type expected there."""
    kind: object = root
    for depth, part in enumerate(loc):
        if model := _model(kind):
            kind = model.model_fields[part].annotation if part in model.model_fields else None
        elif inner := next((each for each in (kind, *get_args(kind)) if get_origin(each) in (dict, list, tuple)), None):
            kind = get_args(inner)[-1]
        else:
            return loc[:depth], kind
    return loc, kind


def _model(kind: object) -> type[BaseModel] | None:
    """The section that a type is, also where it may be null."""
    kinds = (kind, *(get_args(kind) if get_origin(kind) in (Union, UnionType) else ()))
    return next((each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)), None)
