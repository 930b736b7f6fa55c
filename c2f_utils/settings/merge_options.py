"""The options of the merge operators that are there: names, defaults and bounds, known without torch.

`merge/operators.py` joins them to their kernels; settings that name an operator are checked against them before work.
"""

import math
from collections.abc import Mapping

from c2f_utils.errors import short

OPTIONS: dict[str, dict[str, object]] = {
    "residue": {}, "lerp": {}, "slerp": {}, "orthogonal": {}, "tsv": {"rank": 0.0},
    "trim": {"density": 0.2, "scope": "tensor"}, "ties": {"density": 0.2, "scope": "tensor"},
    "dare": {"density": 0.5, "seed": 0}, "dots": {"density": 0.3, "instruct": 1.0, "scope": "tensor"},
}  # fmt: skip
_DIVISORS = {"dare": "it", "dots": "the norm of what is kept"}
_KINDS = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false"}


def option_problems(name: str, spec: Mapping[str, object], defaults: Mapping[str, object]) -> list[str]:
    """One line per option of `spec` that operator `name` has not, of the wrong kind, or out of bounds."""
    found = []
    for key, value in spec.items():
        if key == "name":
            continue
        if key not in defaults:
            found.append(f"operator.{key}: {name} has no such key; its own keys: {', '.join(defaults) or 'none'}")
        elif not _same_kind(defaults[key], value):
            found.append(f"operator.{key}: {value!r} is not {_KINDS.get(type(defaults[key]), 'of the expected type')}")
    return found or _out_of_bounds(name, {**defaults, **spec})


def _out_of_bounds(name: str, options: Mapping[str, object]) -> list[str]:
    found, density, rank = [], options.get("density"), options.get("rank", 0)
    if name in _DIVISORS and not 0 < density <= 1:
        found.append(f"operator.density: {density} must be above 0 and at most 1: {name} divides by {_DIVISORS[name]}")
    elif density is not None and not 0 <= density <= 1:
        found.append(f"operator.density: {density} must lie within 0 and 1 (the share kept)")
    if not 0 <= options.get("seed", 0) < 2**63:
        found.append(f"operator.seed: {short(options['seed'])} must lie within 0 and 2**63 - 1")
    if options.get("scope", "tensor") not in ("tensor", "global"):
        found.append(f"operator.scope: {options['scope']!r} must be tensor or global")
    if name == "tsv" and not 0 <= rank <= 1:
        found.append(f"operator.rank: {rank} must lie within 0 (automatic) and 1 (the share of singular vectors kept)")
    return found


def _same_kind(default: object, value: object) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return type(default) is type(value)
    if isinstance(default, float):
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, type(default))
