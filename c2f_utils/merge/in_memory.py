"""The same merge on state dicts in memory, for sweeps over small models, and the random-residue control.

The kernels, statistics and rounding are those of the stream, applied to the same blocks, so the values are bit for
bit those of `run_merge`.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from c2f_utils.errors import problems
from c2f_utils.merge import gather, names, random_bits, ranges
from c2f_utils.merge.compute import apply, make_piece, recipe_weights
from c2f_utils.merge.kernels import BLOCK, Statistics
from c2f_utils.merge.operators import Operator, resolve
from c2f_utils.merge.readers import Loaded, Workspace
from c2f_utils.merge.recipe import Recipe
from c2f_utils.merge.rounding import TORCH, inner, round_to
from c2f_utils.merge.workers import Workers

StateDict = Mapping[str, Tensor]
_DTYPES = {dtype: code for code, dtype in TORCH.items()}


class _Held:
    """Tensors in memory with the stream's reading interface."""

    def __init__(self, models: dict[str, Tensor]) -> None:
        self.models = {role: tensor.detach().reshape(-1) for role, tensor in models.items()}

    def load(
        self, start: int, stop: int, workspace: Workspace | None = None, roles: tuple[str, ...] | None = None
    ) -> Loaded:
        return Loaded(start, {role: self.models[role][start:stop] for role in roles or self.models}, {})


def merge_state_dicts(
    recipe: Recipe, base: StateDict, instruct: StateDict, coarse: StateDict | Sequence[StateDict]
) -> dict[str, Tensor]:
    """Merge state dicts that live in memory; the recipe's paths are not looked at, its weights are.

    Returns instruct's tensors (new ones, contiguous, tied ones still shared) with merged values. Raises C2FError
    listing every tensor that is missing, differs in shape, or has no place in the network. Merges on the CPU, and
    leaves the result there.
    """
    operator, options = resolve(recipe.operator)
    owner = _owners(instruct)  # before anything is moved: tied tensors are known by their memory
    several = [coarse] if isinstance(coarse, Mapping) else list(coarse)
    instruct = _on_cpu(instruct)
    models = {"base": _on_cpu(base), **{f"coarse.{k}": _on_cpu(model) for k, model in enumerate(several)}}
    layers = names.layer_count(instruct)
    coefficients = {name: recipe.coefficient.at(name, layers) for name in instruct}
    _refuse(recipe, operator, instruct, models, coefficients, several)
    merged: dict[str, Tensor] = {}
    work: dict[str, tuple[_Held, int]] = {}
    for name, tensor in instruct.items():
        if owner[name] != name:
            continue  # tied: merged once
        c = coefficients[name]
        if not tensor.is_floating_point() or names.is_buffer(name) or (c == 0 and operator.zero_is_instruct):
            merged[name] = _as_output(recipe, tensor, name)
        elif c == 1 and operator.one_is_coarse and recipe_weights(recipe) == (1.0,):
            merged[name] = _as_output(recipe, models["coarse.0"][name], name, tensor.dtype)
        else:
            roles = {"instruct": instruct, **models}
            work[name] = (_Held({role: model[name] for role, model in roles.items()}), tensor.numel())
    with Workers(1) as workers:
        targets = [ranges.Target(name, held, count) for name, (held, count) in work.items() if count]
        found = {}
        if operator.statistics:
            stats = gather.gather(operator, options, targets, len(several), recipe.seed, 1 << 20, workers)
            found = {target.name: stat for target, stat in zip(targets, stats, strict=True)}
        for name, (held, count) in work.items():
            merged[name] = _merge(
                recipe, operator, options, name, instruct[name], held, count, coefficients[name], found.get(name)
            )
    return {name: merged[owner[name]] for name in instruct}


def _on_cpu(tensors: StateDict) -> StateDict:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _owners(tensors: StateDict) -> dict[str, str]:
    """Give for every tensor the name under which it is merged: of tied ones the embedding's, as when stored."""
    groups: dict[tuple, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.data_ptr(), tensor.shape) if tensor.numel() else (name,), []).append(name)
    first = [min(group, key=lambda name: (names.family_of(name) != "embedding", name)) for group in groups.values()]
    return {name: owner for owner, group in zip(first, groups.values(), strict=True) for name in group}


