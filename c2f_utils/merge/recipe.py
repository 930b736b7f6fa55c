"""The recipe: everything that decides a merge's result, frozen, and the same in YAML, in JSON and as a papermill
parameter.

The paper's merging formula is not public. The default, fine = instruct + c * (coarse - base), is ours.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from c2f_utils.errors import C2FError, problems
from c2f_utils.files import read_mapping
from c2f_utils.merge import names as tensor_names

OutDtype = Literal["same", "float32", "bfloat16", "bfloat16_stochastic"]


def _tupled(value: object) -> object:
    """YAML and JSON know lists only; frozen models hold tuples."""
    return tuple(_tupled(item) for item in value) if isinstance(value, list | tuple) else value


def _named(value: object) -> object:
    """A bare name stands for an operator without keys of its own."""
    return {"name": value} if isinstance(value, str) else value


def _everywhere(value: object) -> object:
    """A bare number stands for one coefficient for all tensors."""
    return {"default": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Rule(_Frozen):
    """Change the coefficient of tensors whose full name matches: `scale` multiplies it, `set` replaces it."""

    match: str = Field(description="regular expression, searched in the full tensor name")
    scale: float | None = None
    set: float | None = None

    @model_validator(mode="after")
    def _complete(self) -> "Rule":
        if (self.scale is None) == (self.set is None):
            raise ValueError(f"rule {self.match!r} needs exactly one of scale and set")
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(
                f"rule {self.match!r} is not a regular expression ({error}); escape special signs with a backslash"
            ) from None
        return self


class Coefficient(_Frozen):
    """How much residue each tensor gets: `default`, or `knots` by depth (linear between, constant outside), then
    `rules` in order.
    """

    default: float = 0.3
    knots: Annotated[tuple[tuple[float, float], ...] | None, BeforeValidator(_tupled)] = None
    rules: Annotated[tuple[Rule, ...], BeforeValidator(_tupled)] = ()

    @model_validator(mode="after")
    def _ordered(self) -> "Coefficient":
        if self.knots is not None:
            depths = [depth for depth, _ in self.knots]
            if (
                not depths
                or depths[0] < 0
                or depths[-1] > 1
                or any(a >= b for a, b in zip(depths, depths[1:], strict=False))
            ):
                raise ValueError(f"knots {depths} must be at least one depth, strictly increasing, within 0 and 1")
        return self

    def at(self, name: str, layers: int) -> float | None:
        """Give the coefficient of a tensor in a network of `layers` layers; None when neither depth nor a `set` rule
        places it.
        """
        depth = tensor_names.depth_of(name, layers)
        value = None if depth is None else self.default
        if depth is not None and self.knots is not None:
            value = float(np.interp(depth, [knot[0] for knot in self.knots], [knot[1] for knot in self.knots]))
        for rule in self.rules:
            if re.search(rule.match, name):
                value = rule.set if rule.set is not None else (None if value is None else value * rule.scale)
        return value


class Weighted(_Frozen):
    """One of several coarse models and its weight in the sum of residues (weights are not normalised)."""

    path: str
    weight: float = 1.0


class Recipe(_Frozen):
    """A merge of three models; raises C2FError listing every problem at once.

    `base`, `instruct`, `coarse` are folders or hub ids of safetensors checkpoints, or PEFT LoRA adapters trained on
    `base`. `operator` is {"name": ..., own keys} or a bare name, `coefficient` may be a bare number. `vocab`: `equal`,
    or `common_prefix` to merge the rows all models share and copy the others from instruct. `allow` names config keys
    that may differ; `ignore` are regular expressions for tensors of base or coarse to leave out.
    """

    base: str
    instruct: str
    coarse: Annotated[str | tuple[Weighted, ...], BeforeValidator(_tupled)]
    operator: Annotated[dict[str, str | float | int | bool], BeforeValidator(_named)] = Field(
        default_factory=lambda: {"name": "residue"}
    )
    coefficient: Annotated[Coefficient, BeforeValidator(_everywhere)] = Coefficient()
    out_dtype: OutDtype = "same"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    vocab: Literal["equal", "common_prefix"] = "equal"
    allow: Annotated[tuple[str, ...], BeforeValidator(_tupled)] = ()
    ignore: Annotated[tuple[str, ...], BeforeValidator(_tupled)] = ()

    def __init__(self, **fields: object) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise problems("the merge recipe has problems:", [_line(item) for item in error.errors()]) from None

    @model_validator(mode="after")
    def _sound(self) -> "Recipe":
        from c2f_utils.merge.operators import (
            check_operator,  # torch is imported there; a recipe's other fields do not need it
        )

        found = check_operator(self.operator, len(self.coarse) if isinstance(self.coarse, tuple) else 1)
        if self.coarse == ():
            found.append("coarse is an empty list; name at least one model")
        for pattern in self.ignore:
            try:
                re.compile(pattern)
            except re.error as error:
                found.append(f"ignore {pattern!r} is not a regular expression ({error})")
        if found:
            raise ValueError("\n".join(found))
        return self

    @property
    def coarse_models(self) -> tuple[Weighted, ...]:
        return (Weighted(path=self.coarse),) if isinstance(self.coarse, str) else self.coarse

    @property
    def operator_name(self) -> str:
        return str(self.operator["name"])

    @property
    def options(self) -> dict[str, object]:
        return {key: value for key, value in self.operator.items() if key != "name"}

    def to_dict(self) -> dict:
        """Give plain lists, numbers and strings: valid YAML, JSON and papermill parameters."""
        return json.loads(self.model_dump_json())

    @classmethod
    def from_dict(cls, fields: dict) -> "Recipe":
        """Inverse of `to_dict`; raises C2FError."""
        if not isinstance(fields, dict):
            raise C2FError(
                f"a recipe is a mapping with base, instruct and coarse, got {type(fields).__name__}; see "
                f"the example in notebook 06"
            )
        return cls(**{str(key): value for key, value in fields.items()})

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe from a YAML or JSON file; raises C2FError naming the file and every problem."""
    fields = read_mapping(path, "recipe", "base: ..., instruct: ..., coarse: ...")
    try:
        return Recipe.from_dict(fields)
    except C2FError as error:
        raise C2FError(f"recipe {path}: {error}") from None


_FORMS = {
    ("operator",): "a name such as residue, or {name: trim, density: 0.3}",
    ("coefficient",): "a number such as 0.5, or {default: 0.5, knots: [[0.0, 0.2], [1.0, 0.6]], rules: [...]}",
}


def _line(item: dict) -> str:
    place = ".".join(
        str(part)
        for part in item["loc"]
        if part not in ("function-before[_tupled(), union[str,tuple[Weighted, ...]]]",)
    )
    text = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        text = "unknown key; remove it or mend its spelling"
    elif item["type"] == "missing":
        text = "missing; give a value"
    elif item["loc"] in _FORMS and item["type"] in ("dict_type", "model_type"):
        text = f"expected {_FORMS[item['loc']]}, got {item['input']!r:.80}"
    elif item["type"] != "value_error":
        text += f", got {item['input']!r:.80}"
    return f"{place}: {text}" if place else text
