"""The operators a recipe may name: kernels with what they ask of the plan; own ones are registered from a notebook
cell.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from c2f_utils.errors import C2FError, problems, short
from c2f_utils.merge import kernels
from c2f_utils.merge.kernels import Kernel
from c2f_utils.settings.merge_options import OPTIONS, option_problems


@dataclass(frozen=True)
class Operator:
    """A kernel and what it asks of the plan.

    `reads`: the models it needs. `statistics`: a choice of "gram", "thresholds" (of residues), "instruct_threshold",
    "scales" (with both thresholds). `options`: keys with default values. `zero_is_instruct`: c = 0 gives instruct, so
    bytes are copied; `one_is_coarse`: c = 1 gives coarse, likewise. `several`: takes more than one coarse model.
    `matrix`: the kernel gets whole 2-D tensors (others are merged as `residue`).
    """

    name: str
    kernel: Kernel
    formula: str
    options: Mapping[str, object] = field(default_factory=dict)
    reads: tuple[str, ...] = ("base", "instruct", "coarse")
    statistics: tuple[str, ...] = ()
    zero_is_instruct: bool = False
    one_is_coarse: bool = False
    several: bool = False
    matrix: bool = False
    negative: bool = True  # whether c < 0 means anything
    hides: bool = True  # whether a NaN of an input may vanish from the result, so that inputs must be looked at too
    builtin: bool = False


_BUILT_IN = (
    Operator("residue", kernels.residue, "instruct + c * r", hides=False, zero_is_instruct=True, several=True),
    Operator(
        "lerp", kernels.lerp, "(1 - c) * instruct + c * coarse", reads=("instruct", "coarse"), hides=False,
        zero_is_instruct=True, one_is_coarse=True,
    ),
    Operator(
        "slerp", kernels.slerp, "base + slerp(d_I, r; c) per tensor", statistics=("gram",), hides=False,
        zero_is_instruct=True, one_is_coarse=True,
    ),
    Operator(
        "trim", kernels.trim, "instruct + c * top(r; density)", statistics=("thresholds",),
        zero_is_instruct=True, several=True,
    ),
    Operator("dare", kernels.dare, "instruct + c * drop(r; density) / density", zero_is_instruct=True, several=True),
    Operator(
        "ties", kernels.ties, "base + elected mean of top(d_I), top(d_k) with weights 1, c",
        statistics=("thresholds", "instruct_threshold"), several=True, negative=False,
    ),
    Operator(
        "dots", kernels.dots, "base + instruct * top(d_I) |d_I| / |top(d_I)| + c * the same of r, part by part",
        statistics=("thresholds", "instruct_threshold", "scales"), several=True,
    ),
    Operator(
        "orthogonal", kernels.orthogonal, "instruct + c * (r - proj(r on d_I))", statistics=("gram",),
        hides=False, zero_is_instruct=True, several=True,
    ),
    Operator("tsv", kernels.tsv, "base + TSV-Merge(d_I, c * d_k)", several=True, matrix=True, negative=False),
)  # fmt: skip
_REGISTRY: dict[str, Operator] = {
    operator.name: replace(operator, options=OPTIONS[operator.name], builtin=True) for operator in _BUILT_IN
}


def register_operator(
    name: str,
    kernel: Kernel,
    *,
    options: Mapping[str, object] | None = None,
    statistics: tuple[str, ...] = (),
    formula: str = "defined by the user",
    zero_is_instruct: bool = False,
    several: bool = False,
) -> Operator:
    """Make `{"name": name, **options}` usable in recipes of this process; the same name again replaces the older one.

    `kernel(piece, c, **options)` returns the merged piece as a flat float32 tensor; see `Piece` for what it may read.
    `options` with their defaults are read off its signature unless they are given.
    `statistics` asks for `piece.stats.gram` ("gram") or for `piece.trimmed` ("thresholds", with the option
    `density`). Set `zero_is_instruct` when c = 0 gives instruct exactly: those tensors are then copied. Raises
    C2FError for a built-in name or an unknown statistic.
    """
    declared = list(inspect.signature(kernel).parameters.values())[2:] if inspect.isroutine(kernel) else []
    options = options or {item.name: item.default for item in declared if item.default is not item.empty}
    found = (
        [] if callable(kernel) else [f"the kernel of {name!r} is {short(kernel)}; expected a function of (piece, c)"]
    )
    if name in _REGISTRY and _REGISTRY[name].builtin:
        found.append(f"{name!r} is a built-in operator; choose another name")
    if not name.isidentifier():
        found.append(f"{name!r} is not a plain name; use letters, digits and underscores")
    if unknown := sorted(set(statistics) - {"gram", "thresholds", "instruct_threshold"}):
        found.append(f"statistics {unknown} are unknown; expected gram, thresholds or instruct_threshold")
    if "thresholds" in statistics and "density" not in options:
        found.append("statistics thresholds needs the option density")
    if "name" in options:
        found.append("an option cannot be called name")
    if found:
        raise problems(f"operator {name!r} cannot be registered:", found)
    _REGISTRY[name] = Operator(
        name, kernel, formula, options, statistics=tuple(statistics), zero_is_instruct=zero_is_instruct, several=several
    )
    return _REGISTRY[name]


def known_operators() -> dict[str, Operator]:
    """Give the operators a recipe may name, built-in and registered."""
    return dict(_REGISTRY)


def resolve(spec: Mapping[str, object]) -> tuple[Operator, dict[str, object]]:
    """Give the operator and all its options for a recipe's `operator` entry; raises C2FError."""
    if found := check_operator(spec, 1):
        raise problems("the recipe's operator has problems:", found)
    operator = _REGISTRY[str(spec["name"])]
    return operator, {**operator.options, **{key: value for key, value in spec.items() if key != "name"}}


def check_operator(spec: Mapping[str, object], models: int) -> list[str]:
    """Say what is wrong with a recipe's `operator` entry for this many coarse models."""
    name = spec.get("name")
    if name not in _REGISTRY:
        known = ", ".join(sorted(_REGISTRY))
        return [f"operator.name: {name!r} is unknown; expected one of {known} (own ones: register_operator first)"]
    operator = _REGISTRY[name]
    found = option_problems(name, spec, operator.options)
    if models > 1 and not operator.several:
        found.append(
            f"operator {name} takes one coarse model, the recipe names {models}; use residue, trim, dare, "
            f"ties, dots, orthogonal or tsv"
        )
    return found


def fingerprint(operator: Operator) -> str:
    """Text that changes when a registered kernel's code changes, so that a resumed merge never mixes two versions of
    it.
    """
    if operator.builtin:
        return operator.name
    code = getattr(operator.kernel, "__code__", None)
    if code is None:
        raise C2FError(
            f"operator {operator.name!r}: its kernel is a {type(operator.kernel).__name__}; register a plain function"
        )
    return f"{operator.name}|{code.co_code.hex()}|{code.co_consts!r}|{operator.kernel.__defaults__!r}"