def _merge(
    recipe: Recipe,
    operator: Operator,
    options: dict,
    name: str,
    tensor: Tensor,
    held: _Held,
    count: int,
    c: float,
    stats: Statistics | None,
) -> Tensor:
    code = _out_code(recipe, tensor.dtype)
    out = torch.empty(count, dtype=TORCH[code])
    matrix = operator.matrix and tensor.dim() == 2
    for low, high in [(0, count)] if matrix else ranges.blocks(0, count):
        piece = make_piece(held.load(low, high), recipe, name, tuple(tensor.shape), low, high, stats)
        part = apply(operator, options, piece, c)
        out[low:high] = round_to(part, code, recipe.out_dtype == "bfloat16_stochastic", recipe.seed, name, low)
    return out.view(tensor.shape)


def _out_code(recipe: Recipe, dtype: torch.dtype) -> str:
    return {"same": _DTYPES.get(dtype, "F32"), "float32": "F32"}.get(recipe.out_dtype, "BF16")


def _as_output(recipe: Recipe, tensor: Tensor, name: str, like: torch.dtype | None = None) -> Tensor:
    if not tensor.is_floating_point() or names.is_buffer(name):
        return tensor.detach().clone()
    code = _out_code(recipe, like or tensor.dtype)
    if TORCH[code] == tensor.dtype:
        return tensor.detach().clone()
    flat = tensor.detach().float().reshape(-1)
    return round_to(flat, code, recipe.out_dtype == "bfloat16_stochastic", recipe.seed, name, 0).view(tensor.shape)


def _refuse(
    recipe: Recipe,
    operator: Operator,
    instruct: StateDict,
    models: dict[str, StateDict],
    coefficients: dict[str, float | None],
    several: list[StateDict],
) -> None:
    found = []
    if len(several) != len(recipe.coarse_models):
        found.append(f"{len(several)} coarse state dicts for a recipe with {len(recipe.coarse_models)}; give one each")
    for role, model in models.items():
        missing = [name for name in instruct if name not in model]
        if missing:
            found.append(
                f"{role} lacks {len(missing)} tensors of instruct, first {missing[0]!r}; use models of the "
                f"same architecture"
            )
        for name, tensor in instruct.items():
            if name in model and model[name].shape != tensor.shape:
                found.append(
                    f"{name!r}: shape {list(tensor.shape)} in instruct, {list(model[name].shape)} in "
                    f"{role}; use models of the same size"
                )
    for name, tensor in instruct.items():
        c = coefficients[name]
        if not tensor.is_floating_point() or names.is_buffer(name):
            continue
        if c is None:
            found.append(
                f"{name!r}: nothing says where in the network it is; give its coefficient with a rule that sets it"
            )
        elif c < 0 and not operator.negative:
            found.append(
                f"{name!r}: coefficient {c} is negative, which {operator.name} cannot vote with; use 0 or more"
            )
        bad = [
            role
            for role, model in {"instruct": instruct, **models}.items()
            if name in model and not bool(torch.isfinite(model[name]).all())
        ]
        found += [f"{name!r} of {role} holds NaN or infinity; mend or retrain {role}" for role in bad]
    if found:
        raise problems("the state dicts cannot be merged:", found)


def random_residue(base: StateDict, coarse: StateDict, seed: int = 0) -> dict[str, Tensor]:
    """Give base plus Gaussian noise with, tensor by tensor, the norm of the coarse residue: the control for "any
    residue would do".

    Tied tensors stay shared; constants are those of coarse. The noise depends on seed and tensor name only.
    """
    owner, made = _owners(coarse), {}
    for name in dict.fromkeys(owner.values()):
        tensor = coarse[name]
        if not tensor.is_floating_point() or names.is_buffer(name) or not tensor.numel():
            made[name] = tensor.detach().clone()
            continue
        start = base[name].detach().float().reshape(-1)
        norm = math.sqrt(_square(tensor.detach().float().reshape(-1) - start))
        noise = torch.from_numpy(random_bits.normal(seed, f"{name}|random_residue", start.numel()))
        scale = norm / math.sqrt(_square(noise))
        made[name] = (start + scale * noise).to(tensor.dtype).view(tensor.shape)
    return {name: made[owner[name]] for name in coarse}


def _square(flat: Tensor) -> float:
    return math.fsum(inner(part, part) for part in flat.split(BLOCK))
